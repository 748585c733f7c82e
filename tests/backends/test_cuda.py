"""The CUDA seam: both bindings run for real, against a stand-in for NVIDIA's driver library where there is no GPU.

`simulated_driver.c` is compiled into a libcuda.so.1, and a fresh interpreter finds it there. So the very calls that a
GPU will get are made: their names, the number and order of their arguments, what they give back.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_sdk.backends import cuda
from edge_sdk.backends.cuda import STICKY, Binding, BindingMissing, Device, Held, failure
from edge_sdk.backends.cuda_bindings import BINDINGS
from edge_sdk.errors import BackendUnavailable, DeviceLost, EngineFailed, OutOfMemory
from tests.backends.simulated_gpu import SimulatedCuda

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

_CUDA_PYTHON = """
    cuInit cuGetErrorString cuDriverGetVersion cuDeviceGetCount cuDeviceGet cuDeviceGetName cuDeviceGetAttribute
    cuDeviceTotalMem cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease cuCtxPushCurrent cuCtxPopCurrent cuMemGetInfo
    cuMemAlloc cuMemFree cuMemHostAlloc cuMemHostGetDevicePointer cuMemFreeHost cuMemcpyHtoDAsync cuMemcpyDtoHAsync
    cuStreamCreate cuStreamDestroy cuStreamSynchronize cuStreamWaitEvent cuEventCreate cuEventDestroy cuEventRecord
    cuEventSynchronize cuEventElapsedTime cuStreamBeginCapture cuStreamEndCapture cuGraphInstantiate cuGraphDestroy
    cuGraphExecDestroy cuGraphLaunch CU_MEMHOSTALLOC_DEVICEMAP CUdevice_attribute CUstream_flags.CU_STREAM_NON_BLOCKING
    CUevent_flags.CU_EVENT_DEFAULT CUevent_flags.CU_EVENT_DISABLE_TIMING
    CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY
"""
_PYCUDA = """
    init Error get_driver_version mem_get_info mem_alloc pagelocked_empty memcpy_htod_async memcpy_dtoh_async
    Device.count Device.name Device.compute_capability Device.total_memory Device.get_attribute
    Device.retain_primary_context device_attribute.INTEGRATED device_attribute.CAN_MAP_HOST_MEMORY
    Context.push Context.pop Context.detach Context.get_current DeviceAllocation.free PagelockedHostAllocation.free
    PagelockedHostAllocation.get_device_pointer host_alloc_flags.DEVICEMAP Stream.handle Stream.synchronize
    Stream.wait_for_event event_flags.DEFAULT event_flags.DISABLE_TIMING Event.record Event.synchronize Event.time_since
"""
CUDA_PYTHON_NAMES, PYCUDA_NAMES = _CUDA_PYTHON.split(), _PYCUDA.split()
"""Whatever a binding is asked for; a second test sees to it that nothing is missing here."""

EXERCISE = """
import logging, sys, threading
import numpy as np
from edge_sdk.backends.cuda import Device
from edge_sdk.errors import EdgeSdkError

logging.disable()
name, = sys.argv[1:]
device = Device.open(binding=name)
print("facts", *device.facts)

def work():
    with device, device:
        memory, pinned = device.allocate(64), device.allocate_host(64)
        print("free", device.free_bytes(), device.held)
        stream, start, end, plain = device.stream(), device.event(timed=True), device.event(timed=True), device.event()
        pinned.array[:] = np.arange(64)
        start.record(stream)
        stream.copy_in(memory.address, pinned.array[:32])
        stream.copy_in(memory.address + 32, pinned.array[32:])
        end.record(stream)
        plain.record(stream)
        stream.wait(plain)
        end.synchronize()
        print("elapsed", end.since(start))
        back = np.zeros(64, np.uint8)
        stream.copy_out(back, memory.address)
        stream.synchronize()
        print("back", back.tolist() == list(range(64)))
        zero_copy = device.allocate_host(16, mapped=True)
        print("mapped", zero_copy.address == zero_copy.array.ctypes.data, zero_copy.array.nbytes)
        scalar = np.array(3.5, np.float32)
        stream.copy_in(memory.address, scalar)
        print("captures", device.can_capture)
        things = [memory, pinned, stream, start, end, plain, zero_copy]
        if device.can_capture:
            with stream.capture() as captured:
                stream.copy_out(back, memory.address)
            back[:] = 0
            graph, = captured
            before = back.any()
            graph.launch(stream)
            stream.synchronize()
            print("graph", before, back[:4].view(np.float32)[0])
            things.append(graph)
        try:
            device.allocate(1 << 40)
        except EdgeSdkError as exc:
            print("refused", type(exc).__name__, exc)
        for thing in things:
            thing.free()
            thing.free()
        print("held", device.held)

