"""Build and load: real plans of TensorRT for RTX, signed, kept, found again - and every other one refused unopened.

No GPU is needed. What stands in for one is named: `Stand-in` machines are what nvidia-smi and CUDA would say, and
`StandInOpener` takes a plan where TensorRT would, and remembers that it was asked.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_sdk import resources
from edge_sdk.backends import cuda
from edge_sdk.backends.base import Engine, EngineOrder
from edge_sdk.backends.onnx_bytes import interface
from edge_sdk.backends.tensorrt import TensorRTBackend, api, facts
from edge_sdk.backends.tensorrt.backend import Opening
from edge_sdk.backends.tensorrt.making import RTX_TARGETS, Recipe
from edge_sdk.backends.tensorrt.sidecar import PLAN, SIDECAR, Here, Sidecar, decode, encode, signed
from edge_sdk.backends.tensorrt.store import EngineStore
from edge_sdk.cli import main
from edge_sdk.doctor import engine_fit, examine
from edge_sdk.errors import BackendUnavailable, DeviceLost, EngineFailed, EngineUnfit, OutOfMemory, PackageError
from edge_sdk.package import PROFILE, BackendRecord, BatchingRecord, EnginePackage, EngineRecord, seal, writing
from edge_sdk.profiles import DeviceProfile, Gpu, Machine, TensorRTOptions, load_profile
from edge_sdk.settings import Settings
from edge_sdk.tensors import Array, Outputs, TensorSpec
from tests.packages import ARCHITECTURE, make_package, scaling

pytestmark = pytest.mark.skipif(
    api.find("tensorrt_rtx") is None or not facts.cuda_bindings(),
    reason="plans are built with tensorrt-rtx, and loading looks for cuda-python or pycuda",
)

ROOT = Path(__file__).resolve().parents[3]
DIGITS = (resources.EXAMPLES / "digits" / "digits.onnx").read_bytes()
RTX_30, RTX_40 = load_profile("desktop-rtx-30"), load_profile("desktop-rtx-40")


def stand_in_machine(gpu: str = "NVIDIA GeForce RTX 3080", capability: str = "8.6", **changes: Any) -> Machine:
    """What /proc and nvidia-smi would say of a machine with that GPU."""
    gpus = (Gpu(gpu, capability, 10 << 30, "581.15"),)
    fields = {"cpu_flags": frozenset({"avx2"}), "physical_cores": 4, "memory_bytes": 16 << 30, "device_tree": ""}
    return Machine(**{"architecture": ARCHITECTURE, **fields, "gpus": gpus, **changes})


def stand_in_gpu(name: str = "NVIDIA GeForce RTX 3080", capability: str = "8.6") -> Callable[[], cuda.Facts]:
    """What CUDA would say of that GPU."""
    return lambda: cuda.Facts(name, capability, 10 << 30, False, "13.0")


class StandInOpener:
    """Takes a plan where TensorRT and a GPU would be needed, and gives back an engine that computes nothing."""

    def __init__(self, refusing: Exception | None = None) -> None:
        self.plans: list[Callable[[], bytes]] = []
        self.openings: list[Opening] = []
        self._refusing = refusing

    def __call__(self, plan: Callable[[], bytes], opening: Opening) -> Engine:
        self.plans.append(plan)
        self.openings.append(opening)
        if self._refusing is not None:
            raise self._refusing
        return StandInEngine(opening)


class StandInEngine:
    """Has inputs and outputs, and computes nothing."""

    def __init__(self, opening: Opening) -> None:
        self.inputs: tuple[TensorSpec, ...] = opening.inputs
        self.outputs: tuple[TensorSpec, ...] = opening.outputs

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        raise EngineFailed("A stand-in computes nothing.")

    def close(self) -> None:
        pass


def backend(store: Path, opener: StandInOpener | None = None, **machine: str) -> TensorRTBackend:
    """The backend on a machine that has an RTX 3080, or what `machine` says, and this store."""
    return TensorRTBackend(
        store,
        machine=lambda: stand_in_machine(**machine),
        gpu=stand_in_gpu(**{"name" if key == "gpu" else key: value for key, value in machine.items()}),
        opener=opener or StandInOpener(),
    )


def digits_order(profile: DeviceProfile = RTX_30, *, here: bool = False) -> EngineOrder:
    inputs, _ = interface(DIGITS)
    return EngineOrder(DIGITS, inputs, profile, BatchingRecord(max_batch=4, best_batch=4), {}, here)


def pack(folder: Path, engine: Callable[[Path], EngineRecord | None], profile: DeviceProfile = RTX_30) -> EnginePackage:
    """A package of the digits model for `profile`, with what `engine` puts into it, sealed like any other."""
    inputs, outputs = interface(DIGITS)
    made = make_package(folder, DIGITS, max_batch=4, inputs=inputs, outputs=outputs, profile=profile.name)
    with writing(folder) as staged:
        (staged / "graph.onnx").write_bytes(DIGITS)
        (staged / PROFILE).write_text(profile.model_dump_json())
        record = BackendRecord(name="tensorrt", engine=engine(staged))
        seal(staged, made.manifest.model_copy(update={"backend": record}))
    return EnginePackage.open(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[EnginePackage, Path]:
    """The digits model with a real engine for an RTX 30, and the store whose key signed it. Not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    package = pack(folder / "digits", lambda staged: backend(folder / "store").build(digits_order(), staged))
    return package, folder / "store"


