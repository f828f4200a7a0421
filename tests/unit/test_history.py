"""Events survive what happens to files."""

from pathlib import Path

from framework.history import Event, History


def test_a_line_that_was_cut_off_takes_none_with_it(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add(Event("submitted", 1.0, job="7"))
    with history.path.open("a") as file:
        file.write('{"event": "requeued", "ti')
    history.add(Event("cancelled", 2.0, job="7"))
    history.add(Event("started", 3.0, job="7", nodes=("a", "b")))
    assert [(event.event, event.nodes) for event in history.events()] == [
        ("submitted", None),
        ("cancelled", None),
        ("started", ("a", "b")),
    ]


def test_no_history(tmp_path: Path) -> None:
    assert History(tmp_path / "nowhere").events() == []
