"""Where everything about a slide is kept: one Zarr v3 group per slide, resumable, and whole only when it says so.

A group is written in place; its own attributes come last and say `complete` or `empty`. Features are written in whole
chunks of rows, each once: a chunk that exists is finished, whatever happened after.
"""

import hashlib
import json
import math
import os
import shutil
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from .errors import BrokenBag, UsageError, nearest, slide_door
from .quadtree import QuadTree
from .tissue import TissueMask

if TYPE_CHECKING:
    from heads import Bag

SCHEMA = "slidestream/bag"
SCHEMA_VERSION = 1
CHUNK_ROWS = 2048
# Features are nearly random: compression gains little and costs most of the time. The checksum is the last codec.
PLAIN = (Crc32cCodec(),)
SMALL = (ZstdCodec(level=3), Crc32cCodec())
MAX_NAME_BYTES = 240


class BagStore:
    """The slides of an output folder.

    >>> bag = BagStore("out/").bag("case1/a.svs", encoder="resnet50")  # a heads.Bag
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.abspath(root))

    def group(self, slide: str) -> "SlideGroup":
        """The group of a slide, whether it is there or not."""
        return SlideGroup(self.root / "slides" / group_path(slide), slide)

    def slides(self) -> list[str]:
        """The slides that have a readable group, sorted; look at `group(slide).status` for what it is worth."""
        found = []
        for folder, names, _ in os.walk(self.root / "slides"):
            groups = [name for name in names if name.endswith(".zarr")]
            names[:] = [name for name in names if name not in groups]
            attrs = (read_attrs(Path(folder, name)) for name in groups)
            found += [a["slide"]["path"] for a in attrs if "slide" in a]
        return sorted(found)

    def bag(self, slide: str, encoder: str | None = None) -> "Bag":
        """The stored features of a slide as a heads.Bag. `encoder` may be left out where there is one only.

        Raises BrokenBag if the slide is not complete, damaged, or has no features of this encoder.
        """
        from heads import Bag, BagLevel

        group = self.group(slide)
        group.require_complete()
        tree, features = group.tree(), group.features(group.encoder_key(encoder))
        x, valid = features.read()
        levels, at = [], 0
        for k, level in enumerate(tree.levels):
            n = level.stop - level.start
            has = k in tree.encoded_levels
            rows = slice(at, at + n)
            levels.append(
                BagLevel.of(
                    x[rows] if has else None,
                    grid=level.grid,
                    tissue=level.tissue,
                    parent=level.parent,
                    valid=valid[rows] if has else None,
                    xy=level.xy,
                    mpp=level.mpp,
                    tile_px=level.tile_px,
                    span_px=level.span_px,
                )
            )
            at += n if has else 0
        return Bag(levels=levels, slide=slide)


def group_path(slide: str) -> Path:
    """The folder of a slide's group below `slides/`; a name too long for a file system is cut and gets its hash."""
    pure = PurePosixPath(slide)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UsageError(f"{slide!r} is no slide of this folder")
    return Path(*pure.parts[:-1], short_name(pure.name, ".zarr"))


def short_name(name: str, suffix: str) -> str:
    raw = os.fsencode(name)
    if len(raw) + len(suffix) <= MAX_NAME_BYTES:
        return name + suffix
    return (
        os.fsdecode(raw[:160]).encode("utf-8", "ignore").decode() + "-" + hashlib.sha256(raw).hexdigest()[:16] + suffix
    )


def read_attrs(path: Path) -> dict[str, Any]:
    """The attributes of a group, {} if there is none or its zarr.json is cut. By hand: 50 times faster than zarr."""
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


