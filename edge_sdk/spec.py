"""Engine specs: `engines/<name>/engine.toml`, what to build and how the built engine is used.

A spec is the part people write and keep under version control. It names the model, the task, how a payload becomes
the model's input (`[preprocess]`), how its output becomes an answer (`[postprocess]`), and the data on which INT8 is
calibrated and judged. Paths are relative to the file. A bare ONNX file is a spec too: `spec_for_model` gives it the
task `tensors`, which passes arrays through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from edge_sdk.errors import SpecError
from edge_sdk.sequence import SequenceRules
from edge_sdk.toml import Table, parse, read_toml

TaskName = Literal["image-classification", "tensors"]
NAME = r"^[A-Za-z0-9._-]{1,64}$"
"""What a model may be called: it is a level of an MQTT topic and a folder."""


class Preprocess(Table):
    """How a photo becomes the model's input: resize, crop, colour order, then (pixel * scale - mean) / std.

    Pixels are 0 to 255 before `scale`; `mean` and `std` have one number per channel, in the order of `color`.
    """

    resize_short_side: int | None = Field(default=None, gt=0, le=8192)
    """Keep the aspect ratio; the shorter side gets this many pixels."""
    resize: tuple[int, int] | None = None
    """Or: height and width in pixels, whatever the aspect ratio."""
    center_crop: int | None = Field(default=None, gt=0, le=8192)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    color: Literal["RGB", "BGR", "L"] = "RGB"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"

    @property
    def channels(self) -> int:
        return 1 if self.color == "L" else 3

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        if (self.resize is None) == (self.resize_short_side is None):
            raise ValueError("give exactly one of `resize` and `resize_short_side`")
        if self.resize is not None and not all(0 < side <= 8192 for side in self.resize):
            raise ValueError("`resize` takes a height and a width of 1 to 8192 pixels")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"`{key}` has {len(values)} numbers; color {self.color} wants 1 or {self.channels}")
        if 0.0 in self.std:
            raise ValueError("`std` has a zero")
        return self


class Postprocess(Table):
    labels: Path | None = None
    """A text file, one label a line, in the order of the model's classes."""
    top_k: int = Field(default=5, gt=0, le=1000)
    scores: Literal["auto", "probabilities", "logits"] = "auto"
    """What the model puts out. `logits` go through a softmax; `auto` looks whether the graph ends in one."""


class Calibration(Table):
    data: str
    """A folder of images, a .npz or .npy file, or a Python callable `module:function`."""
    samples: int = Field(default=128, gt=0)
    method: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    """How a tensor's range is taken from its statistics; `auto` tries them and keeps the best on held-out samples."""


class Validation(Table):
    data: str
    """A folder whose subfolders or file names give the label, one with labels.csv, or a .npz with x and y."""
    max_drop: float = Field(default=1.0, ge=0)
    """Percentage points of top-1 that a lower precision may lose."""
    min_agreement: float = Field(default=90.0, ge=0, le=100)
    """Without labels: percentage of samples on which the first label must stay that of FP32."""
    min_snr_db: float = 20.0
    """Where there is no first label (tensors): the least signal-to-noise ratio of the outputs against FP32."""


class Batching(Table):
    max_batch: int = Field(default=8, gt=0, le=1024)
    max_wait_ms: float = Field(default=0.0, ge=0, le=1000)
    """Hold a batch open for others; 0 takes what waited while the engine was busy."""
    newest_wins: bool = False
    """Of each client only the latest request waits, and those it overtakes are answered 429: for a camera's stream,
    where nobody wants the answer to an old frame."""


class Serving(Table):
    """How a device runs the engine."""

    instances: int = Field(default=1, ge=1, le=32)
    """How many batches are computed at a time, where the runtime can share a model between threads or is isolated."""
    isolation: Literal["none", "process"] = "none"
    """`process`: the engine computes in a process of its own, whose crash is no more than a slow answer."""


class Axis(Table):
    """The sizes a free axis may have, other than the batch: what a compiled engine is made for."""

    min: int = Field(default=1, ge=1)
    best: int = Field(ge=1)
    """The size it is to be fastest at."""
    max: int = Field(ge=1, le=1 << 24)

    @model_validator(mode="after")
    def _in_order(self) -> Axis:
        if not self.min <= self.best <= self.max:
            raise ValueError(f"min {self.min}, best {self.best} and max {self.max} are not in this order")
        return self


