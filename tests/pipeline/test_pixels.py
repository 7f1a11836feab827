"""Pixels of real slides: the readers agree, and a tile is the area mean of the level it is made from.

`pytest -s tests/pipeline/test_pixels.py` prints both tables.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import SlideError, UnreadableSlide
from pipeline.quadtree import build_quadtree
from pipeline.readers import open_slide
from pipeline.slide import Slide, source_level
from pipeline.stream import stream_tiles
from pipeline.tissue import TissueMask

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SLIDES = DATA / "slides"
READERS = ("openslide", "tiffslide", "image")

pytestmark = pytest.mark.skipif(not SLIDES.is_dir(), reason=f"the shared slides are not at {SLIDES}")

# What opens where it should not be compared, and why. A slide that is missing here must agree.
#
# Refused by one of the two, as its pixels are known to be wrong there:
REFUSED_BY = {
    "test_orient6.tif": ("openslide", "orientation"),  # it mirrors every tile in its place
    "test3-DAPI-2-(387).ndpi": ("tiffslide", "NDPI"),  # its tiles are pieces of one JPEG stream
}
# OpenSlide's downsample of these levels is no whole number (2.0011 for 2033 → 1016): it wants positions in whole
# level-0 pixels, so away from (0, 0) it interpolates between pixels of the level. `auto` takes TiffSlide for these.
INTERPOLATED = {"CropBreastSlide.tiff": {1, 2, 3, 4, 5}, "boxes.tiff": {2, 3}, "yb10kx5k.zstd.tiff": {4}}


@cache
def given_mpp() -> dict[str, float]:
    rows = [line.rsplit(",", 1) for line in (DATA / "mpp.csv").read_text().splitlines()[1:]]
    return {Path(name).name: float(mpp) for name, mpp in rows if name.startswith("slides/")}


def names() -> list[str]:
    return sorted(str(p.relative_to(SLIDES)) for p in SLIDES.rglob("*") if p.is_file()) if SLIDES.is_dir() else []


def try_open(name: str, reader: str = "auto") -> Slide | None:
    try:
        return open_slide(SLIDES / name, given_mpp().get(Path(name).name), reader)
    except SlideError:
        return None


@cache
def opened_by() -> dict[str, list[str]]:
    found = {}
    for name in names():
        found[name] = []
        for reader in READERS:
            slide = try_open(name, reader)
            if slide:
                found[name].append(reader)
                slide.close()
    return found


def test_the_data_are_what_this_file_speaks_of():
    able = opened_by()
    assert sum("openslide" in readers for readers in able.values()) >= 10
    assert sum({"openslide", "tiffslide"} <= set(readers) for readers in able.values()) >= 6
    for name, (reader, words) in REFUSED_BY.items():
        with pytest.raises(UnreadableSlide, match=words):
            open_slide(SLIDES / name, mpp=0.5, reader=reader)
        assert len(able[name]) == 1
    for name, levels in INTERPOLATED.items():
        with open_slide(SLIDES / name, mpp=0.5, reader="openslide") as slide:
            assert set(slide.interpolated) == levels
            assert slide.doubt
        with open_slide(SLIDES / name, mpp=0.5) as slide:
            assert slide.reader == "tiffslide"


def windows(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """In pixels of the level: the whole where it is small, the four borders, the middle, and odd places."""
    w, h = min(width, 301), min(height, 283)
    for x, y in (
        (0, 0),
        (width - w, 0),
        (0, height - h),
        (width - w, height - h),
        ((width - w) // 2, (height - h) // 2),
    ):
        yield x, y, w, h
    yield -17, -13, w, h
    yield width - w + 19, height - h + 23, w, h
    for x, y in np.random.default_rng(5).integers(0, (max(width - 97, 1), max(height - 89, 1)), (4, 2)):
        yield int(x), int(y), 97, 89


@pytest.mark.parametrize("name", names())
def test_openslide_and_tiffslide_agree_at_every_level(name):
    if not {"openslide", "tiffslide"} <= set(opened_by()[name]):
        pytest.skip("not opened by both")
    exceptions = INTERPOLATED.get(name, set())
    with try_open(name, "openslide") as left, try_open(name, "tiffslide") as right:
        assert left.levels == right.levels
        assert (left.mpp, left.warnings[: len(right.warnings)]) == (right.mpp, right.warnings)
        for number, level in enumerate(left.levels):
            fx, fy = level.downsample
            worst = []
            for x, y, w, h in windows(level.width, level.height):
                a, b = (s.read(x * fx, y * fy, number, w, h).astype(float) for s in (left, right))
                if number in exceptions:
                    # The exception is exactly this: bilinear between the pixels beside where OpenSlide looks.
                    own = left._downsamples[number]
                    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, level.width), min(y + h, level.height)
                    shift = [round(at * own) / own - at for at in (x0, y0)]
                    assert max(map(abs, shift)) <= 0.5 / own + 1e-9
                    wide = right.read((x0 - 1) * fx, (y0 - 1) * fy, number, x1 - x0 + 2, y1 - y0 + 2).astype(float)
                    at = [1 + s for s in shift]
                    b = bilinear(wide, at, (x1 - x0, y1 - y0))
                    a = a[y0 - y : y1 - y, x0 - x : x1 - x]
                    a, b = a[1:-1, 1:-1], b[1:-1, 1:-1]  # beyond the border it interpolates with nothing
                worst.append(abs(a - b).mean())
            print(f"\nreaders  {name:32} level {number}  largest mean difference {max(worst):.3f}", end="")
            if number in exceptions:
                print("  (after interpolating like OpenSlide)", end="")
            assert max(worst) <= 1


def bilinear(image: np.ndarray, corner: list[float], size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) of `image` from a corner between its pixels."""
    for axis, at, count in ((1, corner[0], size[0]), (0, corner[1], size[1])):
        low = int(np.floor(at))
        part = at - low
        first, second = (image.take(range(low + k, low + k + count), axis, mode="clip") for k in (0, 1))
        image = first * (1 - part) + second * part
    return image


