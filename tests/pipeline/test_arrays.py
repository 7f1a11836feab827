"""One array on disk: what zarr would have written, placed whole or not at all."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from pipeline import places as module
from pipeline.arrays import PLAIN, SMALL, DamagedArray, StoredArray, read_attrs, write_group


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def values(shape, dtype) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 3).astype(dtype)


# --- the bytes are zarr's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(23,), (20, 3), (5, 6, 3), (0, 2)])
def test_every_file_is_what_zarr_writes(tmp_path, shape, dtype, plain):
    data = values(shape, dtype)
    ours = StoredArray.create(tmp_path / "a/ours", shape, dtype, 5, PLAIN if plain else SMALL)
    for chunk in ours.chunks:
        ours.write_chunk(chunk, data[ours.rows(chunk)])
    theirs = zarr.create_array(
        tmp_path / "a/theirs", shape=shape, chunks=(5, *shape[1:]), dtype=dtype, fill_value=0,
        compressors=(Crc32cCodec(),) if plain else (ZstdCodec(level=3), Crc32cCodec()),
        config={"write_empty_chunks": True},
    )  # fmt: skip
    theirs[...] = data
    assert files(tmp_path / "a/ours") == files(tmp_path / "a/theirs")
    again = StoredArray.open(tmp_path / "a/ours").read()
    np.testing.assert_array_equal(again, data)
    assert again.dtype == data.dtype


def test_a_group_is_what_zarr_writes(tmp_path):
    attributes = {"a": [1, 2.5, None], "ü": {"nested": True}, "nan": "nan"}
    write_group(tmp_path / "ours", attributes)
    zarr.create_group(tmp_path / "theirs", attributes=attributes, zarr_format=3)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert read_attrs(tmp_path / "ours") == attributes
    write_group(tmp_path / "ours", {"b": 1})
    assert read_attrs(tmp_path / "ours") == {"b": 1}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"attributes": []}', "\0"])
def test_attributes_that_cannot_be_read_are_none(tmp_path, content):
    assert read_attrs(tmp_path) == {}
    (tmp_path / "zarr.json").write_text(content)
    assert read_attrs(tmp_path) == {}


def test_chunks_of_zeros_are_written_whatever_zarr_is_set_to(tmp_path):
    """zarr's setting is one for all threads: one that sets and resets it must not cost another its chunk."""
    with zarr.config.set({"array.write_empty_chunks": False}):
        array = StoredArray.create(tmp_path / "a", (4, 2), "float16", 4, PLAIN)
        array.write_chunk(0, np.zeros((4, 2), np.float16))
    assert (tmp_path / "a/c/0/0").stat().st_size == 4 * 2 * 2 + 4


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("shape", [(1, 3), (4, 3), (6, 3), (5,), (5, 1), (5, 3, 1)])
def test_values_of_another_shape_are_refused(tmp_path, shape, chunk):
    array = StoredArray.create(tmp_path / "a", (23, 3), "float32", 5)
    with pytest.raises(ValueError, match="whole"):
        array.write_chunk(chunk, np.zeros(shape))
    assert array.missing() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("chunk", "rows"), [(-1, 5), (5, 5), (5, 0)])
def test_chunks_that_are_none_are_refused(tmp_path, chunk, rows):
    array = StoredArray.create(tmp_path / "a", (23, 3), "float32", 5)
    with pytest.raises(ValueError, match="whole"):
        array.write_chunk(chunk, np.zeros((rows, 3)))


def test_nothing_is_made_where_anything_is(tmp_path):
    """A folder that could not be deleted: the chunks in it must not pass for those of the new array."""
    StoredArray.write(tmp_path / "a", np.ones(4))
    with pytest.raises(FileExistsError):
        StoredArray.create(tmp_path / "a", (4,), "float32", 4)
    np.testing.assert_array_equal(StoredArray.open(tmp_path / "a").read(), np.ones(4))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Killed()])
