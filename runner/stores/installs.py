"""Installing builders: from Debian's packages by their recipe."""

from collections.abc import Callable

from builder.model import Builder
from runner.stores import debian
from runner.stores.rootfs import Installed, RootfsStore


def from_packages(
    store: RootfsStore, builder: Builder, *, mirror: str | None, report: Callable[[str], None]
) -> Installed:
    """Makes the builder's root filesystem from its recipe. Raises BuilderInstallFailed."""
    recipe = builder.recipe
    return store.install(
        builder.name,
        recipe,
        f"debian:{recipe.suite}",
        lambda root: debian.bootstrap(recipe, root, mirror=mirror, report=report),
    )


def from_image(store: RootfsStore, builder: Builder, image: str, tools: object) -> Installed:
    raise NotImplementedError
