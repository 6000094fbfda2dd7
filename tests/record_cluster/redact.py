"""What of a cluster nobody else needs to know is taken out of what was recorded of it."""

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

_ADDRESS = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_STAYS = {"127.0.0.1", "0.0.0.0", "169.254.169.254"}
_DOCUMENTATION = [f"192.0.2.{number}" for number in range(1, 255)]
"""RFC 5737."""
_DROPPED = {"managedFields", "hostIP", "hostIPs", "podIPs", "selfLink"}
_DROPPED_OF_CONTAINER = {"allocatedResources", "resources", "volumeMounts", "user"}
"""Of its status: these say what was asked for once more."""
_OF_NODE = {
    "kernelVersion": "6.1.0-1-amd64",
    "bootID": "00000000-0000-4000-8000-000000000001",
}


def redacted(document: Any, words: Mapping[str, str]) -> Any:
    """The same document for everybody.

    Args:
        document: As JSON has it.
        words: What is told under another name.
    """
    return _Redaction(words).of(document)


class _Redaction:
    def __init__(self, words: Mapping[str, str]) -> None:
        self._words = words
        self._addresses: dict[str, str] = {}

    def of(self, document: Any) -> Any:
        if isinstance(document, dict):
            return self._object(document)
        if isinstance(document, list):
            return [self.of(each) for each in document]
        return self._text(document) if isinstance(document, str) else document

    def _object(self, document: dict[str, Any]) -> Any:
        if document.get("kind") == "Secret":
            document = {**document, "data": dict.fromkeys(document.get("data", {}), "")}
        if document.get("kind") == "Node":
            document = _node(document)
        dropped = _DROPPED | (_DROPPED_OF_CONTAINER if "containerID" in document else set())
        return {
            self._text(name): self.of(value)
            for name, value in document.items()
            if name not in dropped
        }

    def _text(self, text: str) -> str:
        for word, other in self._words.items():
            text = text.replace(word, other)
        return _ADDRESS.sub(lambda found: self._address(found[0]), text)

    def _address(self, address: str) -> str:
        try:
            ipaddress.IPv4Address(address)
        except ValueError:
            return address
        if address in _STAYS:
            return address
        return self._addresses.setdefault(address, _DOCUMENTATION[len(self._addresses)])


def _node(document: dict[str, Any]) -> dict[str, Any]:
    info = document["status"]["nodeInfo"]
    kept = {"containerRuntimeVersion", "kubeletVersion", "operatingSystem", "architecture"}
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": document["metadata"]["name"]},
        "status": {
            "nodeInfo": {**{name: info[name] for name in sorted(kept)}, **_OF_NODE},
        },
    }
