"""What a broker's URL says. Pure.

    mqtt[s]://[user[:password]@]host[:port]
    ws[s]://[user[:password]@]host[:port][/path]       # inside a WebSocket; the path is /mqtt where none is given

An `s` at the end of the scheme is TLS.

A password is for the broker alone. Without TLS whoever carries the packets reads it, so it goes out only to
loopback, where nobody does, unless the caller says that it may. What loopback is, the URL alone decides: a name that
resolves to it today may resolve elsewhere tomorrow.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.transports.base import ConnectOptions

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
DEFAULT_PATH = "/mqtt"
_WITH_TLS = ("mqtts", "wss")


@dataclass(frozen=True)
class Address:
    """A broker's URL, taken apart."""

    scheme: str
    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    websocket_path: str | None = None

    @property
    def tls(self) -> bool:
        return self.scheme in _WITH_TLS

    @property
    def keeps_secrets(self) -> bool:
        """Whether what is said there stays between us and the broker: TLS, or this machine."""
        return self.tls or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or a loopback address; nothing is resolved."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_url(url: str) -> Address:
    """SettingsError for what is not such a URL; the message never repeats a password."""
    fix = "Write mqtt://HOST, mqtt://HOST:PORT or mqtts://HOST for TLS; ws:// or wss://HOST/PATH for a WebSocket."
    try:
        parts = urlsplit(url if "://" in url else f"mqtt://{url}")
        port = parts.port
    except ValueError as err:
        raise SettingsError(f"The broker's URL has a bad host or port: {err}.", fix=fix) from err
    if parts.scheme not in DEFAULT_PORTS:
        raise SettingsError(
            f"A broker's URL starts with {'://, '.join(DEFAULT_PORTS)}://, not {parts.scheme}://.", fix=fix
        )
    path = (parts.path or DEFAULT_PATH) if parts.scheme.startswith("ws") else None
    if (
        not parts.hostname
        or (path is None and parts.path not in ("", "/"))
        or parts.query
        or parts.fragment
        or port == 0
    ):
        raise SettingsError("A broker's URL is a host, perhaps a port, and a path only with ws:// and wss://.", fix=fix)
    if path is not None and not (path.isascii() and path.isprintable() and " " not in path):
        raise SettingsError("The path of a WebSocket is written in ASCII, without spaces.", fix="Write others as %20.")
    username = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if username is not None and parts.password else None
    return Address(parts.scheme, parts.hostname, port or DEFAULT_PORTS[parts.scheme], username, password, path)


def check_password_is_safe(address: Address) -> None:
    """SettingsError if a password would go to `address` for everybody on the way to read."""
    if not address.keeps_secrets:
        raise SettingsError(
            f"The password for the broker at {address.host}:{address.port} would cross the network in the clear: "
            f"{address.scheme}:// is not encrypted, and {address.host} is not this machine.",
            fix=f"Use {address.scheme}s://; or, where everybody on the network may read it, say so with "
            "allow_plaintext_password = true in [broker].",
        )


def connect_options(
    url: str,
    *,
    client_id: str,
    username: str | None = None,
    password: str | None = None,
    allow_plaintext_password: bool = False,
    **more: Any,
) -> ConnectOptions:
    """ConnectOptions for a broker URL; `username` and `password` win over the URL's, `more` are further fields.

    Raises SettingsError for what is not such a URL, and for a password that would go over the network in the clear
    unless `allow_plaintext_password` says that it may.
    """
    address = parse_url(url)
    if username is None and address.username is not None:
        username = address.username
        password = address.password if password is None else password
    if password is not None and username is None:
        raise SettingsError(
            "There is a password for the broker, and no user name that it belongs to.",
            fix="Name the user with `username`.",
        )
    if password is not None and not allow_plaintext_password:
        check_password_is_safe(address)
    return ConnectOptions(
        host=address.host,
        port=address.port,
        client_id=client_id,
        username=username,
        password=password,
        tls=address.tls,
        websocket_path=address.websocket_path,
        **more,
    )
