"""Rows 57, 58 and 60-63 of the fault matrix: output folders that are damaged, half written, in use or read-only.

Each damage is refused by name where the store is read, and mended by the same command, byte for byte.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import BrokenBag
from pipeline.leases import FOLDER, GUARD, living

HOLD = """
import sys, pathlib
from pipeline.leases import joined
with joined(pathlib.Path(sys.argv[1]), "work") as leases:
    leases.take(sys.argv[2])
    print("held", flush=True)
    sys.stdin.read()
"""


@dataclass
class Stored:
    """A finished slide, and its files as they should be."""

    name: str
    path: Path
    group: Path
    files: dict[str, object]

    def differing(self) -> list[str]:
        """The files that are not what they were. Attributes hold no times, so that all of them must be the same."""
        now = snapshot(self.group)
        return sorted(name for name in self.files.keys() | now.keys() if now.get(name) != self.files.get(name))


def snapshot(folder: Path) -> dict[str, object]:
    """Every file below a folder: its bytes, or what they mean where they are JSON, whose order means nothing."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: json.loads(data) if name.endswith("zarr.json") else data for name, data in found.items()}


@pytest.fixture
def stored(neighbour, folder, line) -> Stored:
    path = folder / "a.svs"
    shutil.copy2(neighbour[0], path)
    assert line({"a.svs": path})["a.svs"].status == "done"
    group = line.store.group("a.svs").path
    return Stored("a.svs", path, group, snapshot(group))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def delete(path: Path) -> None:
    path.unlink()


ARRAYS = {
    "features/lab_lbp/x": "c/0/0",
    "features/lab_lbp/valid": "c/0",
    "tissue/mask": "c/0/0",
    "tissue/thumbnail": "c/0/0/0",
    "tiles/grid": "c/0/0",
    "tiles/parent": "c/0",
}


@pytest.mark.fault(61, "chunk cut, flipped, deleted", "refused by name; made again, same bytes")
@pytest.mark.parametrize("damage", [cut, flip, delete])
@pytest.mark.parametrize("array", ARRAYS)
def test_row_61_chunk_is_damaged(array, damage, stored, line):
    damage(stored.group / array / ARRAYS[array])
    group = line.store.group(stored.name)
    read = {"tissue/mask": group.mask, "tissue/thumbnail": group.thumbnail}
    with pytest.raises(BrokenBag) as refused:
        read.get(array, lambda: line.store.bag(stored.name))()
    assert refused.value.stage == "store"
    assert array in refused.value.reason, "says which array"
    row = line({stored.name: stored.path}, redo=True)[stored.name]
    assert row.status == "done"
    assert stored.differing() == []


@pytest.mark.fault(61)
@pytest.mark.parametrize("damage", [cut, delete])
@pytest.mark.parametrize("array", ["features/lab_lbp/x", "features/lab_lbp/valid"])
def test_row_61_what_the_size_shows_is_mended_without_redo(array, damage, stored, line):
    if array.endswith("valid") and damage is cut:
        pytest.skip("compressed: its size says nothing")
    damage(stored.group / array / ARRAYS[array])
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert stored.differing() == []


@pytest.mark.fault(61)
def test_row_61_only_the_damaged_chunk_is_encoded_again(kit, folder, line, monkeypatch):
    """A slide of several chunks of 2048 rows: one is lost, the others are not touched."""
    kit.write_slide(folder / "big.svs", kit.tissue(), 0.5, tile_px=64)
    settings = {"tile_px": 16}
    assert line({"big.svs": folder / "big.svs"}, **settings)["big.svs"].tiles > 2048
    group = line.store.group("big.svs").path
    before = {p: p.stat().st_mtime_ns for p in (group / "features/lab_lbp/x/c").rglob("*") if p.is_file()}
    whole = snapshot(group)
    lost = group / "features/lab_lbp/x/c/1/0"
    lost.unlink()
    assert line({"big.svs": folder / "big.svs"}, **settings)["big.svs"].status == "done"
    assert snapshot(group) == whole
    assert {p for p, time in before.items() if p.stat().st_mtime_ns != time} == {lost}


JSON_FILES = ["zarr.json", "tiles/zarr.json", "tissue/zarr.json", "features/lab_lbp/zarr.json"]
JSON_FILES += [f"{array}/zarr.json" for array in ARRAYS]


@pytest.mark.fault(62, "zarr.json or run.json cut, missing, strange", "refused by name; made again, same bytes")
@pytest.mark.parametrize("damage", [cut, delete])
@pytest.mark.parametrize("file", JSON_FILES)
def test_row_62_zarr_json_is_damaged(file, damage, stored, line):
    damage(stored.group / file)
    if not file.startswith("tissue"):
        with pytest.raises(BrokenBag):
            line.store.bag(stored.name)
    # What says `complete` and is damaged below is looked at with --redo; what does not say so is redone anyway.
    deep = file.startswith(("tissue", "tiles"))
    row = line({stored.name: stored.path}, redo=deep)[stored.name]
    assert row.status == "done"
    assert stored.differing() == []


@pytest.mark.fault(62)
@pytest.mark.parametrize("content", ["[]", "{}", '{"attributes": []}', '{"attributes": {"status": "complete"}}', "\0"])
def test_row_62_zarr_json_is_of_something_else(content, stored, line):
    (stored.group / "zarr.json").write_text(content)
    with pytest.raises(BrokenBag, match="has not been processed"):
        line.store.bag(stored.name)
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert stored.differing() == []


def set_attribute(path: Path, **values: object) -> None:
    about = json.loads(path.read_bytes())
    about["attributes"] |= values
    path.write_text(json.dumps(about))


