"""The public conformance suite of the distribution specification, where somebody has it.

``OCI_CONFORMANCE`` names its executable, built from ``conformance/`` of the specification's
repository. What the specification's text asks for is in ``tests/unit/runner/gateway/test_alone.py``
for everybody.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.served import certificate, served

SUITE = os.environ.get("OCI_CONFORMANCE")
ALL = {
    "OCI_VERSION": "dev",
    "OCI_API_BLOBS_UPLOAD_CANCEL": "true",
    "OCI_API_BLOBS_DIGEST_HEADER": "true",
    "OCI_API_MANIFESTS_DIGEST_HEADER": "true",
    "OCI_API_MANIFESTS_TAG_PARAM": "true",
}


@pytest.mark.skipif(
    SUITE is None,
    reason="OCI_CONFORMANCE does not name the suite's executable: see docs/gateway.md",
)
@pytest.mark.parametrize("switches", [{}, ALL, {**ALL, "OCI_CACHE_AUTH": "false"}])
def test_the_suite_finds_nothing(switches: dict[str, str], tmp_path: Path) -> None:
    assert SUITE is not None
    cert, key = certificate(tmp_path)
    (tmp_path / "login").write_text("me:secret\n")
    options = ("--standalone", "--certificate", cert, "--key", key, "--login", tmp_path / "login")
    with served(tmp_path, *options) as running:
        environ = {
            "PATH": os.environ["PATH"],
            "SSL_CERT_FILE": str(cert),
            "OCI_REGISTRY": running.host,
            "OCI_USERNAME": "me",
            "OCI_PASSWORD": "secret",
            "OCI_RESULTS_DIR": str(tmp_path),
            **switches,
        }
        done = subprocess.run([SUITE], env=environ, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout.decode()[-4000:]
