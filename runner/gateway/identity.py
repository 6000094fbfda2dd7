"""Who the gateway's port is: a certificate, which every pod is given and takes for no other.

No authority vouches for it and no name is in it: pods know the certificate itself.
"""

import contextlib
import fcntl
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

from runner.errors import UsageError
from runner.files import write_whole
from runner.gateway import tlspeer

CERTIFICATE = "certificate.pem"
_PAIR = "identity.pem"
"""Key and certificate in one file: nobody finds the one without the other."""
_DAYS = 3650
"""What ends it is another one. A date would only cut off pods, whoever they are."""
_LEFT_SECONDS = 30 * 86_400
_OPENSSL_SECONDS = 60
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\n.+?\n-----END CERTIFICATE-----\n", re.DOTALL)


def shown(directory: Path, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """What the port shows; CERTIFICATE in ``directory`` is for whoever starts pods.

    Args:
        directory: Of the gateway's state; it is there, and nobody else's.
        certificate: PEM, the operator's own. Without one it is made, once, and again in its last
            month.
        key: Of the operator's own.

    Raises:
        OSError: A file cannot be read or written, or holds something else.
        UsageError: None can be made.
    """
    with _one_at_a_time(directory):
        if certificate is None or key is None:
            certificate = key = _made(directory / _PAIR)
        server = tlspeer.context(certificate, key)
        # The first is the port's own. Pods would trust whatever the others of a chain vouch for,
        # and a key may be in the same file.
        first = _PEM.search(certificate.read_bytes().replace(b"\r\n", b"\n"))
        if first is None:
            raise OSError(f"{certificate} has no CERTIFICATE")
        write_whole(directory / CERTIFICATE, first[0])
    return server


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Services that are started at once show the same."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _made(pair: Path) -> Path:
    check = ("x509", "-noout", "-checkend", str(_LEFT_SECONDS), "-in", str(pair))
    if not pair.exists() or _openssl(*check).returncode != 0:
        made = _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", str(_DAYS), "-subj", "/CN=runner-gateway", "-keyout", "-", "-out", "-",
        )  # fmt: skip
        if made.returncode != 0:
            said = made.stderr.decode(errors="replace")[-500:].strip()
            raise _cannot(f"openssl makes no certificate: {said}")
        write_whole(pair, made.stdout, mode=0o600)
    return pair


def _openssl(*words: str) -> subprocess.CompletedProcess[bytes]:
    path = shutil.which("openssl")
    if path is None:
        raise _cannot("openssl is not on PATH: apt-get install openssl")
    try:
        return subprocess.run(
            [path, *words], capture_output=True, timeout=_OPENSSL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _cannot(f"openssl does not end within {_OPENSSL_SECONDS} s") from None


def _cannot(message: str) -> UsageError:
    return UsageError(message, advice="--certificate and --key take one of your own.")
