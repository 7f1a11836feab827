"""The pixels of slides for heads that read them: whole in memory, or only where a head looks.

    with Region(open_slide("a.svs"), mpp=0.5) as region:    # a head's `Pixels`
        head(region)
        region.cost.pixels                                  # read so far

A slide is read at one resolution, area means as tiles are. The images of a folder are read pixel by pixel.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heads.picture import Picture, cell_of, resized, trimmed

from .config import digest
from .errors import BrokenBag, UsageError
from .fingerprint import fingerprint
from .folder import find_slides
from .labels import Labels, listed
from .output import read_run
from .places import placed
from .readers import open_slide
from .slide import MAX_PIXELS, Box, ReadCost, Slide, Thumbnail, read_mean, source_level, thumbnail
from .store import BagStore

OURS = ("models", "predictions", "heatmaps", "evaluations")  # folders in which images are not those of the user
AS_IT_IS = 1.0  # µm/px that an image of a folder is read at: its own pixels, whatever they measure
BLOCK_PX = 2048


class Region:
    """A rectangle of a slide at one resolution, from which only what a head asks for is read.

    What is small (`thumbnail`) comes from the coarsest level of the file that is fine enough, as the slide would have
    to be read in full otherwise; files' own levels were seen to differ from means by some grey values.
    """

    def __init__(
        self,
        slide: Slide,
        mpp: float,
        box: Box | None = None,
        name: str = "",
        device: torch.device | str = "cpu",
        cost: ReadCost | None = None,
    ) -> None:
        self._slide, self._mpp, self.slide, self.device = slide, mpp, name, torch.device(device)
        self.box = box or Box(0, 0, *slide.size)
        self.scale = mpp / slide.mpp  # level-0 px of a pixel
        self.cost = cost or ReadCost()  # shared by the regions made of this one

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return int(self.box.height / self.scale + 1e-6), int(self.box.width / self.scale + 1e-6)

    def to(self, device: torch.device | str) -> "Region":
        return Region(self._slide, self._mpp, self.box, self.slide, device, self.cost)

    def trimmed(self, edge: int) -> "Region":
        height, width = trimmed(self, edge)
        box = Box(self.box.x, self.box.y, width * self.scale, height * self.scale)
        return Region(self._slide, self._mpp, box, self.slide, self.device, self.cost)

    def thumbnail(self, factor: int) -> Tensor:
        height, width = (side // factor for side in self.size)
        rows = range(0, height, BLOCK_PX)
        strips = [self._read(0, y * factor, (width * factor, min(BLOCK_PX, height - y) * factor), factor) for y in rows]
        return torch.cat(strips, dim=1)

    def crops(self, rows: Tensor, edge: int) -> Tensor:
        across = self.size[1] // edge
        corners = [((row % across) * edge, (row // across) * edge) for row in rows.tolist()]
        return torch.stack([self._read(x, y, (edge, edge)) for x, y in corners])

    def parts(self, cells: Tensor, across: int, px: int) -> Tensor:
        made = []
        for cell in cells.tolist():
            top, bottom, left, right = cell_of(cell, across, self.size)
            made.append(resized(self._read(left, top, (right - left, bottom - top)), px))
        return torch.stack(made)

    def overview(self, edge: int) -> Thumbnail:
        """The whole slide, its longer side of about `edge` pixels or fewer."""
        return thumbnail(self._slide, self._slide.mpp * max(1.0, max(self._slide.size) / edge))

    def whole(self) -> Picture:
        """In memory. Raises BrokenBag where it is too large for that."""
        height, width = self.size
        if height * width > MAX_PIXELS:
            raise BrokenBag(
                self.slide,
                "read",
                f"{width} x {height} px are too many to be trained on as one picture; cut regions from it, or choose a "
                "coarser --level",
            )
        image = np.empty((height, width, 3), np.uint8)
        for y in range(0, height, BLOCK_PX):
            for x in range(0, width, BLOCK_PX):
                w, h = min(BLOCK_PX, width - x), min(BLOCK_PX, height - y)
                image[y : y + h, x : x + w] = self._mean(x, y, (w, h), 1, rounded=True)
        return Picture.of(image, self.slide)

    def _read(self, x: int, y: int, size: tuple[int, int], factor: int = 1) -> Tensor:
        """(3, h / factor, w / factor) in 0..1, of pixels of the region."""
        values = self._mean(x, y, size, factor, rounded=factor == 1)
        grey = 255.0 if values.dtype == np.uint8 else 255.0 * 256
        return torch.from_numpy(values.astype(np.float32) / np.float32(grey)).permute(2, 0, 1).to(self.device)

    def _mean(self, x: int, y: int, size: tuple[int, int], factor: int, rounded: bool) -> np.ndarray:
        level = source_level(self._slide, self._mpp * factor)
        box = Box(self.box.x + x * self.scale, self.box.y + y * self.scale, size[0] * self.scale, size[1] * self.scale)
        self.cost.add(round(box.width * box.height / math.prod(self._slide.levels[level].downsample)))
        return read_mean(self._slide, box, (size[0] // factor, size[1] // factor), level, rounded)


class Pictures:
    """Slides as pictures. `levels`: µm/px at which they may be read, coarse → fine; empty: pixel by pixel."""

    dim = None

    def __init__(self, files: dict[str, tuple[Path, float | None]], levels: Sequence[float], reader: str) -> None:
        """files: of each slide, and the µm/px that a table gave for it."""
        self._files, self.levels, self._reader = files, list(levels), reader

    @classmethod
    def of_store(cls, store: BagStore, slides: Iterable[str]) -> "Pictures":
        """The slides of an output folder. Its levels are those of the tiles."""
        run = read_run(store.root)
        root, files = placed(run["root"]), {}
        for slide in slides:
            files[slide] = (root / slide, store.group(slide).attrs["scale"]["given"])
        first = store.group(next(iter(files)))
        return cls(files, [level.mpp for level in first.tree().levels], run["recipe"]["reader"])

    @contextmanager
    def region(self, slide: str, mpp: float | None) -> Iterator[Region]:
        """Open while it is used. Raises SlideError."""
        path, given = self._files[slide]
        how = {"mpp": AS_IT_IS, "mpp_source": "pixels"} if not self.levels else {"mpp": given, "mpp_source": "csv"}
        with open_slide(path, reader=self._reader, **how) as opened:
            yield Region(opened, opened.mpp if mpp is None else mpp, name=slide)

    def picture(self, slide: str, mpp: float | None) -> Picture:
        """Whole. Raises SlideError."""
        with self.region(slide, mpp) as region:
            return region.whole()

    def state(self, slide: str) -> str:
        return fingerprint(self._files[slide][0]).sha256

    def about(self) -> dict[str, Any]:
        """What a model must know of them: nothing but that they are pixels; `level` says of which µm/px."""
        facts = {"name": "pixels", "scaled": bool(self.levels)}
        return {"encoder_key": "pixels", "encoder": facts, "feature_hash": digest(facts), "encoded_mpp": self.levels}


class ImageFolder:
    """A folder of images, as a place whose images may be labelled: by a table, or by the folder they are in."""

    def __init__(self, folder: str | Path) -> None:
        found = find_slides(folder)
        self.root = found.root
        self._files = {name: path for name, path in found.files.items() if Path(name).parts[0] not in OURS}
        if not self._files:
            raise UsageError(f"{folder}: no image in it")

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        try:
            return Path(folder).is_dir() and bool(ImageFolder(folder).slides())
        except UsageError:
            return False

    def slides(self) -> list[str]:
        return sorted(self._files)

    def origin(self) -> Path:
        return self.root

    def has_features(self, slide: str) -> bool:
        return slide in self._files  # its pixels

    def features(self, slides: Sequence[str], encoder: str | None) -> None:
        if encoder is not None:
            raise UsageError(f"--encoder {encoder}: {self.root} holds images; `slidestream run` makes their features")

    def pictures(self, slides: Iterable[str]) -> Pictures:
        return Pictures({slide: (self._files[slide], None) for slide in slides}, [], "auto")

    def labels(self, target: str) -> Labels:
        """The folder of each image. Raises UsageError for images that lie in none."""
        loose = [name for name in self.slides() if len(Path(name).parts) < 2]
        if loose:
            raise UsageError(
                f"{listed('images lie in no folder that would be their class', loose)} Give a table with --labels"
            )
        rows = [{"slide": name, target: Path(name).parts[0]} for name in self.slides()]
        return Labels(self.root, self.slides(), rows, None)
