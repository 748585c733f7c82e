"""What doctor says about the way to the broker: secrets, certificates, and passwords in the clear."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.doctor import Finding, examine
from edge_sdk.settings import Broker, Settings
from tests.authority import Authority
from tests.brokers import free_port


def finding(subject: str, folder: Path, **broker: Any) -> Finding | None:
    """What doctor finds on a subject, at a broker that is not there."""
    url = broker.pop("url", f"mqtts://127.0.0.1:{free_port()}")
    settings = Settings(device="d", engines=folder, broker=Broker(url=url, **broker))
    return next((found for found in examine(settings) if found.subject == subject), None)


@pytest.mark.parametrize(
    ("days", "level", "words"),
    [(365, "ok", "expires in 365 days"), (5, "note", "expires in 5 days"), (-3, "fault", "expired 3 days ago")],
)
def test_our_certificate_is_told_by_its_days(tmp_path: Path, days: int, level: str, words: str) -> None:
    """A note from two weeks ahead, a fault once it has expired."""
    end = datetime.now(timezone.utc) + timedelta(days=days, minutes=5)
    certificate, key = Authority(tmp_path).certificate("us", ends=end.strftime("%Y%m%d%H%M%SZ"))
    found = finding("client certificate", tmp_path, client_cert=certificate, client_key=key)

    assert found is not None
    assert (level, True) == (found.level, words in found.detail)


def test_a_certificate_that_nobody_is_shown(tmp_path: Path) -> None:
    """Without TLS it proves nothing: somebody thinks that it does."""
    certificate, key = Authority(tmp_path).certificate("us")
    url = f"mqtt://127.0.0.1:{free_port()}"
    found = finding("client certificate", tmp_path, url=url, client_cert=certificate, client_key=key)

    assert found is not None
    assert ("note", True) == (found.level, "mqtts://" in found.fix)


def test_secrets_that_everybody_may_read(tmp_path: Path) -> None:
    """Named with the command that mends it; not once it is mended."""
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o644)
    found = finding("secrets", tmp_path, username="me", password_file=secret)
    secret.chmod(0o600)

    assert found is not None
    assert ("note", f"chmod 600 {secret}") == (found.level, found.fix)
    assert finding("secrets", tmp_path, username="me", password_file=secret) is None


def test_a_password_in_the_clear_is_a_fault(tmp_path: Path) -> None:
    """The daemon would not start with it; doctor says so without sending it."""
    found = finding("broker", tmp_path, url="mqtt://192.0.2.1", username="me", password_file=tmp_path / "secret")

    assert found is not None
    assert ("fault", True) == (found.level, "in the clear" in found.detail)
    assert "allow_plaintext_password" in found.fix
