"""Targets: files that somebody else may have written, or a disk altered."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk import resources
from edge_sdk.backends.onnx_bytes import interface, refuse_external_data
from edge_sdk.backends.tensorrt import sidecar
from edge_sdk.errors import EngineFailed, PackageError, ProfileError, SettingsError, SpecError
from edge_sdk.mqtt.journal import Journal
from edge_sdk.mqtt.session import Record, Recorded
from edge_sdk.mqtt.transports.base import Message, Properties
from edge_sdk.package import GOLDEN, MANIFEST, EnginePackage, Manifest, packed_requests
from edge_sdk.profiles import DeviceProfile, load_profile
from edge_sdk.settings import Settings, load_settings
from edge_sdk.spec import EngineSpec, load_spec
from tests.fuzz.targets import target
from tests.packages import filling, make_package, misbehaving, scaling


@functools.cache
def folder() -> Path:
    """Where inputs become files: in memory, where that is possible."""
    memory = Path("/dev/shm")
    kept = tempfile.TemporaryDirectory(prefix="edge-sdk-fuzz-", dir=memory if memory.is_dir() else None)
    return _keep(kept)


_kept: list[Any] = []


def _keep(temporary: tempfile.TemporaryDirectory[str]) -> Path:
    _kept.append(temporary)  # until the process ends
    return Path(temporary.name)


@functools.cache
def package() -> EnginePackage:
    return make_package(folder() / "package", scaling(), name="scale")


def manifests() -> list[bytes]:
    whole = (package().path / MANIFEST).read_bytes()
    return [whole, json.dumps(json.loads(whole)).encode(), b'{"format": 2}', b"[]"]


@target(seeds=manifests, max_bytes=16_384, words=[f'"{key}":' for key in Manifest.model_fields])
def manifest(data: bytes) -> None:
    """A package whose manifest is these bytes is opened, or PackageError says why not; what was read is written and
    read again as it was, and no file of it lies elsewhere."""
    place = folder() / "manifest"
    place.mkdir(exist_ok=True)
    (place / MANIFEST).write_bytes(data)
    try:
        found = EnginePackage.open(place).manifest
    except PackageError:
        return

    assert not any("/" in name or name in ("", ".", "..") for name in found.files)
    assert found == Manifest.model_validate(json.loads(found.model_dump_json()))


def goldens() -> list[bytes]:
    return [packed_requests([{"x": np.ones((1, 4), np.float32)}] * 2), packed_requests([])]


@target(seeds=goldens)
def golden(data: bytes) -> None:
    """golden.npz: requests that fit the model, or PackageError; nothing is unpacked beyond its limit."""
    sound = package()
    record = sound.manifest.files["graph.onnx"].model_copy(
        update={"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    )
    place = folder() / "golden"
    place.mkdir(exist_ok=True)
    (place / GOLDEN).write_bytes(data)
    with contextlib.suppress(PackageError):
        for feeds in EnginePackage(
            place, sound.manifest.model_copy(update={"files": {GOLDEN: record}}), sound.digest
        ).golden():
            assert {"x"} == set(feeds)


TOML_WORDS = ("=", "[", "]", "[[", '"', "'", '"""', "{", "}", "\n", "#", "true", "nan", "inf", "1979-05-27T07:32:00Z")


def specs() -> list[bytes]:
    return [file.read_bytes() for file in sorted(resources.EXAMPLES.rglob("engine.toml"))] + [
        b'name = "x"\nmodel = "x.onnx"\n[axes.n]\nmin = 1\nbest = 2\nmax = 4\n[tensorrt]\nstrip_weights = true\n'
    ]


@target(seeds=specs, words=TOML_WORDS + tuple(EngineSpec.model_fields))
def spec(data: bytes) -> None:
    """engine.toml is an EngineSpec with absolute paths, or SpecError."""
    file = folder() / "engine.toml"
    file.write_bytes(data)
    with contextlib.suppress(SpecError):
        assert load_spec(file).model.is_absolute()


@target(
    seeds=lambda: [
        b'device = "d"\nroot = "a/b"\nreply_prefixes = ["p/"]\n[broker]\nurl = "mqtts://u@h:1"\n',
        b'health = "127.0.0.1:9464"\ndelivery = "durable"\nstate = "s"\n[broker]\npassword_file = "p"\n',
    ],
    words=TOML_WORDS + tuple(Settings.model_fields),
)
def settings(data: bytes) -> None:
    """edge-sdk.toml gives settings, or SettingsError."""
    file = folder() / "edge-sdk.toml"
    file.write_bytes(data)
    with contextlib.suppress(SettingsError):
        load_settings(file, environment={})


