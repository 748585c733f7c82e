"""Whether an engine may be loaded here is decided by reading, and every reason against it is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.backends.tensorrt.sidecar import (
    MAX_SIDECAR_BYTES,
    Here,
    ShapesRecord,
    Sidecar,
    Unreadable,
    decode,
    encode,
    key_id,
    misfits,
    signed,
)

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
GRAPH = hashlib.sha256(b"graph").hexdigest()
PLAN = b"plan" * 1000
RTX_3080 = Here("tensorrt_rtx", "1.7.1.116", "NVIDIA GeForce RTX 3080", "8.6", "581.15", "13.0")
ORIN = Here("tensorrt", "10.3.0", "NVIDIA Jetson Orin Nano", "8.7", None, "12.6")
A100 = Here("tensorrt", "10.13.3.9", "NVIDIA A100-SXM4-80GB", "8.0", "580.65.06", None)


def record(key: bytes = KEY, **changes: Any) -> Sidecar:
    """A sidecar of PLAN for an RTX 3080, signed."""
    fields: dict[str, Any] = {
        "flavour": "tensorrt_rtx",
        "version": "1.7.1.116",
        "cuda": "13",
        "compute_capabilities": ("8.6",),
        "profile": "desktop-rtx-30",
        "settings": {"optimization_level": 3, "timing_cache": False, "flags": ("REFIT",), "workspace_bytes": None},
        "shapes": {"x": ShapesRecord(smallest=(1, 3), best=(4, 3), largest=(8, 3))},
        "graph_sha256": GRAPH,
        "plan_sha256": hashlib.sha256(PLAN).hexdigest(),
        "plan_bytes": len(PLAN),
        "created": "2026-01-01T00:00:00Z",
        **changes,
    }
    return signed(Sidecar(**fields), key)


def of_orin(**changes: Any) -> Sidecar:
    """A sidecar of PLAN, built on a Jetson Orin Nano for itself, signed."""
    built = {"version": ORIN.version, "gpu": ORIN.gpu, "driver": None, "cuda": "12"}
    return record(**{"flavour": "tensorrt", "compute_capabilities": ("8.7",), **built, **changes})


def of_a100(**changes: Any) -> Sidecar:
    """A sidecar of PLAN, built on an A100 for itself, signed."""
    built = {"version": A100.version, "gpu": A100.gpu, "driver": A100.driver, "cuda": "13"}
    return record(**{"flavour": "tensorrt", "compute_capabilities": ("8.0",), **built, **changes})


def against(
    sidecar: Sidecar, here: Here = RTX_3080, plan: bytes = PLAN, graph: str = GRAPH, key: bytes = KEY
) -> tuple[str, ...]:
    digest = hashlib.sha256(plan).hexdigest()
    return misfits(sidecar, plan_sha256=digest, plan_bytes=len(plan), graph_sha256=graph, here=here, key=key)


def at(here: Here, **changes: Any) -> Here:
    return Here(**{**vars(here), **changes})


FITTING = {
    "RTX, the GPU it was built for": (record(), RTX_3080),
    "RTX, one of several": (record(compute_capabilities=("8.6", "8.9")), at(RTX_3080, compute_capability="8.9")),
    "RTX, portable": (record(compute_capabilities=(), portable=True), at(RTX_3080, compute_capability="12.0")),
    "RTX, driver unknown": (record(), at(RTX_3080, driver=None, cuda=None)),
    "RTX, CUDA of another minor release": (record(cuda="13.2"), at(RTX_3080, cuda="13.0")),
    "Jetson, as built": (of_orin(), ORIN),
    "the build number left out": (of_orin(version="10.3.0.30"), ORIN),
    "a newer driver": (of_a100(), at(A100, driver="581.1")),
    "version-compatible, later": (of_a100(version="10.3.0", version_compatible=True), A100),
    "version-compatible, 8.6 on 10": (of_a100(version="8.6.1", version_compatible=True), A100),
    "version-compatible, 10 on 11": (of_a100(version_compatible=True), at(A100, version="11.4.1")),
    "ampere-plus, another model": (
        of_a100(hardware_compatible="ampere-plus"),
        at(A100, gpu="NVIDIA H100", compute_capability="9.0"),
    ),
    "same compute capability, another model": (
        of_a100(hardware_compatible="same-compute-capability"),
        at(A100, gpu="NVIDIA A100-PCIE-40GB"),
    ),
}


@pytest.mark.parametrize("case", FITTING)
def test_what_fits_has_nothing_against_it(case: str) -> None:
    sidecar, here = FITTING[case]

    assert () == against(sidecar, here)


REASONS = {
    "another version of RTX": (record(version="1.6.0.1"), RTX_3080, ("1.6.0.1; here is 1.7.1.116", "no change of ver")),
    "RTX, version-compatible all the same": (
        record(version="1.6.0.1", version_compatible=True),
        RTX_3080,
        ("survive no change of version",),
    ),
    "a version that metadata does not tell": (record(), at(RTX_3080, version="of unknown version"), ("of unknown",)),
    "the other flavour": (record(), ORIN, ("TensorRT for RTX 1.7.1.116; what runs engines here is TensorRT",)),
    "not installed": (record(), at(RTX_3080, version=None), ("is not installed here",)),
    "another version of TensorRT": (of_orin(version="10.4.0"), ORIN, ("TensorRT 10.4.0; here is 10.3.0",)),
    "too little said of the version": (of_orin(version="10.3"), ORIN, ("TensorRT 10.3; here is 10.3.0",)),
    "compatible, but older here": (of_orin(version="10.4.0", version_compatible=True), ORIN, ("later versions",)),
    "compatible, but 8.5": (of_orin(version="8.5.2", version_compatible=True), ORIN, ("one of 8.6 with 10",)),
    "compatible, but 8 on 11": (
        of_a100(version="8.6.1", version_compatible=True),
        at(A100, version="11.4"),
        ("one of 8.6 with 10",),
    ),
    "another compute capability": (
        record(),
        at(RTX_3080, gpu="NVIDIA GeForce RTX 4090", compute_capability="8.9"),
        ("compute capability 8.6; NVIDIA GeForce RTX 4090 has 8.9",),
    ),
    "portable, on Turing": (
        record(compute_capabilities=(), portable=True),
        at(RTX_3080, compute_capability="7.5"),
        ("8.0 and later; NVIDIA GeForce RTX 3080 has 7.5",),
    ),
    "ampere-plus, on Volta": (
        of_a100(hardware_compatible="ampere-plus"),
        at(A100, compute_capability="7.0"),
        ("8.0 and later",),
    ),
    "a compute capability that cannot be told": (record(), at(RTX_3080, compute_capability=None), ("cannot be told",)),
    "for no compute capability": (record(compute_capabilities=()), RTX_3080, ("none that it names",)),
    "another model of GPU": (
        of_a100(),
        at(A100, gpu="NVIDIA A100-PCIE-40GB"),
        ("built on NVIDIA A100-SXM4-80GB for that model alone; here is NVIDIA A100-PCIE-40GB",),
    ),
    "another model and another compute capability": (
        of_a100(),
        at(A100, gpu="NVIDIA H100", compute_capability="9.0"),
        ("compute capability 8.0; NVIDIA H100 has 9.0", "that model alone"),
    ),
    "an older driver than it was built with": (of_a100(driver="590.1"), A100, ("driver 590.1; the one here is older",)),
    "a driver too old for its CUDA": (
        record(),
        at(RTX_3080, driver="535.54.03", cuda=None),
        ("CUDA 13, so a driver from 580.65.06 on; here is 535.54.03",),
    ),
    "a CUDA that the driver does not run": (record(), at(RTX_3080, cuda="12.4"), ("programs of CUDA 12.4 at most",)),
    "no GPU": (record(), at(RTX_3080, gpu=None), ("no NVIDIA GPU here",)),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_does_not_fit_is_said_exactly(case: str) -> None:
    """Each lack is one reason, which names what was built and what is here."""
    sidecar, here, wanted = REASONS[case]
    said = "; ".join(against(sidecar, here))

    assert [] == [part for part in wanted if part not in said], said


def test_every_reason_is_given_at_once() -> None:
    """Nobody should mend one thing after the other; the signature's reason is the first."""
    old = record(OTHER_KEY, version="1.6.0.1", cuda="14")
    here = at(RTX_3080, compute_capability="8.9")
    reasons = against(old, here, plan=PLAN[:-1], graph=hashlib.sha256(b"another").hexdigest())

    assert "built by another machine or user" in reasons[0]
    assert [
        "its plan is truncated: 3,999 of 4,000 bytes",
        f"it was built from another graph (sha256 {GRAPH[:12]}..., not "
        f"{hashlib.sha256(b'another').hexdigest()[:12]}...)",
    ] == list(reasons[1:3])
    assert 6 == len(reasons), reasons


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (PLAN[:-1], "truncated: 3,999 of 4,000 bytes"),
        (b"", "truncated: 0 of 4,000 bytes"),
        (PLAN + b"\0", "altered: it has 4,001 bytes; 4,000 were built"),
        (b"?" + PLAN[1:], "altered: its sha256 is"),
    ],
)
def test_a_plan_that_is_not_the_one_that_was_built(plan: bytes, reason: str) -> None:
    (found,) = against(record(), plan=plan)

    assert reason in found


