"""Boxes and cuts: what a detector's head says, bounded, whatever is in it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_sdk.errors import InvalidTensor
from edge_sdk.tasks.boxes import Boxes, best_apart, crops, fastestdet_boxes

pytest.importorskip("PIL", reason="pictures need the extra `vision`")


@given(
    arrays.arrays(np.float32, (1, 8, 3, 4), elements=st.floats(-10, 10, width=32)),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 5),
)
def test_boxes_are_few_sorted_and_apart(head: np.ndarray, score: float, overlap: float, at_most: int) -> None:
    found = fastestdet_boxes(head, min_score=score, max_overlap=overlap, at_most=at_most)

    assert len(found.boxes) == len(found.scores) == len(found.classes) <= at_most
    assert sorted(found.scores.tolist(), reverse=True) == found.scores.tolist()
    assert list(range(len(found.scores))) == best_apart(found, overlap)
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_what_overlaps_a_better_one_of_its_class_is_left_out() -> None:
    boxes = np.array([[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 1, 0.9], [0, 0, 0.2, 0.2]], np.float32)
    found = Boxes(boxes, np.array([0.5, 0.9, 0.8, 0.7], np.float32), np.array([1, 1, 2, 1]))

    assert [1, 2, 3] == best_apart(found, 0.45)


@pytest.mark.parametrize("shape", [(1, 5, 2, 2), (2, 8, 2, 2), (8, 2, 2), ()])
def test_another_head_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTensor, match="head"):
        fastestdet_boxes(np.zeros(shape, np.float32), min_score=0, max_overlap=1, at_most=1)


def test_cuts_lie_in_the_picture_and_have_a_pixel() -> None:
    from PIL import Image

    picture = np.arange(20 * 10 * 3, dtype=np.uint8).reshape(10, 20, 3)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    boxes = np.array([[0.25, 0.5, 0.75, 1], [-1, -1, 2, 2], [0.5, 0.5, 0.5, 0.5], [np.nan] * 4], np.float32)
    cut = [np.asarray(Image.open(io.BytesIO(part))) for part in crops(stream.getvalue(), boxes)]

    assert np.array_equal(picture[5:10, 5:15], cut[0])
    assert np.array_equal(picture, cut[1])
    assert [(1, 1, 3)] * 2 == [part.shape for part in cut[2:]]
    with pytest.raises(InvalidTensor, match="Boxes"):
        crops(stream.getvalue(), np.zeros((2, 3), np.float32))
