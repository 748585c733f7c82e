"""The daemon's settings: `edge-sdk.toml`, overridden by EDGE_SDK_* variables, overridden by the command line.

Every default is here, with its reason. Every key has an environment variable: `[broker] url` is EDGE_SDK_BROKER__URL,
`device` is EDGE_SDK_DEVICE. A key nobody knows is refused. Secrets are never in the file: each comes from a file of its
own, or from systemd's credentials.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_origin
from zlib import crc32

from pydantic import BaseModel, Field, field_validator, model_validator

from edge_sdk.errors import SettingsError
from edge_sdk.logs import LogFormat
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.address import parse_url
from edge_sdk.mqtt.negotiation import ProtocolSetting
from edge_sdk.mqtt.topics import DEFAULT_ROOT, Topics
from edge_sdk.mqtt.transports.choice import TransportSetting
from edge_sdk.toml import Table, parse, read_toml

PREFIX = "EDGE_SDK_"
JOURNAL = "answers.db"
CREDENTIALS = {
    "username_file": "broker-username",
    "password_file": "broker-password",
    "ca_file": "broker-ca",
    "client_cert": "broker-client-cert",
    "client_key": "broker-client-key",
    "client_key_password_file": "broker-client-key-password",
}
"""Keys of [broker] and systemd's credentials that stand in for them where they are not set, as in
`LoadCredential=broker-password:/etc/edge-sdk/broker-password`."""


class Broker(Table):
    """Where the broker is and how to speak with it."""

    url: str = "mqtt://localhost:1883"
    """`mqtt://` or `mqtts://`, host and port; a user name may be in it, a password may not."""
    protocol: ProtocolSetting = "auto"
    """`auto` speaks MQTT 5 and falls back to 3.1.1 where the broker knows nothing newer."""
    transport: TransportSetting = "auto"
    """What reads and writes MQTT packets. `auto` is mqtt5, which is compiled, where it is installed and MQTT 5 is
    spoken, and paho otherwise."""
    username: str | None = None
    username_file: Path | None = None
    """Its first line is the user name. This and the files below are read at each connection; under systemd the
    credentials `broker-username`, `broker-password`, ... need no setting."""
    password_file: Path | None = None
    """Its first line is the password."""
    allow_plaintext_password: bool = False
    """Whether the password may go over the network without TLS, for everybody on the way to read."""
    ca_file: Path | None = None
    """Certificate authorities for mqtts; the system's where this is missing."""
    client_cert: Path | None = None
    """Our own certificate, for a broker that asks for one (mutual TLS)."""
    client_key: Path | None = None
    """Its key; None: it is in the certificate's file."""
    client_key_password_file: Path | None = None
    """Its first line is the password of an encrypted key."""
    keepalive_s: int = Field(default=30, ge=1, le=65535)
    """A half-open connection is noticed within twice this."""
    session_expiry_s: int = Field(default=3600, ge=0)
    """How long the broker keeps requests for a daemon that is away."""
    receive_maximum: int = Field(default=64, ge=1, le=65535)
    """Unacknowledged requests the broker may send: with payloads at their limit, 64 of them are 120 MB."""

    @field_validator("url")
    @classmethod
    def _well_formed(cls, url: str) -> str:
        try:
            address = parse_url(url)
        except SettingsError as exc:
            raise ValueError(f"{exc.problem} {exc.fix}".rstrip(".")) from exc
        if address.password is not None:
            raise ValueError("a password in a URL ends up in logs; use password_file")
        return url

    @model_validator(mode="after")
    def _speakable(self) -> Broker:
        if self.transport == "mqtt5" and self.protocol == "3.1.1":
            raise ValueError("the transport mqtt5 speaks MQTT 5 alone; with `protocol` 3.1.1 it is auto or paho")
        return self

    @property
    def spoken(self) -> ProtocolSetting:
        """`protocol`, as far as `transport` speaks it."""
        return "5" if self.transport == "mqtt5" else self.protocol


class Limits(Table):
    """What the daemon takes before it says no."""

    max_payload_bytes: int = Field(default=1_900_000, ge=1)
    """mosquitto 2.1 delivers packets of at most 2,000,000 bytes by default."""
    max_packet_bytes: int = Field(default=16_777_216, ge=1024)
    """Larger packets the broker is asked not to deliver at all; between the two, a request gets a 413."""
    max_queue: int = Field(default=256, ge=1)
    """Requests that may wait for one model; beyond it, 429."""
    max_queue_bytes: int = Field(default=67_108_864, ge=1)
    client_rate: float = Field(default=0.0, ge=0)
    """Requests a second of one client; beyond it, 429. 0: as many as it likes, as long as there is room."""
    client_burst: int = Field(default=10, ge=1)
    """Requests that a client which was silent may send at once, where `client_rate` limits it."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """The deadline of a request that brings none."""
    drain_s: float = Field(default=10.0, ge=0, le=15)
    """How long a stop may take to finish what was accepted; with what follows, less than systemd's TimeoutStopSec."""