def test_another_key_is_told_from_an_altered_record() -> None:
    """Of a record altered here nothing more is believed; one from elsewhere is explained as far as it goes."""
    foreign, altered = record(OTHER_KEY), record().model_copy(update={"compute_capabilities": ("8.9",)})

    assert (key_id(OTHER_KEY) in against(foreign)[0], key_id(KEY) in against(foreign)[0]) == (True, True)
    assert ("its sidecar was altered after it was signed here",) == against(altered, at(RTX_3080, gpu=None))


CHANGES: dict[str, Any] = {
    "flavour": "tensorrt",
    "version": "1.7.1.117",
    "cuda": None,
    "driver": "550.1",
    "gpu": "NVIDIA GeForce RTX 3080",
    "compute_capabilities": ["8.6", "8.9"],
    "portable": True,
    "version_compatible": True,
    "hardware_compatible": "ampere-plus",
    "profile": "desktop-rtx-40",
    "settings": {},
    "shapes": {},
    "graph_sha256": "a" * 64,
    "plan_sha256": "a" * 64,
    "plan_bytes": 3999,
    "created": "2027-01-01T00:00:00Z",
    "signature": "a" * 64,
}


@pytest.mark.parametrize("field", CHANGES)
def test_no_field_can_be_changed_without_the_key(field: str) -> None:
    """Whichever field of the file is changed, it is refused - and what it says then counts for nothing."""
    changed = {**json.loads(encode(record())), field: CHANGES[field]}

    assert ("its sidecar was altered after it was signed here",) == against(decode(json.dumps(changed).encode()))


