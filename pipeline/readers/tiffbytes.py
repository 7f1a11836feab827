"""What every byte of a TIFF file belongs to: a tile, a directory, the value of a tag, or nothing.

In a file as it was written no two tiles share a part, and next to nothing is left over. Where an offset or a count has
been damaged, tiles overlap, or there are data that belong to none; where a directory is lost, there are many.
"""

import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile

TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
MAX_ENTRIES = 1 << 16
LAST = 1 << 16  # above all tags
SHORT, PADDING = 16, 4096  # bytes that belong to nothing and align what follows, in a table of tiles, in a file
GAPS, REACH = 64, 1 << 16  # the largest gaps in which a directory is looked for, and how far into them from both ends
LONGS = {4: "I", 13: "I", 16: "Q", 18: "Q"}  # types of an address
# Tags that are one number, and those without which pixels would be taken for something else.
SINGLE = {256, 257, 259, 262, 266, 274, 277, 278, 284, 317, 322, 323}
CODING = {258, 259, 262, 277, 284, 317, 320, 338, 339, 347, 530}


class Directory(NamedTuple):
    """An image directory: where it stands, its entries (code, type, count, value), where the next one should stand.

    `following` is -1 if the file ends before.
    """

    offset: int
    entries: np.ndarray
    following: int


def read_directory(file: BinaryIO, form: tifffile.TiffFormat, offset: int) -> Directory:
    wide = "u8" if form.version == 43 else "u4"
    kind = np.dtype([("code", "u2"), ("type", "u2"), ("count", wide), ("value", wide)]).newbyteorder(form.byteorder)
    file.seek(offset)
    number = max(unpack(form.tagnoformat, file.read(form.tagnosize)), 0)
    data = file.read(number * form.tagsize) if number <= MAX_ENTRIES else b""
    following = unpack(form.offsetformat, file.read(form.offsetsize))
    return Directory(offset, np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind), following)


def unpack(form: str, data: bytes) -> int:
    """-1 where the data end too early."""
    return struct.unpack(form, data)[0] if len(data) == struct.calcsize(form) else -1


def value_spans(directory: Directory) -> np.ndarray:
    """(n, 2) int64: start and bytes of the values that do not stand in the entries themselves."""
    entries = directory.entries
    each = np.array([TYPE_BYTES.get(int(kind), 0) for kind in entries["type"]], np.float64)
    lengths = each * entries["count"]  # float: a damaged count of 64 bits times 8 is no int64
    outside = lengths > entries["value"].dtype.itemsize
    starts = entries["value"].astype(np.float64)
    return np.stack([starts, lengths], axis=1)[outside].clip(max=2.0**62).astype(np.int64)


def directory_fault(directory: Directory, size: int) -> str:
    """What is wrong with the entries themselves: readers pass over a tag that is damaged, and take its default."""
    spans, codes = value_spans(directory), directory.entries["code"].astype(int)
    if np.any((spans[:, 0] < 8) | (spans.sum(axis=1) > size)):
        return "truncated: a tag's value lies beyond the end of the file"
    for code, kind, count in zip(
        codes.tolist(), *(directory.entries[n].tolist() for n in ("type", "count")), strict=True
    ):
        if code in tifffile.TIFF.TAGS and kind not in TYPE_BYTES:
            return f"corrupt: its tag {code} is of no type"
        if code in SINGLE and count != 1:
            return f"corrupt: its tag {code} has {count} values"
    if len(set(codes.tolist())) < len(codes):
        return "corrupt: one of its tags stands there twice"
    return _order_fault(codes)


def _order_fault(codes: np.ndarray) -> str:
    """Tags stand in the order of their numbers, so that a damaged number shows; harmless unless one of CODING."""
    missing = CODING - {*codes.tolist()}
    for low, code, high in zip([0, *codes[:-1]], codes, [*codes[1:], LAST], strict=True):
        if not low < code < high and code not in tifffile.TIFF.TAGS and any(low < tag < high for tag in missing):
            return f"corrupt: it has a tag {code} where another should be"
    return ""


def claims(offsets: np.ndarray, counts: np.ndarray, others: np.ndarray, size: int) -> tuple[str, np.ndarray]:
    """What is wrong with the addresses of all tiles of a file, and (k, 2), start and end of what belongs to nothing.

    offsets, counts (n,) int64 of the tiles; others (m, 2): start and bytes of directories, values and the header.
    """
    nothing = np.empty((0, 2), np.int64)
    there = counts > 0
    tiles, shared = np.unique(np.stack([offsets[there], counts[there]], axis=1), axis=0, return_counts=True)
    if np.any(tiles[:-1].sum(axis=1) > tiles[1:, 0]):
        return "corrupt: parts of its tiles overlap", nothing
    if _meet(tiles, others):
        return "corrupt: a tile overlaps what is no tile", nothing
    gaps = _gaps(np.concatenate([tiles, others]), size)
    lengths = gaps[:, 1] - gaps[:, 0]
    if np.any(shared > 1) and _is_displaced(offsets[there], counts[there], gaps[lengths > SHORT]):
        return "corrupt: two tiles have one address, and there are data that belong to no tile", nothing
    if _within(offsets[~there & (offsets > 0)], gaps[lengths > SHORT]):
        return "corrupt: a tile without bytes has the address of data that belong to no tile", nothing
    return "", gaps


