"""How long a certificate is good: read from its PEM, without a library for it; the reading is pure.

    certificate = read_certificate(file.read_text())
    certificate.days_left(time.time())                # negative once it has expired

Python's `ssl` tells the dates of the other side's certificate and of authorities, never those of our own. They stand at
a fixed place of the structure that RFC 5280 (4.1) gives a certificate, before anything complicated:

    Certificate: SEQUENCE of tbsCertificate: SEQUENCE of [0] version?, serialNumber, signature, issuer, validity, ...
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

DAY_S = 86_400.0
SOON_DAYS = 14.0
"""So long ahead an operator is warned: enough for a person to notice and act, less than what a renewal leaves."""

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


@dataclass(frozen=True)
class Certificate:
    """The dates between which a certificate is good, in seconds since 1970."""

    not_before: float
    not_after: float

    def days_left(self, now: float) -> float:
        """Until it expires; `now` is the wall clock."""
        return (self.not_after - now) / DAY_S


class ExpiryWatch:
    """The certificate in a file that may be replaced at any time: looked at often, read when it changed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._read: tuple[int, int] = (0, 0)
        self._certificate: Certificate | None = None
        self._told_at: float | None = None

    def days_left(self, now: float) -> float | None:
        """None where the file holds no certificate at the moment; who connects with it says so."""
        try:
            status = self.file.stat()
            if (stamp := (status.st_mtime_ns, status.st_ino)) != self._read:
                self._read, self._certificate = stamp, None
                self._certificate = read_certificate(self.file.read_text(encoding="ascii", errors="replace"))
        except (OSError, ValueError):
            self._certificate = None
        return self._certificate.days_left(now) if self._certificate is not None else None

    def figures(self, now: float) -> dict[str, float]:
        """For the stats."""
        days = self.days_left(now)
        return {} if days is None else {"client_certificate_days": round(days, 1)}

    def warning(self, now: float) -> str:
        """What an operator should hear now, at most once a day; empty if nothing."""
        days = self.days_left(now)
        if days is None or days > SOON_DAYS:
            self._told_at = None
            return ""
        if self._told_at is not None and 0 <= now - self._told_at < DAY_S:
            return ""
        self._told_at = now
        return f"Our certificate {self.file} {told(days)}; once it is renewed, the next connection uses the new one."


def told(days_left: float) -> str:
    """The rest of a sentence about a certificate."""
    days = f"{abs(days_left):.0f} day{'s' * (round(abs(days_left)) != 1)}"
    return f"expired {days} ago" if days_left < 0 else f"expires in {days}"


def read_certificate(pem: str) -> Certificate:
    """The first certificate in `pem`, which is our own: those after it vouch for it. ValueError if there is none."""
    if (found := _PEM.search(pem)) is None:
        raise ValueError("there is no certificate in it")
    # PEM_cert_to_DER_cert raises ValueError (binascii.Error is one) for what is not base64.
    body, _ = _inside(ssl.PEM_cert_to_DER_cert(found[0]), _SEQUENCE)
    body, _ = _inside(body, _SEQUENCE)
    if body[:1] == bytes([_VERSION]):
        body = _inside(body, _VERSION)[1]
    for _ in ("serial number", "algorithm", "issuer"):
        body = _inside(body, None)[1]
    dates, _ = _inside(body, _SEQUENCE)
    not_before, rest = _time(dates)
    not_after, _ = _time(rest)
    return Certificate(not_before, not_after)


def _inside(data: bytes, tag: int | None) -> tuple[bytes, bytes]:
    """The content of the first element of DER in `data`, and what follows it; ValueError if it is not a `tag`."""
    if len(data) < 2 or (tag is not None and data[0] != tag):
        raise ValueError("it is no certificate")
    length, start = data[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(data[2:start], "big")
    if start + length > len(data):
        raise ValueError("the certificate is cut short")
    return data[start : start + length], data[start + length :]


def _time(data: bytes) -> tuple[float, bytes]:
    """A date (4.1.2.5: Zulu time with seconds; years of two digits are 1950 to 2049), and what follows it."""
    content, rest = _inside(data, None)
    text = content.decode("ascii")
    if data[0] == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif data[0] != _GENERALIZED_TIME:
        raise ValueError("the certificate has no dates")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc).timestamp(), rest
