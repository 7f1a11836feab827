"""Output folders and slides on an object store: a real server of this machine, whole runs, a bad network."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage.data import immunohistochemistry

from pipeline import BagStore, leases, objects, open_slide, ranges
from pipeline.arrays import StoredArray, read_attrs
from pipeline.demo import write_slide
from pipeline.errors import RunStopped, UnreadableSlide, UsageError
from pipeline.fingerprint import fingerprint
from pipeline.folder import find_slides
from pipeline.objects import ObjectPath
from pipeline.outcome import Outcome, read_outcomes
from pipeline.places import placed

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'slidestream[s3]'")
pytest.importorskip("moto.server", reason="no S3 server: pip install 'moto[server]'")

SERVER = Path(__file__).with_name("s3_server.py")
ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-c", "from pipeline.cli import main; main()"]
OPTIONS = ["-e", "lab_lbp", "--tile-px", "64", "--levels", "2", "--workers", "2"]


class Proxy:
    """Stands on a port of its own before a server's. `faults`: the share of answers' pieces that meet one."""

    def __init__(self, server_port, seed=0):
        self.server_port, self.faults, self.counts = server_port, 0.0, {"refused": 0, "delayed": 0, "cut": 0, "up": 0}
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def disturb(self, faults, seed=0):
        """From now on; what happened before is not counted."""
        with self._lock:
            self.faults, self.counts = faults, dict.fromkeys(self.counts, 0) if faults else self.counts
            self._random = random.Random(seed)

    def _draw(self):
        """What happens to this piece: None, or refused, delayed, cut."""
        with self._lock:
            if self._random.random() >= self.faults:
                return None, 0.0
            kind = self._random.choice(["refused", "delayed", "cut"])
            return kind, self._random.random()

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client):
        kind, _ = self._draw()
        if kind == "refused":
            self.counts["refused"] += 1
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", self.server_port))
        except OSError:
            client.close()
            return
        for source, sink, name in ((client, server, "up"), (server, client, "cut")):
            threading.Thread(target=self._pump, args=(source, sink, name), daemon=True).start()

    def _pump(self, source, sink, name):
        """One direction; cut in the midst of a piece, so that a part of it has arrived."""
        try:
            while data := source.recv(1 << 15):
                kind, where = self._draw()
                if kind == "delayed":
                    self.counts["delayed"] += 1
                    time.sleep(0.3 * where)
                elif kind == "cut":
                    self.counts[name] += 1
                    sink.sendall(data[: int(len(data) * where)])
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self):
        self._listener.close()


class Server:
    """moto's, with a journal: it may be killed and started again."""

    def __init__(self, folder):
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self._command = [sys.executable, SERVER, str(self.port), str(folder / "journal")]
        self.start()

    def start(self):
        self._process = subprocess.Popen(self._command)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the server did not start")

    def send(self, number):
        self._process.send_signal(number)

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def environment(proxy):
    """All requests go through the proxy, which does no harm unless it is told to."""
    return {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "SLIDESTREAM_NETWORK": "20",
    }


@pytest.fixture(scope="module", autouse=True)
def _reached(environment):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        from pipeline.objects import _made, _store

        _made.cache_clear()
        _store().mkdir("bucket")
        yield
        _made.cache_clear()


@pytest.fixture
def place(request):
    """A folder of the test's own in the bucket."""
    return placed(f"s3://bucket/{request.node.name}")


