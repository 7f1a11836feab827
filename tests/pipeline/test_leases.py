"""Several runs in one folder: who holds a slide, who is dead, what the others are told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline import leases as module
from pipeline.errors import RunStopped, UsageError
from pipeline.leases import FOLDER, Course, Holder, alone, held, joined, living, require_current
from pipeline.outcome import Outcome

DONE = Outcome("a.svs", "done", tiles=7, seconds=1.5)

HOLD = """
import pathlib, sys, time
from pipeline.leases import joined
with joined(pathlib.Path(sys.argv[1]), "work") as leases:
    leases.take("a.svs")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A run in another process, which holds a.svs."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=-1, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def elsewhere(out, silent=0.0, run="f" * 32, slide="a.svs", row=None, work="work"):
    """What a run of another machine left: its file and a lease, written `silent` seconds ago."""
    with joined(out, work) as ours:
        template = ours.holder
        ours.take(slide)
        lease = ours._lease(slide)
        there = lease.with_name(f"{lease.name.split('.')[0]}.{run}")
        lease.rename(there)
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_text(json.dumps({"slide": slide, "run": run, "work": work, "row": row}))
    about = template.__dict__ | {"run": run, "host": "far", "kernel": "another", "course": Course().__dict__}
    path = out / FOLDER / run
    path.write_text(json.dumps(about).ljust(module.ROOM))
    when = time.time() - silent
    os.utime(path, (when, when))
    return path


def test_a_slide_is_held_by_one_run(tmp_path, other):
    with joined(tmp_path, "work") as ours:
        found = ours.take("a.svs")
        assert isinstance(found, Holder)
        assert found.pid == other.pid
        assert f"process {other.pid} on " in found.words()
        assert ours.take("b.svs") is None
        assert ours.take("b.svs") is None, "what is held is held"
        assert {slide: holder.pid for slide, holder in held(tmp_path).items()} == {
            "a.svs": other.pid,
            "b.svs": os.getpid(),
        }


def test_a_dead_run_on_this_machine_is_followed_at_once(tmp_path, other):
    with joined(tmp_path, "work") as ours:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert [holder.pid for holder in living(tmp_path)] == [os.getpid()]
        assert ours.take("a.svs") is None
        assert not (tmp_path / FOLDER / "slides").joinpath("x").exists()
    assert left(tmp_path) == []


def test_a_run_that_stands_still_is_followed_although_its_process_is_there(tmp_path, other, monkeypatch):
    monkeypatch.setattr(module, "EXPIRY", 0.5)
    other.send_signal(signal.SIGSTOP)
    with joined(tmp_path, "work") as ours:
        assert until(lambda: ours.take("a.svs") is None)
    other.send_signal(signal.SIGCONT)


def test_a_run_of_another_machine_lives_as_long_as_it_is_heard(tmp_path):
    path = elsewhere(tmp_path, silent=module.EXPIRY - 20)
    with joined(tmp_path, "work") as ours:
        assert ours.take("a.svs").host == "far"
        os.utime(path, (time.time() - module.EXPIRY - 20,) * 2)
        assert ours.take("a.svs") is None
        assert not path.exists(), "it is buried, so that it notices"


def test_a_settled_slide_is_told_to_those_that_were_there(tmp_path):
    with joined(tmp_path, "work") as first, joined(tmp_path, "work") as second:
        assert first.take("a.svs") is None
        first.settle("a.svs", DONE)
        assert second.take("a.svs") == DONE
        assert held(tmp_path) == {}


def test_a_settled_slide_is_told_although_the_other_has_left(tmp_path):
    with joined(tmp_path, "work") as second:
        with joined(tmp_path, "work") as first:
            first.take("a.svs")
            first.settle("a.svs", DONE)
        assert second.take("a.svs") == DONE


def test_what_was_settled_before_a_run_began_is_no_news(tmp_path):
    """A slide that failed is tried again by the next command, also while an older run is still at work."""
    with joined(tmp_path, "work") as first:
        first.take("a.svs")
        first.settle("a.svs", Outcome("a.svs", "failed"))
        time.sleep(0.02)
        with joined(tmp_path, "work") as second:
            assert second.take("a.svs") is None


