"""The dates of certificates as openssl wrote them, and warnings ahead of their end."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.mqtt.certificates import DAY_S, Certificate, ExpiryWatch, read_certificate
from tests.authority import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def as_openssl_reads(file: Path) -> Certificate:
    """The dates as openssl prints them."""
    told = subprocess.run(
        ["openssl", "x509", "-noout", "-startdate", "-enddate", "-in", file], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    before, after = (ssl.cert_time_to_seconds(line.partition("=")[2]) for line in told)
    return Certificate(before, after)


@pytest.mark.parametrize("ends", ["210101000000Z", "491231235959Z", "20500101000000Z", "99991231235959Z"])
def test_dates_are_what_openssl_says(authority: Authority, ends: str) -> None:
    """Also beyond 2050, from when on they are written differently."""
    file, _ = authority.certificate(f"until-{ends}", ends=ends)

    assert as_openssl_reads(file) == read_certificate(file.read_text())


def test_the_first_certificate_of_a_chain_is_ours(authority: Authority) -> None:
    """What follows it vouches for it."""
    file, _ = authority.certificate("chained", ends="350101000000Z")
    chain = f"# for the broker\n{file.read_text()}{authority.file.read_text()}"

    assert as_openssl_reads(file) == read_certificate(chain)


@given(cut=st.integers(0, 700), flip=st.integers(0, 699), to=st.integers(0, 255))
def test_what_is_broken_is_a_value_error(authority: Authority, cut: int, flip: int, to: int) -> None:
    """Whatever bytes the file holds, dates come out of it or a ValueError."""
    der = bytearray(ssl.PEM_cert_to_DER_cert(authority.file.read_text()))
    der[flip % len(der)] = to
    try:
        found = read_certificate(ssl.DER_cert_to_PEM_cert(bytes(der[:cut])))
    except ValueError:
        return

    assert isinstance(found, Certificate)


def test_the_end_is_told_ahead_and_once_a_day(authority: Authority, tmp_path: Path) -> None:
    """From two weeks before, and no more once the file holds a better one."""
    file = tmp_path / "our.crt"
    old, _ = authority.certificate("old", ends="300601000000Z")
    new, _ = authority.certificate("new", ends="310601000000Z")
    end = as_openssl_reads(old).not_after
    file.write_bytes(old.read_bytes())
    watch = ExpiryWatch(file)

    assert "" == watch.warning(end - 15 * DAY_S)
    assert "expires in 13 days" in watch.warning(end - 13 * DAY_S)
    assert "" == watch.warning(end - 13 * DAY_S + 3600)
    assert "expires in 12 days" in watch.warning(end - 12 * DAY_S)
    assert "expired 1 day ago" in watch.warning(end + DAY_S)
    file.unlink()
    assert (None, "") == (watch.days_left(end), watch.warning(end))
    file.write_bytes(new.read_bytes())
    assert "" == watch.warning(end + 2 * DAY_S)
    assert {"client_certificate_days": 365.0} == watch.figures(end)
