"""Big pictures are decoded beside the thread that computes: nobody waits who need not, and nobody overtakes."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra `vision`", exc_type=ImportError)

from edge_sdk.errors import QueueFull  # noqa: E402
from edge_sdk.runtime.batching import QueueLimits  # noqa: E402
from edge_sdk.runtime.decoding import WORTH_S, Decoders, Stage  # noqa: E402
from edge_sdk.runtime.messages import Answer  # noqa: E402
from edge_sdk.runtime.served import ServedModel  # noqa: E402
from edge_sdk.runtime.worker import Worker  # noqa: E402
from edge_sdk.spec import Preprocess  # noqa: E402
from edge_sdk.tasks.base import JPEG, Payload  # noqa: E402
from tests.brokers import eventually  # noqa: E402
from tests.packages import brightness, make_package  # noqa: E402
from tests.runtime.requests import payload, request, response, statuses  # noqa: E402

PATIENCE_S = 20.0
PREPROCESS = Preprocess(resize=(8, 8), scale=1 / 255)


def photo(brightness: int, size: tuple[int, int]) -> Payload:
    """A grey JPEG; of 2000 x 2000 pixels it is worth handing over, of 20 x 20 it is not."""
    stream = io.BytesIO()
    Image.new("RGB", size, (brightness,) * 3).save(stream, "JPEG")
    return Payload(stream.getvalue(), JPEG)


def big(brightness: int) -> Payload:
    return photo(brightness, (2000, 2000))


def small(brightness: int) -> Payload:
    return photo(brightness, (20, 20))


class Place:
    """A served model that takes pictures, and decoders that a test may hold back."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.now = 0.0
        self.answers: list[Answer] = []
        self.due_on: list[str] = []
        """The threads on which it was said that something may be due."""
        self.decoders = Decoders(threads=1)
        self._free = threading.Event()
        self._free.set()
        self.model = ServedModel(
            "m", "1", limits=options.pop("limits", QueueLimits()), on_answer=self.answers.append,
            decoders=self.decoders, on_due=lambda: self.due_on.append(threading.current_thread().name),
            clock=lambda: self.now, **options,
        )  # fmt: skip

    def hire(self, preprocess: Preprocess = PREPROCESS, *, best_batch: int = 1) -> Worker:
        package = make_package(
            self.folder / "m", brightness(), task="image-classification", preprocess=preprocess, best_batch=best_batch
        )
        return Worker.load(package, clock=lambda: self.now)

    def hold(self) -> None:
        """Nothing that is handed over from now on is decoded."""
        self._free.clear()
        self.decoders.put(lambda: (self._free.wait(PATIENCE_S), None)[1])

    def release(self) -> None:
        self._free.set()

    def finish(self, count: int) -> list[Answer]:
        """Compute on this thread, as the network thread does, until there are so many answers."""

        def done() -> bool:
            while self.model.run_once():
                pass
            return len(self.answers) >= count

        eventually(done, f"{count} answers")
        return self.answers


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.release()
    made.model.retire()
    made.decoders.stop()


def red(answer: Answer) -> float:
    """The mean of the picture's red, which is how bright it is."""
    scores = response(answer).outputs["classification"]
    return float(next(text for text in scores.ravel() if b":0" in text).split(b":")[0])


def test_a_big_picture_holds_up_nobody(place: Place) -> None:
    """While it is decoded the thread that took it goes on, and is told when there is something to compute."""
    place.model.put_in_service(place.hire(), quick=True)
    place.hold()
    place.model.submit(request(big(255)))
    ran = place.model.run_once()

    assert (False, 1, None) == (ran, place.model.waiting, place.model.wake_at())
    place.release()
    eventually(lambda: place.due_on, "word from the decoder")
    assert 0.0 == place.model.wake_at()
    assert [200] == statuses(place.finish(1))
    assert (["edge-sdk-decoder"], 0) == (place.due_on, place.model.waiting)


def test_what_is_quickly_decoded_is_not_handed_over(place: Place) -> None:
    """Small pictures, and tensors, are computed at once by whoever takes them."""
    place.model.put_in_service(place.hire(best_batch=2), quick=True)
    place.hold()
    place.model.submit(request(small(255)))
    place.model.submit(request(payload(image=np.ones((1, 3, 8, 8), np.float32))))

    assert place.model.run_once()
    assert [200, 200] == statuses(place.answers)


@pytest.mark.parametrize("quick", [True, False])
def test_nobody_overtakes(place: Place, quick: bool) -> None:
    """Big and small pictures and broken ones: each its own answer, in the order in which they came."""
    place.model.put_in_service(place.hire(best_batch=2), quick=quick)
    levels = [0, 51, 102, 153, 204, 255] * 2
    sent = [request((small if n % 3 == 1 else big)(level)) for n, level in enumerate(levels)]
    sent.insert(4, request(Payload(big(1).data[:5000], JPEG)))
    sent.insert(7, request(Payload(b"\xff\xd8\xff", JPEG)))
    for each in sent:
        place.model.submit(each)
    if quick:
        place.finish(len(sent))
    eventually(lambda: len(place.answers) == len(sent), "all answers")
    answers = {answer.ticket: answer for answer in place.answers}
    taken = [answers[each.ticket] for each in sent if answers[each.ticket].status == 200]

    assert [each.ticket for each in sent] == [answer.ticket for answer in place.answers]
    assert [400, 415] == [answer.status for answer in place.answers if answer.status != 200]
    assert [level / 255 for level in levels] == pytest.approx([red(answer) for answer in taken], abs=0.01)


