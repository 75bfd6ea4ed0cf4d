"""Files held for MLflow: gone once it has them, and never while an event may still need them, over any restart."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from tracelet.exporters.artifact_names import event_mark, gateway_uri, held_at
from tracelet.exporters.mlflow.artifacts import ArtifactStore
from tracelet.exporters.mlflow.fetch import Sources
from tracelet.gateway.held import UNCLAIMED_S, HeldFiles
from tracelet.records import ArtifactLogged

DATA = b"weights"
SHA = hashlib.sha256(DATA).hexdigest()


def event(path: str, at: int = 1) -> ArtifactLogged:
    return ArtifactLogged(at, path, "/train/" + path, None, len(DATA), SHA, "", uri=gateway_uri(SHA))


def mark(logged: ArtifactLogged) -> str:
    return event_mark(logged.time_unix_nano, logged.path)


def put(held: HeldFiles, logged: ArtifactLogged | None, token: str = "", data: bytes = DATA) -> bool:
    """As the door does it; whether bytes had to be sent."""
    place = held.place("r1", hashlib.sha256(data).hexdigest(), token, "" if logged is None else mark(logged))
    if held.promised(place):
        return False
    handle = held.open(place)
    held.write(handle, bytearray(data))
    assert held.finish(handle, place) is None
    held.close(handle, place)
    return True


def deliver(folder: Path, logged: ArtifactLogged, where: str = "http://mlflow:5000") -> list[str]:
    """As the exporter does it, into MLflow's folder beside; what stands there afterwards."""
    store = ArtifactStore(None, {}, Sources({"artifact_dir": str(folder), "tracking_uri": where}))
    target = folder.parent / "mlflow"
    why, refusal = store.put_received(str(target), "r1", logged, mark(logged))
    assert refusal is None
    assert (why is None) == (not (target / f"{logged.path}.reference.json").exists())
    return sorted(path.name for path in target.rglob("*"))


def test_a_file_that_mlflow_has_goes_and_leaves_room(tmp_path: Path) -> None:
    held = HeldFiles(tmp_path / "held")
    put(held, event("best.pt"))
    assert held.clear() == 0  # nothing has come for it yet
    assert deliver(tmp_path / "held", event("best.pt")) == ["best.pt"]
    assert held.size() == len(DATA)
    assert held.clear() == 1
    assert held.size() == 0
    assert not (tmp_path / "held" / held_at("r1", SHA)).exists()
    assert HeldFiles(tmp_path / "held").size() == 0


def test_one_file_of_two_events_stays_for_the_second_and_each_gets_it(tmp_path: Path) -> None:
    held = HeldFiles(tmp_path / "held")
    first, second, later = event("a.pt"), event("b.pt"), event("a.pt", at=2)
    assert put(held, first)
    assert not put(held, second)
    deliver(tmp_path / "held", first)
    assert held.clear() == 0
    assert deliver(tmp_path / "held", second) == ["a.pt", "b.pt"]
    assert held.clear() == 1
    assert put(held, later)  # its bytes come once more
    assert deliver(tmp_path / "held", later) == ["a.pt", "b.pt"]
    assert held.clear() == 1


def test_an_upload_that_is_repeated_since_its_answer_was_lost_sends_nothing(tmp_path: Path) -> None:
    held = HeldFiles(tmp_path / "held")
    put(held, event("best.pt"))
    deliver(tmp_path / "held", event("best.pt"))
    held.clear()
    assert not put(HeldFiles(tmp_path / "held"), event("best.pt"))


def test_an_event_that_is_repeated_after_a_crash_leaves_no_reference(tmp_path: Path) -> None:
    held = HeldFiles(tmp_path / "held")
    put(held, event("best.pt"))
    deliver(tmp_path / "held", event("best.pt"))
    held.clear()
    assert deliver(tmp_path / "held", event("best.pt")) == ["best.pt"]


def test_another_mlflow_that_never_had_it_gets_a_reference(tmp_path: Path) -> None:
    held = HeldFiles(tmp_path / "held")
    put(held, event("best.pt"))
    deliver(tmp_path / "held", event("best.pt"))
    held.clear()
    assert deliver(tmp_path / "held", event("best.pt"), "http://other:5000") == ["best.pt", "best.pt.reference.json"]


def test_a_death_between_mark_and_unmark_keeps_the_file(tmp_path: Path) -> None:
    held = HeldFiles(tmp_path / "held")
    put(held, event("best.pt"))
    wanted = tmp_path / "held" / "r1" / f"{SHA}.for-{mark(event('best.pt'))}"
    deliver(tmp_path / "held", event("best.pt"))
    wanted.touch()  # as if it had never been taken away
    assert held.clear() == 0
    deliver(tmp_path / "held", event("best.pt"))
    assert held.clear() == 1


def test_a_file_put_without_the_name_of_its_event_stays_until_it_is_old(tmp_path: Path) -> None:
    ahead = 0.0
    held = HeldFiles(tmp_path / "held", clock=lambda: time.time() + ahead)
    put(held, None)
    deliver(tmp_path / "held", event("best.pt"))
    assert held.clear() == 0
    assert held.sweep() == 0
    ahead = UNCLAIMED_S + 60
    assert held.sweep() == 1
    assert held.size() == 0
    assert not list((tmp_path / "held").iterdir())


def test_a_file_that_no_event_came_for_stays_while_something_of_its_run_waits(tmp_path: Path) -> None:
    over: dict[str, bool] = {"r1": False}
    later = lambda: time.time() + UNCLAIMED_S + 60  # noqa: E731
    held = HeldFiles(tmp_path / "held", clock=later, is_over=over.__getitem__)
    put(held, event("best.pt"))
    assert held.sweep() == 0
    over["r1"] = True
    assert held.sweep() == 1


def test_two_tokens_that_finish_the_same_file_are_counted_once(tmp_path: Path) -> None:
    held = HeldFiles(tmp_path / "held")
    mine, theirs = (held.place("r1", SHA, token, "") for token in ("a", "b"))
    handles = [(held.open(place), place) for place in (mine, theirs)]
    for handle, _ in handles:
        held.write(handle, bytearray(DATA))
    for handle, place in handles:
        assert held.finish(handle, place) is None
        held.close(handle, place)
    assert held.size() == len(DATA)
