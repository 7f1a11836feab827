import numpy as np
import pytest

from pipeline.canvas import Canvas


def square(side=6, first=(0, 0)):
    return np.array([(first[0] + c, first[1] + r) for r in range(side) for c in range(side)])


@pytest.mark.parametrize("per_tile", [1, 2, 3])
def test_a_tile_lies_where_its_grid_says(per_tile):
    canvas = Canvas((-2, 3), (4, 8), per_tile, 2)
    canvas.add(np.array([(-1, 6), (3, 3)]), np.array([[5.0, 7.0], [1.0, 2.0]]))
    mean = canvas.mean()
    assert mean.shape == (2, 5 * per_tile, 6 * per_tile)
    assert mean.dtype == np.float32
    expected = np.full((2, 5, 6), np.nan)
    expected[:, 3, 1], expected[:, 0, 5] = (5, 1), (7, 2)
    np.testing.assert_array_equal(mean, expected.repeat(per_tile, 1).repeat(per_tile, 2))


def test_against_the_mean_of_what_lies_on_each_cell():
    """Cell by cell, slowly: which tiles of which moved grid cover it."""
    random = np.random.default_rng(0)
    canvas, per_tile, cells = Canvas((0, 0), (7, 7), 4, 1), 4, {}
    for moved in ((0, 0), (1, 0), (2, 3), (3, 3)):
        grid = square()[random.random(36) < 0.6]
        values = random.normal(size=(1, len(grid), 2, 2))
        canvas.add(grid, values, moved)
        for (column, row), value in zip(grid, values[0], strict=True):
            for y in range(per_tile):
                for x in range(per_tile):
                    at = (row * per_tile + moved[1] + y, column * per_tile + moved[0] + x)
                    cells.setdefault(at, []).append(value[y // 2, x // 2])
    mean = canvas.mean()[0]
    assert np.isfinite(mean).sum() == len(cells)
    for at, found in cells.items():
        assert mean[at] == pytest.approx(np.mean(found), abs=1e-6)


def test_what_is_nan_covers_nothing():
    canvas = Canvas((0, 0), (1, 1), 2, 1)
    for value in (np.nan, 3.0):
        canvas.add(np.array([(0, 0)]), np.array([[[[1.0, value], [np.nan, np.nan]]]]))
    np.testing.assert_array_equal(canvas.mean()[0], [[1, 3], [np.nan, np.nan]])
