"""What a broker's URL says: `mqtt://[user[:password]@]host[:port]`, or `mqtts://` for TLS. Pure."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.transports.base import ConnectOptions

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


def connect_options(
    url: str, *, client_id: str, username: str | None = None, password: str | None = None, **more: Any
) -> ConnectOptions:
    """ConnectOptions for a broker URL; `username` and `password` win over the URL's, `more` are further fields.

    Raises SettingsError for what is not such a URL; the message never repeats a password.
    """
    fix = "Write mqtt://HOST, mqtt://HOST:PORT or mqtts://HOST for TLS."
    try:
        parts = urlsplit(url if "://" in url else f"mqtt://{url}")
        port = parts.port
    except ValueError as err:
        raise SettingsError(f"The broker's URL has a bad host or port: {err}.", fix=fix) from err
    if parts.scheme not in DEFAULT_PORTS:
        raise SettingsError(f"A broker's URL starts with mqtt:// or mqtts://, not {parts.scheme}://.", fix=fix)
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment or port == 0:
        raise SettingsError("A broker's URL is a host and perhaps a port, nothing more.", fix=fix)
    if username is None and parts.username:
        username = unquote(parts.username)
        password = unquote(parts.password) if password is None and parts.password else password
    return ConnectOptions(
        host=parts.hostname,
        port=port or DEFAULT_PORTS[parts.scheme],
        client_id=client_id,
        username=username,
        password=password,
        tls=parts.scheme == "mqtts",
        **more,
    )
