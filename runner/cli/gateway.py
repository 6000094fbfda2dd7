"""``runner gateway serve``: the port that pods come to, or the registry standing alone."""

import argparse
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

from runner import settings
from runner.cli import view
from runner.errors import UsageError
from runner.files import Home
from runner.gateway import alone, identity
from runner.gateway.http import Server
from runner.gateway.listen import Secured, over, plain, tcp, tls
from runner.gateway.service import Service, take_descriptors

NAMESPACES = ("conformance/repo1", "conformance/repo2")


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    purpose = "lead the sandboxes of a cluster to the builds of this host"
    serve = actions.add_parser("serve", help=purpose, description=purpose.capitalize() + ".")
    serve.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:8443", help="[%(default)s]"
    )
    serve.add_argument("--certificate", type=Path, metavar="FILE", help="PEM [made]")
    serve.add_argument("--key", type=Path, metavar="FILE", help="PEM [made]")
    serve.add_argument(
        "--standalone", action="store_true", help="a registry for conformance suites, no sessions"
    )
    serve.add_argument(
        "--repository",
        action="append",
        metavar="NAME",
        help=f"with --standalone; repeatable [{', '.join(NAMESPACES)}]",
    )
    serve.add_argument(
        "--login", type=Path, metavar="FILE", help="with --standalone: one line, USER:PASSWORD"
    )
    serve.add_argument(
        "--directory", type=Path, metavar="DIR", help="with --standalone: for its blobs"
    )


def run(parsed: argparse.Namespace) -> int:
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with ExitStack() as stack:
        close, address = _alone(parsed, stack) if parsed.standalone else _service(parsed)
        stack.callback(close)
        view.say("gateway", f"listening on {address}")
        # A signal that the kernel gives to another thread does not end a wait of this one.
        while not over.wait(_LOOK_SECONDS):
            pass
    return 0


def _alone(parsed: argparse.Namespace, stack: ExitStack) -> tuple[Callable[[], None], str]:
    directory = parsed.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    names = parsed.repository or NAMESPACES
    if not all(map(_REPOSITORY.fullmatch, names)):
        raise _usage("a repository is named in lower case, like team/app")
    registry = alone.Registry(directory, names, settings.load())
    stack.callback(registry.close)
    handler = registry.answer
    if parsed.login is not None:
        handler = alone.behind(_text(parsed.login).strip(), handler)
    elif not _is_loopback(parsed.listen):
        raise _usage("without --login only loopback may be listened on")
    listener, secured = _listener(parsed)
    server = Server(listener, handler, peer_uid=None, failed=_bug, welcome=over(secured, handler))
    return server.close, _address(listener)


def _service(parsed: argparse.Namespace) -> tuple[Callable[[], None], str]:
    _require_pair(parsed)
    take_descriptors()
    home = Home.find()
    home.prepare()
    host, port = _host_and_port(parsed.listen)
    try:
        server = identity.shown(home.gateway, parsed.certificate, parsed.key)
    except OSError as error:
        files = parsed.certificate or home.gateway
        raise _usage(f"{files}: {error.strerror or error}") from None
    try:
        listener = tcp(host, port)
    except OSError as error:
        raise _usage(f"{parsed.listen}: {error.strerror or error}") from None
    return Service(listener, server, home.doors).close, _address(listener)


def _require_pair(parsed: argparse.Namespace) -> None:
    if (parsed.certificate is None) != (parsed.key is None):
        raise _usage("--certificate and --key belong together")


def _listener(parsed: argparse.Namespace) -> tuple[socket.socket, Secured]:
    _require_pair(parsed)
    if parsed.certificate is None and not _is_loopback(parsed.listen):
        raise _usage("without --certificate and --key only loopback may be listened on")
    try:
        secured = plain if parsed.certificate is None else tls(parsed.certificate, parsed.key)
        return tcp(*_host_and_port(parsed.listen)), secured
    except OSError as error:
        raise _usage(f"{parsed.listen}: {error.strerror or error}") from None


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _PORTS:
        raise _usage(f"{text!a} is not HOST:PORT")
    return host.strip("[]"), int(port)


_LOOK_SECONDS = 0.2
_PORTS = 65535
_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)


def _is_loopback(listen: str) -> bool:
    host, _ = _host_and_port(listen)
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _usage(f"{path}: {error}") from None


def _usage(message: str) -> UsageError:
    return UsageError(message, advice="runner gateway serve --help")


def _bug(error: Exception) -> None:
    view.say("failed", repr(error))
