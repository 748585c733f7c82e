"""Pipelines: models asked one after the other, a photo in, what the last ones say out. The [[stage]] tables.

    name = "who-is-there"

    [[stage]]
    name = "detector"
    model = "fastestdet"                            # another model of the device; with `device` or `group`, of those
    picture = "request"                             # what the request brought

    [[stage]]
    name = "found"
    op = "fastestdet-boxes"                         # something the daemon does itself
    inputs = {head = "detector.758"}

    [[stage]]
    name = "parts"
    op = "crop"
    picture = "request"
    inputs = {boxes = "found.boxes"}

    [[stage]]
    name = "classifier"
    model = "squeezenet"
    picture = "parts.pictures"                      # asked once for each

    [outputs]
    boxes = "found.boxes"
    kinds = "classifier.classification"

Such a file is a whole package: `pipeline.json` holds it, checked. It has no graph; its models are packages of their own
and are asked like anybody's, so their batches are shared. What each of them really takes and gives is known where it
lives, and looked at there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from edge_sdk.errors import PackageError, SpecError
from edge_sdk.package import writing
from edge_sdk.spec import NAME, read_labels
from edge_sdk.toml import Table, describe, parse, read_toml

PIPELINE = "pipeline.json"
REQUEST = "request"
"""The source of what the request brought."""
PICTURES = "pictures"

OPS: Mapping[str, tuple[frozenset[str], bool, frozenset[str]]] = {
    "fastestdet-boxes": (frozenset({"head"}), False, frozenset({"boxes", "scores", "classes", "labels"})),
    "crop": (frozenset({"boxes"}), True, frozenset({PICTURES})),
}
"""What each takes, whether it takes a picture, and what it gives."""


class Stage(Table):
    """One step: a model that is asked, or an operation."""

    name: str = Field(pattern=r"^[a-z0-9_-]{1,32}$")
    model: str | None = Field(default=None, pattern=NAME)
    version: str | None = Field(default=None, pattern=NAME)
    device: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Where the model lives, if not here: it is asked over MQTT."""
    group: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    op: Literal["fastestdet-boxes", "crop"] | None = None
    picture: str | None = None
    """`request`, or `stage.pictures`: then the model is asked for each of them, and its outputs are stacked."""
    inputs: Mapping[str, str] = {}
    """Tensors by the name they are taken under, each a `stage.tensor`."""
    min_score: float = Field(default=0.65, ge=0, le=1)
    max_overlap: float = Field(default=0.45, ge=0, le=1)
    at_most: int = Field(default=16, gt=0, le=256)
    """Boxes, the best ones."""
    labels: tuple[str, ...] | str | None = None
    """Of the classes: a file, one label a line, in a spec; the labels themselves in a package."""

    @property
    def sources(self) -> tuple[str, ...]:
        return (*([self.picture] if self.picture else ()), *self.inputs.values())

    @property
    def fans_out(self) -> bool:
        """Whether it is asked once for each of several pictures."""
        return self.model is not None and self.picture not in (None, REQUEST)

    @property
    def is_elsewhere(self) -> bool:
        return self.device is not None or self.group is not None

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if self.device is not None and self.group is not None:
            raise ValueError(f"the stage {self.name!r} is asked of a `device` or of a `group`, not of both")
        if (self.model is None) == (self.op is None):
            raise ValueError(f"the stage {self.name!r} has either a `model` or an `op`")
        if self.name == REQUEST:
            raise ValueError(f"no stage is called {REQUEST!r}, which is what the request brought")
        if self.op is not None:
            taken, picture, _ = OPS[self.op]
            if set(self.inputs) != taken or (self.picture is not None) != picture:
                wanted = [*sorted(taken), *(["and a `picture`"] if picture else [])]
                raise ValueError(f"the stage {self.name!r}: {self.op} takes {' '.join(wanted)}")
            if self.version is not None or self.is_elsewhere:
                raise ValueError(f"the stage {self.name!r} is an operation: it has no version, and is done here")
        elif (self.picture is None) == (not self.inputs):
            raise ValueError(f"the stage {self.name!r} asks its model with either a `picture` or `inputs`")
        return self


