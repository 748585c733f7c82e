"""The client library: ask a model on a device, over MQTT, and get one answer or one error.

    with Client("mqtt://localhost") as client:
        answer = client.infer("squeezenet", "photo.jpg")
        print(answer.predictions[0].label)

    futures = [client.submit("squeezenet", path) for path in paths]      # many in flight
    answers = [future.result() for future in futures]
    answer = await asyncio.wrap_future(client.submit("squeezenet", path))  # from asyncio

Whether a request is sent, sent again or given up is decided in `edge_sdk.mqtt.pending`; this file is the shell around
it: one background thread that owns the connection. What is on the wire is `edge_sdk.mqtt.answers`.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk.errors import (
    BrokerError,
    CommandFailed,
    DataError,
    EdgeSdkError,
    NoAnswer,
    QueueFull,
    SettingsError,
    Unavailable,
)
from edge_sdk.mqtt import commands, topics
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.address import parse_url
from edge_sdk.mqtt.answers import Answer, ClientCodec, Data, Prediction, check_version, described, encoder
from edge_sdk.mqtt.negotiation import ProtocolSetting
from edge_sdk.mqtt.pending import Fail, PendingRequest, PendingRequests
from edge_sdk.mqtt.reconnection import Reconnection
from edge_sdk.mqtt.sequence import ClientSequence
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import (
    FAILURE,
    NO_MATCHING_SUBSCRIBERS,
    Acknowledged,
    Closed,
    Connected,
    ConnectOptions,
    Event,
    Message,
    MqttVersion,
    Received,
    Refused,
    Subscribed,
    Transport,
)
from edge_sdk.tasks.base import BINARY, Body, SequencePart

if TYPE_CHECKING:
    from edge_sdk.mqtt.tracing import UserProperties

__all__ = ["Answer", "BrokerAccess", "Client", "ClientStatistics", "Data", "Prediction"]

WINDOW = 64
"""Requests on their way to the broker, unacknowledged, at a time; the broker's Receive Maximum may say fewer."""
ANSWERS_ON_THE_WAY = 1_000
MAX_ANSWER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class ClientStatistics:
    """Counts since the client was made."""

    requests: int
    answers: int
    errors: int
    """Requests that ended with an exception."""
    resent: int
    """Publications beyond the first of each request."""
    duplicates: int
    """Answers that came again and were dropped."""
    late: int
    """Answers to requests that had been given up."""
    reconnects: int


@dataclass
class _Job:
    """A request with what the shell needs for it."""

    future: Future[Answer]
    model: str
    version: str | None
    encode: Callable[[MqttVersion], Body]
    accept: str | None
    body: Body
    body_version: MqttVersion
    device: str | None
    group: str | None
    deadline: float
    sequence: SequencePart | None = None
    trace: UserProperties = ()


