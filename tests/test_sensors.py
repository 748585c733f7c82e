"""What a machine tells of its condition: each kind its own, a broken or an empty one nothing; never an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.sensors import Sensors
from tests.machines import JETSON, LAPTOP, MACHINES, RASPBERRY_PI, SERVER, Tree, put

ROOM = {"load_1min": 1.25, "memory_total_bytes": 8_192_000_000, "memory_available_bytes": 3_072_000_000}


@pytest.mark.parametrize(
    ("tree", "condition"),
    [
        pytest.param(
            JETSON,
            {
                "temperature_c": {"cpu-thermal": 51.5, "gpu-thermal": 49.0, "tj-thermal": 52.0},
                "throttled": False,
                "power_w": {"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 1.24},
                "power_mode": "15W",
                "cpu_mhz": 1120,
                "cpu_max_mhz": 1510,
                "gpu_load_percent": 43.7,
            },
            id="jetson",
        ),
        pytest.param(
            RASPBERRY_PI,
            {
                "temperature_c": {"cpu-thermal": 60.4},
                "throttled": False,
                "under_voltage": False,
                "cpu_mhz": 1800,
                "cpu_max_mhz": 2400,
            },
            id="raspberry-pi",
        ),
        pytest.param(
            LAPTOP,
            {
                "temperature_c": {"acpitz": 27.8, "x86_pkg_temp": 61.0},
                "throttled": False,
                "power_mode": "balanced",
                "cpu_mhz": 2000,
                "cpu_max_mhz": 4000,
            },
            id="laptop",
        ),
        pytest.param(SERVER, {"temperature_c": {"k10temp Tctl": 55.2}}, id="server"),
    ],
)
def test_each_kind_of_machine_tells_its_own(tmp_path: Path, tree: Tree, condition: dict[str, Any]) -> None:
    """In units that the names say; a zone without a plausible temperature, or with a constant one, is left out."""
    assert {**condition, **ROOM} == Sensors(put(tmp_path, tree)).read()


@pytest.mark.parametrize(
    ("tree", "change", "by"),
    [
        (JETSON, {"sys/class/thermal/cooling_device1/cur_state": "1"}, ["cpu-throttle-alert"]),
        (JETSON, {"sys/class/thermal/cooling_device3/cur_state": "3"}, ["devfreq-17000000-gpu"]),
        (JETSON, {"sys/class/thermal/cooling_device0/cur_state": "4"}, None),  # a fan
        (RASPBERRY_PI, {"sys/devices/platform/soc/soc:firmware/get_throttled": "4"}, ["firmware"]),
        (RASPBERRY_PI, {"sys/devices/platform/soc/soc:firmware/get_throttled": "0x80008"}, ["firmware"]),
        (RASPBERRY_PI, {"sys/devices/platform/soc/soc:firmware/get_throttled": "f0000"}, None),  # once
        (LAPTOP, {"sys/class/thermal/cooling_device0/cur_state": "2"}, ["Processor"]),
        (LAPTOP, {"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "5"}, ["cpu"]),
    ],
)
def test_throttling_is_seen_while_it_lasts(tmp_path: Path, tree: Tree, change: Tree, by: list[str] | None) -> None:
    """`throttled` is about now: what counts up counts since the last reading, and is over with the next."""
    sensors = Sensors(put(tmp_path, tree))
    sensors.read()
    put(tmp_path, change)
    during = sensors.read()
    put(tmp_path, {} if by == ["cpu"] else tree)
    after = sensors.read()

    assert (by is not None, by) == (during["throttled"], during.get("throttled_by"))
    assert (False, None) == (after["throttled"], after.get("throttled_by"))


@pytest.mark.parametrize(
    "change",
    [
        {"sys/devices/platform/soc/soc:firmware/get_throttled": "1"},
        {"sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1"},
    ],
)
def test_a_weak_supply_is_seen(tmp_path: Path, change: Tree) -> None:
    """From the firmware, or from the kernel's own driver for it."""
    sensors = Sensors(put(tmp_path, {**RASPBERRY_PI, **change}))

    assert sensors.read()["under_voltage"]
    assert not sensors.read()["throttled"]


def test_a_power_mode_that_changes_is_followed(tmp_path: Path) -> None:
    sensors = Sensors(put(tmp_path, JETSON))
    put(tmp_path, {"var/lib/nvpmodel/status": "pmode:0001"})

    assert "7W" == sensors.read()["power_mode"]


def test_a_machine_without_sensors_tells_nothing(tmp_path: Path) -> None:
    """As a virtual machine's, or a container's."""
    assert {} == Sensors(tmp_path).read()


def test_sensors_that_go_away_are_left_out(tmp_path: Path) -> None:
    """A module that is unloaded takes its files with it."""
    sensors = Sensors(put(tmp_path, JETSON))
    for name in JETSON:
        (tmp_path / name).unlink()

    assert {"throttled": False, "cpu_max_mhz": 1510} == sensors.read()


FILES = sorted({name for tree in MACHINES.values() for name in tree})


@given(
    tree=st.sampled_from(sorted(MACHINES)),
    garbage=st.dictionaries(st.sampled_from(FILES), st.text(max_size=30) | st.integers().map(str), max_size=12),
)
def test_garbage_is_never_an_error(tmp_path_factory: pytest.TempPathFactory, tree: str, garbage: Tree) -> None:
    """Whatever the files say: figures that are finite and JSON-ready, or none."""
    whole = {**MACHINES[tree], **{name: text.replace("\0", "") for name, text in garbage.items()}}
    encodable = {name: text.encode("utf-8", "replace").decode() for name, text in whole.items()}
    condition = Sensors(put(tmp_path_factory.mktemp("machine"), encodable)).read()

    assert all(-40 <= degrees <= 150 for degrees in condition.get("temperature_c", {}).values())
    assert {type(condition.get(key, False)) for key in ("throttled", "under_voltage")} == {bool}


def test_this_machine_is_read() -> None:
    """The one that runs this has a memory and a load at least."""
    condition = Sensors().read()

    assert 0 < condition["memory_available_bytes"] < condition["memory_total_bytes"]
    assert 0 <= condition["load_1min"]
