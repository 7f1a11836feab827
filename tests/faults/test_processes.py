"""Rows 72-76 of the fault matrix: processes that are killed, crash, leak, hang or are gone."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.outcome import Outcome, read_outcomes

pytestmark = pytest.mark.slow

# A tiler is called while a slide is prepared, in a worker; what it does depends on the slide's name.
BAD_TILER = """
import ctypes, time
from pipeline.quadtree import build_quadtree

def tiler(slide, mask, config):
    if slide.path.name.startswith("segfault"):
        ctypes.string_at(0)
    if slide.path.name.startswith("leak"):
        held = []
        while True:
            held.append(b"x" * (16 << 20))
            time.sleep(0.01)
    if slide.path.name.startswith("hang"):
        time.sleep(1000)
    if slide.path.name.startswith("stuck"):  # in C, and no other thread may run: the interpreter's lock is kept
        ctypes.PyDLL(None).sleep(1000)
    settings = config.model_dump(exclude={"tiler", "tile_px"})
    return build_quadtree(slide, mask, tile_px=config.tile_px, **settings)
"""
# The first tile that it sees of a slide that is all one colour does it.
BAD_ENCODER = """
import ctypes, dataclasses, os, time
import numpy as np
from extractors.lab_lbp import LabLbp, FACTS

class Bad(LabLbp):
    def encode(self, tiles):
        red = np.asarray(tiles)[..., 0].reshape(len(tiles), -1).min(1)
        if (red == 200).any():
            if os.environ["DOES"] == "segfault":
                ctypes.string_at(0)
            time.sleep(1000)
        return super().encode(tiles)

def build(weights=None):
    return Bad(dataclasses.replace(FACTS, name="bad"))