class SlideGroup:
    """One slide's group on disk."""

    def __init__(self, path: Path, slide: str) -> None:
        self.path = path
        self.slide = slide

    @property
    def attrs(self) -> dict[str, Any]:
        return read_attrs(self.path)

    @property
    def status(self) -> str:
        """writing, complete or empty; missing if there is nothing that can be read."""
        attrs = self.attrs
        return attrs.get("status", "missing") if attrs.get("schema") == SCHEMA else "missing"

    @cached_property
    def _zarr(self) -> zarr.Group:
        # A LocalStore and not a string: zarr takes "::" in a string for a chain of addresses.
        return zarr.open_group(LocalStore(self.path), mode="a", zarr_format=3)

    def begin(self, status: str = "writing", **attrs: Any) -> None:
        """Start or take up a group. One whose own attributes cannot be read is begun anew."""
        if not self.attrs and self.path.exists():
            shutil.rmtree(self.path)
            self.__dict__.pop("_zarr", None)
        self.path.mkdir(parents=True, exist_ok=True)
        self._sweep()
        hashes = self.attrs.get("hashes", {})
        self.update(schema=SCHEMA, schema_version=SCHEMA_VERSION, status=status, hashes=hashes, **attrs)

    def _sweep(self) -> None:
        """Remove what a killed writer left half-written; zarr writes a chunk aside and renames it."""
        for part in self.path.rglob("*.partial"):
            part.unlink(missing_ok=True)

    def update(self, **attrs: Any) -> None:
        self._zarr.attrs.put(self.attrs | attrs)

    def drop(self, *parts: str) -> None:
        """Delete parts of the group (`tissue`, `tiles`, `features`, `predictions`)."""
        for part in parts:
            shutil.rmtree(self.path / part, ignore_errors=True)

    def finish(self, status: str, **attrs: Any) -> None:
        """The last write: from now on the group is whole."""
        self.update(status=status, **attrs)

    def write_tissue(self, mask: TissueMask, thumbnail: np.ndarray, tissue_hash: str) -> None:
        self.drop("tissue", "tiles", "features", "predictions")
        _write(self._zarr, "tissue/mask", mask.image.astype(np.uint8), mask.image.shape)
        _write(self._zarr, "tissue/thumbnail", thumbnail, thumbnail.shape)
        facts = {
            "downsample": list(mask.downsample),
            "mpp": mask.mpp,
            "method": mask.method,
            "warnings": list(mask.warnings),
        }
        self._zarr["tissue"].attrs.put(cast(Any, facts))
        self.update(hashes={"tissue": tissue_hash})

    def write_tiles(self, tree: QuadTree) -> None:
        self.drop("tiles", "features", "predictions")
        rows = max(len(tree), 1)
        for name in ("grid", "xy", "tissue", "parent"):
            column = getattr(tree, name)
            _write(self._zarr, f"tiles/{name}", column, (rows, *column.shape[1:]))
        self._zarr["tiles"].attrs.put(tree.facts())
        self.update(hashes={"tissue": self.attrs["hashes"]["tissue"], "tiles": tree.hash})

    def mask(self) -> TissueMask:
        with self._door():
            facts = read_attrs(self.path / "tissue")
            image = self._whole("tissue/mask").astype(bool)
            return TissueMask(
                image, tuple(facts["downsample"]), facts["mpp"], facts["method"], tuple(facts["warnings"])
            )

    def thumbnail(self) -> np.ndarray:
        with self._door():
            return self._whole("tissue/thumbnail")

    def tree(self) -> QuadTree:
        """The stored tiles; BrokenBag if they are not what their hash says."""
        with self._door():
            facts = read_attrs(self.path / "tiles")
            grid, xy, tissue, parent = (self._whole(f"tiles/{name}") for name in ("grid", "xy", "tissue", "parent"))
            scales = tuple((part["mpp"], part["span_px"], part["start"], part["stop"]) for part in facts["levels"])
            encoded = tuple(facts["encoded"])
            tree = QuadTree(
                grid,
                xy,
                tissue,
                parent,
                scales,
                facts["levels"][0]["tile_px"],
                tuple(facts["origin"]),
                facts["overlap"],
                facts["regular"],
                () if len(encoded) == len(scales) else encoded,
            )
        if tree.hash != self.attrs.get("hashes", {}).get("tiles"):
            raise self._broken("its table of tiles is not the one that was written")
        return tree

    def _door(self):  # type: ignore[no-untyped-def]  # a context manager
        return slide_door(self.slide, "store", BrokenBag)

    def _read_group(self, name: str) -> zarr.Group:
        return zarr.open_group(LocalStore(self.path / name, read_only=True), mode="r", zarr_format=3)

    def _whole(self, name: str) -> np.ndarray:
        array = zarr.open_array(LocalStore(self.path / name, read_only=True), mode="r", zarr_format=3)
        lost = missing_chunks(self.path / name, array)
        if lost:
            raise self._broken(f"{name}: chunk {lost[0]} is missing")
        try:
            return np.asarray(array[...])
        except ValueError as error:
            raise self._broken(f"{name} is damaged ({error})") from error

    def _broken(self, what: str) -> BrokenBag:
        return BrokenBag(
            self.slide, "store", f"{what}. Run the same command with --redo: it recomputes what is damaged"
        )

    def require_complete(self) -> None:
        if self.status == "empty":
            raise BrokenBag(self.slide, "store", "the slide has no tissue, so it has no features")
        if self.status != "complete":
            found = {"missing": "has not been processed", "writing": "is not finished"}[self.status]
            raise BrokenBag(self.slide, "store", f"the slide {found}; run `slidestream run` again, it resumes")

    def encoders(self) -> list[str]:
        """The keys of the feature groups that are complete."""
        folder = self.path / "features"
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        return [name for name in names if read_attrs(folder / name).get("status") == "complete"]

    def encoder_key(self, encoder: str | None) -> str:
        """The feature group that is meant: its key, or an encoder's name where one group only is of that encoder."""
        there = self.encoders()
        wanted = (
            there
            if encoder is None
            else [k for k in there if k == encoder or k.split("@")[0] == encoder.replace("/", "--")]
        )
        exact = [key for key in wanted if key == encoder]
        if len(exact or wanted) == 1:
            return (exact or wanted)[0]
        if not there:
            raise BrokenBag(self.slide, "store", "the slide has no complete features")
        if wanted:
            raise BrokenBag(self.slide, "store", f"more than one set of features fits, say which: {', '.join(wanted)}")
        raise BrokenBag(self.slide, "store", nearest(encoder or "", there, "encoder"))

    def features(self, key: str) -> "Features":
        return Features(self, key)

    def write_prediction(self, model: str, arrays: dict[str, np.ndarray], **attrs: Any) -> None:
        """predictions/<model>: small arrays and, last, their attributes with `status: complete`."""
        name = f"predictions/{model}"
        self.drop(name)
        for key, array in arrays.items():
            _write(self._zarr, f"{name}/{key}", array, tuple(max(side, 1) for side in array.shape))
        self._zarr[name].attrs.put(attrs | {"status": "complete"})

    def prediction(self, model: str) -> dict[str, np.ndarray]:
        if read_attrs(self.path / "predictions" / model).get("status") != "complete":
            raise BrokenBag(self.slide, "store", f"there is no prediction of the model {model!r}")
        with self._door():
            names = self._read_group(f"predictions/{model}").array_keys()
            return {name: self._whole(f"predictions/{model}/{name}") for name in names}