def test_every_field_is_signed() -> None:
    """The list above misses none; the format is checked before, the key's name tells whose signature it is."""

    assert set(Sidecar.model_fields) == {*CHANGES, "format", "signed_by"}
    assert "another key" in against(record().model_copy(update={"signed_by": "a" * 16}))[0]


@pytest.mark.parametrize("field", Sidecar.model_fields)
def test_every_field_is_documented(field: str) -> None:
    """Each has a row in docs/package-format.md, below the sidecar's heading."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "package-format.md").read_text(encoding="utf-8")
    section = text.partition("## The engine's sidecar\n")[2].partition("\n## ")[0]

    assert f"\n| `{field}` | " in section


def test_a_sidecar_survives_its_file() -> None:
    """What is written is what is read, and its signature holds."""
    sidecar = record()

    assert sidecar == decode(encode(sidecar))
    assert () == against(decode(encode(sidecar)))


SOUND = encode(record())
HOSTILE = {
    "empty": b"",
    "no JSON": b"engine",
    "not UTF-8": b'{"format": 1, "flavour": "\xff\xfe"}',
    "cut off": SOUND[:-20],
    "a list": b"[1]",
    "nested": b"[" * 100_000,
    "nested in the format": b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}",
    "nested in a field": SOUND.replace(b'"flags": [', b'"flags": [' + b"[" * 150 + b"]" * 150 + b","),
    "huge": b" " * (MAX_SIDECAR_BYTES + 1),
    "huge number": SOUND.replace(b'"plan_bytes": 4000', b'"plan_bytes": ' + b"9" * 4200),
    "huger number": SOUND.replace(b'"plan_bytes": 4000', b'"plan_bytes": ' + b"9" * 400_000),
    "infinite": SOUND.replace(b'"optimization_level": 3', b'"optimization_level": 1e999'),
    "not a number": SOUND.replace(b'"optimization_level": 3', b'"optimization_level": NaN'),
    "lone surrogate": SOUND.replace(b"desktop-rtx-30", b"\\ud800"),
    "escape sequence": SOUND.replace(b"desktop-rtx-30", b"\\u001b[2J"),
    "escape sequence for a key": SOUND.replace(b'"optimization_level"', b'"\\u001b[2J"'),
    "another format": SOUND.replace(b'"format": 1', b'"format": 2'),
    "format true": SOUND.replace(b'"format": 1', b'"format": true'),
    "unknown key": SOUND.replace(b'"format": 1', b'"format": 1, "also": 1'),
    "number as text": SOUND.replace(b'"plan_bytes": 4000', b'"plan_bytes": "4000"'),
    "text as number": SOUND.replace(b'"8.6"', b"8.6"),
    "no signature": SOUND.replace(json.loads(SOUND)["signature"].encode(), b""),
    "null": b"null",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_sidecar_is_a_reason(case: str) -> None:
    """Whatever the bytes are, the answer is one sentence that can be shown in a terminal."""
    with pytest.raises(Unreadable, match="its sidecar ") as raised:
        decode(HOSTILE[case])

    assert HOSTILE[case] != SOUND
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(Sidecar.model_fields)), JSON), st.booleans())
def test_any_json_is_decoded_or_refused(changes: dict[str, Any], whole: bool) -> None:
    """Wrong types anywhere are a reason, never another exception; what is taken can be compared and is refused."""
    base = json.loads(SOUND) if whole else {}
    try:
        reasons: tuple[str, ...] = against(decode(json.dumps({**base, **changes}).encode()))
    except Unreadable as exc:
        reasons = (str(exc),)

    assert all(reason.isprintable() for reason in reasons)
    assert reasons or {**base, **changes} == base or decode(json.dumps({**base, **changes}).encode()) == record()


@given(st.integers(0, len(SOUND) * 8 - 1))
@settings(max_examples=300)
def test_no_bit_of_the_file_can_be_turned(bit: int) -> None:
    """A turned bit is refused, unless it is in the white space."""
    turned = bytearray(SOUND)
    turned[bit // 8] ^= 1 << bit % 8
    try:
        sidecar = decode(bytes(turned))
    except Unreadable:
        return

    assert against(sidecar) or sidecar == record()
