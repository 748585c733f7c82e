"""What a plan fits: the record beside every engine, and whether that engine may be loaded here.

A plan is a program for one kind of GPU and one version of TensorRT, and TensorRT has no way to ask whether it fits
short of running it. So that is decided here, by reading: `misfits` gives every reason against an engine, and TensorRT
is shown the bytes only if there is none.

The signature is an HMAC-SHA256 over all the rest of the record, which holds the plan's digest: it vouches for both. Its
key belongs to this machine's store, so an engine from elsewhere is refused until somebody who knows where it came from
has it signed here. The signature is checked first; where it is wrong, what the record says counts for nothing but an
explanation.

    {"format": 1, "flavour": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": ["8.6"], ...,
     "plan_sha256": "...", "plan_bytes": 2681428, "signed_by": "3f0c...", "signature": "..."}
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_sdk.backends.base import version_numbers
from edge_sdk.toml import describe

PLAN = "engine.plan"
SIDECAR = "engine.json"
FORMAT = 1
MAX_SIDECAR_BYTES = 1 << 20
"""Ours have a few thousand."""

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FOREIGN = "it was built by another machine or user"
"""How the reason begins that a person can do away with, who knows where an engine came from."""
TITLES: Mapping[str, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}

# Whatever a sidecar says may end up in a terminal: printable ASCII, and not much of it.
_Text = Annotated[str, Field(max_length=200, pattern=r"^[\x20-\x7e]*$")]
_Name = Annotated[str, Field(max_length=4000)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Version = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+-]{0,40}$")]
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Whole = Annotated[int, Field(ge=-(1 << 53), lt=1 << 53)]
_Scalar = bool | _Whole | float | _Text | None
_Shape = Annotated[tuple[_Count, ...], Field(max_length=32)]


class _Part(BaseModel):
    """Immutable, and refused as a whole if anything in it is not as we write it: there is always the graph."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ShapesRecord(_Part):
    """The sizes of one input that the engine takes, and the one it was made fastest for."""

    smallest: _Shape
    best: _Shape
    largest: _Shape


