"""The adapters' names against TensorRT's: read from their source, from the real modules, and from real bindings."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_sdk.backends.tensorrt import api
from edge_sdk.backends.tensorrt.api import ADAPTERS, Api, Api8, Api10, Api11, ApiRtx
from edge_sdk.backends.tensorrt.compiling import Draft
from edge_sdk.backends.tensorrt.names import lacking
from edge_sdk.backends.tensorrt.refusals import fallback_notes
from edge_sdk.errors import BackendUnavailable, EngineFailed, ProfileError
from edge_sdk.profiles import TensorRTOptions, load_profiles
from tests.backends.tensorrt.read_bindings import FOLDER, RELEASES
from tests.backends.tensorrt.vendor_use import used_by

GENERATIONS: dict[type[Api], tuple[str, ...]] = {
    Api8: ("8.6.1",), Api10: ("10.3.0", "10.13.3.9"), Api11: ("11.4.0.106",),
}  # fmt: skip
"""Adapter -> the releases whose bindings were read."""

every_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
every_release = pytest.mark.parametrize("release", RELEASES)


def bindings(release: str) -> Any:
    """A module with the classes and names of a release's bindings, and nothing behind them.

    It stands in for a TensorRT that cannot be installed here, where only names matter.
    """
    classes = json.loads((FOLDER / f"{release}.json").read_text(encoding="utf-8"))
    return SimpleNamespace(**{
        name: type(name, (), dict.fromkeys(attributes.split())) for name, attributes in classes.items()
    })  # fmt: skip


def adapter_of(release: str) -> type[Api]:
    return next(adapter for adapter, releases in GENERATIONS.items() if release in releases)


def opened(release: str) -> Api:
    return adapter_of(release)(bindings(release), "tensorrt", release)


@pytest.fixture(scope="module")
def rtx() -> Api:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    return api.open_api("tensorrt_rtx")


def options(flavour: str = "tensorrt", **wishes: Any) -> TensorRTOptions:
    return TensorRTOptions.model_validate({"flavour": flavour, "compute_capabilities": ("8.7",), **wishes})


@every_adapter
def test_an_adapter_uses_exactly_its_names(adapter: type[Api]) -> None:
    """What its source asks of TensorRT is what `names` lists, no more and no less, and nothing escapes the reading."""
    use = used_by(adapter)
    used = use.names | use.optional
    used |= {name.partition(".")[0] for name in used}

    assert set() == use.unknown
    assert used == adapter.names.required
    assert {name.partition(".")[0] for name in adapter.names.optional} <= use.optional


@every_adapter
def test_names_against_tensorrt_for_rtx(adapter: type[Api], rtx: Api) -> None:
    """The real module has every name of every adapter, except those that are listed as gone."""

    assert adapter.names.not_in_rtx == set(lacking(rtx.trt, adapter.names.required))


def test_names_against_the_installed_tensorrt() -> None:
    """On a Jetson or a server, the adapter that is chosen has all it needs."""
    if api.find("tensorrt") is None:
        pytest.skip("tensorrt is not installed")

    assert () == lacking(api.open_api("tensorrt").trt, api.open_api("tensorrt").names.required)


@every_release
def test_names_against_real_bindings(release: str) -> None:
    """The bindings of a release lead to the adapter of its generation, and have all of its names."""
    module = bindings(release)

    assert adapter_of(release) is api.adapter_for(module)
    assert () == lacking(module, adapter_of(release).names.required)


def test_the_real_module_for_rtx_leads_to_its_adapter(rtx: Api) -> None:
    """It is chosen by what it has, and one adapter serves the process."""

    assert isinstance(rtx, ApiRtx)
    assert rtx is api.open_api("tensorrt_rtx")
    assert (api.find("tensorrt_rtx"), "rtx", True) == (rtx.version, rtx.generation, rtx.captures_graphs)


@pytest.mark.parametrize("adapter", GENERATIONS)
def test_optional_names_are_optional(adapter: type[Api]) -> None:
    """Some releases of the generation have them and some have not; otherwise they would not be in that list."""
    for name in adapter.names.optional:
        have = [release for release in GENERATIONS[adapter] if not lacking(bindings(release), frozenset({name}))]

        assert 0 < len(have) < len(GENERATIONS[adapter])


@pytest.mark.parametrize(
    ("release", "misfits"),
    [
        ("8.6.1", {Api10, Api11, ApiRtx}),
        ("10.3.0", {ApiRtx}),
        ("10.13.3.9", {ApiRtx}),
        ("11.4.0.106", {Api8, ApiRtx}),
    ],
)
def test_adapters_of_other_generations_misfit(release: str, misfits: set[type[Api]]) -> None:
    """The tables tell generations apart. 10 still has what 8.6 had; 11 is 10 without it."""

    assert misfits == {adapter for adapter in ADAPTERS if lacking(bindings(release), adapter.names.required)}


def test_a_module_that_lacks_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is refused as it is opened, by that name: not in the middle of a build."""
    classes = json.loads((FOLDER / "8.6.1.json").read_text(encoding="utf-8"))
    classes["IBuilderConfig"] = classes["IBuilderConfig"].replace("builder_optimization_level", "")
    lines = [f"{name} = type('{name}', (), dict.fromkeys('{names}'.split()))" for name, names in classes.items()]
    fake_installation(monkeypatch, tmp_path, "\n".join(["__version__ = '8.5.2'", *lines]))

    with pytest.raises(BackendUnavailable, match=r"8\.5\.2 lacks IBuilderConfig\.builder_optimization_level"):
        api.open_api("tensorrt")


