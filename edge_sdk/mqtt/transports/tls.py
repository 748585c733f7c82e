"""TLS as a client of a broker: what we trust, and what we show. Files are read anew for each connection.

Ours are looked at before the broker is: a key that does not fit its certificate is our mistake, and is named as such
rather than as a handshake that failed.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.transports.base import ConnectOptions


def client_context(options: ConnectOptions) -> ssl.SSLContext:
    """For one connection; SettingsError naming the file that is missing, or wrong, and why."""
    context = _trusting(options.tls_ca_file)
    if options.tls_client_cert is not None:
        _show(context, options.tls_client_cert, options.tls_client_key, options.tls_client_key_password)
    return context


def _trusting(ca_file: str | None) -> ssl.SSLContext:
    if ca_file is not None:
        _check_readable(ca_file, "certificate authorities (ca_file)")
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as err:
        raise SettingsError(
            f"The file of certificate authorities {ca_file} holds none that can be read.",
            fix="It is to be PEM: -----BEGIN CERTIFICATE----- and so on.",
        ) from err


def _show(context: ssl.SSLContext, cert: str, key: str | None, password: str | None) -> None:
    certificate = _check_readable(cert, "client certificate (client_cert)")
    if b"-----BEGIN CERTIFICATE-----" not in certificate:
        raise SettingsError(f"The file {cert} holds no certificate (client_cert).", fix="It is to be PEM.")
    private = _check_readable(key, "client key (client_key)") if key is not None else certificate
    place = key or cert
    if b"PRIVATE KEY-----" not in private:
        raise SettingsError(
            f"The file {place} holds no private key (client_key).",
            fix="It is to be PEM; where the key is in a file of its own, name that with `client_key`.",
        )
    try:
        # Never None: OpenSSL would ask for the password of an encrypted key on the terminal.
        context.load_cert_chain(cert, key, password=password or "")
    except ssl.SSLError as err:
        raise _explained(err, cert, place, encrypted=b"ENCRYPTED" in private, password=password) from err


def _explained(err: ssl.SSLError, cert: str, key: str, *, encrypted: bool, password: str | None) -> SettingsError:
    if err.reason == "KEY_VALUES_MISMATCH":
        return SettingsError(
            f"The client key {key} does not belong to the certificate {cert}.",
            fix="Replace both; while they are being replaced, this passes by itself.",
        )
    if encrypted and password is None:
        return SettingsError(
            f"The client key {key} is encrypted.", fix="Name the file of its password with `client_key_password_file`."
        )
    if encrypted:
        return SettingsError(f"The password does not open the client key {key}.", fix="Correct its file.")
    return SettingsError(
        f"The client certificate {cert} or its key {key} cannot be used: {err.reason or err.strerror or err}.",
        fix="Both are to be PEM and whole.",
    )


def _check_readable(file: str, what: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as err:
        raise SettingsError(
            f"The file of our {what} cannot be read: {file}: {err.strerror or err}.",
            fix="It must exist, and the user that runs this must be allowed to read it.",
        ) from err


_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the broker wants a certificate of us, and we showed none (client_cert)",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the broker says that our certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the broker says that our certificate was revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the broker does not accept our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the broker does not accept our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "the broker does not accept the kind of our certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "the broker does not know the authority that signed our certificate",
    "TLSV1_ALERT_ACCESS_DENIED": "the broker knows our certificate and refuses us",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the broker ended the handshake: it may want a certificate of us (client_cert)",
}
"""What a broker says of our certificate, as OpenSSL names it (RFC 8446, 6.2). In TLS 1.3 it says so only after we think
that all is well, so this comes out of the first read."""


def alert(err: ssl.SSLError) -> str:
    """What a TLS error means, for a person."""
    return _ALERTS.get(err.reason or "", "") or str(err)
