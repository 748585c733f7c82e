"""The files in which four computers tell their condition, to put under a root of one's own.

Made up by us after the kernel's documentation and the vendors'; none was copied from a device, and their values are
round on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Tree = Mapping[str, str]
"""Path below the root -> content, without the newline that every such file ends with."""

_ROOM: Tree = {
    "proc/loadavg": "1.25 0.80 0.40 2/345 6789",
    "proc/meminfo": "MemTotal:        8000000 kB\nMemFree:          100000 kB\nMemAvailable:    3000000 kB",
}


def _zones(**celsius: float) -> dict[str, str]:
    files = {}
    for number, (name, degrees) in enumerate(celsius.items()):
        files[f"sys/class/thermal/thermal_zone{number}/type"] = name.replace("_", "-")
        files[f"sys/class/thermal/thermal_zone{number}/temp"] = str(int(degrees * 1000))
    return files


def _cooling(**states: int) -> dict[str, str]:
    files = {}
    for number, (name, state) in enumerate(states.items()):
        files[f"sys/class/thermal/cooling_device{number}/type"] = name.replace("_", "-")
        files[f"sys/class/thermal/cooling_device{number}/cur_state"] = str(state)
    return files


def _policies(maximum_mhz: int, **mhz: int) -> dict[str, str]:
    files = {}
    for name, now in mhz.items():
        files[f"sys/devices/system/cpu/cpufreq/{name}/scaling_cur_freq"] = str(now * 1000)
        files[f"sys/devices/system/cpu/cpufreq/{name}/cpuinfo_max_freq"] = str(maximum_mhz * 1000)
    return files


JETSON: Tree = {
    **_ROOM,
    **_zones(cpu_thermal=51.5, gpu_thermal=49.0, tj_thermal=52.0, cv0_thermal=-256.0),
    "sys/class/thermal/thermal_zone4/type": "PMIC-Die",
    "sys/class/thermal/thermal_zone4/temp": "100000",
    "sys/class/thermal/thermal_zone5/type": "soc0-thermal",  # its temp cannot be read
    **_cooling(pwm_fan=2, cpu_throttle_alert=0, gpu_throttle_alert=0, devfreq_17000000_gpu=0),
    **_policies(1510, policy0=1510, policy4=730),
    "sys/class/hwmon/hwmon0/name": "pwmfan",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "1200",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": "4960",
    "sys/class/hwmon/hwmon1/curr2_input": "250",
    "sys/class/hwmon/hwmon1/in3_label": "NC",
    "sys/devices/platform/gpu.0/load": "437",
    "etc/nvpmodel.conf": "# modes\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=7W >",
    "var/lib/nvpmodel/status": "pmode:0000",
}

RASPBERRY_PI: Tree = {
    **_ROOM,
    **_zones(cpu_thermal=60.4),
    **_cooling(pwm_fan=1),
    **_policies(2400, policy0=1800),
    "sys/class/hwmon/hwmon0/name": "cpu_thermal",
    "sys/class/hwmon/hwmon0/temp1_input": "60400",
    "sys/class/hwmon/hwmon1/name": "rpi_volt",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "0",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50000",  # it was throttled, once; now it is not
}

LAPTOP: Tree = {
    **_ROOM,
    **_zones(acpitz=27.8, x86_pkg_temp=61.0),
    "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp",
    "sys/class/thermal/cooling_device0/type": "Processor",
    "sys/class/thermal/cooling_device0/cur_state": "0",
    "sys/class/thermal/cooling_device1/type": "intel_powerclamp",
    "sys/class/thermal/cooling_device1/cur_state": "-1",
    **_policies(4000, policy0=3000, policy1=1000),
    "sys/class/hwmon/hwmon0/name": "coretemp",
    "sys/class/hwmon/hwmon0/temp1_input": "61000",
    "sys/class/hwmon/hwmon0/temp1_label": "Package id 0",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "9",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "0",
    "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "9",
    "sys/firmware/acpi/platform_profile": "balanced",
}

SERVER: Tree = {
    **_ROOM,
    "sys/class/hwmon/hwmon0/name": "k10temp",
    "sys/class/hwmon/hwmon0/temp1_input": "55250",
    "sys/class/hwmon/hwmon0/temp1_label": "Tctl",
    "sys/class/hwmon/hwmon1/name": "nvme",
    "sys/class/hwmon/hwmon1/temp1_input": "40000",
}
"""An AMD processor without thermal zones."""

MACHINES: Mapping[str, Tree] = {
    "jetson": JETSON,
    "raspberry-pi": RASPBERRY_PI,
    "laptop": LAPTOP,
    "server": SERVER,
}


def put(root: Path, tree: Tree) -> Path:
    """Write `tree` below `root`, over what is there; gives back `root`."""
    for name, content in tree.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n", encoding="utf-8")
    return root
