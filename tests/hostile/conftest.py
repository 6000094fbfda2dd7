"""The real registries and sandboxes of the integration tests."""

from tests.integration.conftest import (
    builders,
    cache,
    current_runsc,
    docker_person,
    engine,
    locked_registry,
    newcomer,
    place,
    playground,
    registry,
    settings,
    tools_base,
)

__all__ = [
    "builders",
    "cache",
    "current_runsc",
    "docker_person",
    "engine",
    "locked_registry",
    "newcomer",
    "place",
    "playground",
    "registry",
    "settings",
    "tools_base",
]