@pytest.fixture
def package(built: tuple[EnginePackage, Path], tmp_path: Path) -> EnginePackage:
    """A copy of `built`, to be spoilt."""
    shutil.copytree(built[0].path, tmp_path / "digits")
    return EnginePackage.open(tmp_path / "digits")


@pytest.fixture
def store(built: tuple[EnginePackage, Path], tmp_path: Path) -> Path:
    """A store with the key that signed `built`, and nothing else."""
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy2(built[1] / "key", folder / "key")
    return folder


def resealed(package: EnginePackage) -> EnginePackage:
    """The package with a manifest that agrees with its altered files, as somebody would write it who wants that."""
    seal(package.path, package.manifest)
    return EnginePackage.open(package.path)


def refused(package: EnginePackage, store: Path, **machine: str) -> str:
    """Why the package has no engine on that machine. Nothing may have been opened for it."""
    opener = StandInOpener()
    with pytest.raises(EngineUnfit) as raised:
        backend(store, opener, **machine).load(package, package.profile())

    assert [] == opener.plans
    return raised.value.problem


# Into a package


def test_a_built_engine_says_what_it_fits(built: tuple[EnginePackage, Path]) -> None:
    """The sidecar is the truth about the plan beside it, and the record is what the build took."""
    package, _ = built
    plan, described = (package.read(name) for name in (PLAN, SIDECAR))
    sidecar, record = decode(described), package.manifest.backend.engine

    assert record is not None
    assert (PLAN, SIDECAR, len(plan)) == (record.file, record.sidecar, record.bytes)
    assert (len(plan), package.manifest.files[PLAN].sha256) == (sidecar.plan_bytes, sidecar.plan_sha256)
    assert (package.manifest.files["graph.onnx"].sha256, RTX_30.name) == (sidecar.graph_sha256, sidecar.profile)
    assert ("tensorrt_rtx", api.find("tensorrt_rtx")) == (sidecar.flavour, sidecar.version)
    assert (("8.6",), False, None, None) == (
        sidecar.compute_capabilities, sidecar.portable, sidecar.gpu, sidecar.driver
    )  # fmt: skip
    assert ((1, 1, 8, 8), (4, 1, 8, 8)) == (sidecar.shapes["image"].smallest, sidecar.shapes["image"].largest)
    assert sidecar.cuda == facts.cuda_release("tensorrt_rtx") is not None
    assert record.seconds > 0
    assert record.peak_bytes > 50_000_000
    assert {PLAN, SIDECAR, PROFILE, "graph.onnx", "manifest.json"} == {file.name for file in package.path.iterdir()}