@target(
    seeds=lambda: [file.read_bytes() for file in sorted(resources.PROFILES.glob("*.toml"))],
    words=TOML_WORDS + tuple(DeviceProfile.model_fields),
)
def profile(data: bytes) -> None:
    """A device profile, or ProfileError."""
    file = folder() / "profile.toml"
    file.write_bytes(data)
    with contextlib.suppress(ProfileError):
        load_profile(str(file))


def sidecars() -> list[bytes]:
    shapes = {"x": {"smallest": [1, 4], "best": [2, 4], "largest": [8, 4]}}
    written = {
        "format": 1, "flavour": "tensorrt_rtx", "version": "1.7.1.116", "cuda": "13.0", "driver": "581.15",
        "compute_capabilities": ["8.6"], "profile": "desktop-rtx-30", "settings": {"optimization_level": 3, "dla": [1]},
        "shapes": shapes, "graph_sha256": "1" * 64, "plan_sha256": "0" * 64, "plan_bytes": 5, "created": "today",
    }  # fmt: skip
    return [json.dumps(written).encode(), b'{"format": 2}']


@target(seeds=sidecars, words=[f'"{key}":' for key in sidecar.Sidecar.model_fields])
def engine_sidecar(data: bytes) -> None:
    """engine.json is a record that is written and read again as it was, or Unreadable with a text for a terminal."""
    refusal = ""
    try:
        found = sidecar.decode(data)
        assert found == sidecar.decode(sidecar.encode(found))
    except sidecar.Unreadable as exc:
        refusal = str(exc)

    assert refusal.isprintable()


def graphs() -> list[bytes]:
    outside = scaling()
    outside.graph.initializer[0].data_location = 1
    outside.graph.initializer[0].external_data.add(key="location", value="elsewhere")
    return [
        bytes(model.SerializeToString()) for model in (scaling(), filling(), misbehaving([{"do": "sleep"}]), outside)
    ]


@target(seeds=graphs)
def onnx(data: bytes) -> None:
    """A graph's bytes are let through or EngineFailed; what is let through names no file, as `onnx` itself reads it,
    and its interface is inputs and outputs, or EngineFailed."""
    try:
        refuse_external_data(data)
    except EngineFailed:
        return
    with contextlib.suppress(EngineFailed):
        interface(data)

    assert not names_a_file(data)


def names_a_file(data: bytes) -> bool:
    """Whether `onnx` sees a tensor whose data lies in a file."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs are published with it
    from onnx import ModelProto, TensorProto

    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return False
    waiting: list[Any] = [model]
    while waiting:
        message = waiting.pop()
        if isinstance(message, TensorProto) and message.data_location == TensorProto.EXTERNAL:
            return True
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting += value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value]
    return False


ANSWER = Recorded(
    ("edge/v1/d/models/m/infer", "edge/v1/reply/me", b"\1"),
    b"f" * 32,
    Message(
        "edge/v1/reply/me", b"{}", properties=Properties(None, b"\1", "application/json", 30, (("status", "200"),))
    ),
    100.0,
)


def journals() -> list[bytes]:
    file = folder() / "sound.db"
    written = Journal(file)
    written.write(Record((ANSWER,), ()), 0.0, time.time())
    written.close()  # which moves the log into the file
    return [file.read_bytes(), b"SQLite format 3\0", b""]


@target(seeds=journals, max_bytes=24_576)
def journal(data: bytes) -> None:
    """A journal of any bytes is opened, or put aside and begun anew; it gives answers, takes new ones, and never keeps
    the daemon from starting."""
    for file in folder().glob("answers.db*"):
        file.unlink()
    file = folder() / "answers.db"
    file.write_bytes(data)
    opened = Journal(file)
    try:
        for recorded in opened.load(0.0, 1.0):
            assert isinstance(recorded.answer.payload, bytes)
            assert isinstance(recorded.answer.topic, str)
        opened.write(Record((ANSWER,), (ANSWER.key,)), 0.0, 1.0)
    finally:
        opened.close()
