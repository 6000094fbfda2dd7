"""``runner base list|pull|verify|remove|gc``: base images that are unpacked before builds."""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from policies.errors import InvalidReference
from policies.model import MIB
from policies.reference import Digest, ImageReference
from runner import gc, settings
from runner.cli import view
from runner.cli.gc import report
from runner.cli.signals import cancelled_by_signals
from runner.cli.tools import assemble
from runner.errors import BaseImageCorrupt, BaseImageUnknown
from runner.files import Home
from runner.gateway.kept import Kept
from runner.stores.blobs import BlobStore
from runner.stores.unpacked import Unpacked, UnpackedStore
from runner.terminal import clean

_ACTIONS = (
    ("list", "what is unpacked on this host"),
    ("pull", "unpack an image, so that builds which start from it need not"),
    ("verify", "hash every byte of what is unpacked"),
    ("remove", "remove an image; a build that uses it keeps it until its end"),
    ("gc", "remove leftovers, and what is beyond the configured size, now"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, purpose in _ACTIONS:
        action = actions.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        if name == "list":
            action.add_argument("--json", action="store_true")
        elif name == "pull":
            _configure_pull(action)
        elif name == "verify":
            action.add_argument("image", metavar="IMAGE|DIGEST", nargs="?", help="[all of them]")
        elif name == "remove":
            action.add_argument("image", metavar="IMAGE|DIGEST")


def _configure_pull(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="as FROM names it")
    add(
        "--from",
        dest="source",
        metavar="oci:DIR[:TAG]|oci-archive:FILE",
        help="a layout on this host that stands in for the image's registry",
    )
    add(
        "--policy",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="tighten the operator's policy; repeatable",
    )
    add("--platform", metavar="OS/ARCH", default="linux/amd64", help="[%(default)s]")


def run(parsed: argparse.Namespace) -> int:
    if parsed.action == "pull":
        return _pull(parsed)
    home = Home.find()
    home.prepare()
    store = UnpackedStore(home.unpacked)
    if parsed.action == "list":
        _list(store, as_json=parsed.json)
    elif parsed.action == "verify":
        _verify(store, parsed.image)
    elif parsed.action == "remove":
        _remove(store, Kept(BlobStore(home.base_images)), parsed.image)
    else:
        report(gc.base_images(home, settings.load()))
    return 0


def _pull(parsed: argparse.Namespace) -> int:
    from runner.cancel import Cancellation  # noqa: PLC0415 - only here
    from runner.pull import LayoutSource, PullRequest, pull  # noqa: PLC0415 - only here

    request = PullRequest(
        image=ImageReference.parse(parsed.image),
        source=LayoutSource.parse(parsed.source) if parsed.source is not None else None,
        platform=parsed.platform,
    )
    tools = assemble(parsed.policy)
    seen = view.choose(json=False)
    cancellation = Cancellation()
    try:
        with cancelled_by_signals(cancellation):
            pulled = pull(request, tools, seen, cancellation)
    finally:
        seen.close()
    size = pulled.unpacked.size_bytes // MIB
    view.say("unpacked", f"{request.image}, {size} MiB, which builds here get {pulled.how}")
    print(pulled.digest)  # noqa: T201 - the answer
    return 0


def _list(store: UnpackedStore, *, as_json: bool) -> None:
    images = store.all()
    if as_json:
        rows = [_row(store, image) for image in images]
        print(json.dumps(rows, indent=1))  # noqa: T201 - the answer
        return
    for image in images:
        identity = image.identity
        comes = "mountable" if image.mountable else "has extended attributes: copied"
        print(  # noqa: T201 - the answer
            f"{clean(image.name)}\n"
            f"    {identity.image}\n"
            f"    {clean(identity.platform)}, {image.size_bytes / MIB:.1f} MiB, {comes}, "
            f"builder {identity.builder.hex[:12]}, last used {_used(store, image)}"
        )


def _row(store: UnpackedStore, image: Unpacked) -> dict[str, str | int | bool]:
    return {
        "name": image.name,
        "digest": image.identity.image,
        "platform": image.identity.platform,
        "size_bytes": image.size_bytes,
        "builder": image.identity.builder,
        "last_used": _used(store, image),
        "mountable": image.mountable,
        "attributes": image.attributes,
        "packed": image.packed,
    }


def _used(store: UnpackedStore, image: Unpacked) -> str:
    return datetime.fromtimestamp(store.last_used(image), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _verify(store: UnpackedStore, wanted: str | None) -> None:
    corrupt = []
    for image in store.all() if wanted is None else _found(store, wanted):
        sound = store.is_sound(image)
        view.say("sound" if sound else "corrupt", f"{image.name} {image.identity.image}")
        if not sound:
            corrupt.append(image)
    if corrupt:
        names = ", ".join(f"{image.name} {image.identity.image}" for image in corrupt)
        raise BaseImageCorrupt(f"other bytes than were written: {names}")


def _remove(store: UnpackedStore, kept: Kept, wanted: str) -> None:
    for image in _found(store, wanted):
        store.remove(image)
        kept.forget(image.identity.image)
        view.say("removed", f"{image.name} {image.identity.image}")


def _found(store: UnpackedStore, wanted: str) -> list[Unpacked]:
    """The images with this name or digest. Raises BaseImageUnknown where there is none."""
    matches = _matcher(wanted)
    found = [image for image in store.all() if matches(image)]
    if not found:
        raise BaseImageUnknown(f"no base image {wanted[:200]!a} is unpacked here")
    return found


def _matcher(wanted: str) -> Callable[[Unpacked], bool]:
    """A digest counts alone: one image may have been pulled by several names."""
    try:
        digest = Digest(wanted)
    except InvalidReference:
        reference = ImageReference.parse(wanted).explicit()
        if reference.digest is None:
            return lambda image: image.name == str(reference)
        digest = reference.digest
    return lambda image: image.identity.image == digest
