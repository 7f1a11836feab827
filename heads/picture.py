"""An image as a head of pixels reads it: whole and small, and a few places of it in full.

    picture = Picture.of(array)         # (H, W, 3) uint8
    picture.thumbnail(8)                # (3, H / 8, W / 8) 0..1
    picture.crops(rows, 128)            # (k, 3, 128, 128) 0..1, places of a grid of 128 px, counted row by row
    picture.parts(cells, 49, 256)       # (k, 3, 256, 256) 0..1, cells of the image as 49 × 49, whatever its size

What reads from a slide only what it is asked for has the same methods (`Pixels`).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .bag import BadBag

MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, by which networks of pixels are normalised


class Pixels(Protocol):
    """What a head of pixels asks of an image."""

    @property
    def slide(self) -> str:
        """Its name."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        ...

    def trimmed(self, edge: int) -> "Pixels":
        """Without what does not fill a multiple of `edge` pixels at the right and below. BadBag if that is all."""
        ...

    def thumbnail(self, factor: int) -> Tensor: ...

    def crops(self, rows: Tensor, edge: int) -> Tensor: ...

    def parts(self, cells: Tensor, across: int, px: int) -> Tensor: ...

    def to(self, device: torch.device | str) -> "Pixels": ...


@dataclass(frozen=True, eq=False)
class Picture:
    """In memory."""

    pixels: Tensor  # (3, H, W) uint8
    slide: str = ""

    @classmethod
    def of(cls, image: np.ndarray | Tensor, slide: str = "") -> "Picture":
        """(H, W, 3) uint8. BadBag for anything else."""
        array = torch.as_tensor(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != torch.uint8:
            raise BadBag(f"image {slide!r} must be (H, W, 3) uint8, not {tuple(array.shape)} {array.dtype}")
        return cls(array.permute(2, 0, 1).contiguous(), slide)

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def of_pixels(self, pixels: Tensor) -> "Picture":
        """Others under the same name."""
        return replace(self, pixels=pixels)

    def trimmed(self, edge: int) -> "Picture":
        height, width = trimmed(self, edge)
        return self.of_pixels(self.pixels[:, :height, :width])

    def to(self, device: torch.device | str) -> "Picture":
        return self if self.device == torch.device(device) else replace(self, pixels=self.pixels.to(device))

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def thumbnail(self, factor: int) -> Tensor:
        """Means of factor × factor pixels, as coarse tiles of a slide are."""
        return F.avg_pool2d(self.pixels.float(), factor) / 255.0

    def crops(self, rows: Tensor, edge: int) -> Tensor:
        across = self.size[1] // edge
        places = zip((rows // across * edge).tolist(), (rows % across * edge).tolist(), strict=True)
        return torch.stack([self.pixels[:, y : y + edge, x : x + edge] for y, x in places]) / 255.0

    def parts(self, cells: Tensor, across: int, px: int) -> Tensor:
        """(k, 3, px, px) in 0..1: cells of the whole image divided into across × across, counted row by row."""
        made = []
        for cell in cells.tolist():
            top, bottom, left, right = cell_of(cell, across, self.size)
            made.append(resized(self.pixels[:, top:bottom, left:right] / 255.0, px))
        return torch.stack(made)


def trimmed(picture: Pixels, edge: int) -> tuple[int, int]:
    """The height and width that are left."""
    height, width = (side // edge * edge for side in picture.size)
    if not height or not width:
        across, down = picture.size[::-1]
        raise BadBag(f"image {picture.slide!r} of {across} × {down} px holds no place of {edge} px")
    return height, width


def cell_of(cell: int, across: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """top, bottom, left, right in whole pixels, those that are cut included."""
    row, column = divmod(cell, across)
    height, width = size
    top, bottom = row * height // across, -(-(row + 1) * height // across)
    left, right = column * width // across, -(-(column + 1) * width // across)
    return top, bottom, left, right


def resized(image: Tensor, px: int) -> Tensor:
    """(3, h, w) → (3, px, px), whatever its shape."""
    return F.interpolate(image[None], (px, px), mode="bilinear", antialias=True)[0]
