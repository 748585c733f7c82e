"""Settings: file, environment and command line in their order; what is wrong is named; secrets stay secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.topics import is_device_name
from edge_sdk.mqtt.transports.base import ConnectOptions
from edge_sdk.settings import CREDENTIALS, Broker, Settings, default_device, load_settings

FILE = """
device = "from-file"
engines = "models"
reply_prefixes = ["plant/"]
[broker]
url = "mqtt://file:1884"
keepalive_s = 10
[limits]
max_queue = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    written = tmp_path / "edge-sdk.toml"
    written.write_text(FILE, encoding="utf-8")
    return written


def test_defaults_stand_alone() -> None:
    """No file, no environment, no options: settings that name this machine and a local broker."""
    settings = load_settings(None, environment={})

    assert ("mqtt://localhost:1883", default_device()) == (settings.broker.url, settings.device)


def test_the_command_line_wins_over_the_environment_over_the_file(file: Path) -> None:
    """Each layer overrides key by key; what it leaves unset (None) stays."""
    environment = {
        "EDGE_SDK_DEVICE": "from-env",
        "EDGE_SDK_BROKER__URL": "mqtt://env",
        "EDGE_SDK_LIMITS__MAX_QUEUE": "8",
    }
    overrides = {"device": None, "broker": {"url": "mqtt://option", "username": None}}
    settings = load_settings(file, overrides, environment)

    assert ("from-env", "mqtt://option", 10, 8) == (
        settings.device,
        settings.broker.url,
        settings.broker.keepalive_s,
        settings.limits.max_queue,
    )


def test_the_engines_folder_is_relative_to_the_file_that_names_it(file: Path) -> None:
    """A file can be read from any working directory; an option is relative to the caller's."""

    assert file.parent / "models" == load_settings(file, environment={}).engines
    assert Path("here") == load_settings(file, {"engines": "here"}, {}).engines


def test_lists_in_the_environment_are_separated_by_commas() -> None:
    """EDGE_SDK_REPLY_PREFIXES=a/,b/ is two prefixes."""
    settings = load_settings(None, environment={"EDGE_SDK_REPLY_PREFIXES": "a/,b/"})

    assert ("a/", "b/") == settings.reply_prefixes


def test_every_key_has_an_environment_variable() -> None:
    """What the file can say, a variable can: each of them reaches its own key."""
    defaults = Settings(device="d").model_dump()
    keys = [(table, key) for table, value in defaults.items() if isinstance(value, dict) for key in value]
    wrong = {
        f"EDGE_SDK_{table}__{key}".upper(): "\0"
        for table, key in keys
        if isinstance(defaults[table][key], (int, float))
    }
    reached = set()
    for variable, value in wrong.items():
        with pytest.raises(SettingsError) as caught:
            load_settings(None, environment={variable: value})
        reached.add(str(caught.value).split("`")[1])

    assert {f"{table}.{key}" for table, key in keys if isinstance(defaults[table][key], (int, float))} == reached


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("devise = 'x'", "`devise` is not a known key"),
        ("[broker]\nhost = 'x'", "`broker.host` is not a known key"),
        ("[broker]\npassword = 'hunter2'", "`broker.password` is not a known key"),
        ("device = 'a b'", "cannot name a device"),
        ("root = '/a/'", "topic root"),
        ("[broker]\nurl = 'http://x'", "mqtt://"),
        ("[broker]\nurl = 'mqtt://user:hunter2@x'", "use password_file"),
        ("[broker]\nprotocol = '6'", "`broker.protocol`"),
        ("[broker]\nprotocol = '3.1.1'\ntransport = 'mqtt5'", "MQTT 5 alone"),
        ("[limits]\nmax_queue = 0", r"`limits.max_queue`.*\(it is 0\)"),
        ("broker = 'mqtt://x'", "`broker`"),
        ("device = ", "not valid TOML"),
        pytest.param(f"device = {'[' * 5000}", "nested too deeply", id="nested"),
        pytest.param(f"device = {'9' * 5000}", "not valid TOML", id="digits"),
    ],
)
def test_a_bad_file_names_the_key(tmp_path: Path, text: str, complaint: str) -> None:
    """SettingsError says file, key, what is wrong and what came - but never a password."""
    written = tmp_path / "edge-sdk.toml"
    written.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=complaint) as caught:
        load_settings(written, {"broker": {"keepalive_s": 5}}, {})

    assert str(written) in str(caught.value)
    assert "hunter2" not in str(caught.value)


SECRETS = {
    "username_file": "broker-username",
    "password_file": "broker-password",
    "client_key_password_file": "broker-client-key-password",
}
"""What is read from files, and the credentials that stand in for them."""


def told(options: ConnectOptions) -> tuple[str | None, ...]:
    return options.username, options.password, options.tls_client_key_password


