"""Fuzz one decoder, or all of them in turn, guided by coverage (atheris, the extra `fuzz`).

    python -m tests.fuzz --list                            what there is, and what is promised of it
    python -m tests.fuzz --target oip --seconds 3600       an hour of one
    python -m tests.fuzz --seconds 120                     two minutes of each
    python -m tests.fuzz --target oip crash-0a1b...        once, with the bytes of a file

What it learns is kept in `--corpus` (`.fuzz/`, not under git), where the next run takes it up. What breaks a promise
is left there too, as `<target>-crash-...`, `-timeout-` or `-oom-`: mend it with a test that failed first, and put the
file into `tests/fuzz/kept/<target>/`. The exit code is 0 if there was none.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import LIMITS, Target, targets

INSTRUMENTED = ["edge_sdk", "tomllib", "zipfile", "numpy.lib", "PIL"]
"""Where coverage counts: ours, and what reads bytes for us in Python."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="one of --list; all of them, one after the other, where it is missing")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--runs", type=int, default=-1, help="at most so many inputs for each target")
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), help="where what is learned is kept")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("file", nargs="?", type=Path, help="try these bytes once")
    options = parser.parse_args()
    if options.file is not None:
        chosen(options.target).check(options.file.read_bytes())
        return 0
    if options.list:
        for one in targets().values():
            sys.stdout.write(f"{one.name}: {' '.join(one.promise.split())}\n")
        return 0
    if options.target is not None:
        return fuzz(options.target, options.corpus, seconds=options.seconds, runs=options.runs)
    rest = ["--seconds", str(options.seconds), "--runs", str(options.runs), "--corpus", str(options.corpus)]
    # A process of its own for each: libFuzzer ends the one it runs in.
    commands = [[sys.executable, "-m", "tests.fuzz", "--target", name, *rest] for name in targets()]
    codes = [subprocess.run(command, check=False).returncode for command in commands]
    return int(any(codes))


def chosen(name: str | None) -> Target:
    known = targets()
    if name not in known:
        sys.exit(f"There is no target {name!r}; there are {', '.join(known)}.")
    return known[name]


def fuzz(name: str, corpus: Path, *, seconds: int, runs: int) -> int:
    """Until the time or the runs are over, or a promise is broken; libFuzzer ends the process in either case."""
    try:
        import atheris
    except ImportError as exc:
        sys.exit(f"{exc}. Fuzzing needs it: pip install 'edge-sdk[fuzz]' (Linux on x86-64, macOS).")
    logging.disable()  # what a decoder says of each input helps nobody
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        target = chosen(name)
    place = corpus / name
    place.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (place / f"seed-{number}").write_bytes(seed)
    words = corpus / f"{name}.words"
    words.write_text("".join(f'"{_quoted(word)}"\n' for word in target.words), encoding="ascii")
    atheris.Setup(
        [
            sys.argv[0],
            str(place),
            f"-max_total_time={seconds}",
            f"-runs={runs}",
            f"-max_len={target.max_bytes}",
            f"-timeout={LIMITS.seconds}",
            f"-rss_limit_mb={LIMITS.memory_mb}",
            f"-artifact_prefix={corpus}/{name}-",
            *([f"-dict={words}"] if target.words else []),
            "-print_final_stats=1",
        ],
        target.check,
    )
    atheris.Fuzz()
    return 0


def _quoted(word: str) -> str:
    """As libFuzzer reads its dictionaries."""
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


if __name__ == "__main__":
    sys.exit(main())