def command(*arguments, check=0, **environment):
    """The console command; its lines."""
    done = subprocess.run(
        [*CLI, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_slides(folder, count=3, side=700):
    base = immunohistochemistry()
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = np.tile(base, (-(-side // 512), -(-side // 512), 1))[:side, :side].astype(np.int16)
        pixels = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        pixels[:, : side // 5] = 244
        write_slide(folder / f"case{i % 2}" / f"s{i}.svs", pixels, 0.5, downsamples=(4,))


def contents(folder):
    """{path: bytes} of all chunks, and of qc pictures; documents hold times."""
    files = folder.below() if isinstance(folder, ObjectPath) else [p for p in folder.rglob("*") if p.is_file()]
    names = [str(f) if isinstance(folder, ObjectPath) else str(f.relative_to(folder)) for f in files]
    kept = [n for n in names if n.startswith(("slides/", "qc/", "predictions/")) and not n.endswith("zarr.json")]
    return {name: (folder / name).read_bytes() for name in kept}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    make_slides(folder)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory, slides):
    """What an undisturbed run makes of them on a disk."""
    out = tmp_path_factory.mktemp("local") / "out"
    command("run", slides, "-o", out, *OPTIONS)
    return out


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.svs", "c[x]*#?v=3.svs", "two words ü.svs", "a::b", "%41+"])
def test_any_name_is_written_and_found(place, name):
    path = place / "folder" / name
    path.write_bytes(b"12345")
    assert path.read_bytes() == b"12345"
    assert path.read_range(1, 3) == b"23"
    assert path.stat().st_size == 5
    assert [p.name for p in (place / "folder").iterdir()] == [name]
    assert [str(p) for p in place.below()] == [f"folder/{name}"]
    place.remove_tree()
    assert not path.exists()
    assert not place.exists()


def test_folders_are_what_lies_in_them(place):
    for name in ("a/1", "a/b/2", "c.zarr/zarr.json"):
        (place / name).write_bytes(b"x")
    assert (place / "a").is_dir()
    assert not (place / "a").is_file()
    assert (place / "a/1").is_file()
    assert not (place / "a/").joinpath("none").exists()
    assert list((place / "none").iterdir()) == []
    assert [(str(f.relative_to(place)), d, n) for f, d, n in place.walk()] == [
        (".", ["a", "c.zarr"], []),
        ("a", ["b"], ["1"]),
        ("a/b", [], ["2"]),
        ("c.zarr", [], ["zarr.json"]),
    ]
    assert [p.name for p in place.glob("*/zarr.json")] == ["zarr.json"]
    assert [p.name for p in place.glob("a/*")] == ["1", "b"]
    with pytest.raises(FileNotFoundError):
        (place / "none").read_bytes()


def test_an_address_with_credentials_is_refused_and_not_repeated():
    with pytest.raises(UsageError) as refused:
        placed("s3://key:hunter2@bucket/out")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("text", ["s3://", "s3://b/x", "s3://bucket/../x", "gs://bucket/x", "http://host/x"])
def test_other_addresses_are_refused(text):
    with pytest.raises(UsageError):
        placed(text)


def test_it_is_no_file_of_this_machine(place):
    with pytest.raises(TypeError, match="no file of this machine"):
        (place / "x").__fspath__()


def test_what_cannot_be_reached_is_not_what_is_not_there(place, proxy, monkeypatch):
    monkeypatch.setenv("SLIDESTREAM_NETWORK", "0.5")
    monkeypatch.setattr(proxy, "_draw", lambda: ("refused", 0.0))
    started = time.monotonic()
    with pytest.raises(RunStopped, match="cannot be reached"):
        read_attrs(place)
    with pytest.raises(RunStopped):
        place.exists()
    assert time.monotonic() - started < 10
    monkeypatch.undo()
    assert read_attrs(place) == {}


def test_a_bucket_that_is_not_there(slides):
    said = command("run", slides, "-o", "s3://nobucket/out", *OPTIONS, check=1)
    assert "there is no such bucket" in said


def test_what_may_not_be_read_is_not_begun_anew(place, monkeypatch):
    """Credentials that have ended, and are there again when it comes to deleting."""
    group = BagStore(place).group("a.svs")
    group.begin(slide={"path": "a.svs"})
    with monkeypatch.context() as patch:
        store = objects._store()
        patch.setattr(store, "cat_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("Forbidden")))
        with pytest.raises(RunStopped, match="no permission"):
            group.begin(slide={"path": "a.svs"})
        with pytest.raises(PermissionError):
            (place / "a.svs").read_range(0, 1)
        with pytest.raises(UnreadableSlide, match="no permission"):
            ranges.RangedFile(group.path / "zarr.json").pread(1, 0)
    assert group.status == "writing"


def test_an_array_is_the_same_bytes_and_damage_is_seen(place, tmp_path):
    data = np.arange(5000, dtype=np.float32).reshape(1000, 5)
    for where in (place, tmp_path / "a"):
        array = StoredArray.create(where / "x", data.shape, data.dtype, 300)
        for chunk in array.chunks:
            array.write_chunk(chunk, data[array.rows(chunk)])
    on_disk = {str(p.relative_to(tmp_path / "a")): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {str(name): (place / name).read_bytes() for name in place.below()} == on_disk
    found = StoredArray.open(place / "x")
    assert np.array_equal(found.read(), data)
    with pytest.raises(FileExistsError):
        StoredArray.create(place / "x", data.shape, data.dtype, 300)
    chunk = place / "x/c/1/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-9] + b"?" + whole[-8:])
    assert found.is_damaged(1)
    chunk.unlink()
    assert found.missing() == [1]


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_to_an_object_store(place, slides, local):
    said = command("run", slides, "-o", place, *OPTIONS)
    assert "3 done" in said
    assert contents(place) == contents(local)
    assert "3 done" in command("status", place)
    assert "3 slides: 3 whole" in command("verify", place)
    assert "3 finished before, 0 to do" in command("run", slides, "-o", place, *OPTIONS)
    name = "case0/s0.svs"
    ours, theirs = BagStore(str(place)).bag(name), BagStore(local).bag(name)
    assert np.array_equal(ours.levels[-1].features, theirs.levels[-1].features)
    left = [str(path) for path in (place / ".runs").below()]
    assert left == [], "the last run sweeps"
    chunk = next(p for p in BagStore(place).group(name).path.rglob("0") if "/x/" in str(p))
    chunk.unlink()
    assert "1 damaged" in command("verify", place, check=3)
    assert "1 to do" in command("run", slides, "-o", place, *OPTIONS)
    assert contents(place) == contents(local)


# -- slides that lie there --------------------------------------------------------------------------------------------


def upload(folder, place):
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        (place / str(path.relative_to(folder))).write_bytes(path.read_bytes())
    return place


@pytest.fixture(scope="module")
def remote_slides(slides):
    return upload(slides, placed("s3://bucket/slides"))


def test_slides_are_found_as_on_a_disk(place, tmp_path):
    for name in (
        "a/b.svs",
        "a/c[1].tif",
        "d.mrxs",
        "d/Slide1.dat",
        "e/notes.txt",
        ".hidden.svs",
        "out/x.png",
        "f.zarr/g",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "nameless").write_bytes(b"II*\0" + bytes(200))
    (tmp_path / "t.csv").write_text("slide\na/b.svs\n")
    upload(tmp_path, place)
    for words in ("", "/a", "/a/*.svs", "/**/*.svs", "/a/b.svs", "/t.csv", "/*/c[[]1].tif"):
        here, there = find_slides(f"{tmp_path}{words}", tmp_path / "out"), find_slides(f"{place}{words}", place / "out")
        assert list(there.files) == list(here.files) != []
        assert str(there.root).removeprefix(str(place)) == str(here.root).removeprefix(str(tmp_path))
    for words in ("/none", "/e", "/x*.svs"):
        with pytest.raises(UsageError):
            find_slides(f"{place}{words}")
    (place / "out.csv").write_bytes(b"slide\n../x.svs\n")
    with pytest.raises(UsageError, match="outside the table's folder"):
        find_slides(place / "out.csv")


def test_a_slide_is_read_as_from_a_disk(slides, remote_slides):
    name = "case0/s0.svs"
    assert fingerprint(remote_slides / name)[::2] == fingerprint(slides / name)[::2]
    with open_slide(remote_slides / name) as there, open_slide(slides / name) as here:
        assert (there.levels, there.mpp, there.reader, there.vendor) == (
            here.levels,
            here.mpp,
            here.reader,
            here.vendor,
        )
        assert np.array_equal(there.read(-7, 30, 0, 400, 333), here.read(-7, 30, 0, 400, 333))


def test_a_file_of_ranges_is_the_file(place, monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK", 100)
    monkeypatch.setattr(ranges, "KEPT", 3)
    monkeypatch.setattr(ranges, "LARGE", 400)
    data = np.random.default_rng(0).bytes(1234)
    (place / "x").write_bytes(data)
    file = ranges.RangedFile(place / "x")
    chooser = random.Random(0)
    for _ in range(60):
        count, offset = chooser.randrange(600), chooser.randrange(1400)
        assert file.pread(count, offset) == data[offset : offset + count]
    file.seek(-34, 2)
    assert file.read() == data[1200:]
    (place / "x").unlink()
    with pytest.raises(UnreadableSlide, match="not there any more"):
        file.pread(500, 700)
    assert isinstance(file.fault, UnreadableSlide)


def test_what_only_openslide_reads_is_refused_in_words(place, tmp_path):
    (place / "a.mrxs").write_bytes(b"\0\1\2\3" * 100)
    tifffile.imwrite(tmp_path / "j2k.tif", np.zeros((512, 512, 3), np.uint8), tile=(256, 256), compression="jpeg2000")
    upload(tmp_path, place)
    for name in ("a.mrxs", "j2k.tif"):
        with pytest.raises(UnreadableSlide, match="reads from disks only: copy the slide to one"):
            open_slide(place / name, mpp=0.5)
    with open_slide(place / "j2k.tif", mpp=0.5, reader="tiffslide") as slide:
        assert slide.read(0, 0, 0, 10, 10).max() == 0


def test_a_slide_that_fails_is_one_row(place, slides, tmp_path):
    whole = next(slides.rglob("*.svs"))
    (place / "slides/good.svs").write_bytes(whole.read_bytes())
    (place / "slides/cut.svs").write_bytes(whole.read_bytes()[:5000])
    text = command("run", place / "slides", "-o", place / "out", *OPTIONS, check=3)
    assert "1 done, 1 failed" in text
    assert "failed  cut.svs" in text


def test_a_network_that_fails_is_no_damaged_slide(remote_slides, proxy, monkeypatch):
    """tifffile tells a directory that it cannot read in a log, and goes on with fewer levels."""
    monkeypatch.setenv("SLIDESTREAM_NETWORK", "0")
    reached = ObjectPath.read_range
    for good in range(3):
        left = [good]

        def read(path, start, stop, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise RunStopped("the network is gone")
            return reached(path, start, stop)

        with monkeypatch.context() as patch:
            patch.setattr(ranges, "BLOCK", 1 << 14)
            patch.setattr(ObjectPath, "read_range", read)
            with pytest.raises(RunStopped, match="gone"):
                open_slide(remote_slides / "case0/s0.svs").close()


def test_a_run_from_and_to_an_object_store(place, remote_slides, local):
    assert "3 done" in command("run", remote_slides, "-o", place / "out", *OPTIONS)
    assert contents(place / "out") == contents(local)
    assert "3 slides: 3 whole" in command("verify", place / "out", "--deep")
    assert "3 finished before, 0 to do" in command("run", remote_slides, "-o", place / "out", *OPTIONS)
    run_json = (place / "out/run.json").read_bytes().decode()
    assert "secret" not in run_json
    assert "nobody" not in run_json


@pytest.mark.slow
def test_slides_there_and_features_here(tmp_path, remote_slides, local):
    command("run", remote_slides, "-o", tmp_path / "out", *OPTIONS)
    assert contents(tmp_path / "out") == contents(local)


@pytest.mark.slow
def test_a_folder_that_was_copied_is_trained_on_and_predicted_from(place, many, tmp_path):
    local = shutil.copytree(many[1], tmp_path / "out")
    upload(local, place)
    names = BagStore(local).slides()
    rows = [f"{name},{'a' if i % 2 else 'b'},train" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,label,split", *rows]) + "\n")
    (tmp_path / "folds.csv").write_text("\n".join(["slide,label", *(row[:-6] for row in rows)]) + "\n")
    for out in (place, local):
        command("train", out, "--labels", tmp_path / "labels.csv", "--head", "mean", "--epochs", "2")
        command("predict", out, "--model", "mean")
        command("probe", out, "--labels", tmp_path / "folds.csv", "--cv", "2")
        heads = ["--heads", "mean,max", "--cv", "2", "--epochs", "1"]
        command("compare", out, "--labels", tmp_path / "folds.csv", *heads)
    files = [str(path.relative_to(local)) for path in (local / "models").rglob("*") if path.is_file()]
    assert {"models/probe.json", "models/compare/max/out_of_fold.csv", "models/mean/curves.png"} <= set(files)
    assert {f"{path}".removeprefix(f"{place}/") for path in (place / "models").rglob("*")} >= set(files)
    for name in [name for name in files if not name.endswith(".json")]:  # those hold times
        assert (place / name).read_bytes() == (local / name).read_bytes(), name
    assert (place / "predictions/mean.csv").read_bytes() == (local / "predictions/mean.csv").read_bytes()
    for name in ("logits", "weight"):
        group = f"slides/{names[0]}.zarr/predictions/mean/{name}/c"
        assert [b.read_bytes() for b in (place / group).rglob("*")] == [
            b.read_bytes() for b in (local / group).rglob("*") if b.is_file()
        ]
    assert sum(1 for _ in (place / "heatmaps").rglob("*.png")) == 8
    command("verify", place)


def test_what_works_on_disks_only_says_so(place):
    said = command("evaluate", place, "--model", "m", "-a", "x", check=1)
    assert "works in a folder on a disk" in said


def test_a_patience_that_is_no_time(place):
    said = command("status", place, check=1, SLIDESTREAM_NETWORK="soon")
    assert "SLIDESTREAM_NETWORK=soon: it has to be a number of seconds" in said


def test_no_credentials(place, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    said = command("status", place, check=1, AWS_EC2_METADATA_DISABLED="true", HOME="/nowhere")
    assert "Unable to locate credentials" in said


# -- several runs at once ---------------------------------------------------------------------------------------------


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


HOLD = """
import sys
from pipeline.leases import joined
from pipeline.places import placed
with joined(placed(sys.argv[1]), "work") as leases:
    leases.take("a.svs")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(place):
    """A run in another process, which holds a.svs."""
    code = [sys.executable, "-c", HOLD, str(place)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(code, stdin=-1, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_slide_is_held_by_one_run(place, other):
    with leases.joined(place, "work") as ours:
        assert ours.take("a.svs").pid == other.pid
        assert ours.take("b.svs") is None
        assert {slide: holder.pid for slide, holder in leases.held(place).items()} == {
            "a.svs": other.pid,
            "b.svs": os.getpid(),
        }
        other.kill()
        other.wait()
        assert ours.take("a.svs") is None, "a process of this machine that is gone is gone at once"
        ours.settle("a.svs", Outcome("a.svs", "done", tiles=7))
    assert list((place / leases.FOLDER).below()) == []


@pytest.mark.slow
def test_a_silent_run_of_another_machine_is_followed_and_stops(place, other, monkeypatch):
    """There are no locks: its age alone tells. One that was buried must not come back by its next heartbeat."""
    monkeypatch.setattr(leases, "EXPIRY", 3.0)
    monkeypatch.setattr(leases, "BEAT", 0.5)
    monkeypatch.setattr(leases, "_processes", lambda: "of another machine")
    with leases.joined(place, "work") as ours:
        other.send_signal(signal.SIGSTOP)
        assert until(lambda: ours.take("a.svs") is None)
        assert len(leases.living(place)) == 1
        other.send_signal(signal.SIGCONT)
        time.sleep(2 * 5.0)  # its own heartbeat
        assert len(leases.living(place)) == 1


@pytest.mark.slow
def test_a_run_that_stood_still_finds_out_by_itself(place, monkeypatch):
    """Nobody buried it: but others may have judged so just now."""
    monkeypatch.setattr(leases, "EXPIRY", 2.0)
    monkeypatch.setattr(leases, "BEAT", 0.2)
    with leases.joined(place, "work") as ours:
        monkeypatch.setattr(ours._stopped, "wait", lambda _: time.sleep(4) or False)
        assert until(lambda: ours._fault)
        with pytest.raises(RunStopped, match="silent for"):
            ours.take("a.svs")


def test_two_that_want_it_at_the_same_moment_never_both_have_it(place):
    names, got = [f"{i}.svs" for i in range(25)], {}
    with leases.joined(place, "work") as first, leases.joined(place, "work") as second:
        start = threading.Barrier(2)

        def want(name, run):
            start.wait()
            got[name] = {slide for slide in names if run.take(slide) is None}

        threads = [threading.Thread(target=want, args=pair) for pair in (("one", first), ("two", second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got["one"] & got["two"] == set()
        for slide in set(names) - got["one"] - got["two"]:
            assert first.take(slide) is None


def test_a_guard_is_held_by_one_and_outlived(place, monkeypatch):
    inside, most = [0], [0]

    def add():
        for _ in range(3):
            with leases.alone(place):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                (place / "count").write_bytes(str(int((place / "count").read_bytes()) + 1).encode())
                inside[0] -= 1

    (place / "count").write_bytes(b"0")
    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], (place / "count").read_bytes()) == (1, b"12")
    monkeypatch.setattr(leases, "GUARDED_S", 1.0)
    (place / leases.FOLDER / leases.GUARD).write_bytes(b"of a run that was killed")
    add()
    assert (place / "count").read_bytes() == b"15"


@pytest.mark.slow
def test_two_runs_share_one_output_folder(place, tmp_path):
    make_slides(tmp_path / "slides", 8, 500)
    there = upload(tmp_path / "slides", place / "slides")
    code = [*CLI, "run", str(there), "-o", str(place / "out"), *OPTIONS[:-1], "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen(code, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    command("run", tmp_path / "slides", "-o", tmp_path / "out", *OPTIONS)
    assert contents(place / "out") == contents(tmp_path / "out")
    rows = read_outcomes(place / "out/slides.csv")
    assert [row.status for row in rows] == ["done"] * 8
    encoded = [int(found) for words in said for found in re.findall(r"(\d+) tiles encoded", words)]
    assert sum(encoded) == sum(row.tiles for row in rows), "no tile was encoded twice"
    assert list((place / "out/.runs").below()) == []
    command("verify", place / "out")


# -- a bad network ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(8 slides on the store, what an undisturbed run makes of them on a disk)"""
    folder = tmp_path_factory.mktemp("many")
    make_slides(folder / "slides", 8, 900)
    command("run", folder / "slides", "-o", folder / "out", *OPTIONS)
    return upload(folder / "slides", placed("s3://bucket/many")), folder / "out"


def started(slides, out, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    code = [*CLI, "run", str(slides), "-o", str(out), *OPTIONS]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def heard(process, word):
    """The lines until one has this word."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(lines)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_requests_that_are_lost_delayed_and_cut(place, many, proxy, seed):
    slides, local = many
    proxy.disturb(0.03, seed)
    try:
        process = started(slides, place, SLIDESTREAM_NETWORK="60")
        said = process.communicate(timeout=200)[0]
    finally:
        proxy.disturb(0.0)
    assert process.returncode == 0, said
    assert min(proxy.counts["cut"], proxy.counts["up"]) > 3, proxy.counts  # answers and requests, cut in the midst
    assert "Traceback" not in said
    assert contents(place) == contents(local)
    command("verify", place)
    print(f"\n{proxy.counts}")


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_in_time(place, many, server):
    slides, local = many
    process = started(slides, place, SLIDESTREAM_NETWORK="60")
    heard(process, "done")
    server.kill()
    time.sleep(5)
    server.start()
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert contents(place) == contents(local)


@pytest.mark.slow
def test_a_server_that_hangs(place, many, server):
    """It takes connections and says nothing: 20 s a try."""
    slides, local = many
    process = started(slides, place, SLIDESTREAM_NETWORK="3")
    heard(process, "done")
    server.send(signal.SIGSTOP)
    stopped = time.monotonic()
    said = process.communicate(timeout=200)[0]
    server.send(signal.SIGCONT)
    print(f"\nstopped {time.monotonic() - stopped:.1f} s after the server: {said}")
    assert process.returncode == 4, said
    assert "cannot be reached" in said
    assert "8 done" in command("run", slides, "-o", place, *OPTIONS)
    assert contents(place) == contents(local)


@pytest.mark.slow
def test_a_server_that_stays_away_stops_the_run_and_the_same_command_resumes(place, many, server):
    slides, local = many
    process = started(slides, place, SLIDESTREAM_NETWORK="3")
    heard(process, "done")
    server.kill()
    killed = time.monotonic()
    said = process.communicate(timeout=200)[0]
    print(f"\nstopped {time.monotonic() - killed:.1f} s after the server: {said}")
    assert process.returncode == 4, said
    assert len(re.findall("cannot be reached", said)) == 1
    assert "Traceback" not in said
    server.start()
    found = command("verify", place, check=3)
    assert " damaged" not in found
    whole = [name for name in BagStore(place).slides() if BagStore(place).group(name).status == "complete"]
    for name in whole:
        BagStore(place).bag(name)
    assert len(whole) < 8, "or the test shows nothing"
    said = command("run", slides, "-o", place, *OPTIONS)
    assert "8 done" in said
    assert contents(place) == contents(local)
    command("verify", place)