def test_a_fitting_engine_is_opened_with_the_bytes_that_were_built(package: EnginePackage, store: Path) -> None:
    """And with what the package says of its inputs and outputs; the graph only where weights come from it."""
    opener = StandInOpener()
    engine = backend(store, opener).load(package, package.profile())

    assert package.manifest.inputs == engine.inputs
    assert ("tensorrt_rtx", None) == (opener.openings[0].flavour, opener.openings[0].graph)
    assert [package.read(PLAN)] == [plan() for plan in opener.plans]


@pytest.mark.parametrize("place", ["first bit", "middle", "last bit"])
def test_a_turned_bit_is_refused(package: EnginePackage, store: Path, place: str) -> None:
    """One bit anywhere in the plan - also where the manifest was made to agree with it."""
    plan = bytearray(package.read(PLAN))
    at = {"first bit": 0, "middle": len(plan) // 2, "last bit": len(plan) - 1}[place]
    plan[at] ^= 0x01 if place == "first bit" else 0x80
    (package.path / PLAN).write_bytes(plan)

    assert "its plan was altered: its sha256 is" in refused(package, store)
    assert "its plan was altered: its sha256 is" in refused(resealed(package), store)


def test_a_truncated_plan_is_refused(package: EnginePackage, store: Path) -> None:
    plan = package.read(PLAN)
    (package.path / PLAN).write_bytes(plan[:-1000])

    assert f"its plan is truncated: {len(plan) - 1000:,} of {len(plan):,} bytes" in refused(package, store)
    assert "its plan is truncated" in refused(resealed(package), store)


@pytest.mark.parametrize("missing", [PLAN, SIDECAR])
def test_half_an_engine_is_refused(package: EnginePackage, store: Path, missing: str) -> None:
    (package.path / missing).unlink()

    assert "it cannot be read: No such file" in refused(package, store)
    assert "it is not among the package's files" in refused(resealed(package), store)


@pytest.mark.parametrize("place", [PLAN, SIDECAR])
def test_a_pipe_in_the_place_of_an_engine_is_refused(package: EnginePackage, store: Path, place: str) -> None:
    """It is not waited for: whoever opened it to write may never come."""
    (package.path / place).unlink()
    os.mkfifo(package.path / place)

    assert f"it cannot be read: {place} is no file" in refused(package, store)


def test_another_profiles_engine_is_refused(tmp_path: Path, store: Path) -> None:
    """A real engine for an RTX 40, signed here, on an RTX 30."""
    there = backend(store)
    package = pack(tmp_path / "ada", lambda staged: there.build(digits_order(RTX_40), staged), RTX_40)

    assert "compute capability 8.9; NVIDIA GeForce RTX 3080 has 8.6" in refused(package, store)
    assert backend(store, gpu="NVIDIA GeForce RTX 4090", capability="8.9").load(package, RTX_40)


def test_another_versions_engine_is_refused(package: EnginePackage, store: Path) -> None:
    """As it would be after an upgrade: the sidecar is sound, signed here, and names the version before."""
    rewrite(package, store, version="1.6.0.13")
    problem = refused(resealed(package), store)

    assert f"TensorRT for RTX 1.6.0.13; here is {api.find('tensorrt_rtx')}" in problem
    assert "no change of version" in problem


def rewrite(package: EnginePackage, store: Path, **changes: Any) -> Sidecar:
    """The package's sidecar as another release, or another machine with this key, would have written it."""
    sidecar = decode((package.path / SIDECAR).read_bytes()).model_copy(update=changes)
    sidecar = signed(sidecar, EngineStore(store).key())
    (package.path / SIDECAR).write_bytes(encode(sidecar))
    return sidecar


def test_another_keys_engine_is_refused(package: EnginePackage, tmp_path: Path) -> None:
    """A machine that has a key of its own, and one that has none yet."""
    other = tmp_path / "other"
    fresh = refused(package, other)
    EngineStore(other).key()

    assert "this one has no key yet" in fresh
    assert not (other / "engines").exists()
    assert "built by another machine or user: it is signed with another key" in refused(package, other)


def test_a_sidecar_that_claims_more_is_refused(package: EnginePackage, store: Path) -> None:
    """Nobody makes an engine fit by writing that it does."""
    claimed = json.loads((package.path / SIDECAR).read_bytes()) | {"compute_capabilities": ["8.6", "8.9"]}
    (package.path / SIDECAR).write_text(json.dumps(claimed))

    assert "its sidecar was altered after it was signed here" in refused(resealed(package), store)


def test_another_graphs_engine_is_refused(package: EnginePackage, store: Path) -> None:
    (package.path / "graph.onnx").write_bytes(scaling().SerializeToString())

    assert "it was built from another graph" in refused(resealed(package), store)


def test_an_altered_graph_is_an_altered_package(package: EnginePackage, store: Path) -> None:
    """Weights may come from it, and the CPU answers with it."""
    (package.path / "graph.onnx").write_bytes(scaling().SerializeToString())
    opener = StandInOpener()
    with pytest.raises(PackageError, match="altered after the build"):
        backend(store, opener).load(package, RTX_30)

    assert [] == opener.plans


def test_a_package_cannot_name_a_file_elsewhere(package: EnginePackage, store: Path, tmp_path: Path) -> None:
    record = package.manifest.backend.engine
    assert record is not None
    shutil.copy2(package.path / PLAN, tmp_path / PLAN)
    sneaky = BackendRecord(name="tensorrt", engine=record.model_copy(update={"file": f"../{PLAN}"}))
    seal(package.path, package.manifest.model_copy(update={"backend": sneaky}))

    assert "not among the package's files" in refused(EnginePackage.open(package.path), store)


def test_nothing_there_says_so(tmp_path: Path, store: Path) -> None:
    """With the next step: this machine can build it."""
    package = pack(tmp_path / "bare", lambda staged: None)
    with pytest.raises(EngineUnfit, match=r"There is no engine for bare 1 .* yet") as raised:
        backend(store).load(package, RTX_30)

    assert () == raised.value.reasons
    assert "`edge-sdk serve` builds one in the background" in raised.value.fix


# Into the store


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store into which an engine of the digits model was built for the GPU here. Not to be changed."""
    folder = tmp_path_factory.mktemp("stored")
    backend(folder).build(digits_order(RTX_40, here=True), None)
    return folder


@pytest.fixture
def filled(stored: Path, tmp_path: Path) -> Path:
    """A copy of `stored`."""
    return shutil.copytree(stored, tmp_path / "filled")


def test_an_engine_of_the_store_is_found_by_its_graph(filled: Path, tmp_path: Path) -> None:
    """Built for the GPU here, whatever GPU the profile is of; loaded for a package that has none."""
    package = pack(tmp_path / "bare", lambda staged: None, RTX_40)
    (entry,) = EngineStore(filled).engines(digits_order().graph_sha256)
    os.utime(entry, (1e9, 1e9))
    opener = StandInOpener()
    backend(filled, opener).load(package, RTX_40)

    assert time.time() - 60 < entry.stat().st_mtime, "it counts as used"
    assert ("8.6",) == decode((entry / SIDECAR).read_bytes()).compute_capabilities
    assert [(entry / PLAN).read_bytes()] == [plan() for plan in opener.plans]
    assert {PLAN, SIDECAR} == {file.name for file in entry.iterdir()}


def test_where_the_packages_engine_does_not_fit_the_stores_is_taken(filled: Path, package: EnginePackage) -> None:
    """The package's is signed with another key; if that were all there is, both reasons would be said."""
    opener = StandInOpener()
    backend(filled, opener).load(package, RTX_30)
    problem = refused(package, filled, gpu="NVIDIA GeForce RTX 4090", capability="8.9")

    assert 1 == len(opener.plans)
    assert "The package's engine: it was built by another machine or user" in problem
    assert "The store's engine: it was built for compute capability 8.6; NVIDIA GeForce RTX 4090 has 8.9." in problem


def test_trust_is_proposed_where_it_is_all_that_lacks(package: EnginePackage, tmp_path: Path) -> None:
    """Not for an engine that would not be loaded all the same."""
    here = backend(tmp_path / "there")
    ada = backend(tmp_path / "there", gpu="NVIDIA GeForce RTX 4090", capability="8.9")
    fixes = []
    for tensorrt in (here, ada):
        with pytest.raises(EngineUnfit) as raised:
            tensorrt.load(package, RTX_30)
        fixes.append(raised.value.fix)

    assert [True, False] == [f"`edge-sdk trust {package.path}`" in fix for fix in fixes]
    assert [True, True] == ["`edge-sdk serve` builds one in the background" in fix for fix in fixes]


def test_a_tampered_engine_in_the_store_is_refused(filled: Path, tmp_path: Path) -> None:
    package = pack(tmp_path / "bare", lambda staged: None)
    (entry,) = EngineStore(filled).engines(digits_order().graph_sha256)
    (entry / PLAN).write_bytes((entry / PLAN).read_bytes()[:-1] + b"?")

    assert "The store's engine: its plan was altered" in refused(package, filled)


def test_what_the_runtime_refuses_is_dropped(filled: Path, tmp_path: Path) -> None:
    """With TensorRT's own words; the next build starts afresh."""
    package = pack(tmp_path / "bare", lambda staged: None)
    opener = StandInOpener(EngineFailed("TensorRT says: magic tag does not match."))
    with pytest.raises(EngineUnfit, match="it does not load: TensorRT says: magic tag does not match") as raised:
        backend(filled, opener).load(package, RTX_30)

    assert 1 == len(opener.plans)
    assert [] == EngineStore(filled).engines(digits_order().graph_sha256)
    assert 1 == len(raised.value.reasons)


def test_what_the_runtime_refuses_of_a_package_stays_in_it(package: EnginePackage, store: Path) -> None:
    """A package is not ours to change."""
    opener = StandInOpener(EngineUnfit("Its inputs are others.", reasons=()))
    with pytest.raises(EngineUnfit, match="it does not load: Its inputs are others"):
        backend(store, opener).load(package, RTX_30)

    package.verify()


@pytest.mark.parametrize("error", [DeviceLost("gone"), OutOfMemory("full"), BackendUnavailable("no driver")])
def test_what_is_not_the_engines_fault_is_not_held_against_it(filled: Path, tmp_path: Path, error: Exception) -> None:
    """A GPU without memory, or without a driver, is no reason to build again."""
    package = pack(tmp_path / "bare", lambda staged: None)
    with pytest.raises(type(error)):
        backend(filled, StandInOpener(error)).load(package, RTX_30)

    assert 1 == len(EngineStore(filled).engines(digits_order().graph_sha256))


def test_an_engine_in_use_can_be_loaded_again_when_the_store_has_dropped_it(filled: Path, tmp_path: Path) -> None:
    """An engine that made room on the device comes back: with the same bytes, or not at all."""
    package = pack(tmp_path / "bare", lambda staged: None)
    opener = StandInOpener()
    backend(filled, opener).load(package, RTX_30)
    (entry,) = EngineStore(filled).engines(digits_order().graph_sha256)
    first, again = opener.plans[0](), opener.plans[0]()
    with (entry / PLAN).open("r+b") as file:
        EngineStore(filled).drop(entry)
        dropped = opener.plans[0]()
        file.write(b"????")

    assert first == again == dropped
    with pytest.raises(EngineFailed, match="altered while it was in use"):
        opener.plans[0]()


def test_a_plan_that_is_forgotten_is_closed(filled: Path, tmp_path: Path) -> None:
    """Looking at engines leaves no file open; an engine in use has its own."""
    package = pack(tmp_path / "bare", lambda staged: None)
    opener = StandInOpener()
    tensorrt = backend(filled, opener)
    tensorrt.fit(package)
    gc.collect()
    looked = open_files(filled)
    tensorrt.load(package, RTX_30)
    used = open_files(filled)
    opener.plans.clear()
    gc.collect()

    assert ([], [PLAN], []) == (looked, used, open_files(filled))


def open_files(folder: Path) -> list[str]:
    """The names of the files below `folder` that this process has open."""
    opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    return [Path(file).name for file in opened if file.startswith(str(folder.resolve()))]


def test_the_same_order_is_the_same_entry(stored: Path) -> None:
    """Content decides: another graph, batch, option or GPU is another engine; the model's name is in none of them."""
    here = facts.here("tensorrt_rtx", stand_in_machine())
    options = RTX_30.tensorrt
    assert options is not None
    order = digits_order(here=True)
    names = {
        Recipe.of(order, options, here).name,
        Recipe.of(digits_order(RTX_40, here=True), options, here).name,
        Recipe.of(dataclasses.replace(order, graph=DIGITS + b"\0"), options, here).name,
        Recipe.of(dataclasses.replace(order, batching=BatchingRecord(max_batch=8, best_batch=4)), options, here).name,
        Recipe.of(order, options.model_copy(update={"optimization_level": 5}), here).name,
        Recipe.of(order, options, dataclasses.replace(here, compute_capability="8.9")).name,
        Recipe.of(order, options, dataclasses.replace(here, version="1.8.0")).name,
    }

    assert 6 == len(names)


@pytest.mark.parametrize(
    ("flavour", "capability", "here", "targets"),
    [
        ("tensorrt_rtx", "8.9", True, ("8.9",)),
        ("tensorrt_rtx", "9.0", True, ()),
        ("tensorrt_rtx", None, True, ()),
        ("tensorrt_rtx", "8.9", False, ("8.6",)),
        ("tensorrt", "8.7", True, ()),
    ],
)
def test_what_an_engine_is_built_for(
    flavour: str, capability: str | None, here: bool, targets: tuple[str, ...]
) -> None:
    """The profile's GPU, or the one here; a portable engine where RTX has no name for that."""
    options = TensorRTOptions.model_validate({"flavour": flavour, "compute_capabilities": ["8.6"]})
    found = Here(flavour, "1.0", "a GPU", capability)

    assert targets == Recipe.of(digits_order(here=here), options, found).targets


def test_the_targets_are_those_of_rtx_itself() -> None:
    """A GPU it has a name for gets an engine of its own, whatever the release."""
    trt: Any = pytest.importorskip("tensorrt_rtx")
    named = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]

    assert set(RTX_TARGETS) == {f"{digits[:-1]}.{digits[-1]}" for digits in named}


