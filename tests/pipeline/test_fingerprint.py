"""A fingerprint changes with what is in a file, not with when it was copied."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UnreadableSlide
from pipeline.fingerprint import BLOCK, BLOCKS, device, fingerprint, stamp

WHOLE = BLOCK * BLOCKS


def write(path, size, seed=0):
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [0, 1, 1000, WHOLE, WHOLE + 1, 3 * WHOLE])
def test_same_content_same_fingerprint(tmp_path, size):
    a = write(tmp_path / "a", size)
    shutil.copy(a, tmp_path / "b")
    os.utime(tmp_path / "b", ns=(1, 1))
    x, y = fingerprint(a), fingerprint(tmp_path / "b")
    assert x.sha256 == y.sha256
    assert x.size == y.size == size
    assert (x.mtime_ns, y.mtime_ns) == (os.stat(a).st_mtime_ns, 1)


@pytest.mark.parametrize("at", [0, 1, 500_000, WHOLE // 2, WHOLE - 1])
def test_every_byte_of_a_small_file_counts(tmp_path, at):
    path = write(tmp_path / "a", WHOLE)
    before = fingerprint(path).sha256
    flip(path, at)
    assert fingerprint(path).sha256 != before


@pytest.mark.parametrize("at", [0, BLOCK - 1, -1, -BLOCK])
def test_head_and_tail_of_a_large_file_count(tmp_path, at):
    path = write(tmp_path / "a", 3 * WHOLE)
    before = fingerprint(path).sha256
    flip(path, at)
    assert fingerprint(path).sha256 != before


def test_no_gap_of_a_large_file_is_longer_than_an_even_spread_leaves(tmp_path):
    size = 3 * WHOLE
    path = write(tmp_path / "a", size)
    before = fingerprint(path).sha256
    gap = (size - BLOCK * BLOCKS) // (BLOCKS - 1) + 1
    data = path.read_bytes()
    for start in range(0, size - gap - 1, size // 7):  # one byte more than a gap always meets a block
        path.write_bytes(data[:start] + bytes(255 - b for b in data[start : start + gap + 1]) + data[start + gap + 1 :])
        assert fingerprint(path).sha256 != before, start


def test_size_counts_where_the_bytes_that_are_read_do_not_differ(tmp_path):
    (tmp_path / "a").write_bytes(bytes(2 * WHOLE))
    (tmp_path / "b").write_bytes(bytes(2 * WHOLE + 1))
    assert fingerprint(tmp_path / "a").sha256 != fingerprint(tmp_path / "b").sha256


@pytest.mark.parametrize("kind", ["missing", "folder", "no permission"])
def test_what_cannot_be_read_is_the_slides_fault(tmp_path, monkeypatch, kind):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    if kind == "no permission":  # root may read anything, so the refusal is made up
        write(path, 10)
        monkeypatch.setattr("builtins.open", _denied)
    with pytest.raises(UnreadableSlide) as error:
        fingerprint(path)
    assert error.value.stage == "open"


def _denied(path, *_):
    raise PermissionError(13, "Permission denied", str(path))


def test_a_machine_out_of_descriptors_is_not_the_slides_fault(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(24, "Too many open files", str(path))

    write(tmp_path / "a", 10)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="Too many"):
        fingerprint(tmp_path / "a")


def test_stamp_changes_when_a_file_is_written_to_or_replaced(tmp_path):
    path = write(tmp_path / "a", 10)
    first = stamp(path)
    assert first == stamp(path)
    assert first[:2] == (10, os.stat(path).st_mtime_ns)
    os.utime(path, ns=(5, 5))
    assert stamp(path) != first
    written = stamp(path)
    other = write(tmp_path / "b", 10)
    os.utime(other, ns=(5, 5))
    os.replace(other, path)  # same size and time, another file
    assert stamp(path) != written


def test_the_device_of_what_is_gone_is_that_of_the_folder_it_was_in(tmp_path):
    (tmp_path / "a.svs").touch()
    before = device(tmp_path / "a.svs")
    assert before == device(tmp_path) == os.stat(tmp_path).st_dev
    (tmp_path / "a.svs").unlink()
    assert device(tmp_path / "a.svs") == device(tmp_path / "deep/er/a.svs") == before
    assert device(tmp_path / "a.svs") != device(Path("/proc/self")), "another one"
