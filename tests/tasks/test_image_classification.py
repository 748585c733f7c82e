"""The task `image-classification`: a photo in, labels out."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra `vision`", exc_type=ImportError)

from edge_sdk.errors import InferenceFailed, InvalidTensor, Malformed, RequestError, SpecError, UnsupportedType  # noqa: E402
from edge_sdk.spec import Postprocess, Preprocess  # noqa: E402
from edge_sdk.tasks.base import BINARY, JPEG, JSON, PNG, TEXT, Payload  # noqa: E402
from edge_sdk.tasks.image_classification import ImageClassification, best_classes  # noqa: E402
from edge_sdk.tasks.oip import decode_response, encode_request  # noqa: E402
from edge_sdk.tasks.registry import task_for  # noqa: E402
from edge_sdk.tasks.tensors import TensorTask  # noqa: E402
from edge_sdk.tensors import Array, TensorSpec  # noqa: E402

IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 8))
SCORES = TensorSpec("scores", "float32", ("batch", 3))
LABELS = ("red", "green", "blue")


def task(scores: str = "probabilities", *, top_k: int = 2, image: TensorSpec = IMAGE) -> ImageClassification:
    made = task_for(
        "image-classification", name="colors", version="1", inputs=(image,), outputs=(SCORES,), labels=LABELS,
        preprocess=Preprocess(resize=(8, 8), scale=1 / 255),
        postprocess=Postprocess.model_validate({"top_k": top_k, "scores": scores}),
    )  # fmt: skip

    assert isinstance(made, ImageClassification)
    return made


def photo(form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(stream, form)
    return stream.getvalue()


def classified(scores: Array, accept: str | None = None, *, kind: str = "probabilities") -> list[tuple[int, float]]:
    """Index and score of the predictions in the answer to a photo."""
    asked = task(kind)
    body = asked.encode({"scores": scores}, asked.decode(Payload(photo(), PNG, accept=accept)))
    predictions = decode_response(body.data, body.header_length).extra["predictions"]
    return [(prediction["index"], prediction["score"]) for prediction in predictions]


@pytest.mark.parametrize(
    "sent",
    [
        Payload(photo(), PNG),
        Payload(photo("JPEG"), JPEG),
        Payload(photo()),
        Payload(photo("JPEG")),
        Payload(photo(), JPEG),
    ],
    ids=["PNG", "JPEG", "sniffed PNG", "sniffed JPEG", "PNG called JPEG"],
)
def test_a_photo_is_one_row_of_the_model(sent: Payload) -> None:
    """Named, sniffed, or called by the other's name."""
    decoded = task().decode(sent)

    assert ((1, 3, 8, 8), "float32", 1) == (
        decoded.feeds["image"].shape,
        decoded.feeds["image"].dtype.name,
        decoded.rows,
    )
    assert [1, 0, 0] == pytest.approx(decoded.feeds["image"].mean((0, 2, 3)).tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (Payload(b"<svg/>", JPEG), UnsupportedType),
        (Payload(b'{"inputs": []}', JPEG), UnsupportedType),
        (Payload(b"", JPEG), Malformed),
        (Payload(photo("JPEG")[:400], JPEG), Malformed),
        (Payload(b"GIF89a", "image/gif"), UnsupportedType),
        (Payload(photo(), BINARY), InvalidTensor),
    ],
    ids=["SVG", "JSON", "nothing", "cut", "GIF", "photo as raw tensor"],
)
def test_what_is_no_photo_is_refused(sent: Payload, expected: type[RequestError]) -> None:
    """The first bytes decide, whatever the content type claims."""
    with pytest.raises(expected):
        task().decode(sent)


def test_a_photo_that_does_not_suit_the_model_is_said() -> None:
    """A preprocessing that does not give the model's shape is found with the first request, not in the engine."""
    with pytest.raises(InvalidTensor, match=r"shape \[1, 3, 8, 8\]"):
        task(image=TensorSpec("image", "float32", ("batch", 3, 16, 16))).decode(Payload(photo()))


