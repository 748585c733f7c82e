"""What a daemon is made of, put together as its settings say; what few daemons use is loaded by those that do.

Whatever cannot be had is a SettingsError that names the setting, before the daemon says a word to anybody.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from edge_sdk import host
from edge_sdk.backends.registry import usable_profile
from edge_sdk.errors import ProfileError
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.session import Session
from edge_sdk.profiles import DeviceProfile, Machine, load_profile
from edge_sdk.runtime.memory import budget_for
from edge_sdk.settings import Settings

if TYPE_CHECKING:
    from edge_sdk.health import Health
    from edge_sdk.mqtt.certificates import ExpiryWatch
    from edge_sdk.mqtt.journal import Journal
    from edge_sdk.mqtt.rate import ClientRates
    from edge_sdk.mqtt.tracing import RequestSpans

OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's own settings: where either is set, requests are traced without one of ours."""

log = logging.getLogger(__name__)


def open_journal(settings: Settings, session: Session) -> Journal | None:
    """The journal of `durable` delivery, with what it holds handed to the session; SettingsError."""
    if (file := settings.journal()) is None:
        return None
    from edge_sdk.mqtt.journal import Journal

    journal = Journal(file)
    now = time.monotonic()
    session.restore(journal.load(now, time.time()), now)
    return journal


def client_rates(settings: Settings) -> ClientRates | None:
    """What limits each client; None where nothing does."""
    limits = settings.limits
    if not limits.client_rate:
        return None
    from edge_sdk.mqtt.rate import ClientRates

    return ClientRates(limits.client_rate, limits.client_burst)


def watched_certificate(access: BrokerAccess) -> ExpiryWatch | None:
    """Our certificate, to be warned of its end ahead; None where we show none."""
    for file in access.open_to_all():
        log.warning("Every user of this machine may read %s, which holds a secret: chmod 600 it.", file)
    if access.client_cert is None:
        return None
    from edge_sdk.mqtt.certificates import ExpiryWatch

    return ExpiryWatch(access.client_cert)


def open_health(settings: Settings, *, max_silence_s: float, on_asked: Callable[[], None]) -> Health | None:
    """What answers `health`, and says when it wants figures; SettingsError if its port is taken."""
    if (address := settings.health_address()) is None:
        return None
    from edge_sdk.health import Health

    return Health(address, max_silence_s=max_silence_s, on_asked=on_asked)


def open_spans(settings: Settings, environment: Mapping[str, str] = os.environ) -> RequestSpans | None:
    """What traces requests; None where neither the settings nor OpenTelemetry's variables want it. SettingsError."""
    if settings.tracing.endpoint is None and not any(environment.get(name) for name in OTLP_VARIABLES):
        return None
    from edge_sdk.mqtt.tracing import begin_tracing

    return begin_tracing(settings.tracing.endpoint, settings.device)


def preferred_profile(settings: Settings, machine: Machine) -> DeviceProfile | None:
    """The one that the settings name, else the one that fits this machine; None: none does."""
    if settings.serving.profile is not None:
        return load_profile(settings.serving.profile)
    try:
        return usable_profile(machine)[0]
    except ProfileError:
        return None


def memory_budget(settings: Settings, machine: Machine, profile: DeviceProfile | None) -> int | None:
    """What models may hold together: as the settings say, else what the machine and its control groups leave."""
    if (budget_bytes := settings.memory.budget_bytes) is not None:
        return budget_bytes
    budget_bytes = budget_for(
        profile,
        machine_bytes=machine.memory_bytes,
        limit_bytes=host.limit_bytes(),
        own_bytes=host.resident_bytes(),
    )
    log.info(
        "Models may hold %s bytes of memory.", f"{budget_bytes:,}" if budget_bytes is not None else "any number of"
    )
    return budget_bytes