def guarded():
    try:
        work()
    except EdgeSdkError as exc:
        print("error", type(exc).__name__, exc)

for _ in range(2):
    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
device.close()
device.close()
"""
"""What a binding, whose name it is given, is put through: here, and by `tests/gpu` on a real driver."""
LEFT = """
import ctypes
driver = ctypes.CDLL("libcuda.so.1")
print("left", *[driver.simulated_driver_holds(kind) for kind in range(7)])
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 that is not NVIDIA's."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of NVIDIA's driver")
    folder = tmp_path_factory.mktemp("driver")
    rest = folder / "rest.c"
    rest.write_text("\n".join(f"int {name}(void) {{ return 801; }}" for name in linked_by_pycuda(folder, compiler)))
    compile_driver(compiler, folder / "libcuda.so.1", rest)
    return folder


def compile_driver(compiler: str, library: Path, *more: Path) -> None:
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(HERE / "simulated_driver.c")]
    subprocess.run([*command, *map(str, more), "-ldl", "-lpthread"], check=True)


def linked_by_pycuda(folder: Path, compiler: str) -> list[str]:
    """What else an installed pycuda wants of the driver, to be loaded at all: functions that we never call."""
    found = importlib.util.find_spec("pycuda")
    if found is None or not found.submodule_search_locations or shutil.which("nm") is None:
        return []
    compile_driver(compiler, folder / "plain.so")
    (extension,) = Path(found.submodule_search_locations[0]).glob("_driver*.so")
    wanted, had = (
        set(re.findall(r" (cu[A-Z]\w*)", subprocess.check_output(["nm", "-D", kind, str(file)], text=True)))
        for kind, file in (("--undefined-only", extension), ("--defined-only", folder / "plain.so"))
    )
    return sorted(wanted - had)


def require(binding: str) -> None:
    module = {"cuda-python": "cuda.bindings", "pycuda": "pycuda"}[binding]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{binding} is not installed")


def run(driver: Path, program: str, *args: str, env: Mapping[str, str] = {}, quiet: bool = True) -> list[str]:
    """What a fresh interpreter prints that finds the stand-in as its driver.

    It has to end well. Not `quiet` is pycuda when it cannot give things back to a lost device.
    """
    libraries = f"{driver}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": libraries, **env}
    done = subprocess.run(
        [sys.executable, "-c", program, *args], env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    assert (0, "") == (done.returncode, done.stderr if quiet else "")
    return done.stdout.splitlines()


both = pytest.mark.parametrize("binding", [kind.name for kind in BINDINGS])


@both
def test_a_binding_does_what_it_is_asked(driver: Path, binding: str) -> None:
    """Memory, copies, streams, events and graphs, in threads that come and go; afterwards the driver holds nothing."""
    require(binding)
    told = run(driver, EXERCISE + LEFT, binding)
    once = [
        f"free {(64 << 20) - 64} Held(device_bytes=64, host_bytes=64, streams=0, events=0, graphs=0)",
        "elapsed 1.0",
        "back True",
        "mapped True 16",
    ]
    graph = ["captures True", "graph False 3.5"] if binding == "cuda-python" else ["captures False"]
    refused = ["refused OutOfMemory The GPU has no memory left for cuMemAlloc of 1,099,511,627,776 bytes."]
    nothing = [f"held {Held()}"]

    assert ["facts Simulated GPU 8.9 67108864 False 13.0"] == told[:1]
    assert [*once, *graph, *refused, *nothing] * 2 == told[1:-1]
    assert "left 0 0 0 0 0 0 0" == told[-1]


@both
@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("cuMemcpyHtoDAsync:1:700", "DeviceLost The GPU is lost to this process (cuMemcpyHtoDAsync"),
        ("cuEventSynchronize:1:719", "DeviceLost The GPU is lost to this process (cuEventSynchronize"),
        ("cuMemHostAlloc:1:2", "OutOfMemory The GPU has no memory left for cuMemHostAlloc of 64 bytes."),
        ("cuStreamCreate:1:1", "EngineFailed CUDA refused cuStreamCreate"),
        ("cuMemHostGetDevicePointer:1:1", "EngineFailed CUDA refused cuMemHostGetDevicePointer"),
    ],
)
def test_every_status_is_an_error_of_ours(driver: Path, binding: str, order: str, error: str) -> None:
    """A sticky status is DeviceLost, a lack of memory OutOfMemory, any other EngineFailed; closing goes well."""
    require(binding)
    lost = "DeviceLost" in error
    told = run(driver, EXERCISE + LEFT, binding, env={"SIMULATED_DRIVER_FAIL": order}, quiet=not lost)
    errors = [line.removeprefix("error ") for line in told if line.startswith("error ")]

    assert errors[0].startswith(error)
    assert (2 if lost else 1) == len(errors)


