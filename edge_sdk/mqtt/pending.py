"""What the client library decides, without a socket or a clock: when to send, to send again, to wait, to give up.

    request = pending.add(device, model, deadline=now + 30, now=now)
    for action in pending.due(now):                 # Send or Fail
        ...
    sleep until pending.next_moment() or something happens, and tell: acknowledged, answered, put_off, heard, ...

PUBACK is not delivery: a broker may acknowledge a request and lose it, a daemon may be killed with it. So a request is
sent again, under the same key, when its answer takes suspiciously long and after every reconnect; a device recognises
the key and computes once. What came twice is dropped here, so the caller sees one answer.

A device remembers answers by reply topic and key, and the reply topic is the client id's. So the keys of a process
start at a number of its own: were it 1, a client that is restarted would be given the answers of its former life.

Nobody listening is worth knowing early. MQTT 5 says it in the PUBACK; otherwise the device's retained availability
does. A device this client has never seen is given up after SETTLE_S; one that it saw may be restarting, and is waited
for.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Union

from edge_sdk.errors import BrokerError, EdgeSdkError, NoAnswer, RequestError
from edge_sdk.mqtt.transports.base import FAILURE, NO_MATCHING_SUBSCRIBERS, QUOTA_EXCEEDED

FIRST_RESEND_S = 3.0
FIRST_LOOK_S = 2.0
"""When a new request is first looked at again: before a resend can be due, and soon enough to be forgotten soon."""
LONGEST_RESEND_S = 15.0
SETTLE_S = 0.4
"""How long retained messages may take to arrive after the subscription; also the patience with an unknown device."""
LISTEN_AGAIN_S = 0.2
"""The pause before asking again whether anybody listens."""
RETRY_S = 0.05
"""The first pause after `queue_full` and the like, when the device names none; it doubles."""
REMEMBERED = 8_192
"""Keys of answered requests, to tell a duplicate from a stranger's message."""

KEY_BITS = 62
"""Of the first key: of the 8 bytes a key has on the wire, two bits are left to count on."""


@dataclass(eq=False)
class PendingRequest:
    """One request that has no answer yet."""

    key: int
    """Its id on the wire."""
    model: str
    device: str | None
    """None: the only device that is online, once that is known."""
    deadline: float
    group: str | None = None
    """Whoever of this group gets it; then there is no device."""
    state: Literal["waiting", "sent", "accepted"] = "waiting"
    sends: int = 0
    taken: int = 0
    """How often the broker acknowledged it."""
    put_offs: int = 0
    next_at: float = math.inf
    timer_at: float = math.inf
    unheard_since: float | None = None
    error: RequestError | None = None
    """The last answer that said: not now."""


@dataclass(frozen=True)
class Send:
    """Publish the request, and tell `sent` its handle."""

    request: PendingRequest


@dataclass(frozen=True)
class Fail:
    """The caller gets `error`; the request is forgotten."""

    request: PendingRequest
    error: EdgeSdkError


Action = Union[Send, Fail]


@dataclass
class DeviceState:
    """What retained availability says of one device; `online` None: nothing on this connection."""

    online: bool | None = None
    was_online: bool = False


