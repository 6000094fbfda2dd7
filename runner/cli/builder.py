"""``runner builder``: the root filesystems that builders run in."""

import argparse
import json
import secrets
from dataclasses import replace
from pathlib import Path

from policies.model import MIB
from policies.reference import Digest, ImageReference
from runner import settings
from runner.cli import view
from runner.cli.tools import BUILDERS, assemble
from runner.errors import BuilderInstallFailed, BuilderUnknown, OutputInvalid, UsageError
from runner.files import Home
from runner.stores.rootfs import Installed, RootfsStore, missing


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, purpose in (
        ("list", "what there is, and what is installed"),
        ("install", "make a builder's root filesystem"),
        ("export", "write a root filesystem as an OCI archive, for hosts without a registry"),
        ("import", "install what export has written, without any network"),
        ("push", "put a root filesystem into a registry, as the image that pods run"),
        ("verify", "hash every file of a root filesystem"),
        ("remove", "remove a root filesystem"),
    ):
        action = actions.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        if name not in {"list", "import"}:
            action.add_argument("builder", nargs="?", default="buildah", help="[%(default)s]")
        if name in _OPTIONS:
            _OPTIONS[name](action)


def _list_options(action: argparse.ArgumentParser) -> None:
    action.add_argument("--json", action="store_true")


def _install_options(action: argparse.ArgumentParser) -> None:
    action.add_argument("--force", action="store_true", help="even where it is installed and sound")
    source = action.add_mutually_exclusive_group()
    source.add_argument("--mirror", metavar="URL", help="of Debian's archive")
    source.add_argument(
        "--image",
        metavar="HOST/REPO:TAG|oci:DIR",
        help="an image of your own instead of Debian's packages",
    )


def _export_options(action: argparse.ArgumentParser) -> None:
    action.add_argument("file", type=Path, metavar="FILE")
    action.add_argument("--force", action="store_true", help="replace FILE")


def _import_options(action: argparse.ArgumentParser) -> None:
    action.add_argument("file", type=Path, metavar="FILE")
    action.add_argument("--force", action="store_true", help="replace what is installed already")
    vouched = action.add_mutually_exclusive_group(required=True)
    vouched.add_argument("--digest", help="that FILE has to have; export prints it")
    vouched.add_argument(
        "--trust-file",
        action="store_true",
        help="whatever its digest is; a builder decides what images contain",
    )


def _push_options(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--to", metavar="HOST/REPO[:TAG]", help="[repository under kubernetes in config.toml]"
    )


_OPTIONS = {
    "list": _list_options,
    "install": _install_options,
    "export": _export_options,
    "import": _import_options,
    "push": _push_options,
}


def run(parsed: argparse.Namespace) -> int:
    home = Home.find()
    home.prepare()
    store = RootfsStore(home.builders)
    if parsed.action == "list":
        return _list(store, as_json=parsed.json)
    if parsed.action == "import":
        _import(store, parsed)
        return 0
    if parsed.builder not in BUILDERS:
        raise BuilderUnknown(f"there is no builder {parsed.builder!a}")
    if parsed.action == "install":
        _install(store, parsed)
    elif parsed.action == "push":
        _push(store, parsed)
    elif parsed.action == "export":
        _export(store, parsed)
    elif parsed.action == "verify":
        _say(store.verified(parsed.builder, every_byte=True))
    else:
        store.remove(parsed.builder)
    return 0


def _list(store: RootfsStore, *, as_json: bool) -> int:
    rows = []
    for name, builder in BUILDERS.items():
        installed = store.installed(name)
        rows.append(
            {
                "builder": name,
                "recipe": f"debian:{builder.recipe.suite}",
                "installed": installed.version if installed else None,
                "digest": installed.digest if installed else None,
                "source": installed.source if installed else None,
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))  # noqa: T201 - the answer
        return 0
    for row in rows:
        state = (
            f"{row['installed']} from {row['source']}, {row['digest']}"
            if row["installed"]
            else f"{row['recipe']}, not installed (runner builder install {row['builder']})"
        )
        print(f"{row['builder']:<10} {state}")  # noqa: T201 - the answer
    return 0


def _install(store: RootfsStore, parsed: argparse.Namespace) -> None:
    from runner.stores import installs  # noqa: PLC0415 - only here

    builder = BUILDERS[parsed.builder]
    installed = store.installed(builder.name)
    if installed is not None and not parsed.force and not missing(builder.recipe, installed.root):
        _say(store.verified(builder.name))
        return
    if parsed.image is not None:
        seen = view.choose(json=False)
        try:
            _say(installs.from_image(store, builder, parsed.image, tools=assemble([]), listen=seen))
        finally:
            seen.close()
        return

    def report(line: str) -> None:
        view.say("install", line)

    _say(installs.from_packages(store, builder, mirror=parsed.mirror, report=report))


def _export(store: RootfsStore, parsed: argparse.Namespace) -> None:
    from runner.output import Output  # noqa: PLC0415 - only here
    from runner.stores import builderimage  # noqa: PLC0415 - only here

    file: Path = parsed.file
    output = Output("oci-archive", file)
    if parsed.force and file.is_file():
        output = Output(output.kind, file.with_name(f".{file.name}-{secrets.token_hex(8)}"))
    try:
        output.check()
        store.verified(parsed.builder, every_byte=True)
        with store.using(parsed.builder) as installed:
            digest = builderimage.export(BUILDERS[parsed.builder].recipe, installed, output)
    except OutputInvalid as error:
        error.advice = "Name a new file in a directory that you may write; --force replaces one."
        raise
    if output.path != file:
        output.path.rename(file)
    view.say("builder", f"{installed.name} {installed.version}, tree {installed.digest}")
    print(digest)  # noqa: T201 - the answer


def _push(store: RootfsStore, parsed: argparse.Namespace) -> None:
    from runner.stores import podimage  # noqa: PLC0415 - only here

    loaded = settings.load()
    repository = loaded.kubernetes.repository
    to = parsed.to or (f"{repository}/{parsed.builder}" if repository else None)
    if to is None:
        raise UsageError(
            "no registry is named for pods' images",
            advice="--to HOST/REPO, or repository under [kubernetes] in config.toml.",
        )
    store.verified(parsed.builder, every_byte=True)
    with store.using(parsed.builder) as installed:
        recipe = BUILDERS[parsed.builder].recipe
        destination = ImageReference.parse(to)
        if destination.tag is None:  # for people: pods name the digest
            destination = replace(destination, tag=installed.digest.hex[:12])
        image = podimage.push(recipe, installed, destination, loaded)
    view.say("builder", f"{installed.name} {installed.version}, tree {installed.digest}")
    print(image)  # noqa: T201 - the answer


def _import(store: RootfsStore, parsed: argparse.Namespace) -> None:
    from runner.stores import builderimage  # noqa: PLC0415 - only here

    digest = None if parsed.digest is None else Digest(parsed.digest)
    with builderimage.opened(parsed.file, digest) as found:
        if found.builder not in BUILDERS:
            raise BuilderUnknown(f"there is no builder {found.builder[:100]!a}")
        if not parsed.force and store.installed(found.builder) is not None:
            raise BuilderInstallFailed(
                f"{found.builder} is installed already", advice="--force replaces it."
            )
        source = f"oci-archive:{parsed.file}"
        _say(builderimage.install(store, BUILDERS[found.builder], found, source))


def _say(installed: Installed) -> None:
    view.say(
        "builder",
        f"{installed.name} {installed.version}, {installed.entries} files, "
        f"{installed.size_bytes // MIB} MiB",
    )
    print(installed.digest)  # noqa: T201 - the answer
