"""Levels, boxes and thumbnails of a slide, against naive references."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.area import GREY, fixed
from pipeline.errors import CorruptTiles, UnreadableSlide
from pipeline.readers import open_slide
from pipeline.scale import ScaleTags
from pipeline.slide import Box, Slide, make_levels, read_mean, source_level, thumbnail


class Pyramid(Slide):
    """Arrays as levels, read by a loop over pixels; damaged where told; it notes how much is read at once."""

    def __init__(self, images: list[np.ndarray], mpp: float, damaged: tuple[int, int, int, int] | None = None) -> None:
        super().__init__(Path("pyramid"), make_levels([(i.shape[1], i.shape[0]) for i in images]), ScaleTags(), "test")
        self.images, self.mpp, self.mpp_source, self.damaged = images, mpp, "test", damaged
        self.largest = 0
        self.levels_read: set[int] = set()

    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        fx, fy = self.levels[level].downsample
        left, top = round(x / fx), round(y / fy)
        assert left == pytest.approx(x / fx, abs=1e-6)  # whole pixels of the level are asked for
        assert top == pytest.approx(y / fy, abs=1e-6)
        self.largest = max(self.largest, width, height)
        self.levels_read.add(level)
        if self.damaged:
            x0, y0, x1, y1 = self.damaged  # level-0 px
            if left * fx < x1 and (left + width) * fx > x0 and top * fy < y1 and (top + height) * fy > y0:
                raise CorruptTiles("pyramid", "encode", "damaged")
        image = self.images[level]
        columns, rows = np.arange(left, left + width), np.arange(top, top + height)
        inside = ((rows >= 0) & (rows < image.shape[0]))[:, None] & ((columns >= 0) & (columns < image.shape[1]))
        part = image[rows.clip(0, image.shape[0] - 1)][:, columns.clip(0, image.shape[1] - 1)]
        return np.where(inside[..., None], part, np.uint8(255))

    def close(self) -> None:
        pass


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("sizes", "factors"),
    [
        ([(2220, 2967), (555, 741)], [(1, 1), (4, 4)]),  # 741.75 cut
        ([(2221, 2967), (556, 742)], [(1, 1), (4, 4)]),  # 555.25 and 741.75 rounded up
        ([(46000, 32914), (11500, 8228), (2875, 2057)], [(1, 1), (4, 4), (16, 16)]),  # OpenSlide says 4.0001, 16.0005
        ([(10000, 5000), (625, 312)], [(1, 1), (16, 16)]),
        ([(1000, 1000), (333, 334)], [(1, 1), (3, 3)]),
        ([(1000, 1000), (400, 400)], [(1, 1), (2.5, 2.5)]),
        ([(1000, 2000), (500, 800)], [(1, 1), (2, 2.5)]),
        ([(1000, 1000), (498, 500)], [(1, 1), (1000 / 498, 2)]),  # two pixels short is no rounding
        ([(17, 13), (1, 1)], [(1, 1), (17, 17)]),
        ([(7, 7)], [(1, 1)]),
        ([(8, 8), (8, 8)], [(1, 1), (1, 1)]),
    ],
)
def test_a_downsample_is_whole_where_the_size_was_only_rounded(sizes, factors):
    levels = make_levels(sizes)
    assert [(level.width, level.height) for level in levels] == sizes
    assert [level.downsample for level in levels] == factors


@given(
    width=st.integers(1, 100_000),
    height=st.integers(1, 100_000),
    factor=st.integers(1, 64),
    up=st.tuples(*[st.booleans()] * 2),
)
def test_snapping_never_misplaces_a_pixel_of_a_rounded_level(width, height, factor, up):
    small = tuple(
        max(1, -(-side // factor) if u else side // factor) for side, u in zip((width, height), up, strict=True)
    )
    level = make_levels([(width, height), small])[1]
    for side, n, scale in zip((width, height), small, level.downsample, strict=True):
        assert scale > 0
        assert abs(n * scale - side) < max(scale, factor) + 1e-6  # its last border is the slide's, to one of its pixels
    if width >= 3 * factor**2 and height >= 3 * factor**2:  # else another whole factor fits the sizes as well
        assert level.downsample == (factor, factor)


def test_the_source_is_the_coarsest_level_that_is_fine_enough():
    slide = Pyramid([noise(64, 64), noise(32, 32), noise(16, 16), noise(4, 4)], 0.25)
    for mpp, level in (
        (0.1, 0), (0.25, 0), (0.49, 0), (0.496, 1), (0.5, 1), (0.9, 1), (0.989, 1), (0.991, 2), (3.95, 2), (4, 3)
    ):  # fmt: skip
        assert source_level(slide, mpp) == level, mpp
    uneven = Pyramid([noise(64, 64), noise(32, 16)], 0.25)
    assert source_level(uneven, 0.9) == 0  # 0.5 in x but 1.0 in y
    assert source_level(uneven, 1.0) == 1


def read_box(slide: Slide, box: Box, cells: tuple[int, int], level: int) -> np.ndarray:
    """In grey levels."""
    return fixed(read_mean(slide, box, cells, level)) / np.float32(GREY)


boxes = st.builds(
    lambda x, y, ratio, aspect, cells: (x, y, cells[0] * ratio, cells[1] * ratio * aspect, cells),
    st.floats(-90, 140), st.floats(-90, 140), st.floats(0.9, 5), st.sampled_from([1, 1, 1.25]),
    st.tuples(st.integers(1, 23), st.integers(1, 19)),
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(box=boxes, level=st.sampled_from([0, 1, 2]))
def test_any_box_is_the_area_mean_over_its_cells(area_mean, box, level):
    x, y, width, height, cells = box
    slide = SHARED
    fx, fy = slide.levels[level].downsample
    got = read_box(slide, Box(x, y, width, height), cells, level)
    assert got.shape == (cells[1], cells[0], 3)
    assert got.dtype == np.float32
    want = area_mean(slide.images[level], (x / fx, y / fy, width / fx, height / fy), cells)
    # Edges within 1/1000 px of a pixel's border may be moved to it; the cells have at least 0.2 px of a level.
    np.testing.assert_allclose(got, want, atol=255 * 2e-3 / min(width / fx / cells[0], height / fy / cells[1]) + 0.01)


SHARED = Pyramid([noise(127, 101), noise(63, 50, 1), noise(37, 41, 2)], 0.25)


@pytest.mark.parametrize(("cells", "x", "width"), [(1, 1.5, 1), (1, 0.75, 2.5), (2, 0.5, 3), (2, 0.25, 1.5)])
def test_one_or_two_cells_that_cut_pixels(area_mean, cells, x, width):
    """Each pixel belongs to one cell only, and yet they do not count alike."""
    got = read_box(SHARED, Box(x, x + 0.125, width, width), (cells, cells), 0)
    want = area_mean(SHARED.images[0], (x, x + 0.125, width, width), (cells, cells))
    np.testing.assert_allclose(got, want, atol=0.01)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("start", [(0, 0), (7, 3), (-5, 90), (120, -11), (-300, 0), (400, 400)])
def test_whole_boxes_are_plain_block_means(factor, start):
    slide = Pyramid([noise(127, 101)], 0.5)
    got = read_box(slide, Box(*start, 11 * factor, 7 * factor), (11, 7), 0)
    padded = np.full((2000, 2000, 3), 255.0)
    padded[1000 : 1000 + 101, 1000 : 1000 + 127] = slide.images[0]
    at = padded[1000 + start[1] :, 1000 + start[0] :][: 7 * factor, : 11 * factor]
    want = at.reshape(7, factor, 11, factor, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(got, want, atol=0.5 / GREY + 1e-3)


def test_the_drift_of_floats_does_not_widen_a_read():
    slide = Pyramid([noise(4000, 40)], 0.25)
    for n in range(1, 300):
        slide.largest = 0
        x = n * 0.1 * 130  # 13 n, with the errors of 0.1
        read_box(slide, Box(x, 0, 26 * (1 + 1e-12), 26), (13, 13), 0)
        assert slide.largest == 26


def test_a_flat_slide_stays_flat():
    slide = Pyramid([np.full((101, 127, 3), 255, np.uint8)], 0.25)
    for ratio in (1.1, 1.37, 2, 3.3333, 7.77):
        got = read_box(slide, Box(-13.7, 3.3, 50 * ratio, 50 * ratio), (50, 50), 0)
        np.testing.assert_allclose(got, 255, atol=0.01)
        assert (np.rint(got) == 255).all()


@pytest.mark.parametrize("mpp", [0.25, 0.31, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("read_px", [4096, 97])
def test_a_thumbnail_is_the_whole_slide_in_bounded_reads(monkeypatch, area_mean, mpp, read_px):
    monkeypatch.setattr("pipeline.slide.READ_PX", read_px)
    slide = Pyramid([noise(1013, 677)], 0.25)
    view = thumbnail(slide, mpp, min_px=40)
    height, width = view.rgb.shape[:2]
    assert slide.largest <= max(read_px + 2, 1013 if read_px > 1013 else 0)
    assert view.downsample == (1013 / width, 677 / height)
    assert view.mpp == pytest.approx(mpp, rel=0.02)
    want = area_mean(slide.images[0], (0, 0, 1013, 677), (width, height))
    assert abs(view.rgb - want).max() < 0.51 + 255 * 2e-3  # rounding, and edges moved by 1/1000 px
    assert not view.unreadable.any()
    assert view.unreadable.shape == (height, width)


def test_a_small_slide_gets_a_finer_thumbnail():
    slide = Pyramid([noise(211, 149)], 0.5)
    view = thumbnail(slide, 8.0, min_px=64)
    assert min(view.rgb.shape[:2]) == 64
    assert view.mpp == pytest.approx(0.5 * 149 / 64, rel=0.01)
    tiny = thumbnail(Pyramid([noise(5, 3)], 0.5), 8.0)
    assert tiny.rgb.shape == (3, 5, 3)  # never enlarged
    assert tiny.downsample == (1, 1)
    assert thumbnail(Pyramid([noise(1, 1)], 0.5), 8.0).rgb.shape == (1, 1, 3)


def test_a_thumbnail_that_no_memory_holds_is_the_slides_fault_and_not_the_machines():
    slide = Pyramid([noise(9, 9)], 16.8)
    slide.levels = make_levels([(957, 8_389_323)])
    with pytest.raises(UnreadableSlide, match=r"picture of 957 x 8389323 pixels.*more µm per pixel"):
        thumbnail(slide, 8.0)


def test_a_thumbnail_comes_from_the_coarsest_level_that_serves():
    slide = Pyramid([noise(512, 512), noise(128, 128), noise(32, 32)], 0.25)
    thumbnail(slide, 1.0)
    assert slide.levels_read == {1}
    slide.levels_read.clear()
    thumbnail(slide, 4.0, min_px=16)
    assert slide.levels_read == {2}


def test_around_damage_everything_else_is_kept(monkeypatch):
    monkeypatch.setattr("pipeline.slide.READ_PX", 512)
    whole, damage = Pyramid([noise(1013, 1500)], 0.25), (300, 400, 360, 470)
    hurt = Pyramid(whole.images, 0.25, damage)
    want, got = thumbnail(whole, 1.0), thumbnail(hurt, 1.0)
    lost = got.unreadable
    touched = np.zeros_like(lost)
    fx, fy = got.downsample
    touched[int(damage[1] / fy) : int(np.ceil(damage[3] / fy)), int(damage[0] / fx) : int(np.ceil(damage[2] / fx))] = (
        True
    )
    assert (lost >= touched).all()  # no pixel that has to do with the damage passes for one that was read
    rows, columns = np.nonzero(lost)
    assert (columns.max() - columns.min() + 1) * fx <= 60 + 2 * 64  # and no more than 64 px around it are given up
    assert (rows.max() - rows.min() + 1) * fy <= 70 + 2 * 64
    assert (got.rgb[lost] == 255).all()
    # Quarters average over the same cells in another order: at most a rounding apart.
    assert abs(got.rgb[~lost].astype(int) - want.rgb[~lost]).max() <= 1


def test_around_damage_a_thumbnail_of_few_pixels_ends_too():
    """One of its pixels is 160 px of the slide: it cannot be halved again, though it is larger than 64 px."""
    view = thumbnail(Pyramid([noise(1013, 1500)], 0.25, (300, 400, 360, 470)), 40.0, min_px=4)
    assert view.unreadable.sum() == 2  # rows end at 333 and 500, columns at 338: two pixels touch the damage
    assert view.unreadable[2].tolist()[:3] == [False, True, True]


@pytest.mark.parametrize(("share", "fails"), [(1.0, True), (0.75, True), (0.25, False)])
def test_a_slide_of_which_most_cannot_be_read_fails(share, fails):
    """No tissue is looked for in it: that would take time and memory, and most of its tiles would be invalid."""
    slide = Pyramid([noise(1024, 512)], 0.5, (0, 0, round(1024 * share), 512))
    if fails:
        with pytest.raises(CorruptTiles, match=r"\d\d.\d% of its pixels cannot be decoded"):
            thumbnail(slide, 4.0)
    else:
        assert thumbnail(slide, 4.0).unreadable.mean() == pytest.approx(share, abs=0.1)


def test_a_slide_closes_itself():
    with open_slide(noise(5, 4), mpp=0.5) as slide:
        assert slide.size == (5, 4)
        assert (slide.mpp, slide.mpp_source, slide.reader) == (0.5, "argument", "image")
