"""What several of these tests need: pixels that are their own address, a naive area mean, features, labelled bags."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heads.metrics import bootstrap
from pipeline import evaluation
from pipeline.config import make_config
from pipeline.folder import find_slides
from pipeline.output import write_run
from pipeline.stages import SlideFile, encode, make_recipe, open_encoder, prepare


def _address(width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: the colour of a pixel is its address, and neighbours differ by 37, 41 and 59 grey."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 37 % 256, y * 41 % 256, (x // 256 * 16 + y // 256 + 59 * (x + y)) % 256], axis=2).astype(
        np.uint8
    )


def _area_mean(pixels: np.ndarray, box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) float64: the mean over `shape` = (w, h) equal cells of `box` = (x, y, width, height); outside is white.

    From the running integral of the image, which is linear within a pixel: no weights, no borders, no rounding.
    """
    values = pixels.astype(np.float64)
    for axis, start, length, cells in ((0, box[1], box[3], shape[1]), (1, box[0], box[2], shape[0])):
        edges = start + np.arange(cells + 1) * length / cells
        total = np.concatenate([np.zeros_like(values.take([0], axis)), (values - 255).cumsum(axis)], axis)
        inside = np.clip(edges, 0, values.shape[axis])
        low = np.minimum(np.floor(inside).astype(int), values.shape[axis] - 1)
        part = (inside - low).reshape(-1, *[1] * (2 - axis))
        integral = total.take(low, axis) * (1 - part) + total.take(low + 1, axis) * part
        values = 255 + np.diff(integral, axis=axis) / (length / cells)
    return values


@pytest.fixture(scope="session")
def address() -> Callable[[int, int], np.ndarray]:
    return _address


@pytest.fixture(scope="session")
def area_mean() -> Callable[..., np.ndarray]:
    return _area_mean


# --- output folders ---------------------------------------------------------------------------------------------------


def _extract(slides: Path, out: Path, **settings: Any) -> Path:
    """What `run` makes of a folder of slides, in this process. `settings`: those of a Config, and `preset`."""
    config = make_config(**settings)
    encoder = open_encoder(config)
    recipe, folder = make_recipe(config, encoder), find_slides(slides, out)
    prepared = [(file, prepare(file, recipe, out)) for file in map(SlideFile, folder.files, folder.files.values())]
    rows = [row for row, _ in encode(prepared, encoder.load(precision="fp32"), out, recipe)]
    assert [row.status for row in rows] == ["done"] * len(prepared), rows
    write_run(out, folder, recipe)
    return out


@pytest.fixture(scope="session")
def extract() -> Callable[..., Path]:
    return _extract


# --- labelled features -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A folder of feature files, s00.npy and on, and its label table."""

    root: Path

    @property
    def labels(self) -> Path:
        return self.root / "labels.csv"

    def write(self, slide: int, shift: float, seed: int | None = None) -> None:
        """6 to 9 tiles of 4 numbers, all of them moved by `shift`."""
        random = np.random.default_rng(slide if seed is None else seed)
        np.save(self.root / f"s{slide:02}.npy", random.normal(size=(6 + slide % 4, 4)).astype(np.float32) + shift)

    def table(self, rows: Sequence[str], header: str = "slide,label") -> Path:
        """`rows`: what follows the name of each slide."""
        lines = [header, *(f"s{i:02},{row}" for i, row in enumerate(rows))]
        self.labels.write_text("\n".join(lines) + "\n")
        return self.labels


@pytest.fixture
def labelled(tmp_path: Path) -> Labelled:
    """24 slides, every other one `pos` and moved by 2."""
    made = Labelled(tmp_path / "features")
    made.root.mkdir()
    for i in range(24):
        made.write(i, 2.0 * (i % 2))
    made.table(["neg" if i % 2 == 0 else "pos" for i in range(24)])
    return made


@pytest.fixture
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of 25 draws: their width is another test's."""
    monkeypatch.setattr(evaluation, "bootstrap", partial(bootstrap, draws=25))
