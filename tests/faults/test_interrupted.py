"""Rows 54-57 of the fault matrix: the real command, killed, stopped and started twice, with an encoder that is slow."""

import json
import os
import re
import shutil
import signal
import socket
import time

import psutil
import pytest

from pipeline.leases import FOLDER, GUARD, living
from pipeline.outcome import read_outcomes

pytestmark = pytest.mark.slow


def being_started(run) -> bool:
    """A worker process is there; one that ends while it is asked is none."""
    try:
        return any("spawn_main" in " ".join(p.cmdline()) for p in run.children())
    except psutil.Error:
        return False


@pytest.mark.fault(54, "SIGKILL, five times", "the same command resumes, same bytes")
def test_row_54_killed_five_times(start, whole, finish):
    """Each time it gets at least one chunk further, is killed, and its workers go with it."""
    for _ in range(5):
        run = start(0.1)
        before = run.chunks()
        run.until(lambda run=run, n=before: run.chunks() > min(n, 3), "new chunk, if there is one left")
        run.process.kill()
        code, _ = run.ends()
        assert code == -signal.SIGKILL
    finish()


@pytest.mark.fault(55, "SIGTERM", "130, the same command resumes")
def test_row_55_sigterm(start, whole, finish):
    run = start(0.2)
    run.until(lambda: run.chunks() > 0, "first chunk")
    run.process.terminate()
    code, text = run.ends()
    assert code == 130
    assert "Traceback" not in text
    assert "the same command resumes" in text
    done = run.chunks()
    assert 0 < done < 4, "it stopped on the way"
    finish()


@pytest.mark.fault(56, "Ctrl-C once, twice, before there are workers", "130, the same command resumes")
def test_row_56_control_c_once(start, whole, finish):
    run = start(0.2)
    run.until(lambda: run.chunks() > 0, "first chunk")
    os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to all of them
    code, text = run.ends()
    assert code == 130
    assert "Traceback" not in text
    assert len(text.splitlines()) < 12, "no flood of lines from workers"
    assert run.chunks() < 4
    finish()


@pytest.mark.fault(56)
def test_row_56_control_c_twice(start, whole, finish):
    run = start(30.0)  # a batch that nobody wants to wait for
    run.until(lambda: (run.out / "slides/a.svs.zarr/features").exists(), "beginning of a slide")
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(0.3)  # two signals at the same time are one
    os.killpg(run.process.pid, signal.SIGINT)
    code, text = run.ends()
    assert code == 130
    assert "Traceback" not in text
    assert run.chunks() == 0
    finish()


@pytest.mark.fault(56)
def test_row_56_control_c_before_the_workers_are_there(start, whole, finish):
    run = start()
    run.until(lambda: being_started(run), "worker that is being started")
    os.killpg(run.process.pid, signal.SIGINT)
    code, text = run.ends()
    assert code == 130, text
    assert "Traceback" not in text
    finish()


@pytest.mark.fault(57, "two runs in one output folder", "D: both work, each slide once; `--redo` P")
def test_row_57_two_runs_in_one_folder(start, whole, line, folder, kit):
    """Both work; each slide is encoded once, in one of them; both tell of all."""
    names = [*whole, *(f"{letter}.svs" for letter in "cdefgh")]
    for name in names[len(whole) :]:
        shutil.copyfile(kit.good, folder / name)
    (folder / "broken.svs").write_text("no slide\n" * 100)
    runs = [start(0.1), start(0.1)]
    ends = [run.ends() for run in runs]
    for code, text in ends:
        assert (code, "Traceback" in text) == (3, False), text
        assert "8 done, 1 failed" in text
        assert "\nfailed  broken.svs\n" in text
    real = type(line)(runs[0].out, line.root)
    assert {real.x(name) for name in names} == set(whole.values()), "the slides are copies of one"
    encoded = [int(tiles) for _, text in ends for tiles in re.findall(r"; (\d+) tiles encoded", text)]
    rows = read_outcomes(runs[0].out / "slides.csv")
    assert sum(encoded) == sum(row.tiles or 0 for row in rows)
    assert len(encoded) == 2, "both had a part in it"
    assert {row.slide: row.status for row in rows} == dict.fromkeys(names, "done") | {"broken.svs": "failed"}
    assert len(json.loads((runs[0].out / "run.json").read_bytes())["commands"]) == 2
    assert [p for p in (runs[0].out / FOLDER).rglob("*") if p.is_file() and p.name != GUARD] == []


@pytest.mark.fault(57)
def test_row_57_the_other_run_dies_and_its_slides_are_taken_over(start, whole, line):
    first = start(0.3)
    first.until(lambda: first.chunks() > 0, "first chunk")
    second = start()
    second.until(lambda: len(living(first.out)) == 2, "second run in the folder")
    first.process.kill()
    assert first.ends()[0] == -signal.SIGKILL
    code, text = second.ends()
    assert (code, "Traceback" in text) == (0, False), text
    assert f"another run is at work here: process {first.process.pid} on {socket.gethostname()}" in text
    real = type(line)(second.out, line.root)
    assert {name: real.x(name) for name in whole} == whole
