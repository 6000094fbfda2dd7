"""``runner gateway serve`` as a process of its own."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 30


@dataclass(frozen=True)
class Served:
    """Attributes:
    host: ``127.0.0.1:PORT``.
    home: With its state, data and configuration.
    """

    host: str
    home: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.host.rpartition(":")
        return host, int(port)


@contextmanager
def served(home: Path, *options: str | Path, log_path: Path | None = None) -> Iterator[Served]:
    """Serves until the end of the block, and ends well."""
    log_path = log_path or home / "gateway.log"
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CONFIG_HOME": str(home / "config"),
    }
    words = ["gateway", "serve", "--listen", "127.0.0.1:0", *map(str, options)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "runner", *words], env=environ, stdout=log, stderr=log
        )
        try:
            yield Served(_listening(process, log_path), home, process)
        finally:
            process.terminate()
            try:
                status = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
    assert status in {0, -9}, log_path.read_text()


def _listening(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"listening on (\S+)", log.read_text()):
            return found[1]
        time.sleep(0.02)
    pytest.fail(f"the gateway does not start:\n{log.read_text()}")


def certificate(directory: Path) -> tuple[Path, Path]:
    """For 127.0.0.1, signed by itself; the certificate and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    cert, key = directory / "ca.crt", directory / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key
