"""The machine's own condition: how warm it is, whether it holds itself back, what it draws, and what is left of it.

    sensors = Sensors()
    sensors.read()
    # {'temperature_c': {'cpu-thermal': 51.2}, 'throttled': False, 'power_mode': '15W', 'cpu_mhz': 1510, ...}

Everything is read from files of the kernel; what a machine does not tell is missing, and nothing is ever raised. Where
the files lie is looked up once, so `read` costs one open for each: some dozens, for a reading every few seconds.

| what | where | of whom |
|---|---|---|
| `temperature_c` | thermal zones; hwmon of the CPU where no zone is the package's | all |
| `throttled`, now, by | cooling devices that slow a processor down and are at work | Jetson, Raspberry Pi, x86 |
| | `get_throttled` of the firmware | Raspberry Pi |
| | `*_throttle_count` of the CPUs, since the last reading | x86 |
| `under_voltage` | `get_throttled`; the alarm of hwmon `rpi_volt` | Raspberry Pi |
| `power_mode` | nvpmodel's status file; the ACPI platform profile | Jetson; x86 |
| `power_w` | hwmon `ina3221`: volts times amperes, by rail | Jetson |
| `gpu_load_percent` | `load` of the GPU | Jetson |
| `cpu_mhz`, `cpu_max_mhz` | cpufreq, the mean of all policies, and the highest that any could run at | all |
| `load_1min`, `memory_*_bytes` | /proc | all |

The layouts are those that the kernel's documentation describes (sysfs-class-thermal, hwmon, cpufreq, thermal_throttle)
and that NVIDIA's and Raspberry Pi's kernels add. None of the three kinds of device was at hand: on none of them was
this run. JetPack 4, whose rails lie elsewhere, and `vcgencmd`, which needs a device node, are not asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

_PLAUSIBLE_C = (-40.0, 150.0)
"""A zone whose block is switched off says what it likes, -256 for one."""

_CONSTANT_ZONES = ("PMIC-Die",)
"""Always 100 degrees (Jetson)."""

_CPU_HWMON = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
_PACKAGE_ZONES = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal", "CPU-therm")

_SLOWS_DOWN = re.compile(r"(thermal-)?(cpufreq|devfreq)|Processor$|.*-throttle-alert$|cpu-freq-alert$")
"""Types of cooling devices that work by making a processor slower. Fans cool too."""

_UNDER_VOLTAGE, _CAPPED, _THROTTLED, _SOFT_LIMIT = 0x1, 0x2, 0x4, 0x8
"""The bits of `get_throttled` that speak of now; those above 0xffff say what happened since boot."""

Reading = Callable[[], Mapping[str, Any]]


class Sensors:
    """What the machine under `root` tells of itself. Used by one thread."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._zones = _named(root, "sys/class/thermal/thermal_zone*", "type")
        self._hwmon = _named(root, "sys/class/hwmon/hwmon*", "name")
        self._cooling = [
            (name, place)
            for name, place in _named(root, "sys/class/thermal/cooling_device*", "type")
            if _SLOWS_DOWN.match(name)
        ]
        self._temperatures = self._temperature_files()
        self._rails = self._rail_files()
        self._counters = _files(root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
        self._counted = self._throttle_count()
        self._firmware = _files(root, "sys/devices/platform/*/*firmware/get_throttled")[:1]
        self._voltage_alarms = [place / "in0_lcrit_alarm" for name, place in self._hwmon if name == "rpi_volt"]
        self._gpu_load = _files(root, "sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load")[:1]
        self._policies = _files(root, "sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq")
        self._max_mhz = _max_mhz(self._policies)
        self._power_modes = _power_modes(root)
        self._parts: tuple[Reading, ...] = (
            self._read_temperatures,
            self._read_throttling,
            self._read_power,
            self._read_speed,
            self._read_room,
        )

    def read(self) -> dict[str, Any]:
        """The condition now, JSON-ready; keys that the machine does not tell are missing."""
        condition: dict[str, Any] = {}
        for part in self._parts:
            condition.update(part())
        return condition

    def _read_temperatures(self) -> Mapping[str, Any]:
        warmest: dict[str, float] = {}
        for name, file in self._temperatures:
            if (millidegrees := _number(file)) is not None:
                degrees = millidegrees / 1000
                if _PLAUSIBLE_C[0] <= degrees <= _PLAUSIBLE_C[1]:
                    warmest[name] = round(max(degrees, warmest.get(name, degrees)), 1)
        return {"temperature_c": warmest} if warmest else {}

    def _read_throttling(self) -> Mapping[str, Any]:
        by = sorted({name for name, place in self._cooling if (_number(place / "cur_state") or 0) > 0})
        known = bool(self._cooling or self._counters or self._firmware)
        told: dict[str, Any] = {}
        if self._counters:
            counted, self._counted = self._counted, self._throttle_count()
            by += ["cpu"] if self._counted > counted else []
        for file in self._firmware:
            bits = _hexadecimal(file) or 0
            by += ["firmware"] if bits & (_CAPPED | _THROTTLED | _SOFT_LIMIT) else []
            told["under_voltage"] = bool(bits & _UNDER_VOLTAGE)
        for file in self._voltage_alarms:
            told["under_voltage"] = told.get("under_voltage", False) or _number(file) == 1
        if known:
            told["throttled"] = bool(by)
        if by:
            told["throttled_by"] = by
        return told

    def _read_power(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {}
        rails = {}
        for rail, volts, amperes in self._rails:
            millivolts, milliamperes = _number(volts), _number(amperes)
            if millivolts is not None and milliamperes is not None:
                rails[rail] = round(millivolts * milliamperes / 1e6, 3)
        if rails:
            told["power_w"] = rails
        if mode := self._power_mode():
            told["power_mode"] = mode
        return told

    def _power_mode(self) -> str:
        if self._power_modes:
            found = re.search(r"pmode:(\d+)", _text(self._root / "var/lib/nvpmodel/status"))
            return self._power_modes.get(int(found.group(1)), "") if found else ""
        return _text(self._root / "sys/firmware/acpi/platform_profile")[:40]

    def _read_speed(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {}
        if kilohertz := [found for file in self._policies if (found := _number(file)) is not None]:
            told["cpu_mhz"] = round(sum(kilohertz) / len(kilohertz) / 1000)
        if self._max_mhz is not None:
            told["cpu_max_mhz"] = self._max_mhz
        for file in self._gpu_load:
            if (permille := _number(file)) is not None:
                told["gpu_load_percent"] = permille / 10
        return told

    def _read_room(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {}
        if found := re.match(r"\d{1,9}\.\d+", _text(self._root / "proc/loadavg")):
            told["load_1min"] = float(found.group())
        lines = re.findall(r"^(MemTotal|MemAvailable):\s+(\d{1,15}) kB", _text(self._root / "proc/meminfo"), re.M)
        kibibytes = {name: int(figure) for name, figure in lines}
        for key, name in (("memory_total_bytes", "MemTotal"), ("memory_available_bytes", "MemAvailable")):
            if name in kibibytes:
                told[key] = kibibytes[name] * 1024
        return told

    def _temperature_files(self) -> list[tuple[str, Path]]:
        found = [(name, place / "temp") for name, place in self._zones if name not in _CONSTANT_ZONES]
        if any(name in _PACKAGE_ZONES for name, _ in self._zones):
            return found
        for name, place in self._hwmon:
            if name in _CPU_HWMON:
                for file in _files(place, "temp*_input"):
                    label = _text(file.with_name(file.name.replace("_input", "_label")))[:40]
                    if not label.startswith("Core "):  # the package is as warm as its warmest core
                        found.append((f"{name} {label}".rstrip(), file))
        return found

    def _rail_files(self) -> list[tuple[str, Path, Path]]:
        rails = []
        for name, place in self._hwmon:
            if name == "ina3221":
                for channel in "123":
                    rail = _text(place / f"in{channel}_label")[:40]
                    if rail and rail != "NC":  # not connected
                        rails.append((rail, place / f"in{channel}_input", place / f"curr{channel}_input"))
        return rails

    def _throttle_count(self) -> int:
        return sum(_number(file) or 0 for file in self._counters)


def _named(root: Path, pattern: str, name_file: str) -> list[tuple[str, Path]]:
    """The folders of that pattern, each with what its `name_file` calls it."""
    return [(name[:40], file.parent) for file in _files(root, f"{pattern}/{name_file}") if (name := _text(file))]


def _files(root: Path, *patterns: str) -> list[Path]:
    found: Iterable[Path] = ()
    try:
        found = sorted({file for pattern in patterns for file in root.glob(pattern)})
    except OSError:  # a folder that went while it was looked at
        pass
    return list(found)


def _max_mhz(policies: Iterable[Path]) -> int | None:
    """The highest frequency that any CPU may ever run at: the hardware's, not today's limit."""
    highest = [found for file in policies if (found := _number(file.with_name("cpuinfo_max_freq"))) is not None]
    return round(max(highest) / 1000) if highest else None


def _power_modes(root: Path) -> dict[int, str]:
    """nvpmodel's modes by number, from its configuration; empty where this is no Jetson."""
    configured = _text(root / "etc/nvpmodel.conf", limit=1 << 18)
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([\w.+-]{1,40})\s*>", configured)
    return {int(number): name for number, name in modes}


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if re.fullmatch(r"-?\d{1,15}", text) else None


def _hexadecimal(file: Path) -> int | None:
    text = _text(file).removeprefix("0x")
    return int(text, 16) if re.fullmatch(r"[0-9a-fA-F]{1,8}", text) else None


def _text(file: Path, limit: int = 8192) -> str:
    """What a file says, at most `limit` bytes of it; empty where it cannot be read just now."""
    try:
        with file.open("rb", buffering=0) as stream:
            return (stream.read(limit) or b"").decode("utf-8", "replace").strip("\0\n ")
    except (OSError, ValueError):
        return ""