def test_an_installation_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel without its libraries fails on import, each in its own way; the error says how, and what it needs."""
    fake_installation(monkeypatch, tmp_path, "raise OSError('libnvinfer.so.10: cannot open shared object file')")
    with pytest.raises(BackendUnavailable, match=r"cannot be imported: libnvinfer\.so\.10: cannot open") as raised:
        api.open_api("tensorrt")

    assert "JetPack" in raised.value.fix


def fake_installation(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """A module called `tensorrt`, in the way of a real one if there is any."""
    (folder / "tensorrt.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # so that it is put back, or taken out again, at the end
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(api, "open_api", api.open_api.__wrapped__)


def test_what_is_not_installed() -> None:
    """Found out without importing anything; the error says how to get it."""
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")

    assert api.find("tensorrt") is None
    with pytest.raises(BackendUnavailable, match="tensorrt is not installed"):
        api.open_api("tensorrt")


def test_a_folder_of_that_name_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls any folder a package. One that lies where the service was started has no TensorRT in it."""
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    assert importlib.util.find_spec("tensorrt") is not None
    assert api.find("tensorrt") is None


def test_nothing_of_the_vendor_is_loaded_before_it_is_opened() -> None:
    """Neither importing the adapters nor looking for TensorRT loads it."""
    program = (
        "import sys; from edge_sdk.backends.tensorrt import api, builder, child, process; api.find('tensorrt_rtx'); "
        "print(*(m for m in sys.modules if m.partition('.')[0] in ('tensorrt', 'tensorrt_rtx', 'cuda', 'pycuda')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "" == done.stdout.strip()


@pytest.mark.parametrize(
    ("release", "wishes", "reason"),
    [
        ("8.6.1", {"weight_streaming": True}, "weight_streaming, which came with TensorRT 10"),
        ("8.6.1", {"strip_weights": True}, "strip_weights, which came with TensorRT 10"),
        ("8.6.1", {"hardware_compatible": "same-compute-capability"}, "came with a later release"),
        ("10.3.0", {"hardware_compatible": "same-compute-capability"}, "came with a later release"),
        ("10.3.0", {"portable": True}, "portable, which only tensorrt_rtx has"),
        ("11.4.0.106", {"portable": True}, "portable, which only tensorrt_rtx has"),
        ("10.13.3.9", {"hardware_compatible": "same-compute-capability", "weight_streaming": True}, None),
        ("11.4.0.106", {"hardware_compatible": "ampere-plus", "strip_weights": True, "dla_cores": 2}, None),
        ("8.6.1", {"hardware_compatible": "ampere-plus", "version_compatible": True, "dla_cores": 2}, None),
    ],
)
def test_wishes_that_a_generation_cannot_fulfil(release: str, wishes: dict[str, Any], reason: str | None) -> None:
    """They are refused and said, not passed over; whatever the generation can do is taken."""
    if reason is None:
        opened(release).refuse(options(**wishes), (), gpu=True)
        return
    with pytest.raises(ProfileError, match=reason):
        opened(release).refuse(options(**wishes), (), gpu=True)


def test_tensorrt_builds_for_the_gpu_at_hand() -> None:
    """Target compute capabilities are tensorrt_rtx's: elsewhere they would be a promise that nobody keeps."""
    with pytest.raises(ProfileError, match=r"compute capabilities 8\.7, it builds for the GPU at hand only"):
        opened("10.3.0").refuse(options(), ("8.7",), gpu=True)


@pytest.mark.parametrize(
    ("wishes", "reason"),
    [
        ({"version_compatible": True}, "version_compatible, its plans fit one version only"),
        ({"hardware_compatible": "ampere-plus"}, "here it is portable, or several compute_capabilities"),
        ({"dla_cores": 1}, "DLAs are on Jetson"),
        ({"strip_weights": True}, "strip_weights on a machine without a GPU"),
    ],
)
def test_wishes_that_tensorrt_for_rtx_cannot_fulfil(rtx: Api, wishes: dict[str, Any], reason: str) -> None:
    """Stripping works where there is a GPU; the others not at all."""
    with pytest.raises(ProfileError, match=reason):
        rtx.refuse(options("tensorrt_rtx", **wishes), ("8.6",), gpu=False)


def test_an_unknown_target(rtx: Api) -> None:
    """The error names the ones there are."""
    with pytest.raises(ProfileError, match=r"compute capability 8\.7, it has 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1"):
        rtx.refuse(options("tensorrt_rtx"), ("8.6", "8.7"), gpu=False)


def test_our_profiles_ask_for_nothing_impossible(rtx: Api) -> None:
    """Every profile that ships for RTX is one that the installed TensorRT for RTX can build for."""
    wanted = [profile.tensorrt for profile in load_profiles() if profile.tensorrt is not None]
    for asked in wanted:
        if asked.flavour == "tensorrt_rtx":
            rtx.refuse(asked, asked.compute_capabilities, gpu=False)

    assert {"tensorrt", "tensorrt_rtx"} == {asked.flavour for asked in wanted}


def test_every_lane_of_8_6_has_the_profile() -> None:
    """It lets contexts share a profile only if it is built so, and gives it to the first of them alone (its
    documentation). The engine and the settings are stand-ins that note what they are told."""
    adapter = opened("8.6.1")
    assert isinstance(adapter, Api8)
    told: list[tuple[Any, bool]] = []
    config = SimpleNamespace(set_preview_feature=lambda feature, on: told.append((feature, on)))
    network = SimpleNamespace(num_layers=0)
    adapter.trt.PreviewFeature.PROFILE_SHARING_0806 = "sharing"
    adapter.set_modes(Draft(None, network, None, config), options(), ())
    profiles = iter([0, -1])
    engine = SimpleNamespace(
        create_execution_context_without_device_memory=lambda: SimpleNamespace(
            active_optimization_profile=next(profiles)
        )
    )

    assert [("sharing", True)] == told
    assert [0, 0] == [adapter.create_context(engine, False).active_optimization_profile for _ in range(2)]


def test_layers_left_to_the_gpu_are_named() -> None:
    """By kind, the largest first, three names each; nothing is said where the DLA takes everything."""
    left = {"SOFTMAX": ["prob"], "RESIZE": [f"up{n}" for n in range(5)]}

    assert () == fallback_notes({}, 9)
    assert (
        "6 of 9 layers run on the GPU, because the DLA does not take them: resize (5: up0, up1, up2, ...), "
        "softmax (1: prob). It computes FP16 and INT8, with fixed shapes.",
    ) == fallback_notes(left, 9)


def test_bytes_that_are_no_plan(rtx: Api) -> None:
    """TensorRT answers with None; the error has what it logged, without its source paths."""
    with pytest.raises(EngineFailed, match=r"could not load the engine; it says: (?!nothing)") as raised:
        rtx.deserialize(b"no plan", graph=None)

    assert ".cpp" not in raised.value.problem
