"""Does a table of tiles keep what a QuadTree promises? Its hash says only that it is the one that was written."""

from collections.abc import Iterator

import numpy as np

from .quadtree import QuadTree, morton


def faults_of_tree(tree: QuadTree, in_order: bool) -> Iterator[tuple[str, str]]:
    """(part, what is wrong) of a table of tiles. in_order: rows of a level are to stand in Morton order."""
    starts, stops = [scale[2] for scale in tree.scales], [scale[3] for scale in tree.scales]
    if starts != [0, *stops][: len(starts)] or any(a > b for a, b in zip(starts, stops, strict=True)):
        yield "", f"its levels do not follow each other: they begin at {starts} and end at {stops}"
        return
    if not all(0 <= k < len(starts) for k in tree.encoded_levels):
        yield "", f"levels {list(tree.encoded_levels)} have features, and there are {len(starts)}"
    if not ((tree.tissue >= 0) & (tree.tissue <= 1)).all():
        yield "/tissue", "holds shares that do not lie in 0..1"
    nested = tree.regular and not tree.overlap
    for k, level in enumerate(tree.levels):
        above = tree.levels[k - 1] if k else None
        if above is None:
            wrong = level.parent != -1
        else:
            wrong = (level.parent < 0) | (level.parent >= len(above.grid))
            if nested:
                wrong[~wrong] = (above.grid[level.parent[~wrong]] != level.grid[~wrong] // 2).any(axis=1)
        if wrong.any():
            yield "/parent", f"{np.count_nonzero(wrong)} tiles of level {k} name a parent that is not theirs"
        if tree.regular:
            corner = np.asarray(tree.origin) + level.grid * (level.span_px * (1 - tree.overlap))
            if (np.floor(corner) != level.xy).any():
                yield "/xy", f"tiles of level {k} do not lie where their grid says"
        if tree.regular and in_order and not _is_sorted(tree, k):
            yield "/grid", f"rows of level {k} do not stand in Morton order, each once"


def _is_sorted(tree: QuadTree, level: int) -> bool:
    """Columns and rows count from the first root that touches the slide, as in `build_quadtree`."""
    part, depth = tree.levels[level], len(tree.levels) - 1 - level
    pitch, root = tree.levels[-1].span_px * (1 - tree.overlap), 2 ** (len(tree.levels) - 1)
    first = np.array([np.floor(-begin / pitch / root) * root for begin in tree.origin]).astype(np.int64)
    columns, rows = (part.grid - first // 2**depth).T
    if len(part.grid) and min(columns.min(), rows.min()) < 0:
        return False
    code = morton(columns, rows)
    return bool((code[1:] > code[:-1]).all())
