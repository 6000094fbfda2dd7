"""``python -m tests.record_cluster [SCENARIO...]``: writes tests/recordings/kubernetes/*.json.

Needs what a build in a cluster needs, configured as for ``runner`` (RUNNER_CONFIG, XDG_DATA_HOME,
XDG_STATE_HOME): a kubeconfig whose identity may also make namespaces, RuntimeClasses and
PriorityClasses; a RuntimeClass for gVisor; a builder that ``runner builder push`` has pushed; and
``runner gateway serve``, running on this host. ``kubectl`` is on PATH. Each scenario plays with a
backend that reaches the API through a server of ours, which notes what passes. What is of that
cluster alone is taken out before it is written, see ``tests/record_cluster/redact.py``.
"""

import argparse
import json
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from runner import settings
from runner.files import Home
from runner.settings import Settings
from runner.stores import podimage
from runner.stores.rootfs import RootfsStore
from sandbox.kubernetes.backend import Reach
from sandbox.kubernetes.cluster import Cluster
from sandbox.kubernetes.manifests import Pool
from sandbox.kubernetes.place import of_state
from tests.record_cluster import scenarios
from tests.record_cluster.forward import Forward
from tests.record_cluster.redact import redacted
from tests.record_cluster.scenarios import Stage
from tests.support.cluster import (
    NAMESPACE,
    NODE,
    RECORDINGS,
    REGISTRY,
    STATE,
    kubeconfig,
    shortened,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.record_cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="[all of them]")
    parser.add_argument("--to", type=Path, default=RECORDINGS, metavar="DIR", help="[%(default)s]")
    parsed = parser.parse_args()
    if unknown := set(parsed.scenarios) - set(scenarios.ALL):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    for name in parsed.scenarios or scenarios.ALL:
        path = parsed.to / f"{name}.json"
        document = record(name, settings.load())
        path.write_text(written(document), encoding="utf-8")
        size = path.stat().st_size >> 10
        print(f"{name:<22} {size:>4} KiB  {document['said'][:150]}")  # noqa: T201 - its answer
    return 0


def record(name: str, loaded: Settings) -> dict[str, Any]:
    """Plays a scenario; gives what is written of it."""
    home, ours = Home.find(), loaded.kubernetes
    builder = RootfsStore(home.builders).installed("buildah")
    image = podimage.pushed(builder) if builder else ""
    if not image or ours.gateway is None or ours.kubeconfig is None:
        sys.exit("a builder that was pushed, and gateway and kubeconfig in config.toml")
    with tempfile.TemporaryDirectory(prefix="runner-record-") as temporary:
        directory = Path(temporary)
        with Cluster.connect(Path(ours.kubeconfig), ours.context) as cluster:
            forward = Forward(cluster)
            with forward.listening() as url:
                stage = Stage(
                    name=f"ur-{name}-{secrets.token_hex(3)}",
                    forward=forward,
                    reach=Reach(
                        kubeconfig=kubeconfig(directory, url),
                        context=None,
                        gateway=ours.gateway,
                        state=home.gateway,
                    ),
                    sandboxes=directory / "sandboxes",
                    image=image,
                    kubectl=("kubectl", "--kubeconfig", ours.kubeconfig),
                    pool=Pool(namespace=ours.namespace, pending_seconds=60),
                )
                with stage.clearing:
                    scenarios.ALL[name](stage)
                    recorded = stage.play()
        host = image.partition("/")[0]
        words = {
            host: REGISTRY,
            stage.pool.namespace: NAMESPACE,
            stage.name: f"ur-{name}",
            of_state(stage.sandboxes): STATE,
            _node(forward.noted): NODE,
        }
    document = {"scenario": name, "said": recorded.said, "log": recorded.log}
    found: dict[str, Any] = {**document, "exchanges": sorted(forward.noted, key=_at)}
    anonymous: dict[str, Any] = redacted(found, words)
    return anonymous


def _at(exchange: dict[str, Any]) -> float:
    at: float = exchange["at"]
    return at


def _node(noted: list[dict[str, Any]]) -> str:
    """Name of the node that the sandbox came to."""
    pods = [each["line"]["object"] for one in noted for each in one.get("lines", ())]
    names = (pod.get("spec", {}).get("nodeName", "") for pod in pods)
    return next(filter(None, names), "nobody's node")


def written(document: dict[str, Any]) -> str:
    """A line for each exchange, and for each event of a watch."""
    exchanges = ",\n".join(map(_line, document["exchanges"]))
    head = json.dumps({**document, "exchanges": []}, indent=1)
    return head.replace('"exchanges": []', f'"exchanges": [\n{exchanges}\n]') + "\n"


def _line(exchange: dict[str, Any]) -> str:
    if "lines" not in exchange:
        return json.dumps(exchange)
    lines = ",\n".join(f"  {json.dumps(each)}" for each in shortened(exchange["lines"]))
    return json.dumps({**exchange, "lines": []}).replace('"lines": []', f'"lines": [\n{lines}]')


if __name__ == "__main__":
    sys.exit(main())