def test_secrets_come_from_files_and_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting's file, else systemd's credential, else none: one line, read at each connection, in no repr."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    set_to = {key: tmp_path / key for key in SECRETS}

    def options(**broker: Any) -> ConnectOptions:
        settings = load_settings(None, {"device": "d", "broker": {"client_cert": "our.crt", **broker}}, {})
        access = settings.access()
        found = access.options(settings.broker.url, client_id="c")

        assert "hunter" not in f"{settings!r} {settings.model_dump()} {access!r} {found!r}"
        return found

    assert (None, None, None) == told(options())
    for credential, text in zip(SECRETS.values(), ("robot", "hunter1", "hunter2")):
        (tmp_path / credential).write_text(f"{text}\r\nnot this\n", encoding="utf-8")
    for file, text in zip(set_to.values(), ("camera", "hunter3", "hunter4")):
        file.write_text(text, encoding="utf-8")
    assert ("robot", "hunter1", "hunter2") == told(options())
    assert ("camera", "hunter3", "hunter4") == told(options(**set_to))
    assert ("me", "hunter3", "hunter4") == told(options(username="me", **set_to))
    assert ("robot", "hunter3", "hunter2") == told(options(password_file=set_to["password_file"]))


def test_files_are_read_for_each_connection(tmp_path: Path) -> None:
    """What was rotated is what the next connection says; settings are made once."""
    secret = tmp_path / "secret"
    secret.write_text("before\n", encoding="utf-8")
    access = Settings(device="d", broker=Broker(username="me", password_file=secret)).access()
    before = access.options("mqtt://localhost", client_id="c").password
    secret.write_text("after\n", encoding="utf-8")

    assert ("before", "after") == (before, access.options("mqtt://localhost", client_id="c").password)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read: No such file"), (b"", "is empty"), (b"\nhunter2", "is empty"), (b"hunter2\xff", "UTF-8")],
)
def test_a_secret_that_cannot_be_read_is_named_by_its_file(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    """SettingsError says which file and why, never what is in it."""
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_bytes(content)
    access = Settings(device="d", broker=Broker(username="me", password_file=secret)).access()
    with pytest.raises(SettingsError, match=complaint) as caught:
        access.options("mqtt://localhost", client_id="c")

    assert str(secret) in str(caught.value)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("credential", [False, True])
def test_a_password_does_not_go_over_the_network_in_the_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credential: bool
) -> None:
    """Refused when the daemon starts, before the file is read, unless TLS, loopback or a setting makes it right."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    if credential:
        (tmp_path / CREDENTIALS["password_file"]).write_text("hunter2", encoding="utf-8")
    secret = None if credential else tmp_path / "secret"

    def access(url: str, **more: Any) -> BrokerAccess:
        return Settings(device="d", broker=Broker(url=url, username="me", password_file=secret, **more)).access()

    with pytest.raises(SettingsError, match=r"in the clear") as caught:
        access("mqtt://broker.example")

    assert "allow_plaintext_password = true" in caught.value.fix
    assert "mqtts://" in caught.value.fix
    assert not access("mqtts://broker.example").allow_plaintext_password
    assert not access("mqtt://localhost").allow_plaintext_password
    assert access("mqtt://broker.example", allow_plaintext_password=True).allow_plaintext_password


def test_a_key_belongs_to_a_certificate(tmp_path: Path) -> None:
    """A client key alone proves nothing, and is a setting forgotten."""
    with pytest.raises(SettingsError, match="client_cert"):
        Settings(device="d", broker=Broker(client_key=tmp_path / "our.key")).access()


def test_the_default_device_is_a_name_and_stays_the_same() -> None:
    """It can stand in a topic, and the machine id itself is not in it."""
    machine_id = Path("/etc/machine-id")

    assert is_device_name(default_device())
    assert default_device() == default_device()
    if machine_id.is_file() and (private := machine_id.read_text(encoding="ascii").strip()):
        assert private not in default_device()


def test_an_unknown_variable_is_refused_with_the_nearest_name() -> None:
    """EDGE_SDK_BROKER_URL looks right and would do nothing."""
    with pytest.raises(SettingsError, match="EDGE_SDK_BROKER__URL"):
        load_settings(None, environment={"EDGE_SDK_BROKER_URL": "mqtt://other"})


@pytest.mark.parametrize("prefix", ["", "answers", "/", "/a/", "$SYS/"])
def test_a_reply_prefix_is_a_whole_level(prefix: str) -> None:
    """An empty prefix would let a request name any topic at all."""
    with pytest.raises(SettingsError, match="reply_prefixes"):
        load_settings(None, {"reply_prefixes": [prefix]}, environment={})


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path) -> None:
    """Every path: those of the engines, and every file of [broker]."""
    file = tmp_path / "edge-sdk.toml"
    named = "\n".join(f'{key} = "{key}"' for key in CREDENTIALS if key != "ca_file")
    file.write_text(f'engines = "e"\nengine_cache = "c"\n[broker]\nca_file = "/etc/ca.pem"\n{named}\n')
    settings = load_settings(file, environment={})

    assert (tmp_path / "e", tmp_path / "c") == (settings.engines, settings.engine_cache)
    assert all(tmp_path / key == getattr(settings.broker, key) for key in CREDENTIALS if key != "ca_file")
    assert Path("/etc/ca.pem") == settings.broker.ca_file