@both
def test_an_integrated_gpu_is_told_apart(driver: Path, binding: str) -> None:
    """A Jetson's GPU computes in the computer's own memory."""
    require(binding)
    told = run(driver, EXERCISE + LEFT, binding, env={"SIMULATED_DRIVER_INTEGRATED": "1"})

    assert "facts Simulated GPU 8.9 67108864 True 13.0" == told[0]


@both
@pytest.mark.parametrize("status", [100, 3])
def test_a_driver_that_does_not_start_is_unavailable(driver: Path, binding: str, status: int) -> None:
    """A driver without a GPU, or one that cannot be initialised: BackendUnavailable says so in words."""
    require(binding)
    program = (
        "import sys\nfrom edge_sdk.backends import cuda\n"
        "try:\n    cuda.open_binding(sys.argv[1])\nexcept cuda.BackendUnavailable as exc:\n    print(exc)"
    )
    (told,) = run(driver, program, binding, env={"SIMULATED_DRIVER_FAIL": f"cuInit:1:{status}"})

    assert told.startswith("No NVIDIA GPU can be used here: CUDA refused cuInit: ")
    assert "nvidia-smi" in told


def test_without_a_driver_it_is_said() -> None:
    """With a binding and without NVIDIA's driver: which of them is missing, and what to do."""
    require("cuda-python")
    if has_driver():
        pytest.skip("this machine has NVIDIA's driver")
    with pytest.raises(BackendUnavailable, match=r"driver library cannot be used \(cuInit\)") as unavailable:
        Device.open(binding="cuda-python")
    missing = cuda.lacking()

    assert "nvidia-smi" in unavailable.value.fix
    assert missing is not None
    assert missing.problem.startswith("NVIDIA's driver library cannot be used")


def test_an_unknown_binding_is_refused() -> None:
    """By its name, with the two that there are."""
    with pytest.raises(BackendUnavailable, match=r"no CUDA binding 'cupy'.*pycuda and cuda-python"):
        cuda.open_binding("cupy")


def test_the_first_binding_that_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycuda, then cuda-python; where there is neither, each says what it lacks."""

    class First(SimulatedCuda):
        name = "first"

        def __init__(self) -> None:
            raise BindingMissing("The first is not installed.", fix="Install it.")

    class Second(SimulatedCuda):
        name = "second"

    assert ["pycuda", "cuda-python"] == [kind.name for kind in BINDINGS]

    monkeypatch.setattr("edge_sdk.backends.cuda_bindings.BINDINGS", (First, Second))

    assert "second" == cuda.open_binding().name
    assert cuda.lacking() is None

    monkeypatch.setattr("edge_sdk.backends.cuda_bindings.BINDINGS", (First, First))
    with pytest.raises(
        BackendUnavailable, match=r"^The first is not installed\. The first is not installed\. Install it\.$"
    ):
        cuda.open_binding()


# Names


def lacking_names(module: object, names: list[str]) -> list[str]:
    def has(name: str) -> bool:
        found = module
        for part in name.split("."):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True

    return [name for name in names if not has(name)]


def test_cuda_python_has_every_name_we_use() -> None:
    """The installed module has each function and constant of the table."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

    assert [] == lacking_names(driver, CUDA_PYTHON_NAMES)
    assert [] == lacking_names(driver.CUresult, list(STICKY))


def test_pycuda_has_every_name_we_use(driver: Path) -> None:
    """The installed module has each function, class, method and constant of the table."""
    require("pycuda")
    program = (
        "import sys, pycuda.driver\n"
        "def has(name, found=pycuda.driver):\n"
        "    for part in name.split('.'):\n"
        "        if not hasattr(found, part): return False\n"
        "        found = getattr(found, part)\n"
        "    return True\n"
        "print(*[name for name in sys.argv[1:] if not has(name)])"
    )

    assert [""] == run(driver, program, *PYCUDA_NAMES)


