"""How a broker knows us, and how we know the broker: user name, password, certificates.

    access = BrokerAccess(username="camera", password_file=Path("secret"), ca_file=Path("ca.pem"))
    transport.open(access.options("mqtts://broker.example", client_id="camera"), timeout_s=5)

Files are named here and read each time a connection is made. So what was rotated (a password, a key, an authority) is
used by the next connection, without a restart. No secret is in a `repr`.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.address import check_password_is_safe, connect_options, parse_url
from edge_sdk.mqtt.transports.base import ConnectOptions


@dataclass(frozen=True)
class BrokerAccess:
    """What a broker asks for, and what is asked of it. A value given here wins over the file beside it."""

    username: str | None = None
    username_file: Path | None = None
    """Its first line is the user name."""
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    """Its first line is the password."""
    ca_file: Path | None = None
    """The certificate authorities that may vouch for the broker; None: the system's."""
    client_cert: Path | None = None
    """Our certificate, and those between it and the authority, as PEM: for a broker that asks for one."""
    client_key: Path | None = None
    """Its key; None: it is in the certificate's file."""
    client_key_password_file: Path | None = None
    """Its first line is the password of an encrypted key."""
    allow_plaintext_password: bool = False
    """Whether the password may go to another machine without TLS."""

    def __post_init__(self) -> None:
        if self.client_cert is None and (self.client_key or self.client_key_password_file):
            raise SettingsError(
                "There is a client key for the broker, and no certificate that it belongs to.",
                fix="Name the certificate with `client_cert`.",
            )

    def check(self, url: str) -> None:
        """SettingsError where no connection to `url` could be made whatever the files hold."""
        address = parse_url(url)
        if address.websocket_path is not None:
            from edge_sdk.mqtt.transports.websocket import check_installed

            check_installed()
        has_password = address.password is not None or self.password is not None or self.password_file is not None
        if has_password and not self.allow_plaintext_password:
            check_password_is_safe(address)

    def open_to_all(self) -> list[Path]:
        """The files with secrets that every user of this machine may read.

        They are used all the same: containers are given secrets like that in a place where nobody else is, and a device
        in the field that refused a key installed with the wrong mode could not be reached any more.
        """
        secrets = (self.password_file, self.client_key or self.client_cert, self.client_key_password_file)
        return [file for file in secrets if file is not None and _mode(file) & stat.S_IROTH]

    def options(self, url: str, *, client_id: str, **more: Any) -> ConnectOptions:
        """What to connect with, as the files are now; `more` are further fields of ConnectOptions.

        Raises SettingsError for a URL that is none, a file that cannot be read, and a password that would go over the
        network in the clear.
        """
        return connect_options(
            url,
            client_id=client_id,
            username=self.username if self.username is not None else _first_line(self.username_file, "user name"),
            password=self.password if self.password is not None else _first_line(self.password_file, "password"),
            allow_plaintext_password=self.allow_plaintext_password,
            tls_ca_file=_text(self.ca_file),
            tls_client_cert=_text(self.client_cert),
            tls_client_key=_text(self.client_key),
            tls_client_key_password=_first_line(self.client_key_password_file, "client key's password"),
            **more,
        )


def _mode(file: Path) -> int:
    try:
        return file.stat().st_mode
    except OSError:
        return 0


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _first_line(file: Path | None, what: str) -> str | None:
    """The first line of `file`, where there is one to read."""
    if file is None:
        return None
    try:
        line = file.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
    except UnicodeDecodeError as exc:
        # Not `exc` itself, which holds the whole file.
        raise SettingsError(f"The broker's {what} file {file} is not UTF-8 text (byte {exc.start}).") from None
    except OSError as exc:
        raise SettingsError(f"The broker's {what} file {file} cannot be read: {exc.strerror or exc}.") from exc
    if not line:
        raise SettingsError(f"The first line of the broker's {what} file {file} is empty.", fix="Write it there.")
    return line