class Features:
    """One encoder's features of a slide: `x` (M, D) and `valid` (M,), rows of the encoded levels in table order."""

    def __init__(self, group: SlideGroup, key: str) -> None:
        self.group = group
        self.key = key
        self.path = group.path / "features" / key

    @property
    def attrs(self) -> dict[str, Any]:
        return read_attrs(self.path)

    def begin(self, rows: int, dim: int, dtype: str, **attrs: Any) -> None:
        """Start, or take up what is current; features of anything else under this key are deleted first."""
        old = self.attrs
        if any(old.get(name) != value for name, value in attrs.items()) or not self._arrays_fit(rows, dim, dtype):
            self._drop(old.get("feature_hash"))
            create = self.group._zarr.create_array
            options: dict[str, Any] = {"config": {"write_empty_chunks": True}}
            name = f"features/{self.key}"
            create(
                f"{name}/valid",
                shape=(rows,),
                chunks=(CHUNK_ROWS,),
                dtype="bool",
                compressors=SMALL,
                fill_value=False,
                **options,
            )
            create(
                f"{name}/x",
                shape=(rows, dim),
                chunks=(CHUNK_ROWS, dim),
                dtype=dtype,
                compressors=PLAIN,
                fill_value=0,
                **options,
            )
        self.group._zarr[f"features/{self.key}"].attrs.put(attrs | {"status": "writing"})
        self._x = self._open("x", "a")
        self._valid = self._open("valid", "a")

    def _drop(self, feature_hash: str | None) -> None:
        """Delete these features, and the predictions that were made of them."""
        folder = self.group.path / "predictions"
        made = [p.name for p in folder.glob("*") if read_attrs(p).get("feature_hash") == feature_hash]
        self.group.drop(f"features/{self.key}", *(f"predictions/{name}" for name in made))

    def _arrays_fit(self, rows: int, dim: int, dtype: str) -> bool:
        try:
            x, valid = self._open("x", "r"), self._open("valid", "r")
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return x.shape == (rows, dim) and valid.shape == (rows,) and x.dtype == np.dtype(dtype)

    def _open(self, name: str, mode: Any) -> zarr.Array:
        # Set here, as open_array ignores its `config`; a chunk of zeros that is left out would look unfinished.
        with zarr.config.set({"array.write_empty_chunks": True}):
            return zarr.open_array(
                LocalStore(self.path / name, read_only=mode == "r"), mode=mode if mode == "r" else "r+", zarr_format=3
            )

    @property
    def dtype(self) -> np.dtype:
        return self._x.dtype

    def stored_valid(self) -> np.ndarray:
        """(M,) bool of features that are being written; rows whose chunk is missing are False."""
        return np.asarray(self._valid[...])

    def missing_rows(self) -> np.ndarray:
        """(M,) bool: the rows whose chunk is not there yet, or is damaged."""
        missing = np.zeros(self._x.shape[0], bool)
        for name, array in (("x", self._x), ("valid", self._valid)):
            lost = set(missing_chunks(self.path / name, array))
            for chunk in range(math.ceil(len(missing) / CHUNK_ROWS)):
                rows = slice(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)
                if chunk in lost or _is_damaged(array, rows):
                    missing[rows] = True
        return missing

    def write_chunk(self, chunk: int, x: np.ndarray, valid: np.ndarray) -> None:
        """One whole chunk of rows; `valid` first, so that an `x` chunk that exists has its `valid`."""
        rows = slice(chunk * CHUNK_ROWS, chunk * CHUNK_ROWS + len(x))
        if rows.stop != min((chunk + 1) * CHUNK_ROWS, self._x.shape[0]):
            raise ValueError("a chunk is written whole or not at all")
        self._valid[rows] = valid
        self._x[rows] = x

    def chunks_are_there(self) -> bool:
        """Every chunk is stored, in its full size where that is known; no chunk is read."""
        with self.group._door():
            return not any(missing_chunks(self.path / name, self._open(name, "r")) for name in ("x", "valid"))

    def finish(self, **attrs: Any) -> None:
        self.group._zarr[f"features/{self.key}"].attrs.put(self.attrs | attrs | {"status": "complete"})

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """x (M, D) float16 or float32 and valid (M,) bool. BrokenBag if a chunk is missing or fails its checksum."""
        if self.attrs.get("status") != "complete":
            raise BrokenBag(self.group.slide, "store", f"its features of {self.key} are not finished")
        with self.group._door():
            return tuple(self._checked(name) for name in ("x", "valid"))  # type: ignore[return-value]

    def _checked(self, name: str) -> np.ndarray:
        label = f"features/{self.key}/{name}"
        array = self._open(name, "r")
        lost = missing_chunks(self.path / name, array)
        if lost:
            raise self.group._broken(f"{label}: chunk {lost[0]} is missing")
        for chunk in range(math.ceil(array.shape[0] / CHUNK_ROWS)):
            if _is_damaged(array, slice(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)):
                raise self.group._broken(f"{label}: chunk {chunk} is damaged (its checksum is wrong)")
        return np.asarray(array[...])


