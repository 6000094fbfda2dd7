"""Who the port is: one certificate, which is made once, and which pods know."""

import os
import shutil
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runner.errors import UsageError
from runner.gateway import identity
from runner.gateway.identity import CERTIFICATE, shown
from runner.gateway.listen import tcp
from runner.gateway.service import Service
from tests.support.egress import certificate as signed_by_itself
from tests.support.port import Pods

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed: apt-get install openssl"
)
PAIR = "identity.pem"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The gateway's state."""
    directory = tmp_path / "gateway"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """The operator's certificate and key."""
    return signed_by_itself(tmp_path, "gateway.example")


def greets(server: ssl.SSLContext, certificate: Path) -> bool:
    """Whether pods that were given ``certificate`` find the port to be who it should be."""
    listener = tcp("127.0.0.1", 0)
    service = Service(listener, server, Path("/nonexistent"))
    try:
        Pods(listener.getsockname(), certificate).greet().close()
    except ssl.SSLCertVerificationError:
        return False
    finally:
        service.close()
    return True


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_pods_know_the_certificate_that_was_made(home: Path) -> None:
    assert greets(shown(home, None, None), home / CERTIFICATE)


def test_the_key_is_in_one_file_that_nobody_else_reads(home: Path) -> None:
    shown(home, None, None)
    assert sorted(os.listdir(home)) == [CERTIFICATE, PAIR]
    assert mode(home / PAIR) == 0o600
    assert b"PRIVATE" in (home / PAIR).read_bytes()
    assert b"PRIVATE" not in (home / CERTIFICATE).read_bytes()


def test_it_is_made_once(home: Path) -> None:
    shown(home, None, None)
    before = (home / CERTIFICATE).read_bytes()
    assert greets(shown(home, None, None), home / CERTIFICATE)
    assert (home / CERTIFICATE).read_bytes() == before


def test_in_its_last_month_it_is_made_again_and_who_knew_the_old_one_is_cut_off(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_DAYS", 29)
    shown(home, None, None)
    (tmp_path / "old.pem").write_bytes((home / CERTIFICATE).read_bytes())
    monkeypatch.undo()
    server = shown(home, None, None)
    assert greets(server, home / CERTIFICATE)
    assert not greets(server, tmp_path / "old.pem")


def test_services_that_start_at_once_are_the_same(home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: shown(home, None, None), range(4)))
    assert all(greets(server, home / CERTIFICATE) for server in servers)


def test_whoever_starts_first_is_waited_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    make = identity._openssl

    def slow(*words: str) -> subprocess.CompletedProcess[bytes]:
        begun.set()
        assert go_on.wait(10)
        return make(*words)

    monkeypatch.setattr(identity, "_openssl", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shown, home, None, None)
        assert begun.wait(10)
        second = pool.submit(shown, home, None, None)
        go_on.set()
        servers = [first.result(), second.result()]
    assert all(greets(server, home / CERTIFICATE) for server in servers)


def test_a_pair_that_was_cut_off_is_made_again(home: Path) -> None:
    for left in (b"", b"-----BEGIN PRIVATE KEY-----\n"):
        (home / PAIR).write_bytes(left)
        assert greets(shown(home, None, None), home / CERTIFICATE)


def test_a_certificate_that_is_missing_is_given_again(home: Path) -> None:
    shown(home, None, None)
    (home / CERTIFICATE).unlink()
    assert greets(shown(home, None, None), home / CERTIFICATE)


def test_a_key_that_is_not_the_certificates_own_is_told(
    home: Path, tmp_path: Path, own: tuple[Path, Path]
) -> None:
    (tmp_path / "other").mkdir()
    _, other_key = signed_by_itself(tmp_path / "other", "gateway.example")
    with pytest.raises(ssl.SSLError):
        shown(home, own[0], other_key)
    assert os.listdir(home) == []


# -- the operator's own --------------------------------------------------------------------------


def test_the_operators_own_certificate_is_the_one_that_pods_get(
    home: Path, own: tuple[Path, Path]
) -> None:
    assert greets(shown(home, *own), home / CERTIFICATE)
    assert os.listdir(home) == [CERTIFICATE]


def test_of_a_file_with_a_chain_and_a_key_pods_get_the_first_certificate_alone(
    home: Path, tmp_path: Path, own: tuple[Path, Path]
) -> None:
    (tmp_path / "other").mkdir()
    authority, _ = signed_by_itself(tmp_path / "other", "authority.example")
    all_in_one = tmp_path / "all.pem"
    parts = (own[1], own[0], authority)
    text = b"".join(part.read_bytes() for part in parts).replace(b"\n", b"\r\n")
    all_in_one.write_bytes(b"some words\r\n" + text)
    assert greets(shown(home, all_in_one, all_in_one), home / CERTIFICATE)
    assert (home / CERTIFICATE).read_bytes() == own[0].read_bytes()


def test_ones_own_and_then_a_made_one_and_back(home: Path, own: tuple[Path, Path]) -> None:
    shown(home, None, None)
    made = (home / CERTIFICATE).read_bytes()
    for pair, certificate in ((own, own[0].read_bytes()), ((None, None), made)):
        assert greets(shown(home, *pair), home / CERTIFICATE)
        assert (home / CERTIFICATE).read_bytes() == certificate


def test_a_key_with_a_passphrase_is_an_error_and_no_question(
    home: Path, tmp_path: Path, own: tuple[Path, Path]
) -> None:
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", own[1], "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ssl.SSLError):
        shown(home, own[0], locked)


def test_a_certificate_of_another_form_is_told(
    home: Path, tmp_path: Path, own: tuple[Path, Path]
) -> None:
    odd = tmp_path / "odd.pem"
    subprocess.run(
        ["openssl", "x509", "-trustout", "-addtrust", "serverAuth", "-in", own[0], "-out", odd],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(OSError, match="has no CERTIFICATE"):
        shown(home, odd, own[1])


# -- openssl -------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_without_openssl_the_user_hears_what_is_missing(home: Path, tools: Path) -> None:
    with pytest.raises(UsageError, match="openssl is not on PATH") as caught:
        shown(home, None, None)
    assert "--certificate" in (caught.value.advice or "")


def test_ones_own_certificate_needs_no_openssl(
    home: Path, own: tuple[Path, Path], tools: Path
) -> None:
    shown(home, *own)


def test_what_openssl_says_of_its_failure_is_told(home: Path, tools: Path) -> None:
    script(tools / "openssl", "echo 'no randomness' >&2; exit 1")
    with pytest.raises(UsageError, match="no randomness"):
        shown(home, None, None)
    assert os.listdir(home) == []


def test_openssl_that_hangs_is_not_waited_for(
    home: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_OPENSSL_SECONDS", 0.2)
    script(tools / "openssl", "exec /bin/sleep 30")
    with pytest.raises(UsageError, match="does not end"):
        shown(home, None, None)