def test_a_slide_that_another_work_settled_is_not_settled_for_this_one(tmp_path):
    with joined(tmp_path, "one encoder") as first, joined(tmp_path, "another encoder") as second:
        first.take("a.svs")
        assert isinstance(second.take("a.svs"), Holder), "but two may not write to one group"
        first.settle("a.svs", DONE)
        assert second.take("a.svs") is None


def test_two_that_want_it_at_the_same_moment_never_both_have_it(tmp_path):
    """Both may stand back; in the end one of them has it."""
    slides, got = [f"{i}.svs" for i in range(150)], {}
    with joined(tmp_path, "work") as first, joined(tmp_path, "work") as second:
        start = threading.Barrier(2)

        def want(name, run):
            start.wait()
            got[name] = {slide for slide in slides if run.take(slide) is None}

        threads = [threading.Thread(target=want, args=pair) for pair in (("one", first), ("two", second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got["one"] & got["two"] == set()
        for slide in set(slides) - got["one"] - got["two"]:
            assert first.take(slide) is None
        assert len(held(tmp_path)) == len(slides)


def test_a_run_that_was_buried_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    with joined(tmp_path, "work") as ours:
        require_current(tmp_path, ours.holder.run)
        (tmp_path / FOLDER / ours.holder.run).unlink()
        with pytest.raises(RunStopped, match="is over"):
            require_current(tmp_path, ours.holder.run)
        assert until(lambda: bool(ours._fault))
        with pytest.raises(RunStopped, match="another run has taken its place"):
            ours.take("a.svs")


def test_a_worker_whose_run_is_silent_stops(tmp_path):
    with joined(tmp_path, "work") as ours:
        when = time.time() - module.ABANDONED - 10
        os.utime(tmp_path / FOLDER / ours.holder.run, (when, when))
        with pytest.raises(RunStopped, match="silent for 6"):
            require_current(tmp_path, ours.holder.run)


def test_the_heart_beats_and_tells_how_far_the_run_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    with joined(tmp_path, "work") as ours:
        path = tmp_path / FOLDER / ours.holder.run
        os.utime(path, (0, 0))
        ours.progress(Course(settled=3, left=9, settled_bytes=30, left_bytes=60, seconds=10))
        assert until(lambda: path.stat().st_mtime > 1e9)
        [holder] = living(tmp_path)
        assert holder.course == Course(3, 9, 30, 60, 10)
        assert holder.course.bytes_per_s == 3


def test_nothing_is_left_when_the_last_has_gone(tmp_path):
    elsewhere(tmp_path, silent=module.EXPIRY + 100)
    with joined(tmp_path, "work") as first:
        with joined(tmp_path, "work") as second:
            second.take("b.svs")
        first.take("c.svs")
        first.settle("c.svs", DONE)
    assert left(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\xff"])
def test_a_file_without_sense_is_somebody_until_it_is_old(tmp_path, content):
    path = elsewhere(tmp_path)
    path.write_text(content)
    with joined(tmp_path, "work") as ours:
        assert isinstance(ours.take("a.svs"), Holder)
        os.utime(path, (time.time() - module.EXPIRY - 1,) * 2)
        assert ours.take("a.svs") is None


def test_without_locks_the_age_tells(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    with joined(tmp_path, "work") as first, joined(tmp_path, "work") as second, alone(tmp_path):
        first.take("a.svs")
        assert isinstance(second.take("a.svs"), Holder)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.rename", closed)
    with pytest.raises(UsageError, match="cannot be written to: Permission denied"), joined(tmp_path, "work"):
        pass


def test_alone_is_one_at_a_time(tmp_path):
    inside, most = 0, 0

    def visit():
        nonlocal inside, most
        for _ in range(20):
            with alone(tmp_path):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def left(out):
    """What stands in the folder of runs, but for the lock."""
    return [p for p in (out / FOLDER).rglob("*") if p.is_file() and p.name != "guard.lock"]


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
