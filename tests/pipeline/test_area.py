"""Area means in 1/256 of a grey level, against running integrals in float64 and against whole numbers."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import area
from pipeline.area import Weights, area_mean, fixed, halve, to_uint8, weights

HALF = 0.5 / 256  # of a grey level: what rounding to 1/256 may cost


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mean_of(columns: Weights, rows: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Pixels under two axes, and their means in grey levels."""
    pixels = noise(columns.pixels, rows.pixels)
    return pixels, as_grey(area_mean(pixels, columns, rows))


def as_grey(mean: np.ndarray) -> np.ndarray:
    assert mean.dtype in (np.uint8, np.uint16)
    return mean.astype(np.float64) / (256 if mean.dtype == np.uint16 else 1)


def whole_sums(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(h, w, 3) int: the sum of each factor × factor pixels."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    return pixels.astype(np.int64).reshape(height, factor, width, factor, 3).sum(axis=(1, 3))


axes = st.tuples(st.floats(0, 0.9999), st.floats(0.3, 5), st.integers(1, 70)).map(lambda a: (a[0], a[1] * a[2], a[2]))


@settings(max_examples=150, deadline=None)
@given(across=axes, down=axes)
@example(across=(0.0, 64.0, 32), down=(0.0, 66.0, 33))  # whole
@example(across=(0.0, 33.0, 33), down=(0.0, 33.0, 33))  # 1:1
@example(across=(0.5, 40.0, 40), down=(0.25, 40.0, 40))  # 1:1, but between pixels
@example(across=(0.0, 20.0, 40), down=(0.3, 11.0, 33))  # enlarged
@example(across=(0.0, 66.0, 33), down=(0.4, 77.0, 33))  # whole in x, cut in y
@example(across=(0.7, 50.0, 33), down=(0.0, 99.0, 33))  # cut in x, whole in y
@example(across=(0.0, 66.0, 33), down=(0.0, 33.0, 33))  # whole in both, but not alike
@example(across=(0.9996, 70.0, 35), down=(0.0004, 70.0, 35))  # the first edge is moved to a border of pixels
def test_any_axes_give_the_mean_over_each_cell(area_mean, across, down):
    columns, rows = weights(*across), weights(*down)
    pixels, got = mean_of(columns, rows)
    assert got.shape == (down[2], across[2], 3)
    box = (across[0] - columns.first, down[0] - rows.first, across[1], down[1])
    want = area_mean(pixels, box, (across[2], down[2]))
    # Edges within 1/1000 px of a pixel's border are moved to it; that counts for more where cells are small.
    moved = 255 * 2e-3 / min(across[1] / across[2], down[1] / down[2])
    np.testing.assert_allclose(got, want, atol=moved + HALF + 1e-3)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 7, 16])
def test_means_of_whole_pixels_are_right_to_the_last_bit(factor):
    columns, rows = weights(0.0, 37.0 * factor, 37), weights(0.0, 35.0 * factor, 35)
    assert (columns.factor, rows.factor, columns.first) == (factor, factor, 0)
    pixels, got = mean_of(columns, rows)
    error = np.abs(got * factor**2 - whole_sums(pixels, factor)) / factor**2
    assert error.max() <= (HALF * 1.001 if factor**2 & (factor**2 - 1) else 0)


def test_where_a_cell_is_a_pixel_nothing_is_computed():
    pixels = noise(9, 7)
    for start, columns in ((0.0, 9), (0.0003, 9), (0.9998, 9)):
        assert area_mean(pixels, weights(start, 9.0, columns), weights(0.0, 7.0, 7)) is pixels


@pytest.mark.parametrize("cells", [1, 31, 32, 33, 63, 64, 65, 100])
@pytest.mark.parametrize("ratio", [0.6, 1.37, 2.5, 9.99])
def test_strips_meet_without_a_seam(area_mean, cells, ratio):
    """Cells are averaged a few rows at a time; the pixel that two strips share counts for both."""
    rows, columns = weights(0.3, cells * ratio, cells), weights(0.1, 5 * 1.7, 5)
    assert len(rows.strips) == math.ceil(cells / area.STRIP_CELLS)
    pixels, got = mean_of(columns, rows)
    want = area_mean(pixels, (0.1, 0.3, 5 * 1.7, cells * ratio), (5, cells))
    np.testing.assert_allclose(got, want, atol=255 * 2e-3 / min(ratio, 1.7) + HALF + 1e-3)


@pytest.mark.parametrize("strip", [1, 500, 3 * 40 * 4 * 3 + 1, 1 << 18])
def test_strips_of_whole_pixels_change_nothing(monkeypatch, strip):
    columns, rows = weights(0.0, 40.0, 10), weights(0.0, 52.0, 13)
    pixels = noise(40, 52)
    monkeypatch.setattr(area, "STRIP_BYTES", strip)
    np.testing.assert_array_equal(area_mean(pixels, columns, rows).astype(int) * 16, whole_sums(pixels, 4) * 256)


