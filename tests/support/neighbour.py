"""Answers whoever comes to PORT, by every address and protocol, and prints what it heard."""

import contextlib
import socket
import sys
import threading


def serve(family: socket.AddressFamily, kind: socket.SocketKind, port: int) -> None:
    """Until this process is killed."""
    listener = socket.socket(family, kind)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("", port))
    if kind == socket.SOCK_STREAM:
        listener.listen()
    threading.Thread(target=_answer, args=(listener,)).start()


def _answer(listener: socket.socket) -> None:
    while True:
        if listener.type == socket.SOCK_STREAM:
            print("connection", listener.accept()[1], flush=True)  # noqa: T201 - its output is read by the test
            continue
        data, sender = listener.recvfrom(1000)
        print(data, sender, flush=True)  # noqa: T201 - its output is read by the test
        with contextlib.suppress(OSError):
            listener.sendto(b"here", sender)


if __name__ == "__main__":
    for each in (socket.AF_INET, socket.AF_INET6):
        for way in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            serve(each, way, int(sys.argv[1]))
    print("ready", flush=True)  # noqa: T201 - its output is read by the test