@pytest.mark.fault(63, "killed before the last attributes", "not whole; finished by the next run")
def test_row_63_killed_before_the_last_attributes(stored, line):
    set_attribute(stored.group / "zarr.json", status="writing")
    with pytest.raises(BrokenBag, match="is not finished"):
        line.store.bag(stored.name)
    x = stored.group / "features/lab_lbp/x/c/0/0"
    written = x.stat().st_mtime_ns
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert stored.differing() == []
    assert x.stat().st_mtime_ns == written, "all that was missing was the word"


@pytest.mark.fault(63)
def test_row_63_killed_before_the_last_attributes_of_the_features(stored, line):
    set_attribute(stored.group / "zarr.json", status="writing")
    set_attribute(stored.group / "features/lab_lbp/zarr.json", status="writing")
    with pytest.raises(BrokenBag):
        line.store.bag(stored.name)
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert stored.differing() == []


@pytest.mark.fault(63)
def test_row_63_killed_between_validity_and_features(stored, line):
    set_attribute(stored.group / "zarr.json", status="writing")
    set_attribute(stored.group / "features/lab_lbp/zarr.json", status="writing")
    (stored.group / "features/lab_lbp/x/c/0/0").unlink()
    left = stored.group / "features/lab_lbp/x/c/0/0.0123abcd.partial"
    left.write_bytes(b"half a chunk")
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert stored.differing() == []


@pytest.mark.fault(62)
def test_row_62_run_json_is_cut(stored, line):
    cut(line.out / "run.json")
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert json.loads((line.out / "run.json").read_bytes())["root"] == str(stored.path.parent)


def test_slide_file_that_changed_is_done_again(stored, line, kit):
    before = line.x(stored.name)
    shutil.copyfile(kit.good, stored.path)
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert line.x(stored.name) != before


def test_slide_file_that_broke_says_so_and_no_store_says_complete(stored, line):
    stored.path.write_bytes(stored.path.read_bytes()[:-1000])
    assert line({stored.name: stored.path})[stored.name].status == "failed"


def test_slide_file_that_was_touched_is_not_done_again(stored, line):
    x = stored.group / "features/lab_lbp/x/c/0/0"
    written = x.stat().st_mtime_ns
    os.utime(stored.path, (1, 1))
    assert line({stored.name: stored.path})[stored.name].status == "done"
    assert x.stat().st_mtime_ns == written


# --- who may write ----------------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path, neighbour):
    """An output folder in which another process works on a slide."""
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", HOLD, out, neighbour[0].name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield out, holder
        holder.kill()


@pytest.mark.fault(57)
def test_row_57_redo_beside_another_run_is_refused(other, neighbour, cli):
    """It would delete what the other is about to finish."""
    out, holder = other
    result = cli("run", neighbour[0], "-o", out, "-e", "lab_lbp", "--redo")
    assert result.code == 1
    assert f"process {holder.pid} on {socket.gethostname()}" in result.err
    assert "Traceback" not in result.err
    assert not (out / "run.json").exists()
    assert not (out / "slides.csv").exists()


@pytest.mark.fault(58, "lock of a dead run", "taken over")
def test_row_58_slides_of_a_dead_run_are_taken_over(other, neighbour, slidestream):
    out, holder = other
    holder.kill()
    holder.wait()
    assert living(out) == []
    result = slidestream("run", neighbour[0], "-o", out, "-e", "lab_lbp", "--tile-px", "64", "--workers", "1")
    assert result.code == 0, result.err
    assert [path for path in (out / FOLDER).rglob("*") if path.is_file() and path.name != GUARD] == []


@pytest.mark.fault(60)
def test_row_60_read_only_folder(open_folder, neighbour, as_nobody, cli):
    (open_folder / "slides").mkdir()
    shutil.copyfile(neighbour[0], open_folder / "slides/a.svs")
    out = open_folder / "out"
    out.mkdir()
    out.chmod(0o555)
    with as_nobody():
        result = cli("run", open_folder / "slides", "-o", out, "-e", "lab_lbp")
    assert result.code == 1
    assert f"{out} cannot be written to: Permission denied" in result.err
    assert list(out.iterdir()) == []


@pytest.mark.fault(60)
def test_row_60_folder_cannot_be_made(open_folder, neighbour, as_nobody, cli):
    (open_folder / "closed").mkdir(mode=0o755)
    out = open_folder / "closed/out"
    shutil.copyfile(neighbour[0], open_folder / "a.svs")
    with as_nobody():
        result = cli("run", open_folder / "a.svs", "-o", out, "-e", "lab_lbp")
    assert result.code == 1
    assert "cannot be written to" in result.err
    assert not out.exists()


@pytest.mark.fault(60)
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_row_60_a_file_in_place_of_the_folder(place, tmp_path, neighbour, cli):
    (tmp_path / "file").write_text("precious")
    result = cli("run", neighbour[0], "-o", tmp_path / place, "-e", "lab_lbp")
    assert result.code == 1
    assert str(tmp_path / "file") in result.err
    assert "Traceback" not in result.err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.fault(60)
def test_row_60_read_only_folder_of_a_finished_run(open_folder, neighbour, as_nobody, cli, line):
    """The lock of an earlier run by another user: told as what it is."""
    shutil.copyfile(neighbour[0], open_folder / "a.svs")
    out = open_folder / "out"
    for name in ("", "slides", "qc", "logs"):
        (out / name).mkdir()
        (out / name).chmod(0o777)
    (out / FOLDER).mkdir()
    (out / FOLDER / GUARD).touch(0o444)
    with as_nobody():
        result = cli("run", open_folder / "a.svs", "-o", out, "-e", "lab_lbp")
    assert result.code == 1
    assert "cannot be written to" in result.err