class PipelineSpec(Table):
    """A pipeline whose wiring is sound: every source is there before it is used."""

    name: str = Field(pattern=NAME)
    version: str = Field(default="1", pattern=NAME)
    stage: tuple[Stage, ...] = Field(min_length=1, max_length=32)
    outputs: Mapping[str, str] = Field(min_length=1)
    """The answer's tensors, each a `stage.tensor`."""

    @model_validator(mode="after")
    def _wired(self) -> PipelineSpec:
        before: dict[str, Stage] = {}
        for stage in self.stage:
            if stage.name in before:
                raise ValueError(f"two stages are called {stage.name!r}")
            for source in stage.sources:
                _check_source(source, before, f"the stage {stage.name!r}")
            if stage.picture not in (None, REQUEST) and not stage.picture.endswith(f".{PICTURES}"):
                raise ValueError(f"the stage {stage.name!r} takes its picture from {stage.picture!r}, which is none")
            if any(source.endswith(f".{PICTURES}") or source == REQUEST for source in stage.inputs.values()):
                raise ValueError(f"the stage {stage.name!r} takes a picture for a tensor; name it as its `picture`")
            before[stage.name] = stage
        for name, source in self.outputs.items():
            if source == REQUEST or source.endswith(f".{PICTURES}"):
                raise ValueError(f"the output {name!r} is a picture; an answer holds tensors")
            _check_source(source, before, f"the output {name!r}")
        return self

    def used_of(self, stage: str) -> set[str]:
        """The tensors of a stage that somebody reads."""
        sources = [*self.outputs.values(), *(source for each in self.stage for source in each.sources)]
        return {source.partition(".")[2] for source in sources if source.partition(".")[0] == stage}


def _check_source(source: str, before: Mapping[str, Stage], reader: str) -> None:
    name, _, tensor = source.partition(".")
    if source == REQUEST:
        return
    if not tensor or name not in before:
        known = ", ".join(before) or "none yet"
        raise ValueError(f"{reader} reads {source!r}; it is `stage.tensor` of a stage before it ({known})")
    given = OPS[before[name].op or "crop"][2] if before[name].op else None
    if given is not None and tensor not in given:
        raise ValueError(f"{reader} reads {source!r}; {before[name].op} gives {', '.join(sorted(given))}")


@dataclass(frozen=True)
class PipelinePackage:
    """A pipeline on disk."""

    path: Path
    spec: PipelineSpec
    digest: str

    @classmethod
    def open(cls, folder: Path) -> PipelinePackage:
        """The pipeline in a directory; PackageError if there is none that is sound."""
        file = folder / PIPELINE
        try:
            raw = file.read_bytes()
            data = json.loads(raw)
        except (OSError, ValueError, RecursionError) as exc:
            raise PackageError(f"{file} cannot be read: {exc}.", fix="Build the pipeline again.") from exc
        if not isinstance(data, dict) or data.pop("format", None) != 1:
            raise PackageError(f"{file} is no pipeline of format 1.", fix="Build it again with this edge-sdk.")
        try:
            spec = PipelineSpec.model_validate(data)
        except ValidationError as exc:
            raise PackageError(f"{file}: {describe(exc)}.", fix="Build the pipeline again.") from exc
        return cls(folder, spec, hashlib.sha256(raw).hexdigest())


def is_pipeline(file: Path) -> bool:
    """Whether an engine.toml is a pipeline's."""
    return "stage" in read_toml(file, SpecError)


def load_pipeline_spec(file: Path) -> PipelineSpec:
    """The pipeline that an engine.toml describes, with the labels it names; SpecError says what is wrong with it."""
    spec = parse(read_toml(file, SpecError), PipelineSpec, str(file), SpecError)
    stages = [
        stage.model_copy(update={"labels": read_labels(file.parent / stage.labels)})
        if isinstance(stage.labels, str)
        else stage
        for stage in spec.stage
    ]
    return spec.model_copy(update={"stage": tuple(stages)})


def packed(spec: PipelineSpec) -> bytes:
    """The bytes of its pipeline.json."""
    content: dict[str, Any] = {"format": 1, **spec.model_dump(mode="json", exclude_none=True)}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def build_pipeline(file: Path, output: Path | None = None) -> PipelinePackage:
    """Check an engine.toml of [[stage]] tables, and put the pipeline into `output`, by default `build/pipeline` beside
    it. Raises SpecError, and PackageError where it cannot be written or something else is there."""
    spec = load_pipeline_spec(file)
    target = output if output is not None else file.parent.resolve() / "build" / "pipeline"
    if target.exists() and (not target.is_dir() or any(entry.name != PIPELINE for entry in target.iterdir())):
        raise PackageError(f"{target} holds something that is no pipeline.", fix="Give another --output.")
    with writing(target) as folder:
        (folder / PIPELINE).write_bytes(packed(spec))
    return PipelinePackage.open(target)


def pipeline_folders(folder: Path) -> list[Path]:
    """Every pipeline in `folder`, where packages lie: `<name>`, `<name>/<version>` and `<name>/build/<profile>`."""
    patterns = (f"*/{PIPELINE}", f"*/*/{PIPELINE}", f"*/build/*/{PIPELINE}")
    found = {file.parent for pattern in patterns for file in folder.glob(pattern)}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def folders_around(pipeline: Path) -> list[Path]:
    """The folders in which `pipeline_folders` finds this one: its models may lie there."""
    around = pipeline.absolute().parents
    return list(around[2:3] if pipeline.absolute().parent.name == "build" else around[:2])


def holds_pipeline(folder: Path) -> bool:
    """Whether a package is a pipeline's."""
    return (folder / PIPELINE).is_file()