def fixed_sizes(axes: Mapping[str, Axis]) -> dict[str, int]:
    """The axes that have a single size, and which."""
    return {name: axis.best for name, axis in axes.items() if axis.min == axis.max}


class TensorRTWishes(Table):
    """What depends on the model in how TensorRT builds it; where None, the device profile decides."""

    optimization_level: int | None = Field(default=None, ge=0, le=5)
    max_aux_streams: int | None = Field(default=None, ge=0, le=16)
    workspace_bytes: int | None = Field(default=None, gt=0)
    version_compatible: bool | None = None
    weight_streaming: bool | None = None
    strip_weights: bool | None = None
    sparse_weights: bool | None = None


class EngineSpec(Table):
    """One engine: its model, its task and its data, checked and with every path absolute."""

    name: str = Field(pattern=NAME)
    version: str = Field(default="1", pattern=NAME)
    model: Path
    task: TaskName = "tensors"
    preprocess: Preprocess | None = None
    postprocess: Postprocess = Postprocess()
    calibration: Calibration | None = None
    validation: Validation | None = None
    batching: Batching = Batching()
    serving: Serving = Serving()
    axes: Mapping[str, Axis] = {}
    """By the axis's name in the graph, or by `input:position` where it has none."""
    sequence: SequenceRules | None = None
    """Of a stateful model: what the device keeps between the requests of a sequence."""
    tensorrt: TensorRTWishes = TensorRTWishes()

    @model_validator(mode="after")
    def _consistent(self) -> EngineSpec:
        if self.task == "image-classification" and self.preprocess is None:
            raise ValueError("task `image-classification` needs a [preprocess] table")
        if self.name.startswith(".") or self.version.startswith("."):
            raise ValueError("`name` and `version` must not begin with a dot")
        if self.sequence is not None:
            if self.batching.newest_wins:
                raise ValueError("`newest_wins` would drop requests out of the middle of a [sequence]")
            if self.calibration is not None or self.validation is not None:
                raise ValueError(
                    "a model with a [sequence] is neither calibrated nor judged on samples: what it answers depends on "
                    "those before; leave out [calibration] and [validation]"
                )
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The free axes that [axes] gives a single size."""
        return fixed_sizes(self.axes)


def load_spec(path: Path) -> EngineSpec:
    """The spec in the folder `path`, or in the file itself; SpecError says what is wrong with it."""
    file = path / "engine.toml" if path.is_dir() else path
    if not file.is_file():
        raise SpecError(
            f"{path} has no engine.toml.",
            fix="Give the folder of an engine spec, or an .onnx file.",
        )
    spec = parse(read_toml(file, SpecError), EngineSpec, str(file), SpecError)
    return _anchored(spec, file.parent.resolve())


def spec_for_model(model: Path) -> EngineSpec:
    """A spec for a bare ONNX file: named after it, task `tensors`, without calibration data."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.stem).strip("-.")[:64] or "model"
    return EngineSpec(name=name, model=model.resolve())


def read_labels(file: Path, error: type[SpecError] = SpecError) -> tuple[str, ...]:
    """The lines of a label file; blank lines at its end do not count."""
    try:
        return tuple(file.read_text(encoding="utf-8").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as exc:
        raise error(f"The label file {file} cannot be read: {exc}.", fix="It is one label a line, UTF-8.") from exc


def _anchored(spec: EngineSpec, folder: Path) -> EngineSpec:
    """The same spec with its paths made absolute. A `module:function` is not a path."""
    changes: dict[str, object] = {"model": folder / spec.model}
    if spec.postprocess.labels is not None:
        labels = folder / spec.postprocess.labels
        changes["postprocess"] = spec.postprocess.model_copy(update={"labels": labels})
    if spec.calibration is not None:
        changes["calibration"] = _with_absolute_data(spec.calibration, folder)
    if spec.validation is not None:
        changes["validation"] = _with_absolute_data(spec.validation, folder)
    return spec.model_copy(update=changes)


_HasData = TypeVar("_HasData", Calibration, Validation)


def _with_absolute_data(section: _HasData, folder: Path) -> _HasData:
    return section.model_copy(update={"data": data_source(section.data, folder)})


def data_source(text: str, folder: Path) -> str:
    """`text` as it is if it is a callable (`module:function`), otherwise an absolute path below `folder`."""
    return text if is_callable_name(text) else str(folder / text)


def is_callable_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text) is not None