def test_an_engine_straight_from_a_graph(store: Path) -> None:
    """For a profile that knows nothing of TensorRT, too. Nothing is kept but what is loaded."""
    opener = StandInOpener()
    profile = load_profile("cpu-x86")
    engine = backend(store, opener).load_graph(DIGITS, profile)

    assert ["image"] == [spec.name for spec in engine.inputs]
    assert len(opener.plans[0]()) > 10_000
    assert ["key"] == [file.name for file in store.iterdir()]


def test_a_store_that_cannot_be_written_keeps_from_building(tmp_path: Path) -> None:
    """It is known before the build, not after it."""
    (tmp_path / "file").write_bytes(b"")
    tensorrt = backend(tmp_path / "file" / "store")
    able = tensorrt.can_build(RTX_30)

    assert (False, True) == (bool(able), "is no folder" in able.why_not)
    with pytest.raises(BackendUnavailable, match="is no folder"):
        tensorrt.build(digits_order(), None)


def test_a_key_that_others_can_read_vouches_for_nothing(package: EnginePackage, store: Path) -> None:
    (store / "key").chmod(0o644)
    opener = StandInOpener()
    with pytest.raises(BackendUnavailable, match="can be used by others"):
        backend(store, opener).load(package, RTX_30)

    assert [] == opener.plans