def test_what_is_being_decoded_counts_as_waiting(tmp_path: Path) -> None:
    """In bytes, undecoded and decoded: 429 while it fills the queue, and a stage holds half of it at most."""
    data = big(255)
    place = Place(tmp_path, limits=QueueLimits(max_bytes=4 * len(data.data)))
    place.model.put_in_service(place.hire(best_batch=1), quick=True)
    place.hold()
    for _ in range(4):
        place.model.submit(request(data))
        place.model.run_once()
    with pytest.raises(QueueFull, match="waiting"):
        place.model.submit(request(data))

    assert 4 == place.model.waiting
    place.release()
    assert [200] * 4 == statuses(place.finish(4))
    place.model.submit(request(data))
    assert 200 == place.finish(5)[-1].status


def test_what_expires_while_it_is_decoded_is_not_computed(place: Place) -> None:
    """408 for it; and the one behind it is computed."""
    place.model.put_in_service(place.hire(best_batch=2), quick=True)
    place.hold()
    place.model.submit(request(big(0), deadline=5.0))
    place.model.submit(request(big(255)))
    place.model.run_once()
    place.now = 6.0
    place.release()

    assert [200, 408] == sorted(statuses(place.finish(2)))
    assert 1 == place.model.statistics.batched


def test_a_model_that_goes_answers_what_is_being_decoded(place: Place) -> None:
    """503 for it, once, although the decoder is not done with it."""
    place.model.put_in_service(place.hire(), quick=True)
    place.hold()
    for _ in range(3):
        place.model.submit(request(big(255)))
    place.model.run_once()
    place.model.retire()
    place.release()

    assert ([503] * 3, 0) == (statuses(place.answers), place.model.waiting)


def test_a_successor_decodes_for_itself(place: Place) -> None:
    """What was prepared for one package is not computed by another, which may want its pictures otherwise."""
    place.model.put_in_service(place.hire(), quick=True)
    place.model.submit(request(big(255)))
    place.model.run_once()
    eventually(lambda: place.due_on, "word from the decoder")
    place.model.put_in_service(place.hire(Preprocess(resize=(8, 8), scale=1 / 510)), quick=True)
    (answer,) = place.finish(1)

    assert 0.5 == pytest.approx(red(answer), abs=0.01)


def test_the_next_batch_is_decoded_while_one_is_computed(tmp_path: Path) -> None:
    """A stage begins with as much as it has room for, and gives out what is whole, one batch after the other."""
    place = Place(tmp_path)
    worker = place.hire(best_batch=2)
    place.model.put_in_service(worker, quick=True)
    whole = threading.Semaphore(0)
    stage = Stage(
        place.model._planner, place.decoders, threading.Condition(), on_ready=whole.release, clock=lambda: 0.0
    )
    for level in range(7):
        place.model.submit(request(big(level)))
    first, _ = stage.take(worker, 0.0)

    assert ((), 4, 3) == (first.batch, stage.waiting, len(place.model._planner))
    for _ in range(2):
        assert whole.acquire(timeout=PATIENCE_S)
    second, decoded = stage.take(worker, 0.0)
    assert (2, 2, 2) == (len(second.batch), len(decoded), stage.waiting)
    assert {each.ticket for each in second.batch} == set(decoded)


def test_estimates_tell_big_from_small(place: Place) -> None:
    worker = place.hire()
    costs: Callable[[Payload], float] = lambda sent: worker.decode_s(request(sent))  # noqa: E731

    assert costs(small(9)) < WORTH_S < costs(big(9))


def test_what_waits_in_vain_for_the_model_is_turned_away(place: Place) -> None:
    """A model may leave memory while pictures are decoded for it: those whose deadline passes meanwhile are answered
    then, and not when it comes back."""
    place.model.put_in_service(place.hire(), quick=True)
    place.hold()
    for deadline in (2.0, 4.0, 9.0):
        place.model.submit(request(big(255), deadline=deadline))
    place.model.run_once()
    place.model.sleep(even_if_wanted=True)
    place.now = 3.0
    ran = place.model.run_once()

    assert (True, [408], 2) == (ran, statuses(place.answers), place.model.waiting)
    assert place.model.give_up_hopeless(3.0)
    assert [408, 503] == statuses(place.answers)
    place.release()
    place.model.put_in_service(place.hire(), quick=True)
    assert [408, 503, 200] == statuses(place.finish(3))
    assert (0, 0) == (place.model.waiting, place.model.waiting_bytes)
