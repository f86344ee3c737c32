"""A certificate authority of the tests' own, made with the `openssl` command."""

from __future__ import annotations

import subprocess
from pathlib import Path

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """`certificate` is what a client trusts; `issue` gives a server's key and certificate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._issued: dict[tuple[str, int], Path] = {}
        self.certificate = folder / "authority.pem"
        self._key = folder / "authority.key"
        subject = ("-subj", "/CN=Rungway test authority", "-days", "30")
        usage = ("-addext", "keyUsage=critical,keyCertSign")
        places = ("-keyout", str(self._key), "-out", str(self.certificate))
        _openssl("req", "-x509", *_EC, *places, *subject, *usage)

    def issue(self, name: str, *, days: int = 30) -> Path:
        """One file with a key and a certificate for this host name."""
        if (name, days) not in self._issued:
            self._issued[name, days] = self._make(name, days)
        return self._issued[name, days]

    def _make(self, name: str, days: int) -> Path:
        stem = self._folder / f"{name}{days}"
        key, request, extensions = (stem.with_suffix(end) for end in (".key", ".csr", ".ext"))
        _openssl("req", "-new", *_EC, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(
            f"subjectAltName=DNS:{name}\nauthorityKeyIdentifier=keyid\nbasicConstraints=CA:FALSE\n"
        )
        signer = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial")
        limits = ("-days", str(days), "-extfile", extensions)
        signed = _openssl("x509", "-req", "-in", request, *signer, *limits)
        whole = stem.with_suffix(".pem")
        whole.write_bytes(key.read_bytes() + signed)
        return whole


def _openssl(*arguments: str | Path) -> bytes:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
