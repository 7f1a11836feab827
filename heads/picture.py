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

    slide: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        ...

    def thumbnail(self, factor: int) -> Tensor: ...

    def crops(self, rows: Tensor, edge: int) -> Tensor: ...

    def parts(self, cells: Tensor, across: int, px: int) -> Tensor: ...

    def to(self, device: torch.device | str) -> "Pixels": ...


@dataclass(frozen=True, eq=False)
class Picture:
    """In memory. What does not fill a multiple of `edge` pixels at the right and below is left out."""

    pixels: Tensor  # (3, H, W) uint8
    slide: str = ""
    edge: int = 128

    @classmethod
    def of(cls, image: np.ndarray | Tensor, slide: str = "", edge: int = 128) -> "Picture":
        """(H, W, 3) uint8. BadBag for anything else, or one smaller than `edge`."""
        array = torch.as_tensor(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != torch.uint8:
            raise BadBag(f"image {slide!r} must be (H, W, 3) uint8, not {tuple(array.shape)} {array.dtype}")
        height, width = (n // edge * edge for n in array.shape[:2])
        if not height or not width:
            raise BadBag(f"image {slide!r} of {array.shape[1]} × {array.shape[0]} px holds no place of {edge} px")
        return cls(array[:height, :width].permute(2, 0, 1).contiguous(), slide, edge)

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def to(self, device: torch.device | str) -> "Picture":
        return self if self.device == torch.device(device) else replace(self, pixels=self.pixels.to(device))

    def thumbnail(self, factor: int) -> Tensor:
        """Bicubic with antialiasing."""
        height, width = self.size
        whole = self.pixels[None] / 255.0
        small = F.interpolate(whole, (height // factor, width // factor), mode="bicubic", antialias=True)
        return small[0].clamp(0, 1)

    def crops(self, rows: Tensor, edge: int) -> Tensor:
        across = self.size[1] // edge
        places = zip((rows // across * edge).tolist(), (rows % across * edge).tolist(), strict=True)
        return torch.stack([self.pixels[:, y : y + edge, x : x + edge] for y, x in places]) / 255.0

    def parts(self, cells: Tensor, across: int, px: int) -> Tensor:
        """(k, 3, px, px) in 0..1: cells of the whole image divided into across × across, counted row by row."""
        made = []
        for cell in cells.tolist():
            bounds = [
                (i * n // across, -(-(i + 1) * n // across))
                for i, n in zip(divmod(cell, across), self.size, strict=True)
            ]
            (top, bottom), (left, right) = bounds
            part = self.pixels[None, :, top:bottom, left:right] / 255.0
            made.append(F.interpolate(part, (px, px), mode="bilinear", antialias=True)[0])
        return torch.stack(made)
