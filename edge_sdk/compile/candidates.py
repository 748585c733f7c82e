"""The graphs that a build may pack, the one it would like best first.

What a device computes fastest comes first: INT8; where the device has arithmetic for it, INT8 with an FP16 rest, and
FP16 itself; then FP32, which is what everything is measured against. Each is made only if those before it would not do.
What cannot be made at all says why, so that the decision in the end can name everything that was weighed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from onnx import ModelProto
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from edge_sdk.backends.base import Engine
from edge_sdk.compile import calibrate, quantize, widths
from edge_sdk.compile.calibrate import METHODS, Method
from edge_sdk.compile.datasets import Samples
from edge_sdk.compile.inspect import first_line
from edge_sdk.compile.mixed import mixed
from edge_sdk.compile.order import MIN_CALIBRATION, Ingredients, Order
from edge_sdk.compile.verify import Accuracy, judge
from edge_sdk.errors import DataError, ModelError
from edge_sdk.profiles import Precision


@dataclass(frozen=True)
class Candidate:
    """A graph that may be packed. `reason` is why it is this one, where that was decided before measuring."""

    precision: Precision
    graph: bytes
    method: Method | None = None
    fp16_rest: bool = False
    judged_by: bytes | None = None
    """The graph that answers here as this one does on the device, where this one itself does not: widths.rounded."""
    reason: str = ""

    @property
    def title(self) -> str:
        return f"{self.precision.upper()}{' with an FP16 rest' if self.fp16_rest else ''}"


@dataclass(frozen=True)
class Impossible:
    """Why there is no candidate where one might be expected: a sentence."""

    why: str


def baseline_of(ingredients: Ingredients, model: ModelProto) -> Candidate:
    """What everything is measured against: the model in FP32, or the quantised model that it is."""
    precision: Precision = "int8" if ingredients.summary.already_quantized else "fp32"
    return Candidate(precision, model.SerializeToString())


def candidates(
    order: Order, ingredients: Ingredients, model: ModelProto, baseline: Candidate, reference: Engine
) -> Iterator[Candidate | Impossible]:
    """The candidates for the precision asked for, in the order of preference.

    Raises what makes an explicit wish impossible: ModelError, DataError.
    """
    if ingredients.summary.already_quantized:
        if order.precision in {"fp32", "fp16"}:
            raise ModelError(
                f"{ingredients.summary.file} is already quantised; it cannot be built as {order.precision}.",
                fix="Build it as auto, or give the model it was quantised from.",
            )
        yield replace(baseline, reason="INT8: the model came quantised and is served exactly as it is.")
    elif order.precision == "fp32":
        yield replace(baseline, reason="FP32, as asked.")
    elif order.precision == "fp16":
        yield _fp16(model)
    elif order.precision == "int8":
        yield from _int8(order, ingredients, model, reference)
    else:
        yield from _whatever_is_best(order, ingredients, model, baseline, reference)


def _whatever_is_best(
    order: Order, ingredients: Ingredients, model: ModelProto, baseline: Candidate, reference: Engine
) -> Iterator[Candidate | Impossible]:
    if "int8" not in order.profile.precisions:
        yield Impossible(f"the profile {order.profile.name} does not compute INT8.")
    elif order.spec.sequence is not None:
        yield Impossible("INT8 is not made of a model with a [sequence]: its ranges depend on a state no sample has.")
    elif ingredients.calibration is None:
        yield Impossible(f"INT8 needs calibration data, and none was given. {_GIVE_DATA}")
    elif ingredients.held_out is None:
        yield Impossible(str(_too_few(ingredients.calibration)))
    else:
        try:
            yield from _int8(order, ingredients, model, reference)
        except ModelError as exc:
            yield Impossible(exc.problem)
    if order.halves:
        yield _fp16(model)
    if "fp32" in order.profile.precisions:
        yield baseline


_GIVE_DATA = (
    "Name some in engine.toml ([calibration] data = ...) or with --calibration: a folder of typical images, a .npz or "
    ".npy file, or a callable module:function. About a hundred samples do."
)


def _too_few(calibration: Samples) -> DataError:
    return DataError(
        f"{len(calibration)} calibration samples were taken from {calibration.source}; INT8 needs at least "
        f"{MIN_CALIBRATION}.",
        fix="About a hundred typical ones do.",
    )


def _fp16(model: ModelProto) -> Candidate:
    narrow = widths.narrowed(model)
    return Candidate("fp16", narrow.SerializeToString(), judged_by=widths.rounded(narrow).SerializeToString())


def _int8(
    order: Order, ingredients: Ingredients, model: ModelProto, reference: Engine
) -> Iterator[Candidate | Impossible]:
    """The INT8 graph; before it, where FP16 is worth having, the one whose rest is FP16.

    A device that does not compute FP32 is not offered the former.
    """
    graph, method = _quantized(order, ingredients, model, reference)
    plain = Candidate("int8", graph.SerializeToString(), method)
    computes_fp32 = "fp32" in order.profile.precisions
    if order.halves:
        try:
            narrow = mixed(graph, matrices=not computes_fp32)
        except (ValidationError, InferenceError) as exc:
            yield Impossible(f"INT8 with an FP16 rest cannot be made of this graph ({first_line(exc)}).")
        else:
            if narrow is not graph:
                judged_by = widths.rounded(narrow).SerializeToString()
                yield replace(plain, graph=narrow.SerializeToString(), fp16_rest=True, judged_by=judged_by)
                if not computes_fp32:
                    return
    yield plain


def _quantized(
    order: Order, ingredients: Ingredients, model: ModelProto, reference: Engine
) -> tuple[ModelProto, Method]:
    """Statistics once; then a graph for each method asked for, and the best of them."""
    calibration, held_out = ingredients.calibration, ingredients.held_out
    if calibration is None:
        raise DataError("INT8 was asked for, but there is no data to calibrate it with.", fix=_GIVE_DATA)
    if held_out is None:
        raise _too_few(calibration)
    scheme = order.profile.quantization
    placement = quantize.place(model, scheme)
    if not placement:
        raise ModelError(
            "Nothing in the model is computed faster in INT8: it has no Conv, Gemm or MatMul with constant weights.",
            fix="Build it as fp32.",
        )
    statistics = calibrate.observe(
        model,
        placement.observed,
        calibration,
        order.backend,
        order.profile,
        each=order.advance("calibrating", len(calibration)),
    )
    asked = order.spec.calibration.method if order.spec.calibration else "auto"
    methods: tuple[Method, ...] = METHODS if asked == "auto" else (asked,)
    graphs = [
        quantize.quantized(model, placement, statistics.ranges(method, symmetric=scheme.symmetric), scheme)
        for method in methods
    ]
    best = 0 if len(graphs) == 1 else _best_of(order, graphs, reference, held_out)
    return graphs[best], methods[best]


def _best_of(order: Order, graphs: Sequence[ModelProto], reference: Engine, held_out: Samples) -> int:
    """The number of the graph closest to FP32 on samples that it was not calibrated on.

    By signal-to-noise ratio: over a few dozen samples, agreement is decided by one or two close calls.
    """
    with ExitStack() as stack:
        engines = [stack.enter_context(order.loaded(graph.SerializeToString())) for graph in graphs]
        advance = order.advance("choosing ranges", len(held_out))
        judgement = judge(reference, engines, held_out, classes=True, each=advance)
    return max(range(len(graphs)), key=lambda number: _closeness(judgement.candidates[number]))


def _closeness(accuracy: Accuracy) -> tuple[bool, float, float]:
    return accuracy.finite, accuracy.snr_db or 0.0, accuracy.agreement_percent or 0.0
