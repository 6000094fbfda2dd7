"""The door of a sandbox that has a network: the network, and the only neighbour in it."""

import threading
from dataclasses import replace
from typing import Self

from sandbox.docker import containers
from sandbox.docker.containers import Container
from sandbox.docker.place import DockerPlace
from sandbox.errors import SandboxFailed
from sandbox.model import GATEWAY_PORT
from sandbox.plan import Ways
from sandbox.supervise import START_SECONDS

_RELAY_READY = b"runner-relay 1\n"


class Relay:
    """A network of two, and the neighbour in it: a forwarder to this sandbox's sockets."""

    def __init__(self, place: DockerPlace, container: Container) -> None:
        """Raises SandboxFailed where it does not come up; what there is of it has its labels."""
        engine, name = place.engine, place.title
        self.network = name
        engine.create_network(name, containers.network(name, place.labels))
        container = replace(container, network=name)
        relay = engine.create(f"{name}-relay", containers.relay(container))
        self._streams = engine.attach(relay)
        try:
            engine.start(relay)
            self._await()
            address = engine.address(relay, name)
        except BaseException:
            self._streams.close()
            raise
        self.ways = Ways(
            gateway=f"{address}:{GATEWAY_PORT}",
            outlet=f"{address}:{containers.OUTLET_PORT}",
        )

    def _await(self) -> None:
        timer = threading.Timer(START_SECONDS, self._streams.close)
        timer.start()
        seen = b""
        try:
            while _RELAY_READY not in seen:
                data = self._streams.read()
                seen += data
                if not data:
                    shown = seen[-500:].decode("utf-8", "backslashreplace").strip()
                    raise SandboxFailed(f"the relay did not start: {shown or 'no output'}")
        finally:
            timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """It ends by that."""
        self._streams.close()
