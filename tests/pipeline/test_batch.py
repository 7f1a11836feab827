"""Whole runs: a local cluster, one that is there already, a finished folder, a run that is killed again and again."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from skimage.data import immunohistochemistry

from pipeline import BagStore, batch, open_slide
from pipeline.batch import run
from pipeline.demo import write_slide
from pipeline.leases import joined
from pipeline.outcome import Outcome
from pipeline.stages import SlideFile
from pipeline.store import CHUNK_ROWS
from pipeline.stream import stream_tiles

COMMAND = Path(sys.executable).with_name("slidestream")

COUNTING = '''
"""An encoder that writes down every tile it is given."""
import hashlib, os, time
import numpy as np, torch
from extractors import Encoder, EncoderFacts

FACTS = EncoderFacts(
    name="counting_tiles:build", dim=6, tile_px=32, any_tile_px=True, source="", licence="", citation=""
)

class Counting(Encoder):
    def _features(self, tiles):
        tiles = np.asarray(tiles)
        with open(os.path.join(os.environ["COUNTING_LOG"], str(os.getpid())), "a") as log:
            log.write("".join(hashlib.sha1(tile.tobytes()).hexdigest() + "\\n" for tile in tiles if tile.any()))
        time.sleep(float(os.environ.get("COUNTING_SLEEP", "0")))
        flat = tiles.reshape(len(tiles), -1, 3).astype(np.float32)
        return torch.from_numpy(np.concatenate([flat.mean(1), flat.std(1)], axis=1))

def build(weights):
    return Counting(FACTS, weights)
'''


def make_folder(folder: Path, count: int, side: int) -> None:
    """Slides full of real tissue with noise, so that no two tiles are alike."""
    base = immunohistochemistry()
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = np.tile(base, (-(-side // 512), -(-side // 512), 1))[:side, :side].astype(np.int16)
        pixels = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        pixels[:, : side // 5] = 244
        write_slide(folder / f"s{i}.svs", pixels, 0.5, downsamples=(4,))


def arrays(out: Path) -> dict[str, bytes]:
    """Every chunk of every array in a store, without the metadata (which may hold times)."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted((out / "slides").rglob("*"))
        if p.is_file() and p.name != "zarr.json"
    }


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """The counting encoder, importable here and in worker processes; returns the folder of its logs."""
    module, logs = tmp_path / "modules", tmp_path / "log"
    module.mkdir()
    logs.mkdir()
    (module / "counting_tiles.py").write_text(COUNTING)
    monkeypatch.setenv("PYTHONPATH", str(module))
    monkeypatch.setenv("COUNTING_LOG", str(logs))
    monkeypatch.syspath_prepend(str(module))
    yield logs
    sys.modules.pop("counting_tiles", None)


def logged(logs: Path) -> list[str]:
    return [line for path in sorted(logs.iterdir()) for line in path.read_text().split()]


def test_local_run_second_run_and_report(tmp_path, counting):
    make_folder(tmp_path / "slides", 3, 700)
    (tmp_path / "slides" / "broken.svs").write_text("not a slide\n" * 50)
    first = run(tmp_path / "slides", tmp_path / "out", encoder="counting_tiles:build", workers=2, batch_size=16)
    assert first.counts == {"done": 3, "failed": 1}
    assert first.exit_code == 3
    assert first.tiles_encoded == len(logged(counting)) == sum(o.tiles or 0 for o in first.outcomes)
    before = arrays(tmp_path / "out")
    (tmp_path / "slides" / "broken.svs").unlink()
    second = run(tmp_path / "slides", tmp_path / "out", encoder="counting_tiles:build", workers=2)
    assert second.counts == {"done": 3}
    assert second.exit_code == 0
    assert second.tiles_encoded == 0
    assert len(logged(counting)) == first.tiles_encoded
    assert arrays(tmp_path / "out") == before


def test_nothing_to_do_starts_no_cluster(tmp_path, counting, monkeypatch):
    make_folder(tmp_path / "slides", 1, 400)
    run(tmp_path / "slides", tmp_path / "out", encoder="counting_tiles:build", workers=1)
    monkeypatch.setattr("pipeline.batch.reached", lambda *_: pytest.fail("a cluster was started"))
    assert run(tmp_path / "slides", tmp_path / "out", encoder="counting_tiles:build").counts == {"done": 1}


def test_a_scheduler_that_is_there_gives_the_same_bytes(tmp_path, counting):
    make_folder(tmp_path / "slides", 4, 900)
    local = run(tmp_path / "slides", tmp_path / "local", encoder="lab_lbp", tile_px=64, workers=2)
    address = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    dask = [sys.executable, "-m", "dask"]
    place = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(address)]
    processes = [subprocess.Popen([*dask, "scheduler", "--port", "0", *place], **quiet)]
    try:
        for name in ("w1", "w2"):
            one = ["--nthreads", "1", "--no-nanny", "--name", name, "--local-directory", str(tmp_path / name)]
            processes.append(subprocess.Popen([*dask, "worker", *place, *one], **quiet))
        deadline = time.time() + 60
        while not (address.exists() and address.read_text().endswith("}")) and time.time() < deadline:
            time.sleep(0.1)
        import json

        tcp = json.loads(address.read_text())["address"]
        remote = run(tmp_path / "slides", tmp_path / "remote", encoder="lab_lbp", tile_px=64, scheduler=tcp)
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert local.counts == remote.counts == {"done": 4}
    assert arrays(tmp_path / "local") == arrays(tmp_path / "remote")