# What can be done here


def test_each_lack_is_named_with_its_fix(store: Path) -> None:
    """This machine, seen as it is but for its GPUs: TensorRT for RTX is here, a GPU is not."""
    without = TensorRTBackend(store, machine=lambda: stand_in_machine(gpus=())).availability()
    on_a_jetson = TensorRTBackend(
        store, machine=lambda: stand_in_machine(gpus=(), device_tree="NVIDIA Jetson Orin Nano Developer Kit")
    ).availability()

    assert ("There is no NVIDIA GPU here.", True) == (without.why_not, "nvidia-smi" in without.fix)
    assert api.find("tensorrt_rtx") == backend(store).availability().version
    if api.find("tensorrt") is None:
        assert ("TensorRT is not installed.", True) == (on_a_jetson.why_not, "JetPack" in on_a_jetson.fix)


def test_rtx_engines_are_built_anywhere_the_others_on_their_gpu(store: Path) -> None:
    bare = TensorRTBackend(store, machine=lambda: stand_in_machine(gpus=()))

    assert bare.can_build(RTX_30)
    assert api.find("tensorrt") is not None or not bare.can_build(load_profile("datacenter-h100"))


@pytest.mark.parametrize(
    ("machine", "gpu", "capability"),
    [
        (stand_in_machine(), "NVIDIA GeForce RTX 3080", "8.6"),
        (stand_in_machine(gpus=()), None, None),
        (
            stand_in_machine(gpus=(), architecture="aarch64", device_tree="NVIDIA Jetson Orin Nano Developer Kit"),
            "NVIDIA Jetson Orin Nano Developer Kit",
            "8.7",
        ),
        (
            stand_in_machine(gpus=(Gpu("Orin (nvgpu)"),), architecture="aarch64", device_tree="NVIDIA Jetson AGX Orin"),
            "NVIDIA Jetson AGX Orin",
            "8.7",
        ),
    ],
)
def test_what_is_here(machine: Machine, gpu: str | None, capability: str | None) -> None:
    """A Jetson's GPU is known by its device tree, whatever its nvidia-smi says."""
    found = facts.here("tensorrt", machine)

    assert (gpu, capability) == (found.gpu, found.compute_capability)


