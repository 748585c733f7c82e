"""How far a build is, out of what TensorRT reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.backends.tensorrt.phases import Phases


def test_a_build_as_tensorrt_reports_it() -> None:
    """Short steps count for little, and the one that compiles for most; at the end it is 1."""
    told: list[float] = []
    phases = Phases(told.append)
    phases.start("Building engine", None, 6)
    for step in range(4):
        phases.step("Building engine", step)
    before = phases.fraction
    phases.start("Building engine from subgraph", "Building engine", 1)
    phases.start("Optimizing graph", "Building engine from subgraph", 30)
    for step in range(30):
        phases.step("Optimizing graph", step)
    phases.finish("Optimizing graph")
    optimised = phases.fraction
    phases.start("Computing profile costs", "Building engine from subgraph", 4)
    phases.step("Computing profile costs", 1)
    computing = phases.fraction
    phases.finish("Building engine from subgraph")
    phases.step("Building engine", 4)
    compiled = phases.fraction
    phases.finish("Building engine")

    assert [0.08, 0.305, 0.98, 1.0] == [round(at, 3) for at in (before, optimised, compiled, phases.fraction)]
    assert optimised < computing < compiled
    assert sorted(set(told)) == told


def test_phases_of_one_name() -> None:
    """TensorRT runs a phase of the same name again and again; each counts, and none takes the number back."""
    phases = Phases()
    phases.start("root", None, 2)
    seen = []
    for _ in range(3):
        phases.start("Computing reformatting costs", "root", 1)
        phases.step("Computing reformatting costs", 0)
        phases.finish("Computing reformatting costs")
        seen.append(phases.fraction)

    assert [0.25, 0.375, 0.4375] == seen


names = st.sampled_from("abcd")
events = st.lists(
    st.one_of(
        st.tuples(st.just("start"), names, st.none() | names, st.integers(-1, 5)),
        st.tuples(st.just("step"), names, st.integers(-1, 6)),
        st.tuples(st.just("finish"), names),
    ),
    max_size=40,
)


@given(events)
def test_whatever_is_reported(reports: list[tuple[object, ...]]) -> None:
    """In any order, with parents that nobody knows and steps beyond the last: from 0 to 1, and never back."""
    told: list[float] = []
    phases = Phases(told.append)
    phases.start("root", None, 3)
    for act, *rest in reports:
        getattr(phases, str(act))(*rest)
    phases.finish("root")

    assert sorted(set(told)) == told
    assert all(0 < fraction <= 1 for fraction in told)
    assert 1.0 == phases.fraction == told[-1]