@pytest.mark.slow
def test_features_of_a_network_are_the_same_bytes_with_one_worker_or_two(tmp_path, monkeypatch):
    """In another company, another order, another number of batches at a time."""
    make_folder(tmp_path / "slides", 3, 900)
    network = {"encoder": "timm/resnet18", "weights": "random", "tile_px": 96, "levels": 2}
    for workers, cores in ((1, 1), (1, 3), (2, 2)):
        monkeypatch.setattr("pipeline.deploy.CPU_COUNT", cores)
        report = run(tmp_path / "slides", tmp_path / f"{workers} {cores}", workers=workers, **network)
        assert report.counts == {"done": 3}
    want = arrays(tmp_path / "1 1")
    assert sum("features" in name for name in want) >= 6
    assert arrays(tmp_path / "1 3") == want
    assert arrays(tmp_path / "2 2") == want


def test_no_scheduler_there(tmp_path, counting):
    from pipeline.errors import UsageError

    make_folder(tmp_path / "slides", 1, 300)
    with pytest.raises(UsageError, match="no scheduler answers"):
        run(tmp_path / "slides", tmp_path / "out", encoder="counting_tiles:build", scheduler="tcp://127.0.0.1:9")


def stored_rows(out: Path, slides: list[str]) -> dict[str, set[int]]:
    """The rows of each slide whose chunk is on disk."""
    found: dict[str, set[int]] = {}
    for slide in slides:
        folder = BagStore(out).group(slide).path / "features" / "counting_tiles--build" / "x" / "c"
        chunks = [int(p.name) for p in folder.glob("*") if (p / "0").is_file()] if folder.is_dir() else []
        found[slide] = {row for c in chunks for row in range(c * CHUNK_ROWS, (c + 1) * CHUNK_ROWS)}
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_twenty_times(tmp_path, counting, monkeypatch):
    """kill -9 at random moments, each followed by the same command: the same bytes, no stored row encoded again."""
    make_folder(tmp_path / "slides", 6, 1500)
    names = sorted(p.name for p in (tmp_path / "slides").iterdir())
    options = ["-e", "counting_tiles:build", "--tile-px", "32", "--levels", "2", "--workers", "2"]
    options += ["--batch-size", "16"]  # of a size that is tried, tiles come twice

    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [COMMAND, "run", str(tmp_path / "slides"), "-o", str(out), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    monkeypatch.setenv("COUNTING_SLEEP", "0.03")
    began = time.time()
    reference = start(tmp_path / "reference")
    assert reference.wait() == 0, reference.stdout.read()
    whole = time.time() - began
    expected, tree_rows = arrays(tmp_path / "reference"), {}
    for name in names:
        tree = BagStore(tmp_path / "reference").group(name).tree()
        assert len(tree.encoded_rows) > CHUNK_ROWS, "more than one chunk a slide, or the test shows nothing"
        with open_slide(tmp_path / "slides" / name) as slide:
            for tile in stream_tiles(slide, tree):
                tree_rows[hashlib.sha1(tile.pixels.tobytes()).hexdigest()] = (name, tile.row)
    chooser, kills, rounds, again, resumed = random.Random(7), 0, 0, 0, 0
    while kills < 20:
        out = tmp_path / f"out{rounds}"
        rounds += 1
        while kills < 20:
            stored = stored_rows(out, names)
            resumed += sum(map(bool, stored.values()))
            for path in counting.iterdir():
                path.unlink()
            process = start(out)
            try:
                process.wait(timeout=chooser.uniform(0.3 * whole, whole))
                ended = True
            except subprocess.TimeoutExpired:
                ended = False
                kills += 1
                if kills % 2:
                    os.killpg(process.pid, signal.SIGKILL)  # all processes at once
                else:
                    os.kill(process.pid, signal.SIGKILL)  # the client alone: its workers must follow
                process.wait()
                partial = [s for s in names if BagStore(out).group(s).status == "complete"]
                for slide in partial:
                    BagStore(out).bag(slide)
            again += sum(row in stored[name] for name, row in (tree_rows[h] for h in logged(counting)))
            if ended:
                assert process.returncode == 0
                break
        final = start(out)
        assert final.wait() == 0, final.stdout.read()
        assert arrays(out) == expected
    print(
        f"\n{kills} kills in {rounds} rounds, {resumed} slides with stored chunks resumed, {again} rows encoded again"
    )
    assert again == 0
    assert resumed > 0


def test_a_large_table_is_not_saved_all_the_time(tmp_path, monkeypatch):
    """slides.csv is written whole: of 100,000 slides that takes seconds, and a slide is finished every few of them."""
    now, saves = [1000.0], []

    def write(path, rows):
        saves.append(now[0])
        now[0] += 0.5

    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr(batch, "time", clock)
    monkeypatch.setattr(batch, "write_outcomes", write)
    files = [SlideFile(f"{n}.svs", tmp_path / f"{n}.svs") for n in range(60)]
    sizes = {file.name: 1 for file in files}
    with joined(tmp_path, "work") as leases:
        state = batch._State(tmp_path, files, sizes, (), batch.Silent(), leases, lambda _: False)
        for file in files:
            assert state.take(file)
            state.add(Outcome(file.name, "done"))
            now[0] += 1.0
    assert np.diff(saves).tolist() == [26.5, 26.5], (
        "0.5 s of saving in 25 s of work, and the slide that is then finished"
    )