TARGETS = (1.0, 1.37, 2.0, 4.0)


@pytest.mark.parametrize("name", names())
def test_tiles_are_the_area_means_of_their_source(area_mean, name):
    slide = try_open(name)
    if slide is None:
        pytest.skip("no reader opens it")
    with slide:
        limit = 2200  # px of level 0: the upper-left part of larger slides is as good as all
        size = tuple(min(side, limit) for side in slide.size)
        mask = TissueMask(np.ones((1, 1), bool), (float(size[0]), float(size[1])), slide.mpp, "test")
        stored: dict[int, np.ndarray] = {}
        for ratio in TARGETS:
            tree = build_quadtree(slide, mask, mpp=slide.mpp * ratio, tile_px=128, levels=2, min_tissue=0.3)
            if len(tree) == 0:
                continue
            source = source_level(slide, slide.mpp * ratio)
            got = dict(stream_tiles(slide, tree))
            assert sorted(got) == list(range(len(tree)))
            for number in {0, source}:
                if number not in stored:
                    level = slide.levels[number]
                    # What the tree may reach, and the levels whole: roots end behind the limit.
                    part = [int(min(side, 2 * limit / level.downsample[0])) for side in level[:2]]
                    stored[number] = slide.read(0, 0, number, *part)
            differences: dict[int, list[float]] = {0: [], source: []}
            rows = np.random.default_rng(1).permutation(len(tree))[:14]
            for row in sorted(int(r) for r in rows):
                k = next(k for k, level in enumerate(tree.levels) if row < level.stop)
                box = tree.boxes(k)[row - tree.levels[k].start]
                assert got[row] is not None
                for number in differences:
                    f = slide.levels[number].downsample
                    want = area_mean_near(area_mean, stored[number], box, f, 128)
                    differences[number].append(float(abs(got[row] - want).mean()))
            print(
                f"\ntiles  {name:42} {slide.reader:9} at {slide.mpp * ratio:8.4f} from level {source}: "
                f"mean difference to it {np.mean(differences[source]):.3f}, to level 0 {np.mean(differences[0]):.3f}",
                end="",
            )
            assert max(differences[source]) <= 2


def area_mean_near(area_mean, image: np.ndarray, box: np.ndarray, factor: tuple[float, float], px: int) -> np.ndarray:
    """The area mean from the part of the image around the box alone, as the running sums of all of it take long."""
    x, y, width, height = box[0] / factor[0], box[1] / factor[1], box[2] / factor[0], box[3] / factor[1]
    left, top = max(int(x) - 2, 0), max(int(y) - 2, 0)
    part = image[top : int(y + height) + 3, left : int(x + width) + 3]
    return area_mean(part, (x - left, y - top, width, height), (px, px))
