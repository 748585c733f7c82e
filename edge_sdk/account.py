"""What a daemon says of itself: retained to the broker, every few seconds as figures, and in one line to systemd."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edge_sdk import host
from edge_sdk.mqtt import presence
from edge_sdk.mqtt.echo import Echo
from edge_sdk.mqtt.leftovers import Leftovers
from edge_sdk.mqtt.link import Link
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import Message, Properties, Received
from edge_sdk.profiles import DeviceProfile
from edge_sdk.runtime.service import Service
from edge_sdk.seldom import Seldom
from edge_sdk.settings import Settings
from edge_sdk.tasks.base import JSON
from edge_sdk.tasks.oip import dump_json

if TYPE_CHECKING:
    from edge_sdk.mqtt.certificates import ExpiryWatch
    from edge_sdk.mqtt.group import Membership
    from edge_sdk.mqtt.journal import Journal
    from edge_sdk.sensors import Sensors

log = logging.getLogger(__name__)


class Account:
    """Of one daemon, whose parts it asks; it belongs to the network's thread."""

    def __init__(
        self,
        settings: Settings,
        topics: Topics,
        boot_id: str,
        profile: DeviceProfile | None,
        *,
        service: Service,
        link: Link,
        echo: Echo,
        membership: Membership | None,
        journal: Journal | None,
        certificate: ExpiryWatch | None,
        is_drained: Callable[[], bool],
    ) -> None:
        """`is_drained`: whether the device takes no requests, because somebody said so."""
        self.unroutable = Seldom()
        """Messages that had no way back."""
        self.dropped = 0
        """Requests of QoS 0 for which there was no room."""
        self.limited = 0
        """Requests of clients that asked too often."""
        self._settings = settings
        self._topics = topics
        self._boot_id = boot_id
        self._profile = profile
        self._service = service
        self._link = link
        self._echo = echo
        self._membership = membership
        self._journal = journal
        self._certificate = certificate
        self._is_drained = is_drained
        self._announced: Mapping[str, bytes | None] = {}
        self._leftovers = Leftovers(topics)
        self._sensors: Sensors | None = None
        self._machine: Mapping[str, Any] = {}
        self._started = time.monotonic()

    def announce(self) -> None:
        """Publish, retained, what has changed since this connection last heard it."""
        current = {
            self._topics.availability: b"online",
            self._topics.info: dump_json(self.info()),
        }
        for name, versions in self._service.by_name().items():
            current[self._topics.model(name)] = dump_json(presence.metadata(versions))
        current = {**dict.fromkeys(self._announced, b""), **current}  # of those that are gone nothing is retained
        for topic, payload in current.items():
            if self._announced.get(topic) != payload:
                is_json = topic != self._topics.availability
                properties = Properties(content_type=JSON if is_json else None)
                message = Message(topic, payload, retain=self._link.may_retain, properties=properties)
                self._link.session.announce(message)
        self._announced = current

    def forget(self) -> None:
        """On a new connection everything is announced anew, also that a model is gone."""
        self._announced = dict.fromkeys(self._announced)
        self._leftovers.connected()

    def look_for_leftovers(self, now: float) -> None:
        """Read for a while what the broker retains of this device's models, after each start; about once a second."""
        if not self._link.is_connected or not self._link.may_retain:
            return
        match self._leftovers.due(now):
            case "look":
                self._link.look(self._leftovers.topics)
            case "leave":
                self._link.leave(self._leftovers.topics)

    def hears(self, event: Received) -> bool:
        """Whether a message is a document of ours; one of a model that is not here any more is cleared."""
        if not self._leftovers.owns(event.message.topic):
            return False
        self._link.session.set_aside(event)
        if (clearing := self._leftovers.heard(event.message, self._service.by_name())) is not None:
            log.info("%s is retained of a model that is not here any more; it is cleared.", clearing.topic)
            self._link.session.announce(clearing)
        return True

    def info(self) -> dict[str, Any]:
        """What a client has to know before it asks; JSON-ready, as the next two."""
        return presence.info(
            boot_id=self._boot_id,
            profile=self._profile,
            limits={
                "max_payload": self._settings.limits.max_payload_bytes,
                "receive_maximum": self._settings.broker.receive_maximum,
                "request_timeout_s": self._settings.limits.request_timeout_s,
            },
            models=self._service.by_name(),
            group=self._membership.described() if self._membership is not None else None,
            draining=self._is_drained(),
        )

    def stats(self, now: float) -> dict[str, Any]:
        """The figures: what was asked and answered, how long it took, and who holds what."""
        session = self._link.session
        counts = {"unroutable": self.unroutable.count, "dropped": self.dropped, "limited": self.limited}
        journal = {"journal": self._journal.problem or "ok"} if self._journal is not None else {}
        group = {"group": self._membership.counts()} if self._membership is not None else {}
        return {
            "uptime_s": round(now - self._started, 1),
            **self._service.snapshot(),
            "mqtt": {**asdict(session.counts), **counts, "unsent": session.unsent},
            **journal,
            **group,
            "self_test": {**self._echo.states, "models": self._service.self_test},
            **(self._certificate.figures(time.time()) if self._certificate is not None else {}),
            "memory_bytes": host.resident_bytes(),
            "memory": {
                **self._service.memory(),
                "answer_cache_bytes": session.remembered_bytes,
                "outbox_bytes": session.outbox_bytes,
                "journal_bytes": self._journal.size_bytes if self._journal is not None else 0,
            },
            "machine": self._machine,
        }

    def look_at_machine(self) -> None:
        """Read anew what the machine tells of itself: temperatures, throttling, power."""
        if self._sensors is None:
            from edge_sdk.sensors import Sensors

            self._sensors = Sensors()
        self._machine = self._sensors.read()

    def is_ready(self) -> bool:
        """Whether requests come in, and some model answers them."""
        hears = self._link.is_connected and not self._is_drained() and not self._echo.trouble
        return hears and any(model.answers for model in self._service.models())

    def status(self) -> str:
        """For a person who looks at the service, in a line."""
        models = self._service.models()
        ready = sum(model.answers for model in models)
        are_ready = f"{ready} of {len(models)} models ready"
        if self._is_drained():
            are_ready += ", drained"
        if self._link.trouble:
            return f"Not connected: {self._link.trouble} ({are_ready})"
        if self._echo.trouble:
            return f"Connected, but {self._echo.trouble} ({are_ready})"
        group = ""
        if self._membership is not None and self._membership.reason:
            group = f"; not in {', '.join(self._membership.groups)}: {self._membership.reason}"
        return f"{are_ready}, {'connected' if self._link.is_connected else 'not connected'}{group}"
