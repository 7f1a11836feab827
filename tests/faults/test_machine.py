"""Rows 49-53 and 59-60 of the fault matrix: what happens to files, disks and limits while a run is at work."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline import run
from pipeline.deploy import _require_open_files
from pipeline.errors import RunStopped, UsageError
from pipeline.outcome import Outcome, read_outcomes
from pipeline.output import read_run

PAGE = 4096


def _mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine lets nobody mount: {done.stderr.strip()}")


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts something on a folder; what is left ends with the test."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    places = []

    def on(place: Path, *arguments: object) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        _mount(*arguments, place)
        places.append(place)
        return place

    yield on
    for place in reversed(places):
        subprocess.run(["umount", "-l", place], capture_output=True, check=False)


@pytest.fixture
def small_disk(mount, tmp_path) -> Callable[[int], Path]:
    return lambda size: mount(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


@contextmanager
def filled(disk: Path, leave: int) -> Iterator[None]:
    """A disk with so many bytes left."""
    space = os.statvfs(disk)
    rubbish = disk / "rubbish"
    rubbish.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - leave)))
    try:
        yield
    finally:
        rubbish.unlink()


# --- slides that change or go away -----------------------------------------------------------------------------------


@pytest.fixture
def touched(kit, folder, neighbour, start, line) -> Callable[..., Outcome]:
    """A slide of nine blocks to which something is done between two of them; a small one beside it notices nothing."""

    def read(what: Callable[[Path], None], reader: str) -> Outcome:
        kit.write_slide(folder / "a.svs", kit.tissue(6144), 0.5, tile_px=kit.native)
        shutil.copyfile(neighbour[0], folder / "b.svs")
        run = start(0.02, "--tile-px=64", "--levels=1", "--readers=1", "--queue-mb=16", f"--reader={reader}")
        run.until(lambda: run.chunks() > 0, "first chunk")
        what(folder / "a.svs")
        code, text = run.ends()
        assert code == 3, text
        rows = {row.slide: row for row in read_outcomes(run.out / "slides.csv")}
        assert type(line)(run.out, line.root).store.group("a.svs").status == "writing"
        assert rows["b.svs"].status == "done"
        return rows["a.svs"]

    return read


READERS = pytest.mark.parametrize("reader", ["tiffslide", "openslide"])  # one keeps a file open, one opens it by name


@pytest.mark.fault(50, "slide replaced while it is read", "F, changed")
@pytest.mark.slow
@READERS
def test_row_50_slide_replaced_while_it_is_read(reader, touched, kit, tmp_path):
    """By another one of the same size in pixels."""
    kit.write_slide(tmp_path / "other.svs", kit.tissue(6144)[::-1], 0.5, tile_px=kit.native)
    row = touched(lambda path: os.replace(tmp_path / "other.svs", path), reader)
    assert (row.status, row.stage) == ("failed", "encode")
    assert "changed while it was read" in row.message


@pytest.mark.fault(51)
@pytest.mark.slow
@READERS
def test_row_51_slide_removed_while_it_is_read(reader, touched):
    row = touched(Path.unlink, reader)
    assert (row.status, row.stage) == ("failed", "encode")
    assert "No such file" in row.message


@pytest.mark.fault(52, "the disk of the slides is unmounted", "X, no slide is blamed")
@pytest.mark.slow
@pytest.mark.parametrize("linked", [False, True], ids=["folder", "links"])
def test_row_52_mount_of_the_slides_is_gone(linked, mount, start, whole, folder, tmp_path, finish):
    """Nothing is said against any slide; once it is mounted again, the same command resumes."""
    (tmp_path / "kept").mkdir()
    for name in whole:
        shutil.copy2(folder / name, tmp_path / "kept" / name)
        shutil.copy2(folder / name, tmp_path / "kept" / f"more {name}")
    disk = tmp_path / "disk" if linked else folder
    mount(disk, "--bind", tmp_path / "kept")
    disk = mount(disk, "-t", "tmpfs", "tmpfs")
    for path in sorted((tmp_path / "kept").iterdir()):
        shutil.copy2(path, disk)
        if linked:
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(disk / path.name)
    run = start(0.02)
    run.until(lambda: run.chunks() > 0, "first chunk")
    subprocess.run(["umount", "-l", disk], check=True)
    subprocess.run(["umount", "-l", disk], check=True)  # and what was below it
    code, text = run.ends()
    assert code == 4, text
    assert "is gone with its disk, which is not mounted any more" in text
    assert "Traceback" not in text
    assert [row for row in read_outcomes(run.out / "slides.csv") if row.status == "failed"] == []
    mount(disk, "--bind", tmp_path / "kept")
    finish()


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(49, "40 files may be open", "P")
@pytest.mark.slow
@pytest.mark.parametrize("limit", [40, 80, 160])
def test_row_49_few_files_may_be_open(limit, start, whole, line, folder):
    """Either it works, or it is said that the limit is too low; no slide is blamed."""
    for number in range(8):
        shutil.copyfile(folder / "a.svs", folder / f"more {number}.svs")
    run = start(0.0, "--readers=8", limits={resource.RLIMIT_NOFILE: limit})
    code, text = run.ends()
    assert "Traceback" not in text
    assert "failed" not in text
    if code:
        assert code in (1, 4)
        assert "ulimit -n" in text
    else:
        assert {name: type(line)(run.out, line.root).x(name) for name in whole} == whole
    assert code == 1 or limit > 40


@pytest.mark.fault(49)
def test_row_49_limit_is_raised_where_that_is_allowed():
    """As on systems that say 256 until one asks for more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] // 2, before[1]))
        _require_open_files(before[0] // 2 + 10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[0] // 2 + 10, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.mark.fault(59, "disk full, quota", "X, in one line")
def test_row_59_disk_full_wherever_a_slide_is_written(small_disk, neighbour, line, code):
    """Whatever is being written when the disk is full, the slide is not blamed, and what follows is the same bytes."""
    disk, stops = small_disk(8 << 20), 0
    path, expected = neighbour
    for pages in range(0, 2000, 5):
        shutil.rmtree(disk / "out", ignore_errors=True)
        here = type(line)(disk / "out", path.parent)
        (disk / "out/slides").mkdir(parents=True)
        with filled(disk, pages * PAGE):
            try:
                rows = here({path.name: path})
            except OSError as error:
                stops += error.errno == errno.ENOSPC
                assert here.store.group(path.name).status in ("missing", "writing")
            else:
                assert rows[path.name].status == "done"
                break
        assert here({path.name: path})[path.name].status == "done"
        assert here.x(path.name) == expected
        assert list((disk / "out").rglob("*.partial")) == []
    assert stops > 20, "one for every file at least"


@pytest.mark.fault(59)
def test_row_59_disk_full_while_the_tables_are_written(small_disk, neighbour, code):
    """A finished run, again: run.json and slides.csv are the old or the new ones, never cut."""
    disk, (path, _) = small_disk(8 << 20), neighbour
    run(path, disk / "out", encoder="lab_lbp", mpp=0.5, tile_px=64, workers=1)
    before, stops = read_outcomes(disk / "out/slides.csv"), 0
    assert [row.status for row in before] == ["done"]
    for pages in range(20):
        with filled(disk, pages * PAGE):
            try:
                run(path, disk / "out", encoder="lab_lbp", mpp=0.5, tile_px=64)
            except (RunStopped, UsageError) as error:
                stops += "No space left" in str(error)
            else:
                break
        assert [row.status for row in read_outcomes(disk / "out/slides.csv")] == ["done"]
        assert read_run(disk / "out")["root"] == str(path.parent)
        assert list((disk / "out").glob("*.partial")) == []
    assert stops > 0


@pytest.mark.fault(59)
@pytest.mark.slow
def test_row_59_disk_full_in_a_real_run(small_disk, start, whole, finish):
    """2 MB; it is told in one line, and goes on once there is more room."""
    disk = small_disk(2 << 20)
    run = start(0.0, out=disk / "real")
    code, text = run.ends()
    assert code == 4, text
    (line,) = [line for line in text.splitlines() if "stopped" in line]
    assert line.startswith("stopped: No space left on device")
    assert "Traceback" not in text
    assert "failed" not in text
    _mount("-o", "remount,size=64m", disk)
    finish(out=disk / "real")


@pytest.mark.fault(59)
@pytest.mark.slow
def test_row_59_file_size_limit(start, whole, finish):
    """A quota of another kind, for those who may not mount: no file larger than 300 kB."""
    run = start(0.0, limits={resource.RLIMIT_FSIZE: 300_000})
    code, text = run.ends()
    assert code == 4, text
    assert "stopped: File too large" in text
    assert "failed" not in text
    finish()


@pytest.mark.fault(60, "output folder read-only", "P; X where it becomes so in the midst")
@pytest.mark.slow
def test_row_60_folder_becomes_read_only_while_a_run_is_at_work(mount, start, whole, tmp_path, finish):
    slides = tmp_path / "real/slides"
    slides.mkdir(parents=True)
    mount(slides, "--bind", slides)
    run = start(0.05)
    run.until(lambda: run.chunks() > 0, "first chunk")
    remount = ["mount", "-o", "remount,bind,ro", slides]
    run.until(
        lambda: subprocess.run(remount, capture_output=True, check=False).returncode == 0, "moment between writes"
    )
    code, text = run.ends()
    assert code == 4, text
    assert "stopped: Read-only file system" in text
    assert "Traceback" not in text
    assert "failed" not in text
    _mount("-o", "remount,bind,rw", slides)
    finish()


# --- very many slides -------------------------------------------------------------------------------------------------


@pytest.mark.fault(53, "very many tiny slides", "D, memory and open files stay flat")
@pytest.mark.slow
def test_row_53_five_hundred_tiny_slides(kit, folder, start):
    """Neither memory nor open files of any process grow from the 100th slide to the last."""
    kit.write_slide(folder / "0.svs", kit.tissue(512)[64:320, 64:320], 0.5, tile_px=kit.native)
    for number in range(1, 500):
        os.link(folder / "0.svs", folder / f"{number}.svs")
    run = start(0.0, "--encoder=lab_lbp", "--tile-px=64")
    seen: list[dict[int, tuple[int, int]]] = []  # of each process: bytes, open files
    for line in run.process.stdout:
        if line.startswith("["):
            mine = [psutil.Process(run.process.pid), *run.workers()]
            seen.append({one.pid: (one.memory_info().rss, one.num_fds()) for one in mine})
    assert run.process.wait() == 0
    assert len(seen) == 500
    early, late = seen[90:110], seen[-20:]
    assert early[0].keys() == late[-1].keys(), "no process had to be started again"
    for pid in late[-1]:
        (rss, fds), (rss_late, fds_late) = (
            [max(one[pid][what] for one in part) for what in (0, 1)] for part in (early, late)
        )
        assert fds_late <= fds + 8
        assert rss_late <= rss * 1.1 + 8e6
