"""Rows 54-57 of the fault matrix: the real command, killed, stopped and started twice, with an encoder that is slow."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.leases import FOLDER, GUARD, living
from pipeline.outcome import read_outcomes

pytestmark = pytest.mark.slow

SLOW_ENCODER = """
import os, time
from extractors.lab_lbp import LabLbp, FACTS
import dataclasses

class Slow(LabLbp):
    def encode(self, tiles):
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
        return super().encode(tiles)

def build(weights=None):
    return Slow(dataclasses.replace(FACTS, name="slow"))
"""
ENCODER = "slow_encoder:build"
SETTINGS = {"encoder": ENCODER, "mpp": 0.5, "levels": 3, "tile_px": 16}
SLIDES = ("a.svs", "b.svs")
PATIENCE = 120  # seconds after which a wait has failed; nothing is said about how long things take


class Run:
    """`slidestream run` on a folder, in a session of its own as in a terminal of its own."""

    def __init__(self, slides: Path, out: Path, code: Path, seconds_a_batch: float) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
        self.command = [shutil.which("slidestream", path=os.path.dirname(sys.executable)), "run", slides]
        self.command += ["-o", out, "--workers=1", *flags]
        self.out = out
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]),
            "SECONDS_A_BATCH": str(seconds_a_batch),
        }
        self.process = subprocess.Popen(
            self.command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.family: list[psutil.Process] = []

    def until(self, condition: Callable[[], bool], what: str) -> None:
        give_up = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()}"
            assert time.monotonic() < give_up, f"no {what}"
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def ends(self) -> tuple[int, str]:
        """Exit code, stdout and stderr; fails if a worker outlives it."""
        out, err = self.process.communicate(timeout=PATIENCE)
        _, alive = psutil.wait_procs(self.family, timeout=PATIENCE)
        assert alive == [], "workers outlive their run"
        return self.process.returncode, out + err

    def clean_up(self) -> None:
        for process in [*self.family, psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            if process.is_running():
                process.kill()
        self.process.communicate()


def children(run: Run) -> list[psutil.Process]:
    return psutil.Process(run.process.pid).children(recursive=True)


def being_started(run: Run) -> bool:
    """A worker process is there; one that ends while it is asked is none."""
    try:
        return any("spawn_main" in " ".join(p.cmdline()) for p in children(run))
    except psutil.Error:
        return False


def chunks(out: Path) -> int:
    return sum(1 for _ in out.glob("slides/*/features/*/x/c/*/0"))


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """The folder of the encoder; it can be imported here as well."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/slow_encoder.py").write_text(SLOW_ENCODER)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return tmp_path / "code"


@pytest.fixture
def whole(kit, folder, code, line) -> dict[str, tuple[bytes, bytes]]:
    """The features of all slides, from a run that nobody disturbed."""
    for name in SLIDES:
        shutil.copyfile(kit.good, folder / name)
    rows = line.folder(folder, **SETTINGS)
    assert {row.status for row in rows.values()} == {"done"}
    assert chunks(line.out) == 4, "several chunks a slide"
    return {name: line.x(name) for name in SLIDES}


@pytest.fixture
def start(folder, code, tmp_path):
    """Starts the command; whatever is left of it ends with the test."""
    runs = []

    def begin(seconds_a_batch: float = 0.0) -> Run:
        runs.append(Run(folder, tmp_path / "real", code, seconds_a_batch))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean_up()


def finish(start, whole, line) -> None:
    """The same command again brings every slide to the bytes of an undisturbed run, and leaves no scraps."""
    run = start()
    code, text = run.ends()
    assert (code, "Traceback" in text) == (0, False), text
    real = type(line)(run.out, line.root)
    assert {name: real.x(name) for name in SLIDES} == whole
    assert list((run.out / "slides").rglob("*.partial")) == []


def test_row_54_killed_five_times(start, whole, line):
    """Each time it gets at least one chunk further, is killed, and its workers go with it."""
    for _ in range(5):
        run = start(0.1)
        before = chunks(run.out)
        run.until(lambda run=run, n=before: chunks(run.out) > min(n, 3), "new chunk, if there is one left")
        run.process.kill()
        code, _ = run.ends()
        assert code == -signal.SIGKILL
    finish(start, whole, line)


def test_row_55_sigterm(start, whole, line):
    run = start(0.2)
    run.until(lambda: chunks(run.out) > 0, "first chunk")
    run.process.terminate()
    code, text = run.ends()
    assert code == 130
    assert "Traceback" not in text
    assert "the same command resumes" in text
    done = chunks(run.out)
    assert 0 < done < 4, "it stopped on the way"
    finish(start, whole, line)


def test_row_56_control_c_once(start, whole, line):
    run = start(0.2)
    run.until(lambda: chunks(run.out) > 0, "first chunk")
    os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to all of them
    code, text = run.ends()
    assert code == 130
    assert "Traceback" not in text
    assert len(text.splitlines()) < 12, "no flood of lines from workers"
    assert chunks(run.out) < 4
    finish(start, whole, line)


def test_row_56_control_c_twice(start, whole, line):
    run = start(30.0)  # a batch that nobody wants to wait for
    run.until(lambda: (run.out / "slides/a.svs.zarr/features").exists(), "beginning of a slide")
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(0.3)  # two signals at the same time are one
    os.killpg(run.process.pid, signal.SIGINT)
    code, text = run.ends()
    assert code == 130
    assert "Traceback" not in text
    assert chunks(run.out) == 0
    finish(start, whole, line)


def test_row_56_control_c_before_the_workers_are_there(start, whole, line):
    run = start()
    run.until(lambda: being_started(run), "worker that is being started")
    os.killpg(run.process.pid, signal.SIGINT)
    code, text = run.ends()
    assert code == 130, text
    assert "Traceback" not in text
    finish(start, whole, line)


def test_row_57_two_runs_in_one_folder(start, whole, line, folder, kit):
    """Both work; each slide is encoded once, in one of them; both tell of all."""
    names = [*SLIDES, *(f"{letter}.svs" for letter in "cdefgh")]
    for name in names[len(SLIDES) :]:
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


def test_row_57_the_other_run_dies_and_its_slides_are_taken_over(start, whole, line):
    first = start(0.3)
    first.until(lambda: chunks(first.out) > 0, "first chunk")
    second = start()
    second.until(lambda: len(living(first.out)) == 2, "second run in the folder")
    first.process.kill()
    assert first.ends()[0] == -signal.SIGKILL
    code, text = second.ends()
    assert (code, "Traceback" in text) == (0, False), text
    assert f"another run is at work here: process {first.process.pid} on {socket.gethostname()}" in text
    real = type(line)(second.out, line.root)
    assert {name: real.x(name) for name in SLIDES} == whole
