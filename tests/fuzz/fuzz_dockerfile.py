"""The Dockerfile reader against atheris, a fuzzer that follows the branches it has not seen yet.

    python -m tests.fuzz.fuzz_dockerfile -max_total_time=120

Starts from the corpus; arguments are libFuzzer's. What it finds goes to ``tests/dockerfiles``.
Ends at once, with success, where atheris is not installed.
"""

import importlib
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent.parent / "dockerfiles"
SECONDS_FOR_ONE = 5
"""For at most 64 KiB, under instrumentation."""


def main(arguments: list[str]) -> None:
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        print("atheris is not installed: nothing was fuzzed", file=sys.stderr)  # noqa: T201 - a command
        return
    with atheris.instrument_imports(include=["builder", "policies.reference"]):
        dockerfile = importlib.import_module("builder.dockerfile")
        errors = importlib.import_module("builder.errors")

    def read(data: bytes) -> None:
        try:
            facts = dockerfile.read_dockerfile(data, build_args={"X": "a"}, target=None)
        except errors.DockerfileInvalid as error:
            assert error.message.isprintable()  # noqa: PT017 - an error is as good as facts here
            return
        assert facts.stages
        assert all(unknown.facts for unknown in facts.unknown)

    with tempfile.TemporaryDirectory() as found:
        for file in CORPUS.glob("*/Dockerfile"):
            (Path(found) / file.parent.name).write_bytes(file.read_bytes())
        limits = (f"-timeout={SECONDS_FOR_ONE}", "-max_len=65536")
        atheris.Setup([sys.argv[0], found, *limits, *arguments], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
