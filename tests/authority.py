"""Certificates for tests, made with openssl: good ones, and each kind of bad one."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CURVE = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")  # made in no time, which RSA is not


class Authority:
    """A certificate authority for a test, and certificates good and bad."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.file = self._self_signed("authority", "Test Authority")

    def certificate(self, name: str, *, host: str = "localhost", begins: str = "", ends: str = "") -> tuple[Path, Path]:
        """Certificate and key; `begins` and `ends` as YYMMDDHHMMSSZ."""
        key, request, made = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
        self._openssl("req", "-newkey", *_CURVE, "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={host}")
        options = self.folder / f"{name}.cnf"
        index = self.folder / f"{name}.index"
        index.touch()
        options.write_text(
            "[ca]\ndefault_ca=x\n[x]\n"
            f"database={index}\nnew_certs_dir={self.folder}\ndefault_md=sha256\nrand_serial=yes\n"
            "unique_subject=no\npolicy=any\nx509_extensions=names\n[any]\ncommonName=supplied\n"
            f"[names]\nsubjectAltName=DNS:{host}\n"
        )
        self._openssl(
            "ca", "-batch", "-notext", "-config", options, "-cert", self.file,
            "-keyfile", self.folder / "authority.key", "-in", request, "-out", made,
            "-startdate", begins or "200101000000Z", "-enddate", ends or "400101000000Z",
        )  # fmt: skip
        key.chmod(0o644)
        return made, key

    def stranger(self) -> tuple[Path, Path]:
        """A certificate that signed itself."""
        return self._self_signed("stranger", "localhost"), self.folder / "stranger.key"

    def _self_signed(self, name: str, subject: str) -> Path:
        key, made = self.folder / f"{name}.key", self.folder / f"{name}.crt"
        self._openssl(
            "req", "-x509", "-newkey", *_CURVE, "-nodes", "-keyout", key, "-out", made, "-days", "2",
            "-subj", f"/CN={subject}",
        )  # fmt: skip
        key.chmod(0o644)
        return made

    def _openssl(self, *words: object) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, cwd=self.folder)