"""


@pytest.fixture
def bad(kit, folder, code, neighbour, start) -> Callable[..., tuple[dict[str, Outcome], str]]:
    """One run over slides of these names and good neighbours, which must not notice; its rows and what it said."""
    (code / "bad_tiler.py").write_text(BAD_TILER)

    def run(*names: str, limits: dict[int, int] | None = None, **environment: str) -> tuple[dict[str, Outcome], str]:
        for name in (*names, "neighbour.svs", "another.svs"):
            shutil.copyfile(neighbour[0], folder / name)
        flags = ("--encoder=lab_lbp", "--tile-px=64", "--tiler=bad_tiler:tiler")
        run = start(0.0, *flags, limits=limits, **environment)
        run.until(run.workers, "worker")
        code, text = run.ends()
        rows = {row.slide: row for row in read_outcomes(run.out / "slides.csv")}
        assert code == 3, text
        assert "Traceback" not in text
        assert rows["neighbour.svs"].status == rows["another.svs"].status == "done"
        for name in names:
            assert rows[name].status == "failed"
        return rows, text

    return run


@pytest.mark.fault(72, "worker killed once", "D, same bytes")
def test_row_72_worker_killed_once(start, whole, line, finish):
    run = start(0.02)
    run.until(lambda: run.chunks() > 0, "first chunk")
    (worker,) = run.workers()
    worker.kill()
    code, text = run.ends()
    assert (code, "Traceback" in text) == (0, False), text
    real = type(line)(run.out, line.root)
    assert {name: real.x(name) for name in whole} == whole


@pytest.mark.fault(73, "slide that crashes the process, or hangs", "F after a try alone; the others are done")
def test_row_73_slides_that_crash_the_process_while_they_are_prepared(bad):
    rows, _ = bad("segfault1.svs", "segfault2.svs")
    for name in ("segfault1.svs", "segfault2.svs"):
        assert (rows[name].stage, rows[name].error) == ("prepare", "UnreadableSlide")
        assert "died twice" in rows[name].message


@pytest.fixture
def red(kit, folder, code) -> Path:
    """A slide whose pixels an encoder knows again, beside a good one."""
    (code / "bad_encoder.py").write_text(BAD_ENCODER)
    pixels = kit.tissue(512).copy()
    pixels[64:448, 64:448] = (200, 60, 120)
    kit.write_slide(folder / "red.svs", pixels, 0.5, tile_px=64)
    return folder / "red.svs"


@pytest.mark.fault(73)
@pytest.mark.parametrize(("does", "words"), [("segfault", "died twice"), ("hang", "longer than 10 s, twice")])
def test_row_73_slide_that_ends_or_holds_the_encoder(does, words, red, neighbour, folder, start, line):
    shutil.copyfile(neighbour[0], folder / "neighbour.svs")
    run = start(0.0, "--encoder=bad_encoder:build", "--tile-px=64", DOES=does, SLIDESTREAM_PATIENCE="10")
    run.until(run.workers, "worker")
    code, text = run.ends()
    assert code == 3, text
    rows = {row.slide: row for row in read_outcomes(run.out / "slides.csv")}
    assert (rows["red.svs"].status, rows["red.svs"].stage) == ("failed", "encode")
    assert words in rows["red.svs"].message
    assert rows["neighbour.svs"].status == "done"
    assert type(line)(run.out, line.root).x("neighbour.svs") == neighbour[1]


@pytest.mark.fault(74, "slide that takes all memory", "F, memory")
def test_row_74_slide_that_leaks_memory(bad):
    """Its worker ends at its share of the memory, not the machine at all of it."""
    rows, _ = bad("leak.svs", limits={resource.RLIMIT_RSS: 2 << 30})
    assert rows["leak.svs"].stage == "prepare"
    assert "more memory than a worker has" in rows["leak.svs"].message


@pytest.mark.fault(73)
@pytest.mark.parametrize("name", ["hang.svs", "stuck.svs"])
def test_row_73_slide_that_hangs(name, bad):
    rows, _ = bad(name, SLIDESTREAM_PATIENCE="10")
    assert rows[name].stage == "prepare"
    assert "it took longer than 10 s, twice" in rows[name].message


# --- a cluster of somebody else ---------------------------------------------------------------------------------------


class Cluster:
    """A Dask scheduler and workers without nannies, as processes of their own."""

    def __init__(self, place: Path, code: Path) -> None:
        self.place, self.processes = place, []
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])}
        self.environment["SECONDS_A_BATCH"] = "0.05"
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", place / "scheduler.json")
        give_up = time.monotonic() + 60
        while not (place / "scheduler.json").exists():
            assert time.monotonic() < give_up, "no scheduler"
            time.sleep(0.1)
        self.address = json.loads((place / "scheduler.json").read_text())["address"]

    def _start(self, what: str, *arguments: object) -> subprocess.Popen:
        common = ["--host", "127.0.0.1", "--no-dashboard"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-m", "dask", what, *common, *map(str, arguments)]
        self.processes.append(subprocess.Popen(command, env=self.environment, start_new_session=True, **quiet))
        return self.processes[-1]

    def worker(self, name: str) -> subprocess.Popen:
        place = ("--local-directory", self.place / name, "--name", name)
        return self._start("worker", self.address, "--nthreads", "1", "--no-nanny", *place)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def cluster(tmp_path, code):
    (tmp_path / "cluster").mkdir()
    made = Cluster(tmp_path / "cluster", code)
    yield made
    made.close()


@pytest.mark.fault(72)
def test_row_72_worker_of_a_named_scheduler_is_killed(cluster, start, whole, line):
    """Nobody starts it again: what it had goes to the other one."""
    first, _ = cluster.worker("0"), cluster.worker("1")
    run = start(0.0, f"--scheduler={cluster.address}")
    run.until(lambda: run.chunks() > 0, "first chunk")
    first.kill()
    code, text = run.ends()
    assert (code, "Traceback" in text) == (0, False), text
    real = type(line)(run.out, line.root)
    assert {name: real.x(name) for name in whole} == whole


def test_a_worker_that_joins_later_encodes_too(cluster, start, whole, line, folder, kit, tmp_path):
    for letter in "cdefgh":
        shutil.copyfile(kit.good, folder / f"{letter}.svs")
    cluster.environment["ENCODER_LOG"] = str(tmp_path / "encoders")
    cluster.worker("0")
    run = start(0.0, f"--scheduler={cluster.address}")
    run.until(lambda: run.chunks() > 0, "first chunk")
    late = cluster.worker("1")
    code, text = run.ends()
    assert (code, "Traceback" in text) == (0, False), text
    assert str(late.pid) in (tmp_path / "encoders").read_text().split()
    real = type(line)(run.out, line.root)
    assert {real.x(name) for name in (*whole, "h.svs")} == set(whole.values())


@pytest.mark.fault(75, "all workers gone", "X in less than five minutes")
def test_row_75_all_workers_are_gone(cluster, start, whole, finish):
    worker = cluster.worker("0")
    run = start(0.0, f"--scheduler={cluster.address}", SLIDESTREAM_PATIENCE="10")
    run.until(lambda: run.chunks() > 0, "first chunk")
    worker.kill()
    code, text = run.ends()
    assert code == 4, text
    assert "stopped: there has been no worker for" in text
    assert "Traceback" not in text
    finish()


@pytest.mark.fault(76, "scheduler killed", "X, in one line")
def test_row_76_scheduler_is_killed(cluster, start, whole, finish):
    cluster.worker("0")
    run = start(0.0, f"--scheduler={cluster.address}")
    run.until(lambda: run.chunks() > 0, "first chunk")
    cluster.scheduler.kill()
    code, text = run.ends()
    assert code == 4, text
    (line,) = [line for line in text.splitlines() if "stopped" in line]
    assert line.startswith("stopped: the connection to the scheduler was lost. What is complete stays")
    assert "Traceback" not in text
    assert len(text.splitlines()) < 12, "no flood of lines"
    finish()