@dataclass
class PendingRequests:
    """The table of requests without an answer.

    `wait_for_device_s` is the patience with a device that was online before; `knows_listeners`: whether PUBACK says
    that nobody listens (MQTT 5). The keys count up from `first_key`.
    """

    wait_for_device_s: float = 10.0
    chance: Callable[[], float] = random.random
    first_key: int = field(default_factory=lambda: secrets.randbits(KEY_BITS))
    knows_listeners: bool = True
    devices: dict[str, DeviceState] = field(default_factory=dict)

    duplicates: int = 0
    late: int = 0

    _requests: dict[int, PendingRequest] = field(default_factory=dict)
    _ready: deque[PendingRequest] = field(default_factory=deque)
    _timers: list[tuple[float, int, PendingRequest]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)
    _in_flight: dict[int, PendingRequest] = field(default_factory=dict)
    _answered: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _failed: list[Fail] = field(default_factory=list)
    _keys: Iterator[int] = field(init=False)
    _groups: set[str] = field(default_factory=set)
    """Those in which somebody was given a request."""
    _window: int = 0
    _settled_at: float = math.inf
    _unseen: BrokerError | None = None
    """Why the availability of devices is not known, if it is not."""

    def __post_init__(self) -> None:
        self._keys = itertools.count(self.first_key)

    def __len__(self) -> int:
        return len(self._requests)

    # -------------------------------------------------------------------------------------------------- what happens

    def add(
        self, device: str | None, model: str, *, deadline: float, now: float, group: str | None = None
    ) -> PendingRequest:
        """A new request, to be sent as soon as possible."""
        request = PendingRequest(next(self._keys), model, device, deadline, group)
        self._requests[request.key] = request
        self._push_timer(request, min(deadline, now + FIRST_LOOK_S))
        self._make_ready(request)
        return request

    def connected(self, window: int) -> None:
        """Answers can arrive: everything without one is sent (again), at most `window` unacknowledged at a time."""
        self._window = window
        for request in self._requests.values():
            if request.state != "waiting":
                self._make_ready(request)

    def disconnected(self) -> None:
        """Nothing that was sent can be relied on; what the devices' availability was, neither."""
        self._window = 0
        self._in_flight.clear()
        self._settled_at = math.inf
        self._unseen = None
        for state in self.devices.values():
            state.online = None

    def subscribed_to_availability(self, now: float, refusal: BrokerError | None = None) -> None:
        """The broker said yes or, with a `refusal`, no: then nobody will be seen."""
        self._settled_at = now + SETTLE_S
        self._unseen = refusal

    def heard(self, device: str, online: bool) -> None:
        """The availability of a device, retained or fresh."""
        state = self.devices.setdefault(device, DeviceState())
        state.online = online
        if online:
            state.was_online = True
            for request in self._requests.values():
                if (
                    request.state == "waiting"
                    and request.unheard_since is not None
                    and request.device in (None, device)
                ):
                    self._make_ready(request)

    def sent(self, request: PendingRequest, handle: int) -> None:
        request.sends += 1
        request.state = "sent"
        self._in_flight[handle] = request
        self._set_timer(request, request.deadline)

    def acknowledged(self, handle: int, code: int, now: float) -> None:
        """The broker took a request, or said why not. Handles that are not ours are ignored."""
        request = self._in_flight.pop(handle, None)
        if request is None or request.key not in self._requests or request.state != "sent":
            return
        if code == NO_MATCHING_SUBSCRIBERS:
            self._unheard(request, now)
        elif code == QUOTA_EXCEEDED:
            self._wait(request, now + self._jitter(1.0))
        elif code >= FAILURE:
            self._fail(request, NoAnswer(
                f"The broker refused the request for model {request.model!r} with reason code 0x{code:02x}.",
                fix="Allow this client to publish to the device's topics.",
            ))  # fmt: skip
        else:
            request.state = "accepted"
            request.taken += 1
            if request.group is not None:
                self._groups.add(request.group)
            request.unheard_since = None
            pause_s = min(LONGEST_RESEND_S, FIRST_RESEND_S * 2 ** (request.sends - 1))
            self._set_timer(request, now + self._jitter(pause_s))

    def answered(self, key: int) -> PendingRequest | None:
        """The request that an answer is for; None if it was answered before, is given up, or was never ours."""
        request = self._requests.get(key)
        if request is None:
            if key in self._answered:
                self.duplicates += 1
            else:
                self.late += 1
            return None
        self._forget(request)
        self._answered[key] = None
        if len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)
        return request

    def put_off(self, request: PendingRequest, error: RequestError, now: float) -> None:
        """The answer was: not now. That ended the request on the wire; it comes back as a new one, under a new key."""
        request.error = error
        request.key = next(self._keys)
        self._requests[request.key] = request
        pause_s = error.retry_after_ms / 1000 if error.retry_after_ms else RETRY_S * 2 ** min(request.put_offs, 5)
        request.put_offs += 1
        self._wait(request, now + pause_s + self._jitter(pause_s / 4))

    def cancel(self, request: PendingRequest) -> None:
        self._forget(request)

    def fail_all(self, error: EdgeSdkError) -> list[Fail]:
        """Give up everything."""
        failed = [Fail(request, error) for request in self._requests.values()]
        self._requests.clear()
        return failed

    # ---------------------------------------------------------------------------------------------- what is to be done

    def due(self, now: float) -> Iterator[Action]:
        """What to do now; after each Send comes its `sent` (or `cancel`), before the next is asked for."""
        while self._timers and self._timers[0][0] <= now:
            at, _, request = heapq.heappop(self._timers)
            if request.timer_at != at or self._requests.get(request.key) is not request:
                continue
            request.timer_at = math.inf
            if request.next_at > now:
                self._push_timer(request, request.next_at)
            elif now >= request.deadline:
                self._fail(request, self._too_late(request))
            else:
                self._make_ready(request)
        while self._ready and len(self._in_flight) < self._window:
            request = self._ready.popleft()
            if self._requests.get(request.key) is request and request.state == "waiting" and self._may_go(request, now):
                yield Send(request)
        failed, self._failed = self._failed, []
        yield from failed

    def next_moment(self) -> float:
        """When `due` has something to do, if nothing happens before."""
        return self._timers[0][0] if self._timers else math.inf

    # ------------------------------------------------------------------------------------------------------- by itself

    def _may_go(self, request: PendingRequest, now: float) -> bool:
        """Whether somebody is there to take the request; if not, it waits or has failed."""
        if request.group is not None:  # who is in it, only the broker knows
            return True
        if request.device is None and not self._choose_device(request, now):
            return False
        state = self.devices.get(request.device or "", DeviceState())
        if state.online or (state.online is None and self.knows_listeners):
            return True
        if state.online is None and now < self._settled_at:
            self._wait(request, min(self._settled_at, now + SETTLE_S))
        else:
            self._unheard(request, now)
        return False

    def _choose_device(self, request: PendingRequest, now: float) -> bool:
        if now < self._settled_at:
            self._wait(request, min(self._settled_at, now + SETTLE_S))
            return False
        online = sorted(name for name, state in self.devices.items() if state.online)
        if len(online) == 1:
            request.device = online[0]
            return True
        if online:
            self._fail(request, NoAnswer(
                f"{len(online)} devices are online: {', '.join(online[:10])}{', ...' if len(online) > 10 else ''}.",
                fix="Say which one is meant: Client(..., device=...) or infer(..., device=...).",
            ))  # fmt: skip
        else:
            self._unheard(request, now)
        return False

    def _unheard(self, request: PendingRequest, now: float) -> None:
        """Nobody listens. For how long has that been so, and how long may it be?"""
        if request.unheard_since is None:
            request.unheard_since = now
        states = [self.devices.get(request.device, DeviceState())] if request.device else list(self.devices.values())
        was_there = (
            any(state.was_online for state in states) if request.group is None else request.group in self._groups
        )
        patience_s = self.wait_for_device_s if was_there else SETTLE_S
        if now < request.unheard_since + patience_s:
            self._wait(request, now + LISTEN_AGAIN_S)
            return
        if request.group is not None:
            self._fail(request, NoAnswer(
                f"Nobody in group {request.group!r} is listening: nobody answers for model {request.model!r}.",
                fix="Start a daemon with that group among its `groups`, or check the group's name and the topic root.",
            ))  # fmt: skip
            return
        who = f"Device {request.device!r}" if request.device else "No device"
        is_offline = request.device and states[0].online is False
        what = "is offline" if is_offline else "is not listening" if request.device else "is online"
        if self._unseen is not None and not (request.device and self.knows_listeners):
            self._fail(request, NoAnswer(
                f"{who} {what}, as far as this client may see: nobody for model {request.model!r}. "
                f"{self._unseen.problem}",
                fix=self._unseen.fix,
            ))  # fmt: skip
            return
        self._fail(request, NoAnswer(
            f"{who} {what}: nobody answers for model {request.model!r}.",
            fix="Start its daemon (edge-sdk serve), or check the device's name, the broker and the topic root.",
        ))  # fmt: skip

    def _too_late(self, request: PendingRequest) -> EdgeSdkError:
        if request.error is not None:
            return request.error
        about = f"the request for model {request.model!r}" + (
            f" on device {request.device!r}"
            if request.device
            else f" in group {request.group!r}"
            if request.group
            else ""
        )
        if not request.sends:
            return NoAnswer(f"The deadline passed before {about} could be sent: there was no connection to the broker.")
        if request.taken:
            again = "once" if request.taken == 1 else f"{request.taken} times"
            return NoAnswer(f"No answer to {about} by its deadline; the broker took it {again}.")
        return NoAnswer(f"The deadline passed before the broker took {about}.")

    def _make_ready(self, request: PendingRequest) -> None:
        request.state = "waiting"
        self._set_timer(request, request.deadline)
        self._ready.append(request)

    def _wait(self, request: PendingRequest, until: float) -> None:
        request.state = "waiting"
        self._set_timer(request, until)

    def _set_timer(self, request: PendingRequest, at: float) -> None:
        """Look at the request again then. A timer that fires too early is wound up anew, a later one is put before."""
        request.next_at = min(at, request.deadline)
        if request.next_at < request.timer_at:
            self._push_timer(request, request.next_at)

    def _push_timer(self, request: PendingRequest, at: float) -> None:
        request.timer_at = at
        heapq.heappush(self._timers, (at, next(self._order), request))

    def _fail(self, request: PendingRequest, error: EdgeSdkError) -> None:
        self._forget(request)
        self._failed.append(Fail(request, error))

    def _forget(self, request: PendingRequest) -> None:
        self._requests.pop(request.key, None)

    def _jitter(self, pause_s: float) -> float:
        return pause_s * (0.75 + 0.5 * self.chance())
