"""The figures on a device's stats topic, as a person reads them: who holds what, and what came of the requests.

`overview(stats)` takes the document as it is on the wire; what an older or newer device leaves out is left out here.
Each part is a function of its own, in the order in which they are shown: a new kind of figures gets a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edge_sdk import console

Figures = Mapping[str, Any]


def overview(stats: Figures) -> str:
    """Everything, one paragraph or table after the other."""
    parts = (_process(stats), _memory(stats.get("memory", {})), _models(stats.get("models", {})), _machine(stats))
    return "\n\n".join(part for part in parts if part)


def _process(stats: Figures) -> str:
    answers = ", ".join(f"{count:,} with {status}" for status, count in stats.get("answers", {}).items()) or "none yet"
    lines = [
        f"up {_duration(stats.get('uptime_s', 0.0))}, {console.size(stats.get('memory_bytes', 0))} resident",
        f"answers: {answers}; {stats.get('waiting', 0):,} waiting",
    ]
    if "journal" in stats and stats["journal"] != "ok":
        lines.append(f"journal: {stats['journal']}")
    return "\n".join(lines)


def _memory(memory: Figures) -> str:
    if not memory:
        return ""
    budget = memory.get("budget_bytes")
    rows = [
        ("held by", "", ""),
        (
            "models",
            _size(memory["models_bytes"]),
            f"of at most {console.size(budget)}" if budget else "without a bound",
        ),
        ("requests that wait", _size(memory["queue_bytes"]), ""),
        ("answers kept", _size(memory["answer_cache_bytes"]), ""),
        ("answers to be sent", _size(memory["outbox_bytes"]), ""),
        ("journal", _size(memory["journal_bytes"]), "on disk"),
    ]
    moved = (
        f"{memory['evictions']:,} times a model made room, {memory['reloads']:,} times one came back; "
        f"{memory['refusals']:,} requests could not wait for that"
    )
    return f"{console.table(rows)}\n{moved}"


def _models(models: Figures) -> str:
    if not models:
        return ""
    rows: list[tuple[str, ...]] = [
        ("model", "state", "holds", "declared", "measured", "queue", "made room", "answers", "queue p99", "infer p99")
    ]
    for name, model in models.items():
        memory = model.get("memory", {})
        away = model.get("state") == "READY" and not memory.get("resident", True)
        rows.append(
            (
                name,
                "READY, away" if away else model.get("state", "-"),
                _size(memory.get("held_bytes")),
                _size(memory.get("declared_bytes")),
                _size(memory.get("measured_bytes")),
                _size(memory.get("queue_bytes")),
                f"{memory.get('evictions', 0):,}",
                f"{sum(model['answers'].values()):,}",
                console.milliseconds(model["queue_ms"]["p99"]),
                console.milliseconds(model["infer_ms"]["p99"]),
            )
        )
    return console.table(rows)


def _machine(stats: Figures) -> str:
    """How warm it is and whether it holds itself back, where it tells."""
    machine = stats.get("machine", {})
    said = [f"{sensor} {value:g} °C" for sensor, value in machine.get("temperature_c", {}).items()]
    said += [f"{rail} {value:g} W" for rail, value in machine.get("power_w", {}).items()]
    if "power_mode" in machine:
        said.append(f"power mode {machine['power_mode']}")
    if machine.get("throttled"):
        said.append(f"throttled by {_listed(machine.get('throttled_by', ()))}")
    if "memory_available_bytes" in machine:
        said.append(f"{console.size(machine['memory_available_bytes'])} of memory left")
    return f"machine: {', '.join(said)}" if said else ""


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names) or "something"


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else console.size(size_bytes)


def _duration(seconds: float) -> str:
    """The two largest units that say something."""
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} {int(seconds % length // part)} {smaller}"
    return f"{seconds:.0f} s"
