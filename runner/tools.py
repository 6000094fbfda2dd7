"""What builds are made with: this host's parts, the same for every request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder.model import Builder
from policies.loader import Policy
from runner.files import Home
from runner.registry.auth import Credentials
from runner.settings import Settings
from sandbox.model import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Plain values and the adapters that they need."""

    settings: Settings
    home: Home
    policies: Sequence[Policy]
    backends: Mapping[str, Backend]
    builders: Mapping[str, Builder]
    credentials: Credentials
