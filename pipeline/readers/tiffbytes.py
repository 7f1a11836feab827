"""What every byte of a TIFF file belongs to: a tile, a directory, the value of a tag, or nothing.

In a file as it was written no two tiles share a part, and next to nothing is left over. Where an offset or a count has
been damaged, tiles overlap, or there are data that belong to none; where a directory is lost, there are many.
"""

import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile

TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
PADDING = 4096  # bytes; what is shorter and belongs to nothing aligns what follows
LOST, TOLD = 0.5, 0.002  # of the file, belonging to nothing


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
    data = file.read(number * form.tagsize)
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
    """What is wrong with the entries themselves: tags are passed over by readers where these are damaged."""
    codes = directory.entries["code"].astype(int)
    if np.any(value_spans(directory).sum(axis=1) > size):
        return "truncated: a tag's value lies beyond the end of the file"
    for code, kind in zip(codes.tolist(), directory.entries["type"].tolist(), strict=True):
        if code in tifffile.TIFF.TAGS and kind not in TYPE_BYTES:
            return f"corrupt: its tag {code} is of no type"
    steps = np.diff(codes)
    if np.any(steps == 0):
        return f"corrupt: its tag {codes[1:][steps == 0][0]} stands there twice"
    misplaced = {*codes[1:][steps < 0].tolist(), *codes[:-1][steps < 0].tolist()}
    strange = [code for code in misplaced if code not in tifffile.TIFF.TAGS]
    return f"corrupt: there is a tag {strange[0]} out of its order" if strange else ""


def claims_fault(offsets: np.ndarray, counts: np.ndarray, others: np.ndarray, size: int) -> tuple[str, str]:
    """What is wrong with the addresses of all tiles of a file, and what should be said about it.

    offsets, counts (n,) int64 of the tiles; others (m, 2): start and bytes of directories, values and the header.
    """
    there = counts > 0
    tiles, shared = np.unique(np.stack([offsets[there], counts[there]], axis=1), axis=0, return_counts=True)
    if np.any(tiles[:-1].sum(axis=1) > tiles[1:, 0]):
        return "corrupt: parts of its tiles overlap", ""
    claimed = np.concatenate([tiles, others])
    claimed = claimed[np.argsort(claimed[:, 0], kind="stable")]
    ends = np.maximum.accumulate(claimed.sum(axis=1))
    starts = np.append(claimed[1:, 0], size)
    gaps = np.stack([ends, np.minimum(starts, size)], axis=1)[starts > ends]
    lengths = gaps[:, 1] - gaps[:, 0]
    largest = int(lengths.max(initial=0))
    if np.any(tiles[shared > 1, 1] <= largest):
        return "corrupt: two tiles have one address, and there are data that belong to no tile", ""
    at = np.searchsorted(gaps[:, 0], offsets[~there], side="right") - 1
    inside = (at >= 0) & (offsets[~there] < gaps[at, 1]) & (lengths[at] > 16) if len(gaps) else np.zeros(1, bool)
    if np.any(inside & (offsets[~there] > 0)):
        return "corrupt: a tile without bytes has the address of data that belong to no tile", ""
    share = int(lengths[lengths >= PADDING].sum()) / size
    words = f"{share:.1%} of the file belong to no image in it"
    if share > LOST and there.any():  # with no tile at all, it is a slide of background
        return f"corrupt: {words}: an image directory is lost", ""
    return "", f"{words}: a level is lost, or a label was taken out" if share > TOLD else ""