def test_cuda_knows_better_than_nvidia_smi() -> None:
    """Which of several GPUs it is that this process gets."""
    found = facts.here("tensorrt_rtx", stand_in_machine(), stand_in_gpu("NVIDIA GeForce RTX 4090", "8.9")())

    assert ("NVIDIA GeForce RTX 4090", "8.9", "13.0", "581.15") == (
        found.gpu, found.compute_capability, found.cuda, found.driver
    )  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "flavour"),
    [
        (stand_in_machine(architecture="aarch64", device_tree="NVIDIA Jetson Orin Nano", gpus=()), "tensorrt"),
        (stand_in_machine(architecture="x86_64"), "tensorrt_rtx"),
    ],
)
def test_the_flavour_of_a_machine(machine: Machine, flavour: str) -> None:
    assert flavour == facts.flavour_for(machine)
    assert "tensorrt_rtx" == facts.flavour_for(machine, RTX_30)


# Trusting


def test_a_trusted_engine_is_loaded_from_the_store(package: EnginePackage, tmp_path: Path) -> None:
    """The package stays as it is; what was refused before is found, signed with this machine's key."""
    opener = StandInOpener()
    there = backend(tmp_path / "there", opener)
    assert "another machine or user" in refused(package, there.store.folder)
    trusted = there.trust(package)
    there.load(package, RTX_30)

    assert [(package.path / PLAN).read_bytes()] == [plan() for plan in opener.plans]
    assert [trusted.entry] == there.store.engines(digits_order().graph_sha256)
    assert trusted.key == decode((trusted.entry / SIDECAR).read_bytes()).signed_by
    package.verify()


