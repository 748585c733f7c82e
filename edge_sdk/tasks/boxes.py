"""Boxes from what a detector puts out, and cuts from a picture: what stands between a detector and a classifier. Pure
arithmetic on arrays; a box is left, top, right and bottom, relative to the picture.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from edge_sdk.errors import InvalidTensor
from edge_sdk.tasks.images import open_picture
from edge_sdk.tensors import Array


@dataclass(frozen=True)
class Boxes:
    """The best first. `boxes` [n, 4], `scores` [n], `classes` [n]."""

    boxes: Array
    scores: Array
    classes: Array


def fastestdet_boxes(head: Array, *, min_score: float, max_overlap: float, at_most: int) -> Boxes:
    """What FastestDet's head [1, 5 + classes, rows, columns] says, once boxes that overlap a better one of their class
    by more than `max_overlap` (intersection over union) are left out. InvalidTensor for another shape.

    Each cell has objectness o, a box (dx, dy, w, h) and class scores c: score = o^0.6 * max(c)^0.4, centre =
    (cell + tanh d) / cells, size = sigmoid (dog-qiuqiu/FastestDet).
    """
    if head.ndim != 4 or head.shape[0] != 1 or head.shape[1] < 6:
        came = list(head.shape)[:8]
        raise InvalidTensor(f"FastestDet's head has the shape [1, 5 + classes, rows, columns]; {came} came.")
    objectness, (dx, dy, w, h), scores = head[0, 0], head[0, 1:5], head[0, 5:]
    rows, columns = objectness.shape
    classes = scores.argmax(axis=0)
    score = objectness.clip(0) ** 0.6 * scores.max(axis=0).clip(0) ** 0.4
    y, x = np.nonzero(score > min_score)
    centre_x, centre_y = (x + np.tanh(dx[y, x])) / columns, (y + np.tanh(dy[y, x])) / rows
    width, height = (1 / (1 + np.exp(-size[y, x])) for size in (w, h))
    boxes = np.stack(
        [centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2], axis=1
    ).astype(np.float32)
    found = Boxes(boxes, score[y, x].astype(np.float32), classes[y, x].astype(np.int64))
    kept = best_apart(found, max_overlap)[:at_most]
    return Boxes(found.boxes[kept], found.scores[kept], found.classes[kept])


def best_apart(found: Boxes, max_overlap: float) -> list[int]:
    """The indices of the boxes that overlap no better one of their class by more, the best first."""
    order = np.argsort(-found.scores, kind="stable")
    kept: list[int] = []
    while len(order):
        best, others = int(order[0]), order[1:]
        kept.append(best)
        same = found.classes[others] == found.classes[best]
        order = others[~same | (_overlap(found.boxes[best], found.boxes[others]) <= max_overlap)]
    return kept


def crops(picture: bytes, boxes: Array) -> list[bytes]:
    """What lies in each of `boxes` [n, 4], as PNG pictures, at least one pixel each; raises as `decode_image` does.

    The picture is turned upright first, as a detector has seen it.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InvalidTensor(f"Boxes have the shape [n, 4]; {list(boxes.shape)} came.")
    if not len(boxes):
        return []
    opened = open_picture(picture)
    width, height = opened.size
    cut = []
    for left, top, right, bottom in np.nan_to_num(boxes).clip(0.0, 1.0).tolist():
        x, y = min(int(left * width), width - 1), min(int(top * height), height - 1)
        part = opened.crop((x, y, max(x + 1, round(right * width)), max(y + 1, round(bottom * height))))
        stream = io.BytesIO()
        part.save(stream, "PNG", compress_level=1)
        cut.append(stream.getvalue())
    return cut


def _overlap(box: Array, others: Array) -> Array:
    """Intersection over union of one box with each of `others`."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = (high - low).clip(0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    union: Array = common / np.maximum(areas - common, np.finfo(np.float32).tiny)
    return union
