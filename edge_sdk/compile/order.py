"""What a build was asked for, and what it is made of: every default filled in, everything read, checked and digested.

`order_of` turns the arguments of a build into an Order, or says which of them is wrong. `gathered` reads the model and
the data an order names. The digest over all of it is the build's key: the same key, the same package.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from onnx import ModelProto

import edge_sdk
from edge_sdk.backends.aligned import AlignedEngine
from edge_sdk.backends.base import Backend, Engine, installed_version
from edge_sdk.backends.registry import backend as backend_named
from edge_sdk.backends.registry import usable_profile
from edge_sdk.compile.datasets import Reader, Samples, open_samples
from edge_sdk.compile.inspect import ModelSummary, read_model, summarize
from edge_sdk.compile.verify import Progress, decoder_for
from edge_sdk.errors import BackendUnavailable, ModelError, PackageError, ProfileError, SpecError
from edge_sdk.package import MANIFEST, EnginePackage, file_sha256
from edge_sdk.profiles import DeviceProfile, Machine, load_profile
from edge_sdk.spec import (
    Axis,
    Calibration,
    EngineSpec,
    Preprocess,
    TensorRTWishes,
    data_source,
    load_spec,
    read_labels,
    spec_for_model,
)
from edge_sdk.tasks.registry import task_for
from edge_sdk.tensors import NAMELESS, TensorSpec

WantedPrecision = Literal["auto", "fp32", "fp16", "int8"]

MIN_CALIBRATION = 5
"""Fewer samples cannot be divided into some to calibrate on and others to judge on."""
_MIN_HELD_OUT = 8
"""Fewer samples than this say nothing about a graph; then every fifth calibration sample is held out instead."""


@dataclass(frozen=True)
class Order:
    """What was asked for, every default filled in."""

    spec: EngineSpec
    folder: Path
    profile: DeviceProfile
    """As the profile says, but for what the spec wishes of TensorRT."""
    precision: WantedPrecision
    output: Path
    backend: Backend
    """Runs graphs here: to calibrate, to judge and, for devices that run the graph itself, to time."""
    preferred: Backend
    """The one that the device is to use: another one where it loads engines that are compiled for it."""
    missing: str | None
    """Why no engine can be compiled here although `preferred` wants one."""
    measurable: bool
    """Whether the speed of graphs on this machine says something about the profile's device."""
    progress: Progress

    @property
    def halves(self) -> bool:
        """Whether FP16 is worth having: the device has arithmetic of its own for it."""
        return self.preferred.compiles and "fp16" in self.profile.precisions

    def advance(self, step: str, total: int) -> Advance:
        return Advance(self.progress, step, total)

    @contextmanager
    def loaded(self, graph: bytes, profile: DeviceProfile | None = None) -> Iterator[Engine]:
        """The graph as it runs here, with the options of `profile` in place of the order's.

        A stateful one is aligned: its requests stack, and have the inputs of `Ingredients.fed`.
        """
        engine: Engine = self.backend.load_graph(graph, profile or self.profile)
        if self.spec.sequence is not None:
            engine = AlignedEngine(engine, self.spec.sequence, self.spec.sizes)
        with closing(engine):
            yield engine


@dataclass(frozen=True)
class Advance:
    progress: Progress
    step: str
    total: int

    def __call__(self, done: int) -> None:
        self.progress(self.step, done, self.total)


def order_of(
    source: str | os.PathLike[str] | EngineSpec,
    profile: str | DeviceProfile | None,
    precision: WantedPrecision,
    calibration: str | os.PathLike[str] | None,
    samples: int | None,
    output: str | os.PathLike[str] | None,
    progress: Progress,
) -> Order:
    spec, folder, place = _spec_and_places(source)
    machine = Machine.read()
    if profile is None:
        chosen, _ = usable_profile(machine)
    else:
        chosen = profile if isinstance(profile, DeviceProfile) else load_profile(profile)
    if precision not in get_args(WantedPrecision):
        raise SpecError(f"There is no precision {precision!r}.", fix="It is auto, fp32, fp16 or int8.")
    if precision != "auto" and precision not in chosen.precisions:
        raise ProfileError(
            f"The profile {chosen.name} does not compute {precision}; it computes {', '.join(chosen.precisions)}.",
            fix="Choose one of those, or auto.",
        )
    target = Path(output) if output is not None else place / "build" / chosen.name
    _refuse_to_overwrite(target)
    chosen = _with_wishes(chosen, spec.tensorrt)
    backend, preferred = _graph_backend(chosen), backend_named(chosen.backends[0])
    if spec.sequence is not None:
        if precision == "int8" or calibration is not None:
            raise SpecError(
                "A model with a [sequence] cannot be calibrated for INT8: its ranges depend on a state that no sample "
                "has.",
                fix="Build it as auto or fp32, without calibration data.",
            )
        preferred = backend  # no engine is compiled of one: what compiles them takes states for inputs like any other
    return Order(
        spec=_with_calibration(spec, calibration, samples),
        folder=folder,
        profile=chosen,
        precision=precision,
        output=target,
        backend=backend,
        preferred=preferred,
        missing=_missing(chosen, preferred),
        measurable=chosen.architecture == machine.architecture and backend.name == preferred.name,
        progress=progress,
    )


