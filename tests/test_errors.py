"""The error tree: what a program may rely on, and what a person reads."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from edge_sdk import errors
from edge_sdk.errors import EdgeSdkError, EngineUnfit, PackageMismatch, QueueFull, RequestError, request_error

WIRE = {
    "malformed": (400, False), "model_not_found": (404, False), "version_not_found": (404, False),
    "deadline_exceeded": (408, True), "id_reused": (409, False), "sequence_unknown": (409, False),
    "sequence_out_of_step": (409, False), "too_large": (413, False),
    "unsupported_type": (415, False), "invalid_tensor": (422, False), "queue_full": (429, True),
    "inference_failed": (500, False), "unavailable": (503, True), "out_of_memory": (507, True),
}  # fmt: skip
"""The wire contract's table: code -> status, whether the same bytes may succeed later."""


def tree(kind: type[EdgeSdkError] = EdgeSdkError) -> Iterator[type[EdgeSdkError]]:
    """A class and everything below it."""
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


def test_each_row_of_the_contract_is_a_leaf() -> None:
    """Every row of the error table is one class with its status, and there is no class beside the table."""
    leaves = {leaf.code: (leaf.status, leaf.retryable) for leaf in RequestError.__subclasses__()}

    assert WIRE == leaves


@pytest.mark.parametrize("code", WIRE)
def test_a_client_raises_what_the_device_said(code: str) -> None:
    """`request_error` gives back the class of a code, with text and moment to retry."""
    error = request_error(code, "text", 250)

    assert (code, *WIRE[code]) == (error.code, error.status, error.retryable)
    assert ("text", 250) == (str(error), error.retry_after_ms)


def test_an_unknown_code_is_a_request_error() -> None:
    """A newer device's code is still an error of the request, never a KeyError."""

    assert RequestError is type(request_error("quota_exceeded", "text"))


def test_the_tree_is_drawn() -> None:
    """The drawing at the top of the module names every class, and no other."""
    assert errors.__doc__ is not None
    drawing = errors.__doc__.split("\n\n")[1]
    drawn = {line.replace("|", " ").replace("`-", " ").replace("-", " ", 1).split()[0] for line in drawing.splitlines()}
    existing = {
        kind.__name__ for kind in tree() if kind.__module__ == errors.__name__
    }  # others tell rooms apart inside

    assert existing == drawn


def test_exit_codes_are_those_of_the_docstring() -> None:
    """A script may tell from the exit code whose fault it was."""
    codes = {kind.exit_code for kind in tree()}

    assert {1, 3, 4, 5, 6, 7} == codes


def test_a_message_says_what_is_wrong_and_what_to_do() -> None:
    """`str` is the problem and the fix, and both survive as attributes."""
    error = PackageMismatch("It does not fit.", reasons=("built for aarch64",), fix="Build it here.")

    assert "It does not fit. Build it here." == str(error)
    assert ("It does not fit.", "Build it here.") == (error.problem, error.fix)
    assert "It is full." == str(QueueFull("It is full."))


@pytest.mark.parametrize("kind", [*tree()], ids=lambda kind: kind.__name__)
def test_errors_cross_process_borders_whole(kind: type[EdgeSdkError]) -> None:
    """Pickled and read again, an error has its type, its text and its facts."""
    facts = {"reasons": ("it is small",)} if issubclass(kind, (PackageMismatch, EngineUnfit)) else {}
    error = kind("It is wrong.", fix="Mend it.", **facts)
    again = pickle.loads(pickle.dumps(error))

    assert kind is type(again)
    assert str(error) == str(again)
    assert vars(error) == vars(again)