class Serving(Table):
    inline_ms: float = Field(default=10.0, ge=0)
    """Models whose best batch computes within this run on the network thread; slower ones get a thread of their own."""
    busy_poll_us: int = Field(default=500, ge=0, le=10_000)
    """How long the daemon looks for the next message without sleeping, after one. It costs at most this much processor
    time for each message that stays the last, and saves being woken; 0 never does it."""
    hang_s: float = Field(default=60.0, ge=0)
    """A batch that computes for longer ends the daemon, to be started anew: nothing else ends what hangs in native
    code. 0: it may take for ever."""
    self_test_s: float = Field(default=30.0, ge=0)
    """How long a model may be left alone before it is asked zeros, and twice as long as the broker may deliver nothing
    of what the device sends to itself. 0: neither is tried out."""
    profile: str | None = None
    """The device profile preferred where a model was built for several; None: the one detected."""


class Building(Table):
    enabled: bool = True
    """Whether engines are built here for packages that come without one that fits. The graph answers meanwhile; where
    this is off, for good."""


class Commands(Table):
    enabled: bool = False
    """Whether the device obeys what is published on its command topics. The broker must say who may."""


class Memory(Table):
    budget_bytes: int | None = Field(default=None, gt=0)
    """What all models together may hold; None: the share that the device profile gives them of what there is. Where
    more models are served than fit, those used longest ago make room and come back when they are asked."""