def _spec_and_places(source: str | os.PathLike[str] | EngineSpec) -> tuple[EngineSpec, Path, Path]:
    """The spec, the folder its callables are imported from, and the folder that gets `build/`."""
    if isinstance(source, EngineSpec):
        return source, source.model.parent, source.model.parent
    path = Path(source)
    if not path.exists():
        raise SpecError(f"There is nothing at {path}.", fix="Give the folder of an engine.toml, or an .onnx file.")
    if path.is_dir() or path.suffix == ".toml":
        spec = load_spec(path)
        folder = (path if path.is_dir() else path.parent).resolve()
        return spec, folder, folder
    spec = spec_for_model(path)
    return spec, path.absolute().parent, path.absolute().parent / spec.name


def _with_calibration(spec: EngineSpec, calibration: str | os.PathLike[str] | None, samples: int | None) -> EngineSpec:
    if samples is not None and samples < 1:
        raise SpecError(f"{samples} calibration samples were asked for; at least 1 is needed.")
    section = spec.calibration
    if calibration is not None:
        data = data_source(os.fspath(calibration), Path.cwd())
        section = section.model_copy(update={"data": data}) if section else Calibration(data=data)
    if samples is not None and section is not None:
        section = section.model_copy(update={"samples": samples})
    return spec.model_copy(update={"calibration": section})


def _refuse_to_overwrite(target: Path) -> None:
    """A build replaces the whole directory, so it must be a package and nothing else, empty, or not there."""
    if not target.exists():
        return
    if not target.is_dir():
        raise PackageError(f"{target} is not a directory.", fix="Give another --output.")
    entries = {entry.name: entry for entry in target.iterdir()}
    ours = _files_of_a_package(target) if MANIFEST in entries else frozenset()
    for name, entry in sorted(entries.items()):
        if name not in ours or (entry.is_dir() and not entry.is_symlink()):
            raise PackageError(
                f"{target} would be replaced as a whole, but it holds {name!r}, which is not of an engine package.",
                fix="Move it away, or give another --output.",
            )


def _files_of_a_package(folder: Path) -> frozenset[str]:
    """The names its manifest vouches for, itself included; empty where it is not a package's manifest.

    A package of another format, which this release cannot read, is known by its format number and its build key.
    """
    try:
        return frozenset({MANIFEST, *EnginePackage.open(folder).manifest.files})
    except PackageError:
        pass
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return frozenset()
    if not isinstance(data, dict) or type(data.get("format")) is not int or not isinstance(data.get("build_key"), str):
        return frozenset()
    files = data.get("files")
    return frozenset({MANIFEST, *(files if isinstance(files, dict) else ())})


def _with_wishes(profile: DeviceProfile, wishes: TensorRTWishes) -> DeviceProfile:
    """The profile with what the spec wishes of TensorRT, where the device has it at all."""
    if profile.tensorrt is None:
        return profile
    options = profile.tensorrt.model_copy(update=wishes.model_dump(exclude_none=True))
    return profile.model_copy(update={"tensorrt": options})


def _graph_backend(profile: DeviceProfile) -> Backend:
    """The first backend of the profile that runs graphs, here and now; onnxruntime for one that names none."""
    candidates = [backend_named(name) for name in dict.fromkeys((*profile.backends, "onnxruntime"))]
    candidates = [candidate for candidate in candidates if not candidate.compiles]
    for candidate in candidates:
        if candidate.availability():
            return candidate
    lacking = [candidate.availability() for candidate in candidates]
    raise BackendUnavailable(
        f"Nothing here can run a graph to judge it by. {' '.join(available.why_not for available in lacking)}",
        fix=" ".join(available.fix for available in lacking),
    )


def _missing(profile: DeviceProfile, preferred: Backend) -> str | None:
    """Why the engine that the preferred backend wants cannot be compiled here; None if it can, or it wants none."""
    if not preferred.compiles or (possible := preferred.can_build(profile)):
        return None
    return (
        f"{preferred.name} has no engine for {profile.title} yet: {possible.why_not} "
        "Until it has one, the graph runs on the device's CPU."
    )


