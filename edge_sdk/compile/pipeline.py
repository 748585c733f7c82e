"""The offline journey: an ONNX file becomes an engine package. `_make` is the journey, read it first.

    package = build_engine("engines/squeezenet", precision="auto")
    print(package.manifest.measurements.decision)

A build depends on nothing but content: the model, the spec, the data, the profile and the tools. Their digest is the
build key, and a build whose key is the one already there does nothing. FP32 is always the reference. A lower precision
is kept only on evidence, and the package says which. Two backends have a part in it: one that runs graphs here judges
them, and the one that the device is to use compiles its engine, if it loads any.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from onnx import ModelProto

from edge_sdk.backends.base import Engine
from edge_sdk.compile import widths
from edge_sdk.compile.candidates import Candidate, Impossible, baseline_of, candidates
from edge_sdk.compile.compiled import with_engine
from edge_sdk.compile.datasets import Sample
from edge_sdk.compile.golden import Golden, golden_requests
from edge_sdk.compile.inspect import ends_in_softmax
from edge_sdk.compile.modernize import OPSET, ModernGraph, modern_graph
from edge_sdk.compile.order import (
    Ingredients,
    Order,
    WantedPrecision,
    existing,
    free_axes,
    gathered,
    order_of,
    tools,
)
from edge_sdk.compile.report import write_reports
from edge_sdk.compile.running import Speed, speeds_of
from edge_sdk.compile.verify import (
    Accuracy,
    Progress,
    best_batch,
    can_stack,
    judge,
    no_progress,
    same_answers,
)
from edge_sdk.errors import DataError, EngineFailed, ModelError, OutOfMemory
from edge_sdk.package import (
    GOLDEN,
    GRAPH,
    LABELS,
    PROFILE,
    BackendRecord,
    BatchingRecord,
    CalibrationRecord,
    EnginePackage,
    Figures,
    Manifest,
    Measurements,
    RunningRecord,
    SourceRecord,
    seal,
    writing,
)
from edge_sdk.profiles import DeviceProfile
from edge_sdk.spec import Axis, EngineSpec, Validation
from edge_sdk.tensors import MAX_ELEMENTS, Feeds, TensorSpec, zeros

_WORTH_IT = 1.02
"""How many times faster than FP32 a lower precision must be: less than that is noise."""
_SAME_ANSWER_DB = 40.0
"""How closely the modern graph must answer as the file does: well above what FP16's own rounding leaves."""
_PROBES = 3


@dataclass(frozen=True)
class Build:
    """A package, and whether it was there already: built from the same model, data and tools, so nothing was done."""

    package: EnginePackage
    unchanged: bool


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _arguments_of(other: Callable[_P, Any]) -> Callable[[Callable[..., _R]], Callable[_P, _R]]:
    """The decorated function takes what `other` takes, and returns what it does; type checkers and `help` see both."""

    def taking(function: Callable[..., _R]) -> Callable[_P, _R]:
        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(other).replace(return_annotation=returned)
        function.__signature__ = signature  # type: ignore[attr-defined]  # where `inspect` and `help` look for it
        function.__annotations__ = {**other.__annotations__, "return": returned}
        return function

    return taking