def test_the_tables_hold_every_name_we_use() -> None:
    """Whatever `cuda_bindings.py` asks a binding for is in the tables, and nothing else is."""
    source = (ROOT / "edge_sdk" / "backends" / "cuda_bindings.py").read_text(encoding="utf-8")
    functions = set(re.findall(r"\"(cu[A-Z]\w+)\"|self\._driver\.(cu[A-Z]\w+)", source))
    constants = set(re.findall(r"\.(CU_[A-Z_]+)\b", source))
    used = {name for pair in functions for name in pair if name} | constants
    listed = {name.rpartition(".")[2] for name in CUDA_PYTHON_NAMES if not name.startswith("CUdevice_attribute")}
    asked = {f"CU_DEVICE_ATTRIBUTE_{name}" for name in re.findall(r"""ask\(["'](\w+)["']\)""", source)}

    assert listed == used
    assert {name.partition(".")[2] for name in CUDA_PYTHON_NAMES if name.startswith("CUdevice_attribute.")} == asked
    pycuda = source[source.index("class PyCuda") : source.index("class CudaPython")]
    called = set(re.findall(r"self\._cuda\.(\w+)", pycuda))
    assert {name.partition(".")[0] for name in PYCUDA_NAMES} >= called


def test_what_the_driver_says_of_sticky_statuses() -> None:
    """pycuda passes on the driver's words and not its codes: they are those of CUDA's own table."""
    for library in ("libcudart.so.13", "libcudart.so.12", "/usr/local/cuda/lib64/libcudart.so"):
        try:
            cudart = ctypes.CDLL(library)
            break
        except OSError:
            continue
    else:
        pytest.skip("CUDA's runtime library, which has the words without a GPU, is not installed")
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    cudart.cudaGetErrorString.restype = ctypes.c_char_p
    said = {name: cudart.cudaGetErrorString(int(getattr(driver.CUresult, name))).decode() for name in STICKY}

    assert said == STICKY


# The device, and what it makes


@pytest.mark.parametrize("status", STICKY)
def test_sticky_statuses(status: str) -> None:
    """One clear sentence: the process must be started again."""
    error = failure("cuLaunchKernel", status, STICKY[status])

    assert isinstance(error, DeviceLost)
    assert f"(cuLaunchKernel: {status}: {STICKY[status]})" in error.problem
    assert "until the process is started again" in error.problem


def test_other_statuses() -> None:
    """Too little memory says how much was asked for; the rest says what CUDA said."""
    memory = failure("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory", asked_bytes=1 << 30)

    assert isinstance(memory, OutOfMemory)
    assert "1,073,741,824 bytes" in str(memory)
    assert EngineFailed is type(failure("cuInit", "CUDA_ERROR_INVALID_VALUE", "invalid argument"))
    assert "CUDA refused cuInit: invalid argument." == str(failure("cuInit", "", "invalid argument"))


def test_a_device_is_current_only_where_it_was_entered() -> None:
    """Nested as often as wanted, in each thread for itself, and left also when something failed."""
    binding = SimulatedCuda()
    device = Device(binding)

    def depth() -> int:
        return int(getattr(binding._thread, "depth", 0))

    with device, device:
        inside = depth()
        elsewhere: list[int] = []
        thread = threading.Thread(target=lambda: elsewhere.append(depth()))
        thread.start()
        thread.join()
    with pytest.raises(ZeroDivisionError), device:
        _ = 1 / 0

    assert (1, [0], 0) == (inside, elsewhere, depth())

    device.close()

    assert {} == binding.leaks()


def test_closing_a_device_gives_everything_back(caplog: pytest.LogCaptureFixture) -> None:
    """What was forgotten is given back all the same, and said, as it is a defect."""
    binding = SimulatedCuda()
    device = Device(binding)
    with device:
        device.allocate(100)
        device.allocate_host(50)
        stream, _ = device.stream(), device.event()
        stream.synchronize()

    assert Held(device_bytes=100, host_bytes=50, streams=1, events=1) == device.held

    device.close()

    assert "A defect of edge-sdk" in caplog.text
    assert {} == binding.leaks()


def test_a_capture_that_fails_leaves_the_stream_usable() -> None:
    """Whatever ends it, the stream is captured no longer."""
    binding: Binding = SimulatedCuda()
    device = Device(binding)
    with device:
        stream = device.stream()
        with pytest.raises(ZeroDivisionError), stream.capture():
            _ = 1 / 0
        event = device.event()
        event.record(stream)
        event.synchronize()
        stream.free()
        event.free()
    device.close()

    assert Held() == device.held


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
