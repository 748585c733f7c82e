"""The daemon: the online journey, from a PUBLISH to its answer.

    poll -> take -> submit -> (compute) -> finish -> perform -> poll

One thread owns the connection and everything that is decided about it. It reads all that has arrived, hands requests to
the service, computes what waits for quick models, and writes the answers; slower models compute on threads of their own
and wake it. Nothing here decides: what may be acknowledged is the session's to say, what a message means the codec's,
what is computed together the planner's.

It stops like this: take nothing new (what the broker still has, it keeps for us), finish what was accepted within
`drain_s`, say `offline`, disconnect, exit 0.

A lost device ends it at once, without a goodbye: no answer that could still be given would be right, and the broker,
which has no acknowledgement of what was being computed, gives that to the next daemon.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_sdk import host
from edge_sdk.account import Account
from edge_sdk.assembly import (
    client_rates,
    memory_budget,
    open_health,
    open_journal,
    open_spans,
    preferred_profile,
    watched_certificate,
)
from edge_sdk.errors import (
    DeadlineExceeded,
    EngineFailed,
    EngineHung,
    IdReused,
    QueueFull,
    RequestError,
    SettingsError,
    Unavailable,
)
from edge_sdk.mqtt.codec import Codec
from edge_sdk.mqtt.echo import OWN, Echo
from edge_sdk.mqtt.identity import key_of
from edge_sdk.mqtt.link import Link, QoS
from edge_sdk.mqtt.session import Record, ReplyRoute, Session
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import (
    ConnectOptions,
    Event,
    Message,
    MqttVersion,
    Properties,
    Received,
    Transport,
    Will,
)
from edge_sdk.notify import Notifier, watchdog_interval_s
from edge_sdk.profiles import Machine
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer, stopping
from edge_sdk.runtime.recorder import FlightRecorder
from edge_sdk.runtime.service import Service
from edge_sdk.settings import Settings
from edge_sdk.signals import Signals
from edge_sdk.tasks.base import JSON
from edge_sdk.tasks.oip import dump_json
from edge_sdk.watch import Watch

if TYPE_CHECKING:  # what few daemons use is loaded by those that do
    from edge_sdk.control import Control
    from edge_sdk.mqtt.elsewhere import Elsewhere
    from edge_sdk.mqtt.group import Membership
    from edge_sdk.mqtt.rate import ClientRates
    from edge_sdk.stages import Stage
    from edge_sdk.tasks.base import Payload
    from edge_sdk.tensors import Outputs

log = logging.getLogger(__name__)

WILL_DELAY_S = 10
IDLE_POLL_S = 1.0
HEALTH_PATIENCE_S = 15.0
"""/healthz says that the daemon stands still when its loop was silent for so long; it turns once a second at least."""
HARD_STOP_S = 5.0
"""Beyond `drain_s`: a stop that has not ended by then is ended."""
DRAINED_RETRY_MS = 5000
"""When to try a drained device again: nobody knows, and it has nothing better to do than to say no."""
MAX_UNSENT = 4096
"""QoS 0 requests are dropped while so many answers wait for the broker: nobody else holds them back."""


class Daemon:
    """`run` serves until SIGTERM or SIGINT and gives back the exit code."""

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        *,
        group_transport: Transport | None = None,
        reread: Callable[[], Settings] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        """`group_transport` is another of the same kind, wanted where the settings name groups; `reread` gives the
        settings anew on SIGHUP, or raises SettingsError."""
        self._settings = settings
        self._access = settings.access()
        self._certificate = watched_certificate(self._access)
        self._reread = reread
        self._notifier = notifier or Notifier()
        self._topics = Topics(settings.root, settings.device)
        self._qos: QoS = 0 if settings.delivery == "fast" else 1
        self._codec = Codec(
            self._topics,
            boot_id=secrets.token_hex(8),
            max_payload_bytes=settings.limits.max_payload_bytes,
            timeout_s=settings.limits.request_timeout_s,
            reply_prefixes=settings.reply_prefixes,
            qos=self._qos,
        )
        self._echo = Echo(self._topics, self._codec.boot_id, self_test_s=settings.serving.self_test_s)
        self._echo_told = ""
        tickets = itertools.count(1)
        self._link = Link(
            transport,
            protocol=settings.broker.spoken,
            options=self._connect_options,
            subscriptions={},  # until it is connected: what can be read depends on the version
            too_large=self._codec.too_large,
            durable=settings.delivery == "durable",
            numbers=tickets,
            on_connected=self._on_connected,
            on_trouble=self._on_trouble,
            on_refused=self._on_refused,
            write_down=self._write_down,
        )
        self._session = self._link.session
        self._membership = self._new_membership(transport, group_transport, tickets) if settings.groups else None
        self._elsewhere: Elsewhere | None = None
        self._rates = client_rates(settings)
        self._journal = open_journal(settings, self._session)
        self._health = open_health(settings, max_silence_s=HEALTH_PATIENCE_S, on_asked=self._note_scrape)
        self._spans = open_spans(settings)
        host.return_large_pieces()
        flights = settings.flights()
        self._recorder = FlightRecorder() if flights is None else FlightRecorder.open(flights)
        machine = Machine.read()
        self._profile = preferred_profile(settings, machine)
        self._service = Service(
            settings.engines,
            on_answer=self._note_answer,
            on_change=self._note_change,
            machine=machine,
            profile=self._profile,
            limits=QueueLimits(settings.limits.max_queue, settings.limits.max_queue_bytes),
            newest_wins=settings.delivery == "fast",
            inline_ms=settings.serving.inline_ms,
            on_lost=self._end_failed,
            on_due=self._link.wake,
            store=settings.engine_cache,
            building=settings.building.enabled,
            budget_bytes=memory_budget(settings, machine, self._profile),
            recorder=self._recorder,
            self_test_s=settings.serving.self_test_s,
            elsewhere=self._ask_elsewhere,
        )
        self._watch = Watch(self._recorder, hang_s=settings.serving.hang_s, on_hang=self._end_failed)
        self._account = Account(
            settings,
            self._topics,
            self._codec.boot_id,
            self._profile,
            service=self._service,
            link=self._link,
            echo=self._echo,
            membership=self._membership,
            journal=self._journal,
            certificate=self._certificate,
            is_drained=lambda: self._draining,
        )
        self._control = self._new_control(tickets) if settings.commands.enabled else None
        self._routes: dict[int, tuple[Session, ReplyRoute, float]] = {}  # ticket -> where the answer goes, by when
        self._answers: deque[Answer] = deque()  # appended by any thread
        self._owner = threading.get_ident()
        self._ending = threading.Lock()
        self._draining = False
        self._stop_requested = False
        self._reload_requested = False
        self._changed = False
        self._moves_told = 0
        self._stats_at = 0.0
        self._alive_at = 0.0
        self._look_at = 0.0
        self._awake_until = 0.0
        self._busy_poll_s = settings.serving.busy_poll_us / 1e6
        self._watchdog_s = watchdog_interval_s()
        self._ready = False

    def run(self) -> int:
        """Start up, serve, shut down."""
        self._owner = threading.get_ident()
        with Signals(stop=self.stop, reload=self.reload):
            self._service.start()
            self._watch.start()
            while not self._stop_requested:
                self._turn(taking=True)
            return self._shut_down()

    def stop(self) -> None:
        """From any thread, or a signal handler: begin to stop."""
        self._stop_requested = True
        self._link.wake()

    def reload(self) -> None:
        """From any thread, or a signal handler: look at the settings and the engines folder again."""
        self._reload_requested = True
        self._link.wake()

    # One turn: everything that has happened, and what follows from it

    def _turn(self, *, taking: bool) -> None:
        now = time.monotonic()
        self._watch.turns += 1
        self._link.keep_up(now)
        for event in self._poll(now):
            if isinstance(event, Received):
                self._receive(event, self._session, taking=taking)
            else:
                self._link.note(event)
        if self._membership is not None:
            self._take_share(self._membership, now)
        self._service.run_quick()
        self._finish_answers()
        self._link.perform()
        if self._membership is not None:
            self._membership.perform()
        self._keep_house(time.monotonic())

    def _poll(self, now: float) -> Sequence[Event]:
        """What has happened since; for a moment after a message without going to sleep.

        Who asks one thing at a time sends the next request as soon as it has the answer, and to be woken for it takes
        a processor longer than a small model does.
        """
        while now < self._awake_until and not self._answers and not self._service.waiting():
            if events := self._link.poll(0.0):
                return events
            if self._membership is not None and self._membership.look():
                return ()
            now = time.monotonic()
        return self._link.poll(self._pause_s(now))

    def _take_share(self, membership: Membership, now: float) -> None:
        """What the second connection brought. It is taken to the last: nobody else would be given it."""
        if self._link.is_connected:
            membership.keep_up(now)
        for event in membership.poll():
            membership.note(event)
            if isinstance(event, Received):
                self._receive(event, membership.link.session, taking=True)

    def _receive(self, event: Received, session: Session, *, taking: bool) -> None:
        now = time.monotonic()
        self._awake_until = now + self._busy_poll_s
        if taking or event.packet_id is None:  # what is not acknowledged now, the broker keeps for the next
            self._take(event, session, now, taking=taking)

    def _take(self, event: Received, session: Session, now: float, *, taking: bool) -> None:
        """A message: a request for the service, or something to be acknowledged and forgotten."""
        message = event.message
        envelope = self._codec.envelope(message)
        if (envelope is None or envelope.client == OWN) and self._echo.owns(message.topic):
            self._hear_echo(event, now)
            return
        if envelope is None and self._control is not None and self._control.take(event, now):
            return
        if envelope is None and self._account.hears(event):
            return
        if envelope is None or message.retain:
            # A retained request is an old one; one we may not answer would make us write where its sender may not.
            self._note_unroutable(message, now)
            session.answered(session.received(event, None, now).ticket, None, now)
            return
        if event.packet_id is None and session.unsent >= MAX_UNSENT:
            self._account.dropped += 1
            return
        route = self._codec.route(message, envelope)
        intake = session.received(event, route, now)
        if intake.fate in ("joined", "replayed"):
            return
        if self._spans is not None:
            self._spans.began(intake.ticket, message, now)
        self._routes[intake.ticket] = (session, route, now + self._settings.limits.request_timeout_s)
        try:
            if not taking:
                raise stopping()
            if self._draining and session is self._session:
                raise Unavailable("The device is drained.", retry_after_ms=DRAINED_RETRY_MS)
            if intake.fate == "reused":
                raise IdReused("This id was used before, with another payload.", fix="Give each request its own.")
            if self._rates is not None:
                self._check_rate(self._rates, envelope.client, now)
            request = self._codec.request(event, envelope, intake.ticket, now, self._key(message, route))
        except RequestError as exc:
            self._answers.append(Answer(intake.ticket, exc))
            return
        self._routes[intake.ticket] = (session, route, request.deadline)
        self._service.submit(request)

    def _hear_echo(self, event: Received, now: float) -> None:
        if (pong := self._echo.heard(event.message, now)) is not None:
            self._session.announce(pong)
        self._session.set_aside(event)
        self._look_at = now  # for what has changed by it

    def _look_for_echo(self, now: float) -> None:
        """Ask ourselves what is due, and tell of what does not come back."""
        if not self._link.is_connected or self._draining:
            return
        former = self._echo_told
        commands = self._control.heard if self._control is not None else 0  # they come by another subscription
        if (ping := self._echo.due(now, self._session.counts.received - commands)) is not None:
            self._session.announce(ping)
            self._link.perform()
        if (trouble := self._echo.trouble) != former:
            self._echo_told = trouble
            if trouble:
                log.error("This device's %s.", trouble)
            else:
                log.info("What this device sends to itself comes back again.")
            self._notifier.status(self._account.status())

    def _forget_echo(self) -> None:
        """Nothing comes back while we do not listen."""
        self._echo.closed()
        self._echo_told = ""

    def _check_rate(self, rates: ClientRates, client: str, now: float) -> None:
        """Raises QueueFull for a client that asks more often than it may."""
        if wait_s := rates.take(client, now):
            self._account.limited += 1
            raise QueueFull(
                f"This client asks more often than {self._settings.limits.client_rate:g} times a second.",
                fix="Try again later.",
                retry_after_ms=math.ceil(wait_s * 1000),
            )

    def _key(self, message: Message, route: ReplyRoute) -> int:
        """What tells the request from others when the broker gives it to the next daemon; QoS 0 it gives to none."""
        return key_of(message, route) if message.qos else 0

    def _note_unroutable(self, message: Message, now: float) -> None:
        """Count it, and say so at most once a minute: its sender waits for an answer that cannot come."""
        if self._account.unroutable.happened(now):
            topic, wanted = message.topic[:200], str(message.properties.response_topic)[:200]
            log.warning(
                "A message on %s was not answered: it is retained, or names a Response Topic that this device may not "
                "write to (%s). %d of that kind so far.",
                topic, wanted, self._account.unroutable.count, extra={"topic": topic},
            )  # fmt: skip

    def _finish_answers(self) -> None:
        """Hand what was computed, here or on other threads, to the session."""
        now = time.monotonic()
        while self._answers:
            answer = self._answers.popleft()
            if (open_request := self._routes.pop(answer.ticket, None)) is not None:  # else it was given up
                session, route, deadline = open_request
                message = self._codec.message(answer, route, deadline - now)
                if self._spans is not None:
                    message = self._spans.finished(answer, message)
                session.answered(answer.ticket, message, now)
            elif self._control is not None:
                self._control.note(answer)
        if self._control is not None:
            self._control.perform(now)

    def _give_up_late(self, now: float) -> None:
        """Answer 408 to what is still being computed past its deadline; its result will be dropped.

        Acknowledgements go out in the order of arrival, so one request that never ends would otherwise hold back
        those of every model behind it, until the broker sends nothing more.
        """
        for ticket in [ticket for ticket, (_, _, deadline) in self._routes.items() if deadline <= now]:
            self._answers.append(Answer(ticket, DeadlineExceeded("The deadline passed before the answer was there.")))

    # Commands

    def _new_control(self, tickets: Iterator[int]) -> Control:
        from edge_sdk.control import Control

        return Control(
            self._topics,
            self._session,
            self._service,
            tickets,
            info=self._account.info,
            drain=lambda: self._drain(True),
            resume=lambda: self._drain(False),
            wake=self._link.wake,
        )

    def _drain(self, draining: bool) -> dict[str, Any]:
        """Take no more requests, and finish those that were accepted; or take them again. How far that is."""
        if draining != self._draining:
            self._draining, self._changed = draining, True
            self._link.listen(self._subscriptions(self._link.version))
            if draining:
                self._forget_echo()
            else:
                self._echo.connected(self._link.version, time.monotonic())
            if self._membership is not None and draining:
                self._membership.leave()
            elif self._membership is not None:
                self._membership.come_back(self._link, time.monotonic())
            self._notifier.status(self._account.status())
        return {"draining": draining, "waiting": self._service.waiting()}

    # The connection

    def _subscriptions(self, version: MqttVersion) -> dict[str, QoS]:
        """What is read from the broker now, in this version of MQTT. A device that is drained hears commands only."""
        requests = [] if self._draining else self._topics.subscriptions()
        if requests and version == 4 and self._settings.serving.self_test_s:
            requests.append(self._echo.pongs)
        commands: dict[str, QoS] = {self._topics.command_subscription(): 1} if self._settings.commands.enabled else {}
        return {**dict.fromkeys(requests, self._qos), **commands}

    def _new_membership(
        self, transport: Transport, group_transport: Transport | None, tickets: Iterator[int]
    ) -> Membership:
        from edge_sdk.mqtt.group import Membership

        if group_transport is None:
            raise SettingsError("Groups need a second connection to the broker, and this daemon was given one.")
        transport.attend(group_transport)
        return Membership(
            group_transport,
            self._topics,
            self._settings.groups,
            options=self._group_options,
            qos=self._qos,
            too_large=self._codec.too_large,
            numbers=tickets,
            on_change=self._on_group_changed,
        )

    def _connect_options(self, version: MqttVersion) -> ConnectOptions:
        broker = self._settings.broker
        offline = Message(self._topics.availability, b"offline", retain=True)
        return self._access.options(
            broker.url,
            client_id=f"edge-sdk-{self._settings.device}",
            version=version,
            session_expiry_s=broker.session_expiry_s,
            keepalive_s=broker.keepalive_s,
            receive_maximum=broker.receive_maximum,
            maximum_packet_size=self._settings.limits.max_packet_bytes,
            will=Will(offline, WILL_DELAY_S),
        )

    def _group_options(self, version: MqttVersion) -> ConnectOptions:
        """As for the first connection, but with a session that ends with it, and nothing to say of us."""
        options = self._connect_options(version)
        # A dot is in no device's name, so this is no other device's id.
        return replace(options, client_id=f"{options.client_id}.group", clean_start=True, session_expiry_s=0, will=None)

    def _on_connected(self) -> None:
        self._account.forget()
        self._changed = True
        self._link.listen(self._subscriptions(self._link.version))
        self._echo.connected(self._link.version, time.monotonic())
        if self._membership is not None:
            self._membership.invite(self._link, time.monotonic())

    def _on_group_changed(self) -> None:
        self._changed = True
        self._notifier.status(self._account.status())

    def _on_trouble(self) -> None:
        if not self._link.is_connected:
            self._forget_echo()
        self._notifier.status(self._account.status())

    def _on_refused(self, topic: str, code: int) -> None:
        self._echo.refused(topic, code, time.monotonic())

    def _write_down(self, record: Record) -> None:
        if self._journal is not None:
            self._journal.write(record, time.monotonic(), time.time())

    # Housekeeping

    def _keep_house(self, now: float) -> None:
        if self._reload_requested:
            self._reload_requested = False
            self._reload()
        if self._changed and self._link.is_connected:
            self._changed = False
            self._account.announce()
            self._link.perform()
        if not self._ready and self._service.settled:
            self._ready = True
            self._notifier.ready(self._account.status())
        if now >= self._look_at:
            self._look_at = now + 1.0
            self._give_up_late(now)
            self._finish_answers()
            self._look_for_echo(now)
            self._account.look_for_leftovers(now)
            self._service.test_itself(now)
            if self._health is not None:
                self._health.update(ready=self._account.is_ready(), ailing=self._service.ailing)
                if self._health.is_asked:
                    self._health.tell(self._account.stats(now))
        if now >= self._stats_at:
            self._stats_at = now + self._settings.stats_interval_s
            self._account.look_at_machine()
            if self._certificate is not None and (warning := self._certificate.warning(time.time())):
                log.warning("%s", warning)
            if (moves := self._service.moves) != self._moves_told:  # retained: not at the rate at which models move
                self._moves_told, self._changed = moves, True
            if self._link.is_connected:
                self._link.publish(
                    Message(
                        self._topics.stats,
                        dump_json(self._account.stats(now)),
                        qos=0,
                        properties=Properties(content_type=JSON),
                    )
                )
                self._notifier.status(self._account.status())
        if self._watchdog_s is not None and now >= self._alive_at and not self._service.ailing:
            self._alive_at = now + self._watchdog_s / 2
            self._notifier.alive()

    def _pause_s(self, now: float) -> float:
        """How long the next poll may wait for something to happen."""
        if self._control is not None and self._control.has_news:
            return 0.0
        if self._answers or self._stop_requested or (self._changed and self._link.is_connected):
            return 0.0
        moments = [now + IDLE_POLL_S, self._stats_at, self._link.next_at]
        if self._membership is not None:
            if self._membership.has_news:
                return 0.0
            moments.append(now + self._settings.broker.keepalive_s / 8)
            if self._link.is_connected:
                moments.append(self._membership.link.next_at)
        if (quick_at := self._service.wake_at()) is not None:
            moments.append(quick_at)
        return max(0.0, min(moments) - now)

    def _reload(self) -> None:
        log.info("Reloading.")
        if self._reread is not None:
            try:
                fresh = self._reread()
            except SettingsError as exc:
                log.error("The settings were not taken, the former ones stay: %s", exc)
            else:
                self._take_over(fresh)
        self._service.reload()

    def _take_over(self, fresh: Settings) -> None:
        """Settings that can change in a running daemon do; the others are named."""
        logging.getLogger("edge_sdk").setLevel(fresh.log_level.upper())
        old, new = self._settings.model_dump(), fresh.model_dump()
        fixed = [key for key in new if new[key] != old[key] and key not in ("log_level", "stats_interval_s")]
        if fixed:
            log.warning("These settings changed and need a restart: %s.", ", ".join(fixed))
        self._settings = self._settings.model_copy(
            update={"log_level": fresh.log_level, "stats_interval_s": fresh.stats_interval_s}
        )

    def _shut_down(self) -> int:
        log.info("Stopping: %d requests to finish.", self._service.waiting())
        self._notifier.stopping()
        drain_s = self._settings.limits.drain_s
        self._watch.stop()  # from here on this limit holds
        hard_stop = threading.Timer(drain_s + HARD_STOP_S, self._end_now)
        hard_stop.daemon = True
        hard_stop.start()
        deadline = time.monotonic() + drain_s
        if self._membership is not None:
            self._membership.leave()
        while time.monotonic() < deadline and not self._finished():
            self._turn(taking=False)
        if self._membership is not None:
            self._membership.close()
        if self._link.is_connected:
            self._session.announce(Message(self._topics.availability, b"offline", retain=self._link.may_retain))
            self._link.perform()
        while time.monotonic() < deadline and self._link.is_connected and not self._session.idle:
            self._turn(taking=False)
        # What could not be said is left to the will: else the device would look online for ever.
        self._link.close(send_will=not self._session.idle)
        left = self._service.waiting()
        self._service.stop(limit_s=2.0)
        self._recorder.close()
        if self._elsewhere is not None:
            self._elsewhere.close(limit_s=1.0)
        hard_stop.cancel()
        if self._journal is not None:
            self._journal.close()
        if self._health is not None:
            self._health.close()
        if self._spans is not None:
            self._spans.close()
        log.info("Stopped%s.", f"; {left} requests were handed back to the broker" if left else "")
        return 0

    def _finished(self) -> bool:
        """Whether nothing accepted is left to do. Without a connection, answers have nowhere to go: the broker, which
        has no acknowledgement, gives those requests to the next daemon."""
        computing = self._service.waiting() or self._answers
        if self._membership is not None and not self._membership.has_left:
            return False
        return not computing and (self._session.idle or not self._link.is_connected)

    # From other threads, and from signal handlers: only take note

    def _ask_elsewhere(
        self, stage: Stage, payload: Payload, timeout_s: float, done: Callable[[Outputs | RequestError], None]
    ) -> None:
        """For the thread of the pipelines, few of which have such stages."""
        if self._elsewhere is None:
            from edge_sdk.mqtt.client import Client
            from edge_sdk.mqtt.elsewhere import Elsewhere

            settings = self._settings
            self._elsewhere = Elsewhere(
                lambda: Client(
                    settings.broker.url,
                    access=settings.access(),
                    protocol=settings.broker.protocol,
                    root=settings.root,
                    client_id=settings.device,  # so that access control can name where its answers come
                )
            )
        self._elsewhere.ask(stage, payload, timeout_s, done)

    def _note_answer(self, answer: Answer) -> None:
        self._answers.append(answer)
        if threading.get_ident() != self._owner:
            self._link.wake()

    def _note_change(self) -> None:
        self._changed = True
        self._link.wake()

    def _note_scrape(self) -> None:
        self._look_at = 0.0
        self._link.wake()

    def _end_failed(self, failure: EngineFailed) -> None:
        """End the process, on whichever thread noticed: a device is lost, and every engine on it will find the same; or
        a computation hangs, and then the stack of every thread is worth having."""
        if self._ending.acquire(blocking=False):
            log.critical("%s Ending, to be started anew; the broker has what was not answered.", failure)
            self._recorder.confess()
            if isinstance(failure, EngineHung):
                import faulthandler

                faulthandler.dump_traceback()
            os._exit(failure.exit_code)

    def _end_now(self) -> None:
        log.error("The stop took too long and is cut short; the broker has what was not finished.")
        self._recorder.excuse()
        os._exit(1)