def test_what_would_not_be_loaded_is_not_signed(package: EnginePackage, tmp_path: Path) -> None:
    """Trust says who made it. It makes nothing fit, and does not mend what was altered."""
    ada = backend(tmp_path / "there", gpu="NVIDIA GeForce RTX 4090", capability="8.9")
    with pytest.raises(EngineUnfit, match=r"whoever signed it: it was built for compute capability 8\.6"):
        ada.trust(package)
    (package.path / PLAN).write_bytes((package.path / PLAN).read_bytes()[:-1] + b"?")
    with pytest.raises(EngineUnfit, match="its plan was altered"):
        backend(tmp_path / "there").trust(resealed(package))
    with pytest.raises(EngineUnfit, match="holds no engine to trust"):
        ada.trust(pack(tmp_path / "bare", lambda staged: None))

    assert ["key"] == [file.name for file in (tmp_path / "there").iterdir()]


def test_what_was_altered_after_it_was_signed_here_is_not_signed_again(package: EnginePackage, store: Path) -> None:
    claimed = json.loads((package.path / SIDECAR).read_bytes()) | {"compute_capabilities": ["8.6", "8.9"]}
    (package.path / SIDECAR).write_text(json.dumps(claimed))
    with pytest.raises(EngineUnfit, match="altered after it was signed here"):
        backend(store).trust(resealed(package))


