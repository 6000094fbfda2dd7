"""An independent client, skopeo, reads what we write and finds the same digests."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from policies.model import Limits
from policies.reference import ImageReference
from runner.output import Output, write_output
from runner.verify import VerifiedImage, verify
from tests.support.images import HELLO_TAR, MORE_TAR, make_image, make_index

pytestmark = pytest.mark.skipif(
    shutil.which("skopeo") is None, reason="skopeo is not installed: apt-get install skopeo"
)

REFERENCE = ImageReference.parse("localhost/acme/app:1.2")


def skopeo(*arguments: str) -> bytes:
    done = subprocess.run(["skopeo", *arguments], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def written(tmp_path: Path, image: VerifiedImage) -> Path:
    write_output(image, Output.parse(f"oci:{tmp_path}/layout"), REFERENCE)
    write_output(image, Output.parse(f"tar:{tmp_path}/image.tar"), REFERENCE)
    return tmp_path


ONLY_ROOT = pytest.mark.skipif(
    os.geteuid() != 0,
    reason="Debian's skopeo changes owners when it unpacks oci-archive: run as root",
)


# Not zstd in Docker's manifests: the skopeo of Debian 12 cannot read that.
@pytest.mark.parametrize(
    ("compression", "docker"),
    [("", False), ("gzip", False), ("zstd", False), ("", True), ("gzip", True)],
)
@pytest.mark.parametrize("transport", ["oci", pytest.param("oci-archive", marks=ONLY_ROOT)])
def test_skopeo_reads_all_that_we_write(
    tmp_path: Path, transport: str, compression: str, docker: bool
) -> None:
    staged = make_image(compression=compression, docker=docker)
    image = verify(staged, limits=Limits(), platform=None, claimed=None)
    written(tmp_path, image)
    name = "" if docker else ":1.2"  # by name skopeo finds OCI manifests only
    path = {"oci": "layout", "oci-archive": "image.tar"}[transport]
    source = f"{transport}:{tmp_path}/{path}{name}"
    raw = skopeo("inspect", "--raw", source)
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == image.root.digest
    # Reads every blob and checks it.
    skopeo("copy", "--preserve-digests", source, f"dir:{tmp_path}/copy")
    copied = (tmp_path / "copy" / "manifest.json").read_bytes()
    assert f"sha256:{hashlib.sha256(copied).hexdigest()}" == image.root.digest


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_skopeo_reads_the_tar_as_dockers_own(tmp_path: Path, compression: str) -> None:
    staged = make_image(compression=compression)
    image = verify(staged, limits=Limits(), platform=None, claimed=None)
    tar = written(tmp_path, image) / "image.tar"
    source = f"docker-archive:{tar}:localhost/acme/app:1.2"
    seen = json.loads(skopeo("inspect", "--config", source))
    assert seen["rootfs"]["diff_ids"] == [
        f"sha256:{hashlib.sha256(plain).hexdigest()}" for plain in (HELLO_TAR, MORE_TAR)
    ]
    skopeo("copy", source, f"dir:{tmp_path}/copy")


def test_skopeo_reads_an_index(tmp_path: Path) -> None:
    staged = make_index(("linux", "amd64", None), ("linux", "arm64", "v8"))
    image = verify(staged, limits=Limits(), platform="linux/arm64", claimed=None)
    written(tmp_path, image)
    source = f"oci:{tmp_path}/layout:1.2"
    skopeo("copy", "--all", "--preserve-digests", source, f"dir:{tmp_path}/copy")
    copied = (tmp_path / "copy" / "manifest.json").read_bytes()
    assert f"sha256:{hashlib.sha256(copied).hexdigest()}" == image.root.digest