def test_the_answer_is_labels_in_three_forms() -> None:
    """JSON has strings and predictions, binary the same strings, text one string a line."""
    asked = task()
    scores = np.array([[0.1, 0.7, 0.2]], np.float32)
    bodies = {
        a: asked.encode({"scores": scores}, asked.decode(Payload(photo(), accept=a))) for a in (None, BINARY, TEXT)
    }
    strings = [b"0.700000:1:green", b"0.200000:2:blue"]

    assert (JSON, BINARY, TEXT) == tuple(body.content_type for body in bodies.values())
    for body in (bodies[None], bodies[BINARY]):
        assert strings == decode_response(body.data, body.header_length).outputs["classification"].tolist()
    assert b"\n".join(strings) == bodies[TEXT].data
    assert [
        {"label": "green", "index": 1, "score": 0.7}, {"label": "blue", "index": 2, "score": 0.2},
    ] == json.loads(bodies[None].data)["predictions"]  # fmt: skip


def test_logits_go_through_a_softmax() -> None:
    """Scores add up to one, also where a convolutional head leaves axes of one pixel, and where they are huge."""
    logits = np.array([[1, 3, 2]], np.float32)
    expected = [(1, 0.665241), (2, 0.244728)]

    assert expected == classified(logits, kind="logits")
    assert expected == classified(logits.reshape(1, 3, 1, 1), kind="logits")
    assert [(1, 1.0), (0, 0.0)] == classified(np.array([[0, 1000, 0]], np.float32), kind="logits")
    assert [(1, 3.0), (2, 2.0)] == classified(logits)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("accept", [None, BINARY, TEXT])
def test_nan_scores_are_an_error(value: float, accept: str | None) -> None:
    """A label for NaN would be a guess."""
    with pytest.raises(InferenceFailed, match="NaN or infinite"):
        classified(np.array([[0, value, 0]], np.float32), accept)


def test_tensors_are_answered_with_tensors() -> None:
    """Whoever preprocesses himself gets the raw scores."""
    asked = task()
    encoded = encode_request({"image": np.zeros((2, 3, 8, 8), np.float32)})
    decoded = asked.decode(Payload(encoded.data, encoded.content_type, encoded.header_length))
    scores = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    body = asked.encode({"scores": scores}, decoded)

    assert 2 == decoded.rows
    assert scores.tolist() == decode_response(body.data, body.header_length).outputs["scores"].tolist()


def test_equal_scores_keep_their_order() -> None:
    """The best come first, and asking for more than there are gives what there is."""

    assert [2, 0, 1] == best_classes(np.array([1, 1, 2], np.float32), 5)


def test_a_model_that_is_no_image_classifier_is_refused() -> None:
    """SpecError says what the model has, and which task suits it."""
    common = {"name": "m", "version": "1", "outputs": (SCORES,)}
    with pytest.raises(SpecError, match=r"one input of four axes; m has scores.*tensors"):
        task_for("image-classification", inputs=(SCORES,), preprocess=Preprocess(resize=(8, 8)), **common)  # type: ignore[arg-type]  # the common part
    with pytest.raises(SpecError, match="preprocess"):
        task_for("image-classification", inputs=(IMAGE,), **common)  # type: ignore[arg-type]

    assert TensorTask is type(task_for("tensors", inputs=(IMAGE,), **common))  # type: ignore[arg-type]


def test_without_pillow_a_model_for_photos_does_not_load() -> None:
    """The task is refused when it is made, with what to install; a model of plain tensors does without Pillow."""
    program = """
import sys
sys.modules["PIL"] = None  # as if it were not installed
from edge_sdk.errors import BackendUnavailable
from edge_sdk.spec import Preprocess
from edge_sdk.tasks.registry import task_for
from edge_sdk.tensors import TensorSpec

model = dict(
    name="colors", version="1", preprocess=Preprocess(resize=(8, 8)),
    inputs=(TensorSpec("image", "float32", (1, 3, 8, 8)),), outputs=(TensorSpec("scores", "float32", (1, 3)),),
)
task_for("tensors", **model)
try:
    task_for("image-classification", **model)
except BackendUnavailable as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "Pillow cannot be imported" in done.stdout
    assert "pip install 'edge-sdk[vision]'" in done.stdout
