"""What builds are made with: this host's parts, the same for every request."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

from builder.model import Builder
from policies.loader import Policy
from runner.files import Home
from runner.registry.auth import Credentials
from runner.settings import Settings
from sandbox.model import Backend

_T = TypeVar("_T")


class OnDemand(Mapping[str, _T]):
    """Each value is made when it is first asked for, and kept: some are dear to import.

    Looking for a name, counting and going through the names make nothing.
    """

    def __init__(self, makers: Mapping[str, Callable[[], _T]]) -> None:
        self._makers = makers
        self._made: dict[str, _T] = {}
        self._lock = Lock()

    def __getitem__(self, name: str) -> _T:
        with self._lock:
            if name not in self._made:
                self._made[name] = self._makers[name]()
            return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Plain values and the adapters that they need.

    Attributes:
        backends: By name.
    """

    settings: Settings
    home: Home
    policies: Sequence[Policy]
    backends: Mapping[str, Backend]
    builders: Mapping[str, Builder]
    credentials: Credentials

    @property
    def automatic(self) -> tuple[str, ...]:
        """Names of the backends that are tried in turn where a request names none."""
        has_cluster = self.settings.kubernetes.gateway is not None
        return tuple(name for name in self.backends if has_cluster or name != "kubernetes")