class Client:
    """A connection to a broker, and through it to devices. Thread-safe; use it as a context manager, or `close` it.

    `broker_url` is mqtt://HOST[:PORT] or mqtts://. `access` is how the broker knows us and we the broker, from files
    that are read for each connection; `username`, `password` and `tls_ca_file` are short for fields of it, and win.
    Without TLS a password goes to loopback only, unless `access` allows more. `device` is whom requests go to when they
    do not say; None means the only device that is online. `timeout_s` is the total deadline of a request, resends and
    waiting included. `wait_for_device_s` is the patience with a device that was online and is not (it may be
    restarting); one that was never seen fails within half a second. `protocol` is "auto", "5" or "3.1.1".

    The constructor connects, and raises BrokerError if that is not possible; each attempt may take `connect_timeout_s`.
    After that a lost connection is restored in the background and costs no request, only time.
    """

    def __init__(
        self,
        broker_url: str = "mqtt://localhost:1883",
        *,
        device: str | None = None,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 10.0,
        wait_for_device_s: float = 10.0,
        protocol: ProtocolSetting = "auto",
        access: BrokerAccess = BrokerAccess(),
        username: str | None = None,
        password: str | None = None,
        tls_ca_file: str | None = None,
        root: str = topics.DEFAULT_ROOT,
        client_id: str | None = None,
        keepalive_s: int = 30,
        transport: Transport | None = None,
    ) -> None:
        self.client_id = client_id or f"sdk-{secrets.token_hex(6)}"
        self._root = topics.check_root(root)
        self._device = None if device is None else Topics(root, device).device
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._codec = ClientCodec(self._root, self.client_id)
        self._broker_url = broker_url
        self._access = replace(
            access,
            username=access.username if username is None else username,
            password=access.password if password is None else password,
            ca_file=access.ca_file if tls_ca_file is None else Path(tls_ca_file),
        )
        self._keepalive_s = keepalive_s
        self._options(5)  # what is wrong with them is raised here
        address = parse_url(broker_url)
        self._where = f"{address.host}:{address.port}"
        if transport is None:
            from edge_sdk.mqtt.transports.choice import new_transport

            transport = new_transport()
        self._transport = transport

        self._reconnection = Reconnection(protocol)
        self._pending = PendingRequests(wait_for_device_s)
        self._jobs: dict[PendingRequest, _Job] = {}
        self._submitted: deque[_Job] = deque()
        self._retained: dict[str, bytes] = {}
        self._retained_changed = threading.Condition()
        self._commands: deque[tuple[str, Message]] = deque()
        self._commanding: dict[int, str] = {}
        self._outcomes: dict[str, commands.Outcome | EdgeSdkError | None] = {}
        """By transaction; None: it is waited for."""
        self._watched = {topics.everyones_availability(root) if device is None else Topics(root, device).availability}
        self._granted: set[str] = set()
        self._refused: dict[str, BrokerError] = {}
        self._subscribing: dict[int, tuple[str, ...]] = {}
        self._requests = self._answers = self._errors = self._resent = self._connections = 0

        self._lock = threading.Lock()
        self._closing = False
        self._first_try: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"edge-sdk client {self.client_id}", daemon=True)
        self._thread.start()
        try:
            self._first_try.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.client_id} at {self._where}, {len(self._jobs)} waiting>"

    # -------------------------------------------------------------------------------------------------- for the caller

    def infer(
        self,
        model: str,
        data: Data,
        *,
        version: str | None = None,
        device: str | None = None,
        group: str | None = None,
        timeout_s: float | None = None,
        accept: str | None = None,
        sequence: SequencePart | None = None,
    ) -> Answer:
        """Ask `model` about `data`, and wait for the answer.

        `data` is one of

        * the bytes of a JPEG, PNG, WAV or .npy file, of a JSON body of the Open Inference Protocol, or, failing all
          these, of one raw tensor: little-endian, row-major, of the model's input shape at batch 1;
        * the path of such a file;
        * an array, for a model with one input, in the input's dtype and shape;
        * {input name: array}, for any model.

        `group` asks whichever device of that group gets the request, in place of one device; the answer says which it
        was. `accept` is the content type wanted for the answer: by default binary tensors for arrays, JSON for the
        rest. `sequence` says which part of a sequence it is, for a stateful model; `Client.sequence` counts by itself.

        Raises the RequestError that the device answered with (see `edge_sdk.errors`; QueueFull and Unavailable only if
        they were still the answer at the deadline), TooLarge if the broker would not take the request, NoAnswer if the
        deadline passed or nobody listens, and DataError for data that is none of the above.
        """
        return self.submit(
            model, data,
            version=version, device=device, group=group, timeout_s=timeout_s, accept=accept, sequence=sequence,
        ).result()  # fmt: skip

    def submit(
        self,
        model: str,
        data: Data,
        *,
        version: str | None = None,
        device: str | None = None,
        group: str | None = None,
        timeout_s: float | None = None,
        accept: str | None = None,
        sequence: SequencePart | None = None,
    ) -> Future[Answer]:
        """As `infer`, without waiting: the future gives the Answer or raises.

        Its callbacks run on the client's thread and must not block. Cancelling it forgets the request.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        if group is not None:
            if device is not None:
                raise SettingsError("A request goes to a device or to a group, not to both.")
            if sequence is not None:
                raise SettingsError("A sequence is on one device, and a group may ask another one each time.")
            topics.infer_in_group(self._root, group, model)
        else:
            device = device or self._device
        Topics(self._root, device or "any").infer(model, version=version)
        encode = encoder(data, sequence)
        protocol = self._reconnection.version
        check_version(version, protocol, group)
        if accept is None and isinstance(data, (np.ndarray, Mapping)):
            accept = BINARY
        job = _Job(
            Future(), model, version, encode, accept, encode(protocol), protocol, device, group, deadline, sequence
        )
        if "opentelemetry.trace" in sys.modules:
            self._trace(job)
        with self._lock:
            if self._closing:
                raise NoAnswer("This client is closed.")
            self._submitted.append(job)
            self._requests += 1
        self._transport.wake()
        return job.future

    def sequence(self, model: str, *, version: str | None = None, device: str | None = None) -> ClientSequence:
        """A new sequence of a stateful model, which lives on the device: a context manager.

        >>> with client.sequence("vad") as sequence:
        ...     for chunk in chunks:
        ...         answer = sequence.infer(chunk)
        """
        return ClientSequence(self.infer, model, version=version, device=device or self._device)

    def devices(self) -> dict[str, bool]:
        """Every device that ever said so on this broker, and whether it is online."""
        everyone = topics.everyones_availability(self._root)
        self._settle(everyone)
        with self._retained_changed:
            found = {
                topics.device_of(self._root, topic): payload == b"online"
                for topic, payload in self._retained.items()
                if topic.endswith("/availability")
            }
        return {device: online for device, online in sorted(found.items(), key=str) if device is not None}

    def info(self, device: str | None = None) -> dict[str, Any]:
        """A device's own description: server metadata, limits, content types. Raises NoAnswer if there is none."""
        return self._described(Topics(self._root, self._one_device(device)).info, "It has never been online here.")

    def metadata(self, model: str, *, device: str | None = None) -> dict[str, Any]:
        """A model's retained metadata: inputs, outputs, state. Raises NoAnswer if the device has no such model."""
        topic = Topics(self._root, self._one_device(device)).model(model)
        return self._described(topic, f"The device serves no model {model!r}, or is not there.")

    def command(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        device: str | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Tell a device to do something, as the wire contract lists it, and wait until it has; what it says about it.

        Raises CommandFailed with the device's reason, and NoAnswer if there is no answer in time: it may have been done
        all the same.
        """
        place = Topics(self._root, self._one_device(device))
        self._settle(place.command_response(name), until=lambda: True)
        transaction = f"{self.client_id}-{secrets.token_hex(8)}"
        with self._retained_changed:
            self._outcomes[transaction] = None
            self._commands.append((transaction, commands.ask(name, transaction, arguments or {}, place)))
            self._transport.wake()
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            self._retained_changed.wait_for(lambda: self._outcomes[transaction] is not None or self._closing, limit_s)
            outcome = self._outcomes.pop(transaction)
        if isinstance(outcome, EdgeSdkError):
            raise outcome
        if outcome is None:
            raise NoAnswer(f"Device {place.device!r} said nothing about the command {name!r} within {limit_s:g} s.")
        if outcome.error is not None:
            raise CommandFailed(f"Device {place.device!r}, {name}: {outcome.error}", data=dict(outcome.data))
        return dict(outcome.data)

    def stats(self, device: str | None = None, *, timeout_s: float = 30.0) -> dict[str, Any]:
        """The next statistics that a device publishes: counts, timings, memory. Raises NoAnswer if none come in time.

        A device publishes them every ten seconds, unless it is told otherwise.
        """
        name = self._one_device(device)
        topic = Topics(self._root, name).stats
        with self._retained_changed:
            self._retained.pop(topic, None)
        self._settle(topic, until=lambda: topic in self._retained)
        with self._retained_changed:
            self._retained_changed.wait_for(lambda: topic in self._retained or self._closing, timeout_s)
            payload = self._retained.pop(topic, None)
        if payload is None:
            raise NoAnswer(
                f"{name} published no statistics within {timeout_s:g} s.",
                fix="Is it online? `stats_interval_s` is how often it does.",
            )
        return described(topic, payload)

    @property
    def statistics(self) -> ClientStatistics:
        return ClientStatistics(
            requests=self._requests,
            answers=self._answers,
            errors=self._errors,
            resent=self._resent,
            duplicates=self._pending.duplicates,
            late=self._pending.late,
            reconnects=max(0, self._connections - 1),
        )

    @property
    def protocol(self) -> str:
        """The version of MQTT in use: "5" or "3.1.1"."""
        return self._reconnection.version_name

    def close(self) -> None:
        """Disconnect. What has no answer yet ends with NoAnswer. Closing again does nothing."""
        with self._lock:
            self._closing = True
        self._transport.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ------------------------------------------------------------------------------------------------ retained topics

    def _one_device(self, device: str | None) -> str:
        device = device or self._device
        if device is not None:
            return device
        online = [name for name, is_online in self.devices().items() if is_online]
        if len(online) != 1:
            listed = ", ".join(online[:10]) or "none"
            raise NoAnswer(f"{len(online)} devices are online ({listed}).", fix="Say which one is meant: device=...")
        return online[0]

    def _described(self, topic: str, otherwise: str) -> dict[str, Any]:
        self._settle(topic, until=lambda: topic in self._retained)
        payload = self._retained.get(topic)
        if payload is None:
            raise NoAnswer(f"Nothing is retained on {topic}. {otherwise}")
        return described(topic, payload)

    def _settle(self, topic_filter: str, until: Callable[[], bool] | None = None) -> None:
        """Watch a filter, and wait until what is retained there has had time to come, or `until` says enough."""
        with self._lock:
            self._watched.add(topic_filter)
        self._transport.wake()
        with self._retained_changed:
            granted = self._retained_changed.wait_for(
                lambda: topic_filter in self._granted or topic_filter in self._refused or self._closing,
                min(self._timeout_s, 5.0),
            )
            refusal = self._refused.get(topic_filter)
            if refusal is not None:
                raise NoAnswer(refusal.problem, fix=refusal.fix) from refusal
            if not granted:
                raise NoAnswer("There is no connection to the broker.")
            # Nothing marks the end of the retained messages; a broker sends them right after SUBACK.
            self._retained_changed.wait_for(until or (lambda: False), 0.3)

    # ---------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        error: EdgeSdkError = NoAnswer("The client was closed before the answer came.")
        try:
            while not self._closing:
                now = time.monotonic()
                self._keep_connected(now)
                self._subscribe()
                self._start_jobs(now)
                self._act(time.monotonic())
                self._send_commands()
                for event in self._transport.poll(self._until_next(time.monotonic())):
                    self._on(event, time.monotonic())
        except Exception as exc:
            error = NoAnswer(f"The client broke down: {exc!r}. This is a defect of edge-sdk.")
            error.__cause__ = exc
        finally:
            with self._lock:
                self._closing = True
            self._give_up(error)
            self._transport.close()
            with self._retained_changed:
                self._retained_changed.notify_all()

    def _give_up(self, error: EdgeSdkError) -> None:
        """End everything that is waiting."""
        for fail in self._pending.fail_all(error):
            self._end(fail)
        with self._lock:
            submitted = list(self._submitted)
            self._submitted.clear()
        for job in submitted:
            self._errors += 1
            _set_exception(job.future, error)
        if not self._first_try.done():
            self._first_try.set_exception(error)

    def _until_next(self, now: float) -> float:
        moment = min(self._pending.next_moment(), self._reconnection.next_at)
        return max(0.0, min(moment - now, 10.0))

    def _start_jobs(self, now: float) -> None:
        while self._submitted:
            job = self._submitted.popleft()
            request = self._pending.add(job.device, job.model, deadline=job.deadline, now=now, group=job.group)
            self._jobs[request] = job
            if job.device is not None and self._device != job.device:
                with self._lock:
                    self._watched.add(Topics(self._root, job.device).availability)
        deaf = self._refused.get(self._codec.answers_filter(self._reconnection.version))
        if deaf is not None:
            for fail in self._pending.fail_all(deaf):
                self._end(fail)

    def _act(self, now: float) -> None:
        for action in self._pending.due(now):
            if isinstance(action, Fail):
                self._end(action)
                continue
            request = action.request
            job = self._jobs[request]
            if job.future.cancelled():
                self._pending.cancel(request)
                del self._jobs[request]
                continue
            try:
                handle = self._transport.publish(self._message(request, job, now))
            except (EdgeSdkError, ValueError) as err:
                self._pending.cancel(request)
                error = err if isinstance(err, EdgeSdkError) else DataError(
                    f"The request for model {request.model!r} cannot be sent: {err}."
                )  # fmt: skip
                self._end(Fail(request, error))
                continue
            self._resent += request.sends > 0
            self._pending.sent(request, handle)

    def _send_commands(self) -> None:
        while self._commands and self._reconnection.is_connected:
            transaction, message = self._commands.popleft()
            self._commanding[self._transport.publish(message)] = transaction

    def _on_command_taken(self, event: Acknowledged) -> None:
        transaction = self._commanding.pop(event.handle, None)
        if transaction is None or (event.code != NO_MATCHING_SUBSCRIBERS and event.code < FAILURE):
            return
        if event.code == NO_MATCHING_SUBSCRIBERS:
            why = NoAnswer(
                "Nobody listens to commands for that device.",
                fix="Check its name, that it is online, and that its settings say `[commands] enabled = true`.",
            )
        else:
            why = NoAnswer(f"The broker refused the command with reason code 0x{event.code:02x}.")
        self._conclude(transaction, why)

    def _conclude(self, transaction: object, outcome: commands.Outcome | EdgeSdkError) -> None:
        with self._retained_changed:
            if transaction in self._outcomes:
                self._outcomes[str(transaction)] = outcome
                self._retained_changed.notify_all()

    def _message(self, request: PendingRequest, job: _Job, now: float) -> Message:
        version = self._reconnection.version
        if job.body_version != version:
            job.body, job.body_version = job.encode(version), version
        return self._codec.request(
            request.key, request.device or "", job.model, job.body,
            version=job.version, accept=job.accept, sequence=job.sequence, protocol=version,
            remaining_s=request.deadline - now, group=request.group, trace=job.trace,
        )  # fmt: skip

    def _trace(self, job: _Job) -> None:
        """Give the request a span, where the program traces."""
        from edge_sdk.mqtt.tracing import client_span

        if (span := client_span(job.model, job.device)) is not None:
            job.trace = span.properties
            job.future.add_done_callback(span.end)

    # ----------------------------------------------------------------------------------------------------- connection

    def _keep_connected(self, now: float) -> None:
        if not self._reconnection.due(now):
            return
        try:
            options = self._options(self._reconnection.version)
            self._transport.open(options, timeout_s=self._reconnection.patience_s(self._connect_timeout_s))
        except EdgeSdkError as error:
            self._reconnection.failed(time.monotonic())  # the attempt took its time
            self._fail_first_try(error)

    def _options(self, version: MqttVersion) -> ConnectOptions:
        """What to connect with, as the files are now; SettingsError."""
        return self._access.options(
            self._broker_url,
            client_id=self.client_id,
            version=version,
            clean_start=True,
            keepalive_s=self._keepalive_s,
            receive_maximum=ANSWERS_ON_THE_WAY,
            maximum_packet_size=MAX_ANSWER_BYTES,
        )

    def _fail_first_try(self, error: EdgeSdkError) -> None:
        """The first connection is the constructor's, and its failure final."""
        if not self._first_try.done():
            self._first_try.set_exception(error)

    def _on_connected(self, event: Connected, now: float) -> None:
        self._reconnection.connected(now)
        self._connections += 1
        self._granted.clear()
        self._subscribing.clear()
        self._commanding.clear()
        self._pending.knows_listeners = self._reconnection.version == 5
        self._window = min(WINDOW, event.limits.receive_maximum)

    def _on_lost(self, event: Refused | Closed, now: float) -> None:
        self._pending.disconnected()
        self._refused.clear()
        where = f"The MQTT broker at {self._where}"
        if isinstance(event, Refused):
            pause_s = self._reconnection.refused(event.code, now)
            error = BrokerError(f"{where} refused the connection: {event.reason}.")
        else:
            pause_s = self._reconnection.closed(event.code, now)
            error = BrokerError(f"{where} closed the connection: {event.reason}.")
        if pause_s:
            self._fail_first_try(error)

    def _subscribe(self) -> None:
        """Ask for what is watched and not asked for yet on this connection; the answers' own topic comes first."""
        if not self._reconnection.is_connected:
            return
        answers = self._codec.answers_filter(self._reconnection.version)
        asked = self._granted.union(self._refused, *self._subscribing.values())
        with self._lock:
            wanted = [name for name in (answers, *sorted(self._watched)) if name not in asked]
        if wanted:
            self._subscribing[self._transport.subscribe(wanted)] = tuple(wanted)

    def _on_subscribed(self, event: Subscribed, now: float) -> None:
        filters = self._subscribing.pop(event.handle, ())
        codes = dict(zip(filters, (*event.codes, *[FAILURE] * len(filters))))  # what a SUBACK leaves out, it refuses
        refused = {name: _refusal(name, code) for name, code in codes.items() if code >= FAILURE}
        with self._retained_changed:
            self._granted.update(codes.keys() - refused.keys())
            self._refused.update(refused)
            self._retained_changed.notify_all()
        if any(name.endswith("/availability") for name in filters):
            unseen = next((error for name, error in self._refused.items() if name.endswith("/availability")), None)
            self._pending.subscribed_to_availability(now, unseen)
        answers = self._codec.answers_filter(self._reconnection.version)
        if answers in refused:
            self._give_up(refused[answers])
        elif answers in codes:
            self._pending.connected(self._window)
            if not self._first_try.done():
                self._first_try.set_result(None)

    # --------------------------------------------------------------------------------------------------------- events

    def _on(self, event: Event, now: float) -> None:
        if isinstance(event, Received):
            self._on_message(event, now)
        elif isinstance(event, Acknowledged):
            self._pending.acknowledged(event.handle, event.code, now)
            if self._commanding:
                self._on_command_taken(event)
        elif isinstance(event, Connected):
            self._on_connected(event, now)
        elif isinstance(event, Subscribed):
            self._on_subscribed(event, now)
        else:
            self._on_lost(event, now)

    def _on_message(self, received: Received, now: float) -> None:
        message = received.message
        self._transport.acknowledge(received)
        key = self._codec.key(message)
        if key is not None:
            self._on_answer(key, message, now)
        elif message.topic.endswith("/availability"):
            device = topics.device_of(self._root, message.topic)
            if device is not None:
                self._retain(message)
                self._pending.heard(device, message.payload == b"online")
        elif message.topic.endswith("/response"):
            if (answered := commands.answered(message.payload)) is not None:
                self._conclude(*answered)
        else:
            self._retain(message)

    def _retain(self, message: Message) -> None:
        with self._retained_changed:
            if message.payload:
                self._retained[message.topic] = message.payload
            else:
                self._retained.pop(message.topic, None)
            self._retained_changed.notify_all()

    def _on_answer(self, key: int, message: Message, now: float) -> None:
        request = self._pending.answered(key)
        if request is None:
            return
        job = self._jobs[request]
        try:
            answer = self._codec.answer(message, job.model, request.device or "")
        except EdgeSdkError as error:
            if isinstance(error, (QueueFull, Unavailable)) and error.retryable:
                self._pending.put_off(request, error, now)
                return
            self._end(Fail(request, error))
        else:
            del self._jobs[request]
            self._answers += 1
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(answer)

    def _end(self, fail: Fail) -> None:
        job = self._jobs.pop(fail.request, None)
        if job is not None:
            self._errors += 1
            _set_exception(job.future, fail.error)


def _refusal(topic_filter: str, code: int) -> BrokerError:
    return BrokerError(
        f"The broker refused this client the subscription to {topic_filter} (0x{code:02x}).",
        fix="Allow it in the broker's access control.",
    )


def _set_exception(future: Future[Answer], error: EdgeSdkError) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
