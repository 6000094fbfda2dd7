import json
from typing import get_args

from runner import events
from runner.events import Broadcast, Event, Output, Stage, as_json, as_line


def test_every_kind_of_event_is_looked_at(every_event: list[Event]) -> None:
    assert {type(event) for event in every_event} == set(get_args(Event))


def test_every_event_is_one_line_of_printable_ascii(every_event: list[Event]) -> None:
    for event in every_event:
        line = as_line(event)
        assert line.endswith(b"\n")
        assert all(0x20 <= byte < 0x7F for byte in line[:-1])
        document = json.loads(line)
        assert document == json.loads(json.dumps(as_json(event)))
        assert document["event"] == type(event).__name__.lower()


def test_output_is_text_with_escapes_for_what_is_none() -> None:
    assert as_json(Output(b"a\xff\n")) == {"event": "output", "text": "a\\xff\n"}
    assert "hidden" not in repr(Output(b"hidden"))


def test_names_are_written_as_text() -> None:
    assert as_json(events.StageEnded(Stage.BUILD, 1.5)) == {
        "event": "stageended",
        "stage": "build",
        "seconds": 1.5,
    }


def test_every_listener_gets_every_event_in_order(every_event: list[Event]) -> None:
    one: list[Event] = []
    other: list[Event] = []
    broadcast = Broadcast(one.append, other.append)
    for event in every_event:
        broadcast(event)
    assert one == other == every_event