class Sidecar(_Part):
    """engine.json, format 1."""

    format: Literal[1] = 1
    flavour: Flavour
    version: _Version
    """Of the TensorRT that built it."""
    cuda: _Version | None = None
    """The CUDA release which that TensorRT is made for; often only its major number is known."""
    driver: _Version | None = None
    """Of the GPU that it was built on; None where it was built without one."""
    gpu: _Text | None = None
    """The GPU that it was built on; None where it was built without one."""
    compute_capabilities: Annotated[tuple[Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")], ...], Field(max_length=32)]
    """What it was built for; empty if it is portable."""
    portable: bool = False
    """tensorrt_rtx: for every compute capability from 8.0 on."""
    version_compatible: bool = False
    hardware_compatible: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    profile: _Text
    settings: Annotated[Mapping[_Text, _Scalar | tuple[_Scalar, ...]], Field(max_length=200)] = {}
    """The builder's, as they were used."""
    shapes: Annotated[Mapping[_Name, ShapesRecord], Field(max_length=1000)]
    """By input; never shown, so a name may be whatever a graph calls it."""
    graph_sha256: _Digest
    plan_sha256: _Digest
    plan_bytes: _Count
    created: _Text
    signed_by: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] = "0" * 16
    """Which key signed it, without saying the key."""
    signature: _Digest = "0" * 64

    @property
    def is_stripped(self) -> bool:
        """Whether its weights are to be put back from the graph."""
        return self.settings.get("strip_weights") is True

    def __str__(self) -> str:
        suits = self.gpu or f"compute capability {' and '.join(self.compute_capabilities) or '8.0 and later'}"
        return f"{TITLES[self.flavour]} {self.version}, for {suits}, {self.plan_bytes:,} bytes, built {self.created}"


class Unreadable(ValueError):
    """Bytes that are no sidecar of ours; the text is the reason."""


@dataclass(frozen=True)
class Here:
    """What this machine has, for an engine to be compared with. None: it has none, or it cannot be told."""

    flavour: str
    version: str | None
    """Of that flavour; None: it is not installed."""
    gpu: str | None
    """None: there is no NVIDIA GPU."""
    compute_capability: str | None = None
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver runs."""


def decode(raw: bytes) -> Sidecar:
    """The sidecar in `raw`, well-formed but not yet believed. Raises Unreadable, and nothing else, for other bytes."""
    if len(raw) > MAX_SIDECAR_BYTES:
        raise Unreadable(f"its sidecar cannot be read: it has {len(raw):,} bytes; {MAX_SIDECAR_BYTES:,} are the most")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as exc:  # not UTF-8 is a ValueError, too
        raise Unreadable("its sidecar cannot be read: it is not JSON") from exc
    found = data.get("format") if isinstance(data, dict) else None
    if type(found) is not int or found != FORMAT:
        other = found if type(found) is int and 0 <= found < 1 << 31 else "another one"
        raise Unreadable(f"its sidecar has format {other}; this edge-sdk reads format {FORMAT}")
    try:
        return Sidecar.model_validate_json(raw)
    except ValidationError as exc:
        raise Unreadable(f"its sidecar cannot be read: {_printable(describe(exc))}") from exc


def encode(sidecar: Sidecar) -> bytes:
    return (json.dumps(sidecar.model_dump(mode="json"), indent=2) + "\n").encode("ascii")


def signed(sidecar: Sidecar, key: bytes) -> Sidecar:
    """The same record, vouched for with `key`."""
    named = sidecar.model_copy(update={"signed_by": key_id(key)})
    return named.model_copy(update={"signature": _signature(named, key)})


def key_id(key: bytes) -> str:
    """A name for a key, which tells nothing of it."""
    return hmac.new(key, b"edge-sdk engine key", hashlib.sha256).hexdigest()[:16]


def _signature(sidecar: Sidecar, key: bytes) -> str:
    content = sidecar.model_dump(mode="json", exclude={"signature"})
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, canonical.encode("ascii"), hashlib.sha256).hexdigest()


def misfits(
    sidecar: Sidecar, *, plan_sha256: str, plan_bytes: int, graph_sha256: str, here: Here, key: bytes | None
) -> tuple[str, ...]:
    """Every reason why the engine with this sidecar must not be loaded here, in words; empty if it may.

    `plan_sha256` and `plan_bytes` are of the plan that lies beside it, `graph_sha256` is of the graph it is to stand
    for; `key` is this machine's, None if it has none. The first reason is the signature's, where that is wrong. Of a
    record that was altered nothing else is said.
    """
    against = _signature_misfit(sidecar, key)
    if against is not None and key is not None and sidecar.signed_by == key_id(key):
        return (against,)
    return tuple(
        reason
        for reason in (
            against,
            _plan_misfit(sidecar, plan_sha256, plan_bytes),
            _graph_misfit(sidecar, graph_sha256),
            _version_misfit(sidecar, here),
            *_gpu_misfits(sidecar, here),
        )
        if reason is not None
    )


def _signature_misfit(sidecar: Sidecar, key: bytes | None) -> str | None:
    if key is None:
        return f"{FOREIGN}: this one has no key yet, so it has signed nothing"
    if hmac.compare_digest(_signature(sidecar, key), sidecar.signature):
        return None
    if sidecar.signed_by == key_id(key):
        return "its sidecar was altered after it was signed here"
    return f"{FOREIGN}: it is signed with another key ({sidecar.signed_by}) than this machine's ({key_id(key)})"


def _plan_misfit(sidecar: Sidecar, plan_sha256: str, plan_bytes: int) -> str | None:
    if plan_bytes < sidecar.plan_bytes:
        return f"its plan is truncated: {plan_bytes:,} of {sidecar.plan_bytes:,} bytes"
    if plan_bytes > sidecar.plan_bytes:
        return f"its plan was altered: it has {plan_bytes:,} bytes; {sidecar.plan_bytes:,} were built"
    if not hmac.compare_digest(plan_sha256, sidecar.plan_sha256):
        return f"its plan was altered: its sha256 is {plan_sha256[:12]}...; {sidecar.plan_sha256[:12]}... was built"
    return None


def _graph_misfit(sidecar: Sidecar, graph_sha256: str) -> str | None:
    if sidecar.graph_sha256 == graph_sha256:
        return None
    return f"it was built from another graph (sha256 {sidecar.graph_sha256[:12]}..., not {graph_sha256[:12]}...)"


def _version_misfit(sidecar: Sidecar, here: Here) -> str | None:
    built_with = f"{TITLES[sidecar.flavour]} {sidecar.version}"
    title = TITLES.get(here.flavour, here.flavour)
    if sidecar.flavour != here.flavour:
        return f"it was built with {built_with}; what runs engines here is {title}"
    if here.version is None:
        return f"it was built with {built_with}, and {title} is not installed here"
    if _same_version(sidecar.version, here.version):
        return None
    if sidecar.flavour == "tensorrt_rtx":
        return f"it was built with {built_with}; here is {here.version}, and its engines survive no change of version"
    if not sidecar.version_compatible:
        return (
            f"it was built with {built_with}; here is {here.version}, "
            "and an engine that was not built version-compatible runs with the version it was built with"
        )
    if _carries_over(sidecar.version, here.version):
        return None
    return (
        f"it was built with {built_with}, version-compatible; here is {here.version}, and such an engine runs with "
        "later versions of its major release, one of 8.6 with 10, too, and one of 10 with 11"
    )


def _same_version(one: str, other: str) -> bool:
    """10.3.0 and 10.3.0.30 are one: packages of the same TensorRT say its build number or leave it out."""
    ours, theirs = one.split("."), other.split(".")
    common = min(len(ours), len(theirs))
    return ours == theirs or (common >= 3 and ours[:common] == theirs[:common])


_LATER_MAJORS = {8: (8, 10), 10: (10, 11)}
"""Which major releases run a version-compatible engine of one: TensorRT's documentation, version compatibility."""


def _carries_over(built: str, here: str) -> bool:
    ours, theirs = version_numbers(built), version_numbers(here)
    if not ours or not theirs or ours < (8, 6) or theirs < ours:
        return False
    return theirs[0] in _LATER_MAJORS.get(ours[0], (ours[0],))


def _gpu_misfits(sidecar: Sidecar, here: Here) -> Iterator[str | None]:
    if here.gpu is None:
        yield "there is no NVIDIA GPU here"
        return
    yield _compute_capability_misfit(sidecar, here)
    if _bound_to_its_gpu(sidecar) and sidecar.gpu != here.gpu:
        yield f"it was built on {sidecar.gpu or 'an unknown GPU'} for that model alone; here is {here.gpu}"
    yield _driver_misfit(sidecar, here)


def _bound_to_its_gpu(sidecar: Sidecar) -> bool:
    return sidecar.flavour == "tensorrt" and sidecar.hardware_compatible == "none"


def _compute_capability_misfit(sidecar: Sidecar, here: Here) -> str | None:
    from_ampere_on = sidecar.portable or sidecar.hardware_compatible == "ampere-plus"
    wanted = "8.0 and later" if from_ampere_on else " and ".join(sidecar.compute_capabilities) or "none that it names"
    if here.compute_capability is None:
        return f"it was built for compute capability {wanted}, and which one {here.gpu} has cannot be told"
    if version_numbers(here.compute_capability) >= (8, 0) if from_ampere_on else _named(sidecar, here):
        return None
    return f"it was built for compute capability {wanted}; {here.gpu} has {here.compute_capability}"


def _named(sidecar: Sidecar, here: Here) -> bool:
    return here.compute_capability in sidecar.compute_capabilities


_OLDEST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""CUDA's major release -> the oldest Linux driver that runs programs of it: CUDA Toolkit release notes, minor version
compatibility. A Jetson's drivers have numbers of the same kind."""


def newest_cuda(driver: str) -> str | None:
    """The newest major release of CUDA whose programs a driver runs, as "13"; None for one older than ours go back."""
    fitting = [cuda for cuda, oldest in _OLDEST_DRIVERS.items() if version_numbers(driver) >= version_numbers(oldest)]
    return str(max(fitting)) if fitting else None


def _driver_misfit(sidecar: Sidecar, here: Here) -> str | None:
    needed = version_numbers(sidecar.cuda or "")[:1]
    if needed and here.cuda is not None:
        if version_numbers(here.cuda)[:1] < needed:
            return f"it needs CUDA {sidecar.cuda}; the driver here runs programs of CUDA {here.cuda} at most"
    elif needed and here.driver is not None:
        oldest = _OLDEST_DRIVERS.get(needed[0], "")
        if version_numbers(here.driver) < version_numbers(oldest):
            return f"it needs CUDA {sidecar.cuda}, so a driver from {oldest} on; here is {here.driver}"
    if (
        sidecar.driver is not None
        and here.driver is not None
        and version_numbers(here.driver) < version_numbers(sidecar.driver)
    ):
        return f"it was built with driver {sidecar.driver}; the one here is older, {here.driver}"
    return None


def _printable(text: str) -> str:
    """What may go to a terminal of a text that a stranger wrote."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:400])
