"""The figures of a build: `report.json` for a program, `report.md` for a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.compile.inspect import ModelSummary
from edge_sdk.package import EngineRecord, Figures, Manifest, RunningRecord, WayRecord

JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"


def write_reports(folder: Path, manifest: Manifest, source: ModelSummary, notes: Sequence[str]) -> None:
    """Both reports, into the folder of a package that is being written. `notes` are what a person should know."""
    report = {
        **manifest.model_dump(mode="json", exclude={"files"}, exclude_none=True),
        "model": source.to_dict(),
        "notes": list(notes),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / JSON_FILE).write_text(text, encoding="utf-8")
    (folder / MARKDOWN_FILE).write_text(markdown(manifest, source, notes), encoding="utf-8")


def markdown(manifest: Manifest, source: ModelSummary, notes: Sequence[str]) -> str:
    """The report as a person reads it: the decision first, then the figures, then where everything came from."""
    measured = manifest.measurements
    lines = [f"# {manifest.name} {manifest.version}: {manifest.precision} for {manifest.profile}", ""]
    if measured is not None:
        lines += [measured.decision, "", *_table(measured.reference, measured.engine), ""]
        if measured.agreement_percent is not None:
            lines.append(f"- First label as the reference's: {measured.agreement_percent:.1f} %")
        if measured.snr_db is not None:
            lines.append(f"- Outputs against the reference's: {measured.snr_db:.1f} dB signal to noise")
        lines.append(f"- Judged on {measured.judged_on}")
    lines += [f"- Note: {note}" for note in notes]
    lines += ["", "## Where it came from", ""]
    lines.append(f"- Model: {source}; sha256 {manifest.source.sha256}")
    if (data := manifest.calibration) is not None:
        lines.append(f"- Calibrated by {data.method} on {data.samples} samples of {data.data}; sha256 {data.sha256}")
    if (engine := manifest.backend.engine) is not None:
        lines += _engine_lines(manifest.backend.name, engine)
    if manifest.backend.missing:
        lines.append(f"- Backend: {manifest.backend.name}. {manifest.backend.missing}")
    lines.append(f"- Batches: up to {manifest.batching.max_batch}, best {manifest.batching.best_batch}")
    if (running := manifest.running) is not None:
        lines += _running_lines(running)
    elif manifest.backend.name == "onnxruntime":
        lines.append("- Threads: the profile's, as no way to run the graph was measured on a device of its kind")
    lines.append(f"- Tools: {', '.join(f'{name} {version}' for name, version in manifest.tools.items())}")
    lines.append(f"- Built {manifest.created}; build key {manifest.build_key}")
    return "\n".join(lines) + "\n"


def _running_lines(running: RunningRecord) -> list[str]:
    """How the graph is run, and what the other ways were that lost."""
    ways = "; ".join(
        f"{_threads(way)} {way.latency_ms:.3g} ms, {way.cpu_ms:.3g} ms of processor time" for way in running.tried
    )
    return [
        f"- Threads: {_threads(running)}, on {running.processor} (elsewhere the profile's)",
        f"- Threads, tried at batch 1: {ways}",
    ]


def _threads(way: RunningRecord | WayRecord) -> str:
    return f"{way.intra_op_threads}{', spinning' if way.spinning else ''}"


def _engine_lines(backend: str, engine: EngineRecord) -> list[str]:
    """What a compiled engine is, what it took, and how fast it was if it ran."""
    lines = [
        f"- Engine: {engine.file} by {backend}, {_size(engine.bytes)}, compiled in {engine.seconds:.1f} s with "
        f"{_size(engine.peak_bytes)} of memory at most"
    ]
    if engine.latency_ms is not None:
        rates = ", ".join(f"{rate:g} at batch {batch}" for batch, rate in engine.per_second_at_batch.items())
        lines.append(f"- Engine, measured: {engine.latency_ms:.2f} ms; per second {rates}")
    return lines + [f"- Engine, note: {note}" for note in engine.notes]


def _table(reference: Figures, engine: Figures) -> list[str]:
    rows = [("", f"reference ({reference.precision})", f"engine ({engine.precision})")]
    rows.append(("size", _size(reference.bytes), _size(engine.bytes)))
    if reference.top1_percent is not None or engine.top1_percent is not None:
        rows.append(("top-1", _with_unit(reference.top1_percent, "%"), _with_unit(engine.top1_percent, "%")))
    if reference.latency_ms is not None or engine.latency_ms is not None:
        rows.append(("latency, batch 1", _with_unit(reference.latency_ms, "ms"), _with_unit(engine.latency_ms, "ms")))
    for batch in engine.per_second_at_batch:
        there = reference.per_second_at_batch.get(batch)
        here = engine.per_second_at_batch[batch]
        rows.append((f"per second, batch {batch}", _with_unit(there, ""), _with_unit(here, "")))
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---|---|---|", *body]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


def _with_unit(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.2f} {unit}".rstrip()