@pytest.mark.parametrize("step", ["open", "write", "replace"])
def test_what_was_there_stays_until_the_new_is_whole(tmp_path, monkeypatch, step, error):
    array = StoredArray.create(tmp_path / "a", (4,), "float32", 4)
    array.write_chunk(0, np.ones(4))
    write_group(tmp_path, {"a": 1})
    before = files(tmp_path)

    def fail(*_):
        raise error

    class Full:
        def __init__(self, name: str, mode: str) -> None:
            self.file = open(name, mode)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.file.close()

        def write(self, data) -> None:
            self.file.write(bytes(data)[:3])
            fail()

    with monkeypatch.context() as patch:
        if step == "replace":
            patch.setattr(module.os, "replace", fail)
        else:
            patch.setattr(module, "open", fail if step == "open" else Full, raising=False)
        with pytest.raises(type(error)):
            array.write_chunk(0, np.zeros(4))
        with pytest.raises(type(error)):
            write_group(tmp_path, {"a": 2})
    after = files(tmp_path)
    left = [name for name in after if name not in before]
    assert all(name.endswith(".partial") for name in left), "which the store sweeps"
    assert len(left) == (2 if isinstance(error, Killed) and step != "open" else 0)
    assert {name: after[name] for name in before} == before


def test_threads_write_and_read_at_the_same_time(tmp_path):
    """Chunks of many arrays, zeros among them, from as many threads; other threads read what is whole already."""
    done = tmp_path / "done"
    StoredArray.write(done, np.arange(3000))

    def write(k: int) -> None:
        array = StoredArray.create(tmp_path / str(k), (64, 50), "float16", 16, PLAIN)
        for chunk in array.chunks:
            array.write_chunk(chunk, np.full((16, 50), k * chunk, np.float16))

    def read(_: int) -> bool:
        return np.array_equal(StoredArray.open(done).read(), np.arange(3000))

    with ThreadPoolExecutor(8) as pool:
        written, whole = pool.map(write, range(24)), pool.map(read, range(48))
        assert list(written) == [None] * 24
        assert all(whole)
    for k in range(24):
        found = StoredArray.open(tmp_path / str(k)).read()
        np.testing.assert_array_equal(found, np.repeat(np.arange(4) * k, 16)[:, None] * np.ones((1, 50)))
    assert not list(tmp_path.rglob("*.partial"))


# --- what is there ---------------------------------------------------------------------------------------------------


def test_missing_against_a_listing(tmp_path):
    theirs = zarr.create_array(
        tmp_path / "a", shape=(23, 3), chunks=(5, 3), dtype="f2", compressors=(Crc32cCodec(),),
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array = StoredArray.open(tmp_path / "a")
    assert array.missing() == [0, 1, 2, 3, 4]
    theirs[:] = 0
    assert array.missing() == []
    (tmp_path / "a/c/0/0").unlink()
    (tmp_path / "a/c/3/0").write_bytes(b"")
    (tmp_path / "a/c/4/0").write_bytes((tmp_path / "a/c/4/0").read_bytes()[:-1])
    assert array.missing() == [0, 3, 4]


@pytest.mark.parametrize(("codecs", "flipped"), [(PLAIN, 7), (SMALL, 7), (SMALL, -1)])
def test_damage_is_named(tmp_path, codecs, flipped):
    array = StoredArray.create(tmp_path / "a", (23,), "int32", 5, codecs)
    for chunk in array.chunks:
        array.write_chunk(chunk, np.arange(23, dtype=np.int32)[array.rows(chunk)])
    path = tmp_path / "a/c/2"
    data = bytearray(path.read_bytes())
    data[flipped] ^= 4
    path.write_bytes(data)
    assert array.missing() == []
    assert [chunk for chunk in array.chunks if array.is_damaged(chunk)] == [2]
    with pytest.raises(DamagedArray, match="chunk 2 is damaged"):
        array.read()
    path.unlink()
    with pytest.raises(DamagedArray, match="chunk 2 is missing"):
        array.read()
    assert not array.stored[10:15].any(), "as zarr reads it"


@pytest.mark.parametrize("part", ["shape", "data_type", "chunk_grid", None])
def test_a_damaged_document_is_an_error_when_opened(tmp_path, part):
    StoredArray.write(tmp_path / "a", np.arange(5))
    path = tmp_path / "a/zarr.json"
    about = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: value for name, value in about.items() if name != part} if part else [about]))
    with pytest.raises((KeyError, TypeError)):
        StoredArray.open(tmp_path / "a")
    os.unlink(path)
    with pytest.raises(OSError, match="No such file"):
        StoredArray.open(tmp_path / "a")
