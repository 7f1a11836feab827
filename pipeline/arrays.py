"""Zarr v3 arrays and groups on a disk or an object store: zarr makes the bytes, each file is placed once, whole.

Asked for an array in a group, zarr looks for each of its parents and writes their documents again: 43 writes where 25
do. Here the caller knows what is there. Documents come from zarr's own metadata and chunks from its codecs, by way of a
store in memory; what is stored is byte for byte what zarr would have written.
"""

import asyncio
import json
import math
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.storage import LocalStore, MemoryStore, StorePath

from .objects import ObjectPath
from .places import is_remote, put

CHECKSUM = {"name": "crc32c"}
# Features are nearly random: compression gains little and costs most of the time. The checksum is the last codec.
PLAIN = (CHECKSUM,)
SMALL = ({"name": "zstd", "configuration": {"level": 3, "checksum": False}}, CHECKSUM)
# A chunk of zeros that is left out would look unfinished. Said to each array: zarr.config is one for all threads.
EMPTY_TOO: Any = {"order": "C", "write_empty_chunks": True}


class DamagedArray(ValueError):
    """A chunk of an array is missing, or is not what was written."""


def read_attrs(path: Path) -> dict[str, Any]:
    """The attributes of a group, {} if there is none or its zarr.json is cut. By hand: 50 times faster than zarr."""
    try:
        attributes = _document(path)["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


def write_group(path: Path, attributes: dict[str, Any]) -> None:
    """Make a group, or replace the attributes of one."""
    put(path / "zarr.json", _json(GroupMetadata(attributes)))


class StoredArray:
    """An array on disk, chunked along its first axis alone. A chunk is written whole, each by one writer."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self._document: Any = document
        self.shape: tuple[int, ...] = tuple(document["shape"])
        self.chunk_shape: tuple[int, ...] = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
        self.dtype = np.dtype(document["data_type"])

    @classmethod
    def open(cls, path: Path) -> "StoredArray":
        """Raises OSError, ValueError, KeyError or TypeError where there is none or its document is damaged."""
        return cls(path, _document(path))

    @classmethod
    def create(
        cls, path: Path, shape: tuple[int, ...], dtype: Any, chunk_rows: int, codecs: tuple[dict[str, Any], ...] = SMALL
    ) -> "StoredArray":
        """An array without chunks. FileExistsError where anything is: old chunks must not pass for new ones."""
        chunk_shape = [max(side, 1) for side in (chunk_rows, *shape[1:])]
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": np.zeros((), dtype).item(),
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *codecs],
        }
        array = cls(path, document)
        if isinstance(path, ObjectPath):
            if path.exists():
                raise FileExistsError(f"{path} is there")
        else:
            os.makedirs(path)
        put(path / "zarr.json", _json(array._metadata))
        return array

    @classmethod
    def write(cls, path: Path, data: np.ndarray) -> None:
        """A small array, compressed, in one chunk."""
        array = cls.create(path, data.shape, data.dtype, len(data))
        if data.size:
            array.write_chunk(0, data)

    @property
    def chunks(self) -> range:
        return range(math.ceil(self.shape[0] / self.chunk_shape[0]))

    def rows(self, chunk: int) -> slice:
        size = self.chunk_shape[0]
        return slice(chunk * size, min((chunk + 1) * size, self.shape[0]))

    def write_chunk(self, chunk: int, values: np.ndarray) -> None:
        """From any thread. ValueError unless `values` are all rows of the chunk; zarr would repeat or cut them."""
        rows = self.rows(chunk)
        if chunk not in self.chunks or values.shape != (rows.stop - rows.start, *self.shape[1:]):
            raise ValueError("a chunk is written whole or not at all")
        files: dict[str, Buffer] = {}
        self._in(MemoryStore(files))[rows] = values
        for name, data in files.items():
            put(self.path / name, data.as_numpy_array().data)

    def missing(self) -> list[int]:
        """The chunks that are not stored whole; a missing one would read as zeros.

        No chunk is read. What is not compressed has a size that is known, and it is checked too.
        """
        rest = "/0" * (len(self.shape) - 1)
        plain = all(codec["name"] != "zstd" for codec in self._document["codecs"])
        whole = math.prod(self.chunk_shape) * self.dtype.itemsize + 4 if plain else None
        size_of = self._sizes()
        lost = []
        for chunk in self.chunks:
            size = size_of(f"{chunk}{rest}")
            if size < 1 or (whole is not None and size != whole):
                lost.append(chunk)
        return lost

    def _sizes(self) -> Callable[[str], int]:
        """How many bytes a chunk has, 0 if it is missing; one request says it of all on an object store."""
        folder = self.path / "c"
        if isinstance(folder, ObjectPath):
            there = {str(name): found.st_size for name, found in folder.below().items()}
            return lambda name: there.get(name, 0)

        def on_disk(name: str) -> int:
            try:
                return os.stat(folder / name).st_size
            except FileNotFoundError:
                return 0

        return on_disk

    @cached_property
    def stored(self) -> zarr.Array:
        """To read, as zarr reads: rows of missing chunks are zeros, a wrong checksum is a ValueError."""
        # A LocalStore and not a string: zarr takes "::" in a string for a chain of addresses.
        return self._in(_Objects(self.path) if is_remote(self.path) else LocalStore(self.path, read_only=True))

    def is_damaged(self, chunk: int) -> bool:
        try:
            self.stored[self.rows(chunk)]
        except ValueError:  # of the checksum
            return True
        return False

    def read(self) -> np.ndarray:
        """All of it. Raises DamagedArray, which names the chunk, if one is missing or fails its checksum."""
        for chunk in self.missing():
            raise DamagedArray(f"chunk {chunk} is missing")
        try:
            return np.asarray(self.stored[...])
        except ValueError as error:
            for chunk in filter(self.is_damaged, self.chunks):
                raise DamagedArray(f"chunk {chunk} is damaged (its checksum is wrong)") from error
            raise

    @cached_property
    def _metadata(self) -> Any:
        """The document as zarr understands it; parsed once, and only where chunks are read or written."""
        return zarr.AsyncArray(self._document, StorePath(MemoryStore())).metadata

    def _in(self, store: LocalStore | MemoryStore) -> zarr.Array:
        return zarr.Array(zarr.AsyncArray(self._metadata, StorePath(store), config=EMPTY_TOO))


class _Objects(MemoryStore):
    """What zarr asks for, read from an object store: a network that fails is not a chunk that is missing."""

    def __init__(self, root: Path) -> None:
        super().__init__(read_only=True)
        self._root = root

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        try:
            data = await asyncio.to_thread((self._root / key).read_bytes)
        except FileNotFoundError:
            return None
        return cast(Buffer, prototype.buffer.from_bytes(data))


def _document(path: Path) -> Any:
    return json.loads((path / "zarr.json").read_bytes())


def _json(metadata: Any) -> bytes:
    return cast(bytes, metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes())
