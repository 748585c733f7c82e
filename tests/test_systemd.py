"""The systemd unit: it is valid, it stays hardened, and what it forbids is not needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "systemd" / "edge-sdk.service"
DIGITS = ROOT / "engines" / "digits" / "digits.onnx"

MAX_EXPOSURE = 2.0
"""systemd's own scale: 0 reaches nothing, 10 everything; below 4.5 it says OK."""

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1  # linux/prctl.h, Linux 6.3 and later

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


DROP_INS = {
    "cpu": "",
    "graphics-card": (ROOT / "systemd" / "edge-sdk-gpu.conf").read_text(encoding="utf-8"),
    "jetson": (ROOT / "systemd" / "edge-sdk-jetson.conf").read_text(encoding="utf-8"),
}
"""What comes on top of the unit, by the kind of device."""


def unit_in(folder: Path, drop_in: str = "") -> Path:
    """A copy of the unit that starts a program which exists: `verify` looks for it."""
    text = re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    unit = folder / UNIT.name
    unit.write_text(text, encoding="utf-8")
    drop_ins = folder / f"{UNIT.name}.d"
    drop_ins.mkdir()
    drop_ins.joinpath("gpu.conf").write_text(drop_in, encoding="utf-8")
    return unit


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def exposure(unit: Path) -> float:
    """What `systemd-analyze security` thinks of the file, without starting anything."""
    report = analyze("security", "--offline=true", str(unit))
    if "--offline" in report.stderr:
        pytest.skip("this systemd-analyze cannot judge a file offline (systemd 250 and later can)")
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", report.stdout)

    assert found is not None, report.stderr
    return float(found[1])


@needs_systemd
@pytest.mark.parametrize("drop_in", DROP_INS.values(), ids=DROP_INS)
def test_unit_is_valid(tmp_path: Path, drop_in: str) -> None:
    """systemd understands every line, alone and with each GPU's drop-in."""
    result = analyze("verify", str(unit_in(tmp_path, drop_in)))
    # An unknown key is a warning with exit status 0, and other units of this machine may have warnings of their own.
    complaints = "\n".join(line for line in result.stderr.splitlines() if "edge-sdk" in line)
    expected = (0, "")
    actual = (result.returncode, complaints)

    assert expected == actual


@needs_systemd
@pytest.mark.parametrize("drop_in", DROP_INS.values(), ids=DROP_INS)
def test_unit_is_hardened(tmp_path: Path, drop_in: str) -> None:
    """The service reaches little of the device, even when a GPU is opened to it."""
    actual = exposure(unit_in(tmp_path, drop_in))

    assert actual <= MAX_EXPOSURE


@needs_systemd
def test_the_devices_that_a_jetson_may_be_given_by_name_are_valid(tmp_path: Path) -> None:
    """The lines that are commented out in its drop-in, once somebody puts them in."""
    named = re.sub(r"^#(Device)", r"\1", DROP_INS["jetson"], flags=re.MULTILINE)
    result = analyze("verify", str(unit_in(tmp_path, named)))
    complaints = "\n".join(line for line in result.stderr.splitlines() if "edge-sdk" in line)

    assert 3 == named.count("\nDeviceAllow=")
    assert (0, "") == (result.returncode, complaints)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_onnxruntime_runs_without_memory_that_is_written_and_executed() -> None:
    """MemoryDenyWriteExecute= takes nothing from inference on the CPU: the model loads and answers under it."""
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    program = f"""
import ctypes, mmap, sys
if ctypes.CDLL(None).prctl({PR_SET_MDWE}, {PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0):
    sys.exit("no PR_SET_MDWE")
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except OSError:
    pass
else:
    sys.exit("not enforced")
import numpy, onnxruntime
session = onnxruntime.InferenceSession({str(DIGITS)!r}, providers=["CPUExecutionProvider"])
print(session.run(None, {{"image": numpy.zeros((2, 1, 8, 8), "float32")}})[0].shape)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    if "no PR_SET_MDWE" in result.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3 and later do)")
    expected = (0, "(2, 10)\n")
    actual = (result.returncode, result.stdout)

    assert expected == actual, result.stderr