@dataclass(frozen=True)
class Ingredients:
    """Everything a build depends on, read and checked, and the digest of it all."""

    model: ModelProto
    summary: ModelSummary
    sha256: str
    labels: tuple[str, ...]
    calibration: Samples | None
    judging: Samples | None
    """Validation data, or held-out calibration samples, or those that were too few to calibrate on; None without."""
    judged_on: str
    held_out: Samples | None
    """Calibration samples on which methods are compared; None where there are too few to calibrate at all."""
    data_sha256: str
    key: str
    fed: tuple[TensorSpec, ...]
    """What an engine of the model is fed: its inputs; those of a stateful model are aligned."""


def gathered(order: Order) -> Ingredients:
    spec = order.spec
    model = read_model(spec.model)
    summary = summarize(model, spec.model.name)
    for kind, specs in (("inputs", summary.inputs), ("outputs", summary.outputs)):
        if not specs:
            raise ModelError(f"{summary.file} has no {kind}; an engine has at least one.", fix="Export it again.")
    labels = read_labels(spec.postprocess.labels) if spec.postprocess.labels is not None else ()
    _check_axes(spec.axes, summary)
    fed, asked, answered = summary.inputs, summary.inputs, summary.outputs
    if (rules := spec.sequence) is not None:
        rules.check(summary.inputs, summary.outputs, spec.sizes)
        fed, _ = rules.aligned(summary.inputs, summary.outputs, spec.sizes)
        asked, answered = rules.asked(summary.inputs, spec.sizes), rules.answered(summary.outputs)
    _check_task(spec, replace(summary, inputs=asked, outputs=answered), labels)
    reader = Reader(summary.inputs, decoder_for(spec.preprocess, summary.inputs), labels, order.folder)
    calibration, held_out = _calibration_samples(spec, reader)
    validation = open_samples(spec.validation.data, reader, limit=_CALLABLE_LIMIT) if spec.validation else None
    if validation is not None:
        judged_on = f"{len(validation)} samples of {spec.validation.data if spec.validation else ''}"
    elif held_out is not None:
        judged_on = f"{len(held_out)} held-out samples of {held_out.source}"
    elif calibration is not None:
        judged_on = f"{len(calibration)} samples of {calibration.source}"
    else:
        judged_on = "no data: none was given"
    order.progress("reading the data", 0, 1)
    data_sha256 = calibration.digest() if calibration is not None else ""
    others = [samples.digest() for samples in (held_out, validation) if samples is not None]
    order.progress("reading the data", 1, 1)
    content = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return Ingredients(
        model=model,
        summary=summary,
        sha256=file_sha256(spec.model),
        labels=labels,
        calibration=calibration,
        judging=validation or held_out or calibration,
        judged_on=judged_on,
        held_out=held_out,
        data_sha256=data_sha256,
        key=_build_key(order, content, labels, [data_sha256, *others]),
        fed=fed,
    )


_CALLABLE_LIMIT = 1000
"""How many validation samples are taken from a callable, which may never end."""


def _check_task(spec: EngineSpec, summary: ModelSummary, labels: tuple[str, ...]) -> None:
    """SpecError if the task does not suit the model, or the labels do not."""
    task_for(
        spec.task,
        name=spec.name,
        version=spec.version,
        inputs=summary.inputs,
        outputs=summary.outputs,
        preprocess=spec.preprocess,
        postprocess=spec.postprocess,
        labels=labels,
    )
    if spec.task == "image-classification" and spec.preprocess is not None:
        _check_photos(spec.preprocess, summary)
    sizes = summary.outputs[0].shape[1:]
    fixed = [axis for axis in sizes if isinstance(axis, int)]
    if labels and fixed and len(fixed) == len(sizes) and int(np.prod(fixed)) != len(labels):
        raise SpecError(
            f"{spec.postprocess.labels} has {len(labels)} labels; the model's first output has {int(np.prod(fixed))} "
            "scores.",
            fix="There must be one label for each class, in their order.",
        )


def _check_axes(axes: Mapping[str, Axis], summary: ModelSummary) -> None:
    """SpecError if [axes] speaks of an axis that no input of the model leaves free."""
    free = dict.fromkeys(key for spec in summary.inputs for key in free_axes(spec))
    for key in axes:
        if key not in free:
            raise SpecError(
                f"[axes] has {key!r}, which no input of {summary.file} has as a free axis.",
                fix=f"The free axes are {', '.join(map(repr, free))}." if free else "Every axis is fixed; take it out.",
            )


