"""Installing builders: from Debian's packages by their recipe, or from an image of one's own."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from builder.model import Builder
from policies.reference import Digest, ImageReference
from runner.cancel import Cancellation
from runner.errors import BuilderInstallFailed, ImageNotFound, PolicyDenied
from runner.events import Listener
from runner.inflate import inflated
from runner.output import Output
from runner.pipeline import submit
from runner.registry.image import LAYER_TYPES, parse_manifest
from runner.registry.layout import LayoutClient, LayoutDirectory
from runner.request import BuildRequest
from runner.stores import debian
from runner.stores.plant import plant
from runner.stores.rootfs import Installed, RootfsStore
from runner.tools import Tools

_LOCAL = ImageReference("layout.invalid", "builder", "latest")
"""Stands for a layout on this host inside the sandbox that unpacks it; no such host exists."""

_FLATTEN = """\
FROM {image} AS source
FROM scratch
COPY --from=source / /
"""
_FLATTEN_SECONDS = 1800


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


def from_image(
    store: RootfsStore, builder: Builder, image: str, *, tools: Tools, listen: Listener
) -> Installed:
    """Makes the builder's root filesystem from ``HOST/REPO:TAG`` or ``oci:DIR``.

    An ordinary untrusted build, by the builder that is installed now, unpacks the image and makes
    one flat layer of it; that layer, verified, is laid out here.

    Raises:
        BuilderInstallFailed: It lacks what the builder needs.
        RunnerError: The build ends in it.
    """
    kind, _, directory = image.partition(":")
    local = {_LOCAL: Path(directory)} if kind == "oci" else {}
    reference = _LOCAL if local else ImageReference.parse(image)
    with tempfile.TemporaryDirectory(prefix="runner-install-") as temporary:
        context, layout = Path(temporary) / "context", Path(temporary) / "layout"
        context.mkdir()
        (context / "Dockerfile").write_text(_FLATTEN.format(image=reference))
        request = BuildRequest(
            context=context,
            output=Output("oci", layout),
            build_args={},
            local_images=local,
            wall_seconds=_FLATTEN_SECONDS,
        )
        try:
            result = submit(request, tools, listen, Cancellation())
        except PolicyDenied as error:
            error.advice = f"The policy's base_images must allow {reference.name}."
            raise
        pinned = dict(result.base_images).get(str(reference))
        if pinned is None:
            raise ImageNotFound(f"{reference} was not resolved")
        source = f"{image}@{pinned}"

        def make(root: Path) -> str:
            _plant_only_layer(layout, result.digest, root)
            return f"image {Digest(pinned).hex[:12]}"

        return store.install(builder.name, builder.recipe, source, make)


def _plant_only_layer(layout: Path, root_digest: Digest, root: Path) -> None:
    client = LayoutClient(LayoutDirectory(layout))
    descriptor, data = client.manifest(_LOCAL.at(root_digest))
    (layer, *more) = parse_manifest(data, descriptor.media_type).layers
    if more:
        raise BuilderInstallFailed("the image was not flattened to one layer")
    with client.read_blob(_LOCAL, layer.digest, layer.size) as chunks:
        plant(inflated(chunks, LAYER_TYPES[layer.media_type]), root)