# What a person is told


@pytest.mark.skipif(bool(Machine.read().gpus), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_why_and_what_answers(package: EnginePackage, store: Path) -> None:
    """`inspect`, `doctor` and `trust`, as they are on this machine."""
    fit = engine_fit(package, store)
    found = {finding.subject: finding for finding in examine(Settings(engines=package.path, engine_cache=store))}
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(package.path), "--json"]).output)
    shown = CliRunner().invoke(main, ["inspect", str(package.path)]).output
    refusal = CliRunner().invoke(main, ["trust", str(package.path), "--store", str(store)])

    assert fit is not None
    assert ("the package's engine: there is no NVIDIA GPU here",) == fit.why_not
    assert ("", "onnxruntime") == (fit.place, fit.meanwhile)
    assert (False, "onnxruntime") == (inspected["engine"]["fits"], inspected["engine"]["meanwhile"])
    assert "engine: no engine fits this machine" in shown
    assert "note" == found[str(package)].level
    assert "there is no NVIDIA GPU here" in found[str(package)].detail
    assert "nvidia-smi" in found[str(package)].fix
    assert (4, True) == (refusal.exit_code, "there is no NVIDIA GPU here" in refusal.output)
    assert "can be written, with its key, 0 engines" in found["engine store"].detail
    assert ("ok", True) == (found["CUDA binding"].level, "cuda-bindings" in found["CUDA binding"].detail)


def test_an_engine_that_fits_is_said_to(
    package: EnginePackage, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has the GPU - here, one that stands in for it."""
    monkeypatch.setattr(facts, "_found", [stand_in_machine()])
    fit = engine_fit(package, store)
    trusted = CliRunner().invoke(main, ["trust", str(package.path), "--store", str(tmp_path / "new"), "--json"])

    assert fit is not None
    assert ("the package's engine", "the package's engine fits this machine") == (fit.place, fit.text())
    assert 0 == trusted.exit_code, trusted.output
    assert PLAN in {file.name for file in Path(json.loads(trusted.output)["entry"]).iterdir()}


def test_looking_loads_nothing_of_nvidias(package: EnginePackage, store: Path) -> None:
    """`doctor`, `inspect` and what is asked before a build: in a process of its own, whose modules are then counted."""
    program = """
import sys
import time
from pathlib import Path
from edge_sdk.backends.tensorrt import TensorRTBackend
from edge_sdk.doctor import engine_fit, examine
from edge_sdk.package import EnginePackage
from edge_sdk.settings import Settings
package, store = Path(sys.argv[1]), Path(sys.argv[2])
examine(Settings(engines=package, engine_cache=store))
engine_fit(EnginePackage.open(package), store)
TensorRTBackend(store).can_build(EnginePackage.open(package).profile())
print([name for name in sys.modules if name.partition(".")[0] in ("tensorrt", "tensorrt_rtx", "cuda", "pycuda")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, package.path, store], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert "[]" == done.stdout.strip()
