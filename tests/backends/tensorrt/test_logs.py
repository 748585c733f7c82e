"""What TensorRT says, as a person would read it."""

from __future__ import annotations

import pytest

from edge_sdk.backends.tensorrt.logs import Said, readable

LINES = {
    "ITensor::getDimensions: Error Code 4: API Usage Error (bias_DequantizeLinear: input has type Int32 but must have "
    "type FP8, FP4, Int4, Int8, or UInt8. In checkType at /_src/optimizer/common/nodeBase.cpp:456)":
    "API Usage Error (bias_DequantizeLinear: input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8.)",
    "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] "
    "MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.  In compileGraph at "
    "/_src/optimizer/myelin/codeGenerator.cpp:2012)":
    "Myelin (MyelinCheckException: CHECK(status == CUDA_SUCCESS) failed.)",
    "[graphScope.cpp::analyze::471] Error Code 2: Internal Error (Assertion tScope.getType() != ScopeType::kUNDEFINED "
    "failed.  In analyze at /_src/optimizer/common/graphScope.cpp:471)":
    "Internal Error (Assertion tScope.getType() != ScopeType::kUNDEFINED failed.)",
    "ModelImporter.cpp:151: ERROR: onnxOpImporters.cpp:1929 In function buildZeroPointTensor:\n"
    "[6] Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.":
    "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported",
    "ModelImporter.cpp:143: --- End node ---": "--- End node ---",
    "Unable to load library: libnvinfer_lean.so.1: cannot open shared object file: No such file or directory":
    "Unable to load library: libnvinfer_lean.so.1: cannot open shared object file: No such file or directory",
    "The node 'a (b)' reads scores.h5 at 3:4": "The node 'a (b)' reads scores.h5 at 3:4",
}  # fmt: skip
"""Lines that tensorrt_rtx 1.7 logged, and two in which there is nothing to take out -> what is left of them."""

NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
    "version))"
)


@pytest.mark.parametrize("line", LINES)
def test_where_it_was_said_is_left_out(line: str) -> None:
    """No path, line or code of NVIDIA's sources is left, and nothing of the sentence is lost."""

    assert LINES[line] == readable([line])


def test_that_there_is_no_gpu_is_said_if_nothing_else_is() -> None:
    """The builder mentions it beside every other error, on a machine without one."""

    assert "Something else" == readable([NO_DRIVER, "Something else.", NO_DRIVER])
    assert "Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)" == readable(
        [NO_DRIVER]
    )


def test_what_is_kept() -> None:
    """Errors, or warnings where there are none, since `clear`; a repeated line once, and not more than fits."""
    said = Said()
    said.keep("VERBOSE", "a detail of many")
    said.keep("INFO", "a detail")

    assert "nothing" == str(said)

    said.keep("WARNING", "a warning")
    assert "a warning" == str(said)

    for _ in range(2):
        said.keep("ERROR", "an error")
    said.keep("INTERNAL_ERROR", "[runtime.cpp::read::7] another")
    assert "an error; another" == str(said)

    said.keep("ERROR", "very long " * 1000)
    assert 710 > len(str(said))

    said.clear()
    assert "nothing" == str(said)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)", True),
        ("Error Code 1: Cuda Runtime (out of memory)", True),
        ("Requested amount of GPU memory (1 bytes) could not be allocated.", True),
        ("Error Code 1: Cuda Runtime (cudaError 2: out of memory)", True),
        ("Error Code 4: Internal Error (no tactic)", False),
        (NO_DRIVER, False),
    ],
)
def test_whether_memory_ran_out(line: str, expected: bool) -> None:
    """That is an error of its own: another model can be unloaded for it."""
    said = Said()
    said.keep("ERROR", line)

    assert expected == said.out_of_memory
