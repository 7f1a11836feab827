"""Rows 54-57 of the fault matrix: the real command, killed, stopped and started twice, with an encoder that is slow."""

import json
import os
import signal
import socket
import time

import psutil
import pytest

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
        if before == 4:
            run.until(lambda run=run: (run.out / ".lock").exists(), "lock")
        else:
            run.until(lambda run=run, n=before: run.chunks() > n, "new chunk")
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


@pytest.mark.fault(57, "two runs in one output folder", "P for the second, which names the first")
def test_row_57_second_run_while_the_first_is_at_work(start, whole, line):
    first = start(0.2)
    first.until(lambda: first.chunks() > 0, "first chunk")
    code, text = start().ends()
    assert code == 1
    assert f"process {first.process.pid} on {socket.gethostname()}" in text
    assert "Traceback" not in text
    assert first.process.poll() is None
    code, text = first.ends()
    assert code == 0, text
    real = type(line)(first.out, line.root)
    assert {name: real.x(name) for name in whole} == whole
    assert len(json.loads((first.out / "run.json").read_bytes())["commands"]) == 1