def free_axes(spec: TensorSpec) -> dict[str, int]:
    """Where the free axes of an input are, by what [axes] calls them: their name, or `input:position` without one."""
    free = [(position, axis) for position, axis in enumerate(spec.shape) if isinstance(axis, str)]
    return {f"{spec.name}:{position}" if axis == NAMELESS else axis: position for position, axis in free}


def _check_photos(preprocess: Preprocess, summary: ModelSummary) -> None:
    """SpecError if no photo, as [preprocess] prepares it, fits the model's input: the engine would refuse them all."""
    wanted = summary.inputs[0]
    batch, *axes = wanted.shape
    channels, height, width = axes if preprocess.layout == "NCHW" else (axes[2], axes[0], axes[1])
    sides = (height, width)
    sizes = _photo_sides(preprocess, sides)
    if isinstance(batch, int) and batch != 1:
        fix = "Export the model with batch 1, or with a free batch axis."
    elif isinstance(channels, int) and channels != preprocess.channels:
        other = channels not in (1, 3) and preprocess.channels in axes
        fix = "Set `layout`: NCHW or NHWC." if other else "Set `color`: RGB and BGR have 3 channels, L has 1."
    elif any(isinstance(side, int) and isinstance(size, int) and side != size for side, size in zip(sides, sizes)):
        key = "center_crop" if preprocess.center_crop else "resize" if preprocess.resize else "resize_short_side"
        fix = f"Set `{key}` to the size that the model takes."
    else:
        return
    made = (preprocess.channels, *sizes) if preprocess.layout == "NCHW" else (*sizes, preprocess.channels)
    shape = ", ".join(map(str, (1, *made)))
    raise SpecError(f"[preprocess] makes [{shape}] of a photo; the model's input is {wanted}.", fix=fix)


def _photo_sides(preprocess: Preprocess, sides: tuple[int | str, int | str]) -> tuple[int | str, int | str]:
    """Height and width of a prepared photo; a name where that depends on the photo. `sides` are the model's."""
    if preprocess.center_crop is not None:
        return preprocess.center_crop, preprocess.center_crop
    if preprocess.resize is not None:
        return preprocess.resize
    assert preprocess.resize_short_side is not None
    short, (height, width) = preprocess.resize_short_side, sides
    if isinstance(height, int) and isinstance(width, int) and width < height:
        return "height", short
    return short, "width"


def _calibration_samples(spec: EngineSpec, reader: Reader) -> tuple[Samples | None, Samples | None]:
    """The samples to calibrate on and others of the same data, held out to compare methods on.

    The held-out ones are those the spread left over; where it took all, every fifth of it. Below MIN_CALIBRATION there
    are none, and nothing is calibrated.
    """
    if spec.calibration is None:
        return None, None
    wanted = spec.calibration.samples
    held_out = max(_MIN_HELD_OUT, wanted // 4)
    everything = open_samples(spec.calibration.data, reader, limit=wanted + held_out).without_labels()
    chosen = everything.spread(wanted)
    rest = everything.without(chosen)
    if len(chosen) < MIN_CALIBRATION:
        return chosen, None
    if len(rest) >= _MIN_HELD_OUT:
        return chosen, rest.spread(held_out)
    fifth = chosen.spread(len(chosen) // 5)
    return chosen.without(fifth), fifth


def _build_key(order: Order, model: str, labels: tuple[str, ...], data: Sequence[str]) -> str:
    """Paths are not in it: a build that was moved, or whose data was, is still the same build."""
    spec = order.spec.model_dump(mode="json")
    del spec["model"], spec["postprocess"]["labels"]
    for section in ("calibration", "validation"):
        if spec[section] is not None:
            del spec[section]["data"]
    content = {
        "model": model,
        "file": order.spec.model.name,
        "spec": spec,
        "labels": labels,
        "data": data,
        "profile": order.profile.model_dump(mode="json"),
        "precision": order.precision,
        "backends": [order.backend.name, order.preferred.name, order.missing, bool(order.preferred.availability())],
        "measurable": order.measurable,
        "tools": tools(order),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tools(order: Order) -> dict[str, str]:
    """The versions of everything that had a hand in a build."""
    libraries = {name: installed_version(name) for name in ("onnx", "onnxslim", "numpy")}
    used = {"edge-sdk": edge_sdk.__version__, **libraries, order.backend.name: order.backend.availability().version}
    if order.preferred.compiles and order.missing is None:
        used[order.preferred.name] = order.preferred.can_build(order.profile).version
    return {name: version or "" for name, version in used.items()}


def existing(output: Path, key: str) -> EnginePackage | None:
    """The package at `output` if it was built from the same things and is whole."""
    try:
        package = EnginePackage.open(output)
        if package.manifest.build_key != key:
            return None
        package.verify()
    except PackageError:
        return None
    return package
