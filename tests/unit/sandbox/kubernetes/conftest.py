import pytest
from tenacity import wait_fixed

from sandbox.kubernetes import cluster, conversation, follower, machine, place


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that waits, waits for less."""
    monkeypatch.setattr(cluster, "wait_random_exponential", lambda **_: wait_fixed(0.01))
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(cluster, "READ_SECONDS", 2.0)
    monkeypatch.setattr(conversation, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(conversation, "_LATE_SECONDS", 0.2)
    monkeypatch.setattr(conversation, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(follower, "_AGAIN_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(machine, "_BEGIN_SECONDS", 0.05)
    monkeypatch.setattr(machine, "_END_SECONDS", 0.3)
    monkeypatch.setattr(machine, "_EVENTS_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(machine, "_EVENTS_EACH_SECONDS", 0.1)
    monkeypatch.setattr(machine, "_SHOW_SECONDS", 1.0)
    monkeypatch.setattr(machine, "_UNHEARD_SECONDS", 0.8)
    monkeypatch.setattr(machine.KubernetesMachine, "poll_seconds", 0.02)
    monkeypatch.setattr(place, "_GONE_SECONDS", 2.0)
    monkeypatch.setattr(place, "_LOOK_SECONDS", (0.01, 0.05))
