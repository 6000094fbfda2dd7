"""``runner verify IMAGE@DIGEST``: an image in a registry, under the rules for builds."""

import argparse
import json

from policies.model import Limits
from policies.reference import ImageReference
from runner import settings
from runner.cli import view
from runner.errors import UsageError
from runner.registry.auth import DockerConfig
from runner.registry.client import RegistryClient
from runner.registry.remote import RemoteImage
from runner.verify import StagedImage, verify


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE@DIGEST", type=str)
    parser.add_argument("--platform", metavar="OS/ARCH", help="that the image must have")
    parser.add_argument("--json", action="store_true")


def run(parsed: argparse.Namespace) -> int:
    reference = ImageReference.parse(parsed.image)
    if reference.digest is None:
        raise UsageError(f"{reference} names no digest", advice="Write HOST/REPO@sha256:...")
    with (
        RegistryClient(settings.load(), DockerConfig()) as client,
        RemoteImage(client, reference.at(reference.digest)) as remote,
    ):
        staged = StagedImage(remote.root, remote)
        image = verify(staged, limits=Limits(), platform=parsed.platform, claimed=reference.digest)
    size = image.size_bytes
    if parsed.json:
        found = {"digest": image.root.digest, "size_bytes": size, "platforms": image.platforms}
        print(json.dumps(found, indent=1))  # noqa: T201 - the answer
    else:
        view.say("verified", f"{reference.name}, {', '.join(image.platforms)}, {size} bytes")
        print(image.root.digest)  # noqa: T201 - the answer
    return 0