@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize("down", [(1, 1.0), (1, 2.0), (3, 0.5), (1, 0.3), (2, 2.5), (5, 5.0)])
@pytest.mark.parametrize("across", [(1, 1.0), (1, 2.0), (3, 0.5), (1, 0.3), (4, 6.7)])
def test_one_pixel_and_one_cell_keep_their_shape(area_mean, across, down, start):
    columns, rows = weights(start, across[1], across[0]), weights(0.2, down[1], down[0])
    pixels, got = mean_of(columns, rows)
    assert got.shape == (down[0], across[0], 3)
    want = area_mean(pixels, (start, 0.2, across[1], down[1]), (across[0], down[0]))
    np.testing.assert_allclose(got, want, atol=0.02)


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("ratio", [0.7, 1.37, 2, 3.3333, 16])
def test_what_is_flat_stays_flat(value, ratio):
    columns, rows = weights(0.3 if ratio % 1 else 0.0, 40 * ratio, 40), weights(0.0, 40 * ratio, 40)
    mean = area_mean(np.full((rows.pixels, columns.pixels, 3), value, np.uint8), columns, rows)
    assert (mean == value * 256).all()


def test_weights_of_every_cell_add_up_to_one():
    for start, length, cells in ((0.0, 64.0, 32), (0.37, 100.1, 33), (0.9, 7.3, 40), (0.0, 65.0, 65), (0.5, 0.25, 1)):
        axis = weights(start, length, cells)
        np.testing.assert_allclose(axis.matrix.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([s.matrix.sum(axis=1) for s in axis.strips]), 1, atol=1e-5)
        assert axis.pixels == math.ceil(start + length) - axis.first


def test_the_drift_of_floats_does_not_widen_a_read():
    for n in range(1, 300):
        left = n * 0.1 * 130 % 1  # 13 n, with the errors of 0.1
        axis = weights(left, 26 * (1 + 1e-12), 13)
        assert (axis.pixels, axis.factor) == (26, 2)


@pytest.mark.parametrize("ramp", [False, True])
def test_four_halvings_are_exact(ramp):
    pixels = noise(64, 48) if not ramp else np.tile(np.arange(64, dtype=np.uint8), (48, 1))[..., None].repeat(3, 2)
    part = pixels
    for times in (2, 4, 8, 16):
        part = halve(part)
        assert part.dtype == np.uint16
        np.testing.assert_array_equal(part.astype(np.int64) * times**2, whole_sums(pixels, times) * 256)


def test_halves_of_means_are_the_means_of_halves_to_one_rounding():
    columns, rows = weights(0.3, 64 * 1.37, 64), weights(0.6, 64 * 1.37, 64)
    pixels = noise(columns.pixels, rows.pixels)
    fine = area_mean(pixels, columns, rows)
    coarse = area_mean(pixels, weights(0.3, 64 * 1.37, 32), weights(0.6, 64 * 1.37, 32))
    assert np.abs(halve(fine).astype(int) - coarse).max() <= 1 + 1  # its own, and those of the four


def test_halving_is_of_each_four_and_of_every_channel():
    four = np.zeros((2, 4, 3), np.uint8)
    four[..., 0], four[0, :2, 1], four[1, 3, 2] = 255, 200, 3
    np.testing.assert_array_equal(halve(four), [[[65280, 25600, 0], [65280, 0, 192]]])


def test_whole_grey_levels_are_the_nearest_and_halves_go_up():
    every = np.arange(255 * 256 + 1, dtype=np.uint16).repeat(3).reshape(-1, 1, 3)
    np.testing.assert_array_equal(to_uint8(every), (every.astype(int) + 128) // 256)
    assert to_uint8(every).max() == 255


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 1.37, 0.5])
@pytest.mark.parametrize("width", [1, 7, 64])  # OpenCV has other code for what does not fill a register
def test_rounded_means_are_the_means_rounded(ratio, width):
    columns, rows = weights(0.0, width * ratio, width), weights(0.0, 20 * ratio, 20)
    pixels = noise(columns.pixels, rows.pixels)
    rounded = area_mean(pixels, columns, rows, rounded=True)
    assert (rounded.dtype, rounded.shape) == (np.uint8, (20, width, 3))
    np.testing.assert_array_equal(rounded, to_uint8(area_mean(pixels, columns, rows)))


def test_whole_grey_levels_are_not_copied():
    block = noise(8, 8)
    assert np.shares_memory(to_uint8(block[2:5, 3:7]), block)


def test_fixed_point_and_back():
    pixels = noise(20, 30)
    np.testing.assert_array_equal(fixed(pixels), pixels.astype(int) * 256)
    np.testing.assert_array_equal(to_uint8(fixed(pixels)), pixels)
    mean = fixed(pixels)
    assert fixed(mean) is mean