def unclaimed(gaps: np.ndarray) -> int:
    """Bytes of a file that belong to nothing, without those that only align what follows."""
    lengths = gaps[:, 1] - gaps[:, 0]
    return int(lengths[lengths >= PADDING].sum())


def has_lost_directory(file: BinaryIO, form: tifffile.TiffFormat, gaps: np.ndarray) -> bool:
    """True if a directory to which no link leads names data that belong to nothing.

    Directories that were written anew leave the old one behind, which names data that belong to the new one.
    """
    lengths = gaps[:, 1] - gaps[:, 0]
    wide = lengths >= form.tagnosize + 4 * form.tagsize + form.offsetsize  # what a directory needs
    for start, end in gaps[wide][np.argsort(-lengths[wide])][:GAPS].tolist():
        for first in {start, max(start, end - REACH)}:
            file.seek(first)
            places = _like_directories(file.read(min(REACH, end - first)), form)
            if any(_within(_address(file, form, first + place), gaps) for place in places):
                return True
    return False


def _like_directories(data: bytes, form: tifffile.TiffFormat) -> Iterator[int]:
    """Where a number of entries from 4 to 255 stands, and one of the three tags that come first."""
    parts = [b"[\x04-\xff]" + bytes(form.tagnosize - 1), b"(?:[\xfe\xff]\0|\0\x01)"]
    if form.byteorder == ">":
        parts = [bytes(form.tagnosize - 1) + b"[\x04-\xff]", b"(?:\0[\xfe\xff]|\x01\0)"]
    return (found.start() for found in re.finditer(b"(?=" + b"".join(parts) + b")", data, re.DOTALL))


def _address(file: BinaryIO, form: tifffile.TiffFormat, at: int) -> np.ndarray:
    """(1,) where the first tile of the directory at `at` stands, (0,) if there is no directory with tiles."""
    entries = read_directory(file, form, at).entries
    nowhere = np.empty(0, np.int64)
    tiles = [entry for entry in entries if entry["code"] in (273, 324) and int(entry["type"]) in LONGS]
    if len(tiles) != 1 or np.any(np.diff(entries["code"].astype(int)) <= 0) or 257 not in entries["code"]:
        return nowhere
    address = int(tiles[0]["value"])
    if tiles[0]["count"] > 1:
        kind = form.byteorder + LONGS[int(tiles[0]["type"])]
        file.seek(address)
        address = unpack(kind, file.read(struct.calcsize(kind)))
    return np.array([address])


def _meet(tiles: np.ndarray, others: np.ndarray) -> bool:
    """True if one of the tiles (n, 2), which are sorted and do not overlap, has a part of one of the others (m, 2)."""
    last = np.searchsorted(tiles[:, 0], others.sum(axis=1)) - 1  # the last tile that begins before the end of each
    return bool(np.any((last >= 0) & (tiles.sum(axis=1)[last] > others[:, 0]))) if len(tiles) else False


def _is_displaced(offsets: np.ndarray, counts: np.ndarray, gaps: np.ndarray) -> bool:
    """True if a tile has the address of another, and where the tiles before and after it leave off there is a hole.

    Tiles are mostly written one after the other. Equal tiles that were stored once leave no hole there, and a label
    that was taken out leaves one elsewhere.
    """
    _, which, times = np.unique(offsets, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(times[which] > 1)
    begin = (offsets + counts)[repeated[repeated > 0] - 1]
    end = offsets[repeated[repeated < len(offsets) - 1] + 1]
    return _near(begin, gaps[:, 0]) or _near(end, gaps[:, 1])


def _near(places: np.ndarray, edges: np.ndarray) -> bool:
    """True if one of the places (n,) is within SHORT bytes of one of the edges (m,), which are sorted."""
    at = np.searchsorted(edges, places - SHORT)
    return bool(np.any((at < len(edges)) & (np.append(edges, -1)[at] <= places + SHORT)))


def _within(places: np.ndarray, gaps: np.ndarray) -> bool:
    """True if one of the places (n,) lies in one of the gaps (m, 2), which are sorted."""
    at = np.searchsorted(gaps[:, 0], places, side="right") - 1
    return bool(np.any((at >= 0) & (places < gaps[at, 1]))) if len(gaps) else False


def _gaps(claimed: np.ndarray, size: int) -> np.ndarray:
    """(n, 2): start and end of what lies between spans (m, 2) of a start and bytes."""
    claimed = claimed[np.argsort(claimed[:, 0], kind="stable")]
    ends, starts = np.maximum.accumulate(claimed.sum(axis=1)), np.append(claimed[1:, 0], size)
    return np.stack([ends, starts], axis=1)[starts > ends]