def _is_damaged(array: zarr.Array, rows: slice) -> bool:
    try:
        array[rows]
    except ValueError:  # of the checksum
        return True
    return False


def missing_chunks(path: Path, array: zarr.Array) -> list[int]:
    """The first-axis chunks that are not stored whole; a missing chunk would read as zeros.

    All our arrays are chunked along their first axis alone. Uncompressed chunks have one size, which is checked too.
    """
    rest = "/0" * (array.ndim - 1)
    whole = math.prod(array.chunks) * array.dtype.itemsize + 4 if _is_plain(array) else None
    lost = []
    for chunk in range(math.ceil(array.shape[0] / array.chunks[0])):
        try:
            size = os.stat(path / f"c/{chunk}{rest}").st_size
        except FileNotFoundError:
            size = -1
        if size < 1 or (whole is not None and size != whole):
            lost.append(chunk)
    return lost


def _is_plain(array: zarr.Array) -> bool:
    return not any(isinstance(codec, ZstdCodec) for codec in array.compressors)


def _write(group: zarr.Group, name: str, data: np.ndarray, chunks: tuple[int, ...]) -> None:
    array = group.create_array(
        name,
        shape=data.shape,
        chunks=chunks,
        dtype=data.dtype,
        compressors=SMALL,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    if data.size:
        array[...] = data
