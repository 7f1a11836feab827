"""Values of tiles laid over each other on cells of a slide; where several lie, their mean (Grisi et al., 2024)."""

import numpy as np


class Canvas:
    """Sums and coverage on cells: `per_tile` × `per_tile` of them a tile, over the tiles `low` up to `high` of a grid.

    low, high: (column, row); the tile `high` is the first that does not belong to it. channels: values of a tile.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, per_tile: int, channels: int) -> None:
        columns, rows = (np.asarray(high) - low) * per_tile
        self._low, self._per_tile = np.asarray(low), per_tile
        self._sum = np.zeros((channels, rows, columns), np.float32)
        self._count = np.zeros((rows, columns), np.int32)

    def add(self, grid: np.ndarray, values: np.ndarray, moved: tuple[int, int] = (0, 0)) -> None:
        """Tiles at `grid` (n, 2), moved by cells (x, y); values (channels, n), or (channels, n, s, s) within a tile.

        s divides `per_tile`. What is NaN was not looked at, and covers nothing.
        """
        if values.ndim == 2:
            values = values[:, :, None, None]
        times = self._per_tile // values.shape[-1]
        values = values.repeat(times, axis=2).repeat(times, axis=3)
        corner = (np.asarray(grid) - self._low) * self._per_tile + moved
        inside = np.arange(self._per_tile)
        rows = (corner[:, 1, None] + inside)[:, :, None]
        columns = (corner[:, 0, None] + inside)[:, None, :]
        seen = np.isfinite(values).all(axis=0)
        self._sum[:, rows, columns] += np.where(seen, values, 0)  # no cell twice: tiles of one grid do not overlap
        self._count[rows, columns] += seen

    def mean(self) -> np.ndarray:
        """(channels, rows, columns) float32, NaN where nothing was looked at."""
        with np.errstate(invalid="ignore"):
            return np.where(self._count > 0, self._sum / self._count, np.nan).astype(np.float32)