class Tracing(Table):
    endpoint: str | None = None
    """Where spans are sent by OTLP over HTTP, as http://127.0.0.1:4318/v1/traces; None: wherever OTEL_EXPORTER_OTLP_*
    say, and nowhere without them."""

    @field_validator("endpoint")
    @classmethod
    def _over_http(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
            raise ValueError(
                "a collector's address begins with http:// or https://, as http://127.0.0.1:4318/v1/traces"
            )
        return endpoint


class Settings(Table):
    """Everything `edge-sdk serve` can be told."""

    device: str = Field(default_factory=lambda: default_device())
    """This device's name in topics. The default is made from /etc/machine-id, so that no two devices share one."""
    root: str = DEFAULT_ROOT
    engines: Path = Path("engines")
    delivery: Literal["at-least-once", "durable", "fast"] = "at-least-once"
    """`durable` writes answers down before they go out, so that the next daemon knows them. `fast` is QoS 0 both ways,
    and of each client only the newest request waits: for streams."""
    state: Path | None = None
    """Where `durable` keeps its journal; None: systemd's StateDirectory."""
    health: str | None = None
    """Loopback address and port of /metrics, /healthz and /readyz, as `127.0.0.1:9464`; None: nothing listens."""
    engine_cache: Path | None = None
    """The folder for engines that are built here; None: the cache folder of the service or of the user."""
    groups: tuple[str, ...] = ()
    """Groups of devices whose requests this one takes its share of, through shared subscriptions of MQTT 5."""
    reply_prefixes: tuple[str, ...] = ()
    """Further topic prefixes a Response Topic may begin with, beside `<root>/reply/`."""
    stats_interval_s: float = Field(default=10.0, gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = "text"
    """`json`: one object a line, for what collects logs."""
    broker: Broker = Broker()
    limits: Limits = Limits()
    serving: Serving = Serving()
    building: Building = Building()
    commands: Commands = Commands()
    memory: Memory = Memory()
    tracing: Tracing = Tracing()

    @field_validator("reply_prefixes")
    @classmethod
    def _below_something(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            if not prefix.strip("/") or not prefix.endswith("/") or prefix.startswith(("/", "$")):
                raise ValueError(f"{prefix!r} is not a topic prefix; write it like `answers/`, with a slash at its end")
        return prefixes

    @field_validator("health")
    @classmethod
    def _on_loopback(cls, health: str | None) -> str | None:
        if health is not None:
            _address(health)
        return health

    def health_address(self) -> tuple[str, int] | None:
        return _address(self.health) if self.health is not None else None

    def journal(self) -> Path | None:
        """The file of `durable` delivery; None where there is none. SettingsError if nobody says where it belongs."""
        if self.delivery != "durable":
            return None
        folder = self.state or os.environ.get("STATE_DIRECTORY")
        if not folder:
            raise SettingsError(
                "`delivery` is durable, and there is no folder for the journal.",
                fix="Name one with `state` or EDGE_SDK_STATE.",
            )
        return Path(folder) / JOURNAL

    def flights(self) -> Path | None:
        """The file that says what is being computed; None where nothing is given to the next daemon again.

        It has to outlive a process and not a machine, so it is in memory where there is such a folder: systemd's
        RuntimeDirectory, else `state`, else the session's, else the one for temporary files.
        """
        if self.delivery == "fast":
            return None
        name = f"{self.device}-{crc32(f'{self.root} {self.broker.url}'.encode()):08x}.flights"
        if folder := os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or self.state:
            return Path(folder) / name
        if folder := os.environ.get("XDG_RUNTIME_DIR"):
            return Path(folder) / "edge-sdk" / name
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
        return Path(tempfile.gettempdir()) / f"edge-sdk-{user}" / name

    @model_validator(mode="after")
    def _nameable(self) -> Settings:
        try:
            topics = Topics(self.root, self.device)
            for group in self.groups:
                topics.group_subscription(group)
        except SettingsError as exc:
            raise ValueError(exc.problem) from exc
        return self

    def access(self) -> BrokerAccess:
        """How the broker is to know us, and we the broker: settings, and systemd's credentials where those are silent.

        SettingsError for what does not fit together, and for a password that would go over the network in the clear.
        """
        broker = self.broker
        files: dict[str, Any] = {key: getattr(broker, key) or _credential(name) for key, name in CREDENTIALS.items()}
        access = BrokerAccess(
            username=broker.username, allow_plaintext_password=broker.allow_plaintext_password, **files
        )
        access.check(broker.url)
        return access


def _credential(name: str) -> Path | None:
    """The file in which systemd put a credential of ours, if it did."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return file if folder and (file := Path(folder) / name).is_file() else None


def _address(text: str) -> tuple[str, int]:
    """Host and port; ValueError unless the host is a loopback address."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        if not ipaddress.ip_address(host).is_loopback or not 0 <= int(port) <= 65535:
            raise ValueError
    except ValueError as exc:
        raise ValueError(f"{text!r} is no loopback address with a port, as 127.0.0.1:9464 is") from exc
    return host, int(port)


def load_settings(
    file: Path | None, overrides: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Settings from `file` (None: none), then `environment`, then `overrides` (nested like the file; None is unset).

    Raises SettingsError naming the key, what it is and what it may be.
    """
    data = read_toml(file, SettingsError) if file is not None else {}
    if file is not None:
        _anchor(data, file.parent)
    _merge(data, _from_environment(environment))
    _merge(data, overrides or {})
    return parse(data, Settings, str(file or "The settings"), SettingsError)


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make the file's paths relative to the file, not to wherever the daemon was started."""
    broker = data.get("broker")
    paths = ((data, "engines"), (data, "engine_cache"), *((broker, key) for key in CREDENTIALS))
    for table, key in paths:
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(folder / table[key])


def default_device() -> str:
    """A name that stays with this machine and differs from every other's. The machine id itself stays private."""
    try:
        machine_id = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except OSError:
        machine_id = ""
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:40] or "edge"
    digest = hashlib.sha256(f"edge-sdk {machine_id or host}".encode()).hexdigest()
    return f"{host}-{digest[:8]}"


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """EDGE_SDK_BROKER__URL=x -> {"broker": {"url": "x"}}; lists are comma-separated. An unknown name is refused."""
    known = _variables()
    found: dict[str, Any] = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in _NOT_SETTINGS:
            continue
        if variable not in known:
            nearest = difflib.get_close_matches(variable, known, n=1)
            raise SettingsError(
                f"The environment variable {variable} is no setting of edge-sdk.",
                fix=f"Did you mean {nearest[0]}?" if nearest else "docs/settings.md lists them.",
            )
        table, key, is_list = known[variable]
        place = found.setdefault(table, {}) if table else found
        place[key] = [part for part in value.split(",") if part] if is_list else value
    return found


_NOT_SETTINGS = (f"{PREFIX}DEBUG", f"{PREFIX}SHARED", f"{PREFIX}VENV")
"""Variables of the command line and of our test scripts."""


def _variables() -> dict[str, tuple[str, str, bool]]:
    """Every setting's variable: its table (empty at the top), its key, and whether it is a list."""
    tables = _tables(Settings)
    named = [("", key, field) for key, field in Settings.model_fields.items() if key not in tables]
    named += [(table, key, field) for table, model in tables.items() for key, field in model.model_fields.items()]
    return {
        f"{PREFIX}{f'{table}__' if table else ''}{key}".upper(): (table, key, get_origin(field.annotation) is tuple)
        for table, key, field in named
    }


def _tables(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _merge(data: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Lay `changes` over `data`, table by table; None changes nothing."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            table = data.setdefault(key, {})
            if isinstance(table, dict):  # otherwise it is wrong already, and `parse` says so
                _merge(table, value)
        elif value is not None:
            data[key] = value