def build(
    source: str | os.PathLike[str] | EngineSpec,
    *,
    profile: str | DeviceProfile | None = None,
    precision: WantedPrecision = "auto",
    calibration: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Build:
    """As `build_engine`, and say whether anything had to be done."""
    order = order_of(source, profile, precision, calibration, samples, output, progress or no_progress)
    ingredients = gathered(order)
    if not force and (package := existing(order.output, ingredients.key)) is not None:
        return Build(package, unchanged=True)
    return Build(_make(order, ingredients), unchanged=False)


@_arguments_of(build)
def build_engine(*args: Any, **kwargs: Any) -> EnginePackage:
    """Build an engine package from an engine spec or an ONNX file, and give it back opened.

    >>> package = build_engine("engines/digits")
    >>> package = build_engine("model.onnx", profile="cpu-x86", calibration="photos.npz")

    Args:
        source: the folder of an `engine.toml`, the file itself, an `.onnx` file (task `tensors`), or a spec.
        profile: a device profile, by name, by the path of a TOML file, or as a value; by default the one that fits
            this machine.
        precision: `fp32`, `fp16`, `int8`, or `auto`: INT8 if it is faster than FP32 and inside the spec's budget
            ([validation]), otherwise FP32. On devices with arithmetic for FP16, those that TensorRT compiles for, what
            INT8 leaves over is FP16, and FP16 comes before FP32. The package's `manifest.measurements.decision` says
            why, with figures.
        calibration: calibration data in place of the spec's: a folder of images, a .npz or .npy file, or a callable
            `module:function`.
        samples: how many calibration samples to take in place of the spec's number, evenly spread over the data.
        output: the package's directory. By default `build/<profile>` beside engine.toml, or
            `<name>/build/<profile>` beside a bare ONNX file.
        force: build even if the package there was built from the very same things.
        progress: called with (step, done, total) as long steps advance.

    An already quantised model is packaged exactly as it is. Without validation data, part of the calibration samples
    is held out to judge on. Fewer than five cannot be divided so: `int8` is then refused, and `auto` does without. For
    a profile of another kind of device the speed cannot be measured here; `auto` then takes INT8 on its accuracy
    alone, and says so. FP16 without any data is judged on random requests.

    Where the device loads a compiled engine, one is made from the graph if this machine can: for RTX cards any can. If
    the device is at hand, the engine must answer as the graph does on the CPU; otherwise the report says that it never
    ran.

    The package appears in one step, or not at all: no failure and no interrupt leaves anything behind.

    Raises:
        ModelError: the file is broken, hostile, cannot be taken; the precision asked for is outside the budget; or the
            compiler of the device's engines does not take the graph.
        SpecError: engine.toml, or an argument, is wrong.
        DataError: calibration or validation data is missing or does not fit, or is too little for the `int8` asked for.
        ProfileError: no such profile, or it lacks the precision.
        BackendError: nothing here can run the graph, the runtime refuses it, or a compiled engine fails or answers
            otherwise than the graph.
        PackageError: `output` cannot be written, or holds something that is not a package.
    """
    return build(*args, **kwargs).package


def _make(order: Order, ingredients: Ingredients) -> EnginePackage:
    """Inspected model -> modern graph -> candidates -> the one that will do -> packed, with its engine."""
    modern = _trusted_graph(order, ingredients)
    baseline = baseline_of(ingredients, modern.model)
    with order.loaded(baseline.graph) as reference:
        golden = golden_requests(order, ingredients, reference) if order.preferred.compiles else None
        trials = _Trials(order, ingredients, golden, baseline, reference)
        verdict = _verdict(trials, candidates(order, ingredients, modern.model, baseline, reference))
    with writing(order.output) as folder:
        (folder / GRAPH).write_bytes(verdict.chosen.graph)
        if ingredients.labels:
            (folder / LABELS).write_text("\n".join(ingredients.labels) + "\n", encoding="utf-8")
        (folder / PROFILE).write_text(order.profile.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if golden is not None and golden.requests:
            (folder / GOLDEN).write_bytes(golden.packed())
        manifest = _manifest(order, ingredients, verdict)
        if golden is not None:
            manifest = with_engine(order, verdict.chosen.graph, manifest, golden, folder)
        write_reports(folder, manifest, ingredients.summary, (*modern.notes, *([golden.note] if golden else ())))
        seal(folder, manifest)
    return EnginePackage.open(order.output)


# The graph, and what will do of what might become of it


def _trusted_graph(order: Order, ingredients: Ingredients) -> ModernGraph:
    """The tidiest modern graph that answers as the file does.

    The converter and the simplifier are other people's graph surgery; their word is not taken for it. Where the file
    itself cannot be run here, the modern graph stands.
    """
    model, summary = ingredients.model, ingredients.summary
    modern = modern_graph(model, summary)
    if summary.already_quantized or _answers_as(order, ingredients, modern.model):
        return modern
    plain = modern_graph(model, summary, simplify=False)
    if _answers_as(order, ingredients, plain.model):
        return replace(
            plain, notes=(*plain.notes, "Simplifying the graph broke it or changed its answers, so it was left out.")
        )
    raise ModelError(
        f"{summary.file} answers otherwise, or not at all, once it is brought to opset {OPSET}.",
        fix="Export it again at that opset or a later one.",
    )


def _answers_as(order: Order, ingredients: Ingredients, graph: ModelProto) -> bool:
    """Whether `graph` answers a few questions as the file does; True where the file itself answers nothing."""
    try:
        probes = _probes(ingredients)
        with order.loaded(ingredients.model.SerializeToString()) as original:
            wanted = [original.infer(probe.feeds) for probe in probes]
    except (EngineFailed, OutOfMemory, DataError):
        return True
    try:
        with order.loaded(graph.SerializeToString()) as engine:
            found = [engine.infer(probe.feeds) for probe in probes]
    except (EngineFailed, OutOfMemory):
        return False
    # What FP16 rounds away can decide a close call, such as an ArgMax; our graphs are FP32 inside.
    in_fp32 = widths.widened(ingredients.model) is ingredients.model
    return same_answers(wanted, found, min_snr_db=_SAME_ANSWER_DB, integers=in_fp32)


def _probes(ingredients: Ingredients) -> list[Sample]:
    """A few questions to ask graphs that ought to be equal: samples, or zeros where there is no data."""
    if ingredients.judging is not None:
        return list(ingredients.judging.spread(_PROBES))
    zeros = _zeros(ingredients.fed)
    return [Sample("zeros", zeros)] if zeros is not None else []


def _zeros(inputs: tuple[TensorSpec, ...], axes: Mapping[str, Axis] = {}) -> Feeds | None:
    """One request of zeros, for timing alone, free `axes` at their best size; None where only the user knows what
    sizes make sense."""
    sized = []
    for spec in inputs:
        shape = list(spec.at_batch(1))
        for key, position in free_axes(spec).items():
            if position and key in axes:
                shape[position] = axes[key].best
        sizes = [axis for axis in shape if isinstance(axis, int)]
        if len(sizes) < len(shape) or spec.dtype == "string" or math.prod(sizes) > MAX_ELEMENTS:
            return None
        sized.append(replace(spec, shape=tuple(shape)))
    return zeros(sized)


@dataclass(frozen=True)
class _Trial:
    """What one candidate showed beside the baseline. `accuracy` is None where there is nothing to judge it on."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    accuracy: Accuracy | None
    samples: int
    theirs: Figures
    ours: Figures
    their_running: RunningRecord | None
    our_running: RunningRecord | None
    """How each is run best here; None where that was not measured."""
    stackable: bool


@dataclass(frozen=True)
class _Verdict:
    """The graph to pack, and everything that was found out about it."""

    chosen: Candidate
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    measurements: Measurements
    batching: BatchingRecord
    running: RunningRecord | None


@dataclass(frozen=True)
class _Trials:
    """Where candidates are tried: accuracy against the baseline first, then speed."""

    order: Order
    ingredients: Ingredients
    golden: Golden | None
    baseline: Candidate
    reference: Engine

    def of(self, candidate: Candidate) -> _Trial:
        order = self.order
        feeds = _timing_feeds(order, self.ingredients)
        same = candidate.graph == self.baseline.graph
        with nullcontext(self.reference) if same else order.loaded(candidate.graph) as engine:
            accuracy, top1, samples = self._accuracy(candidate, engine)
            stackable = any(can_stack(engine, probe) for probe in ([feeds] if feeds else _guesses(engine.inputs)))
        speeds = _speeds(order, [self.baseline] if same else [self.baseline, candidate], feeds)
        return _Trial(
            inputs=engine.inputs,
            outputs=engine.outputs,
            accuracy=accuracy,
            samples=samples,
            theirs=_figures(self.baseline, speeds[0], top1),
            ours=_figures(candidate, speeds[-1], accuracy.top1_percent if accuracy else None),
            their_running=speeds[0].record,
            our_running=speeds[-1].record,
            stackable=stackable,
        )

    def _accuracy(self, candidate: Candidate, engine: Engine) -> tuple[Accuracy | None, float | None, int]:
        """The candidate's accuracy, the reference's top-1, and over how many samples; without any there is none."""
        order, judging = self.order, self.ingredients.judging
        samples = judging if judging is not None else self.golden.samples() if self.golden else []
        if not len(samples):
            return None, None, 0
        classes = judging is not None and (order.spec.task == "image-classification" or judging.is_labelled)
        advance = order.advance("verifying", len(samples))
        with order.loaded(candidate.judged_by) if candidate.judged_by else nullcontext(engine) as judged:
            judgement = judge(self.reference, [judged], samples, classes=classes, each=advance)
        return judgement.candidates[0], judgement.reference_top1_percent, judgement.samples

    @property
    def judged_on(self) -> str:
        if self.ingredients.judging is None and self.golden is not None and self.golden.requests:
            return self.golden.origin
        return self.ingredients.judged_on


def _verdict(trials: _Trials, wanted: Iterable[Candidate | Impossible]) -> _Verdict:
    """The first candidate that will do; ModelError if none does, with what is wrong with each."""
    passed_over: list[str] = []
    trial: _Trial | None = None
    for candidate in wanted:
        if isinstance(candidate, Impossible):
            passed_over.append(candidate.why)
        elif candidate.reason:
            return _chosen(trials, candidate, trials.of(candidate))
        elif candidate is trials.baseline:
            chosen = replace(candidate, reason=f"{candidate.title}: {' '.join(passed_over)}")
            return _chosen(trials, chosen, trial or trials.of(candidate))
        else:
            trial = trials.of(candidate)
            for_it, against_it = _weighed(trials.order, candidate, trial)
            if not against_it:
                reason = " ".join([for_it, *(f"{why[0].upper()}{why[1:]}" for why in passed_over)])
                return _chosen(trials, replace(candidate, reason=reason), trial)
            passed_over.append(against_it)
    raise ModelError(
        " ".join(passed_over),
        fix="Give more or more typical calibration data, raise the budget in engine.toml ([validation]), or build "
        "with --precision auto, which falls back to what is accurate enough.",
    )


def _chosen(trials: _Trials, chosen: Candidate, trial: _Trial) -> _Verdict:
    """The verdict for `chosen`, from its trial, or from another candidate's beside which it is the baseline."""
    is_baseline = chosen.graph == trials.baseline.graph
    accuracy = None if is_baseline else trial.accuracy
    figures = trial.ours if not is_baseline else trial.theirs
    return _Verdict(
        chosen=chosen,
        inputs=trial.inputs,
        outputs=trial.outputs,
        measurements=Measurements(
            reference=trial.theirs,
            engine=figures,
            samples=trial.samples,
            judged_on=trials.judged_on,
            agreement_percent=accuracy.agreement_percent if accuracy else None,
            snr_db=accuracy.snr_db if accuracy else None,
            decision=chosen.reason,
        ),
        batching=_batching(trials.order, figures, trial.stackable),
        running=trial.their_running if is_baseline else trial.our_running,
    )


def _timing_feeds(order: Order, ingredients: Ingredients) -> Feeds | None:
    if ingredients.judging is not None:
        return next(iter(ingredients.judging)).feeds
    return _zeros(ingredients.fed, order.spec.axes)


_GUESSED_SIZES = (16, 64, 224)
"""Of free axes that nobody gave a size: short texts, spectrograms, pictures."""


def _guesses(inputs: tuple[TensorSpec, ...]) -> list[Feeds]:
    """Requests that the model may take, to see whether two can be computed together: not how fast."""
    axes = {key for spec in inputs for key, position in free_axes(spec).items() if position}
    return [
        feeds for size in _GUESSED_SIZES if (feeds := _zeros(inputs, {key: Axis(best=size, max=size) for key in axes}))
    ]


def _speeds(order: Order, candidates: Sequence[Candidate], feeds: Feeds | None) -> list[Speed]:
    """How fast each candidate is here, run in the way that does it most good; nothing where this is another device."""
    if feeds is None or not order.measurable:
        return [Speed() for _ in candidates]
    advance = order.advance("timing", 1 + len(candidates))
    done = itertools.count(1)
    advance(0)
    speeds = speeds_of(
        [candidate.graph for candidate in candidates],
        order.profile.onnxruntime,
        lambda graph, way: order.loaded(graph, order.profile.model_copy(update={"onnxruntime": way})),
        feeds,
        max_batch=order.spec.batching.max_batch,
        each=lambda: advance(next(done)),
    )
    advance(next(done))
    return speeds


def _figures(candidate: Candidate, speed: Speed, top1: float | None) -> Figures:
    return Figures(
        precision=candidate.precision,
        bytes=len(candidate.graph),
        top1_percent=top1,
        latency_ms=speed.latency_ms,
        per_second_at_batch=speed.per_second_at_batch,
    )


def _weighed(order: Order, candidate: Candidate, trial: _Trial) -> tuple[str, str]:
    """What speaks for the candidate, and what against it (empty if nothing does), as sentences."""
    name = candidate.title
    kept, broken = _against_budget(order.spec.validation or _DEFAULT_BUDGET, trial.theirs.top1_percent, trial.accuracy)
    speed, is_faster = _speed_in_words(order, trial.theirs, trial.ours)
    if broken:
        return "", f"{name} was outside the accuracy budget: {broken}."
    if trial.accuracy is None and order.precision == "auto" and "fp32" in order.profile.precisions:
        return "", f"{name} could not be judged, as there was nothing to judge it on."
    if order.precision == "auto" and is_faster is False:
        return "", f"{name} was accurate enough ({kept}), but not faster: {speed}."
    asked = "" if order.precision == "auto" else ", as asked"
    return f"{name}{asked}: {kept}; {speed}.", ""


_DEFAULT_BUDGET = Validation(data="")


def _against_budget(budget: Validation, reference_top1: float | None, accuracy: Accuracy | None) -> tuple[str, str]:
    """The accuracy in words, once as what was found, and once as what is wrong with it (empty if nothing is)."""
    if accuracy is None:
        return "its accuracy was not judged, there was no data", ""
    if not accuracy.finite:
        return "", "its outputs hold NaN or infinity"
    if accuracy.top1_percent is not None and reference_top1 is not None:
        found = f"top-1 {accuracy.top1_percent:.1f} % against {reference_top1:.1f} % in FP32"
        limit = f"at most {budget.max_drop:g} points may be lost"
        broken = reference_top1 - accuracy.top1_percent > budget.max_drop
    elif accuracy.agreement_percent is not None:
        found = f"the first label is FP32's in {accuracy.agreement_percent:.1f} % of the samples"
        limit = f"{budget.min_agreement:g} % are needed"
        broken = accuracy.agreement_percent < budget.min_agreement
    else:
        snr_db = accuracy.snr_db if accuracy.snr_db is not None else 0.0
        found = f"its outputs are {snr_db:.1f} dB above their difference from FP32's"
        limit = f"{budget.min_snr_db:g} dB are needed"
        broken = accuracy.snr_db is not None and snr_db < budget.min_snr_db
    return found, f"{found}, but {limit}" if broken else ""


def _speed_in_words(order: Order, theirs: Figures, ours: Figures) -> tuple[str, bool | None]:
    """The comparison, and whether the candidate is faster; None where that cannot be known here."""
    if theirs.latency_ms is None or ours.latency_ms is None:
        return f"its speed on {order.profile.title} could not be measured on this machine", None
    ratio = theirs.latency_ms / ours.latency_ms
    compared = f"{ours.latency_ms:.2f} ms against {theirs.latency_ms:.2f} ms in FP32, {ratio:.2f} times as fast"
    return compared, ratio >= _WORTH_IT


def _batching(order: Order, figures: Figures, stackable: bool) -> BatchingRecord:
    """Where nothing was measured the largest batch counts as the best: on the devices that this is about, it is."""
    batching, rates = order.spec.batching, figures.per_second_at_batch
    largest = max(rates) if rates else batching.max_batch
    best = best_batch(rates) if rates else batching.max_batch
    return BatchingRecord(
        max_batch=largest if stackable else 1,
        best_batch=best if stackable else 1,
        max_wait_ms=batching.max_wait_ms,
        newest_wins=batching.newest_wins,
    )


# What is packed


def _manifest(order: Order, ingredients: Ingredients, verdict: _Verdict) -> Manifest:
    spec, summary, chosen = order.spec, ingredients.summary, verdict.chosen
    scores = spec.postprocess.scores
    if scores == "auto":
        scores = "probabilities" if ends_in_softmax(ingredients.model) else "logits"
    return Manifest(
        name=spec.name,
        version=spec.version,
        task=spec.task,
        preprocess=spec.preprocess,
        postprocess=spec.postprocess.model_copy(
            update={"labels": Path(LABELS) if ingredients.labels else None, "scores": scores}
        ),
        inputs=summary.inputs if spec.sequence else verdict.inputs,
        outputs=summary.outputs if spec.sequence else verdict.outputs,
        profile=order.profile.name,
        architecture=order.profile.architecture,
        precision=chosen.precision,
        batching=verdict.batching,
        serving=spec.serving,
        running=verdict.running,
        axes=order.spec.axes,
        sequence=spec.sequence,
        backend=BackendRecord(name=order.preferred.name, missing=order.missing),
        source=SourceRecord(
            file=summary.file,
            sha256=ingredients.sha256,
            bytes=summary.size_bytes,
            opset=summary.opset,
            ir_version=summary.ir_version,
            already_quantized=summary.already_quantized,
        ),
        calibration=_calibration_record(ingredients, chosen),
        tools=tools(order),
        measurements=verdict.measurements,
        build_key=ingredients.key,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _calibration_record(ingredients: Ingredients, chosen: Candidate) -> CalibrationRecord | None:
    data = ingredients.calibration
    if data is None or chosen.method is None:
        return None
    return CalibrationRecord(data=data.source, sha256=ingredients.data_sha256, samples=len(data), method=chosen.method)
