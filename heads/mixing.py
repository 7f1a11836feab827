"""What ScoreMix is compared with: boxes that are put where they were cut, at random or around what is salient.

CutMix: Yun et al., ICCV 2019. SaliencyMix: Uddin et al., ICLR 2021. As in ScoreMix boxes are of whole places, and half
of the pictures have one; saliency is the spectral residual (Hou and Zhang, CVPR 2007).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .head import Head
from .picture import Picture
from .scoremix import Mixed, ScoreMix, draw_box, paste

SALIENCY_PX = 64  # the longer side of the image that saliency is computed of


class CutMix(ScoreMix):
    """A box from anywhere."""

    def mixed(self, head: Head, own: Picture, other: Picture) -> Mixed:
        rows, columns = (min(a, b) // self.edge for a, b in zip(own.size, other.size, strict=True))
        box = draw_box(rows, columns, None)
        at = self.corner(other, (rows, columns), box)
        return paste(own.pixels, other.pixels, at, at, box, self.edge)

    def corner(self, other: Picture, grid: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
        """The upper left place of the box."""
        row, column = (int(torch.randint(n - side + 1, ())) for n, side in zip(grid, box, strict=True))
        return row, column


class SaliencyMix(CutMix):
    """A box with the most salient point of the other picture in its middle, or as near as the border allows."""

    def corner(self, other: Picture, grid: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
        where = saliency(other)
        y, x = divmod(int(where.argmax()), where.shape[1])
        middle = ((y + 0.5) / where.shape[0] * other.size[0], (x + 0.5) / where.shape[1] * other.size[1])
        row, column = (
            min(max(round(at / self.edge - side / 2), 0), n - side)
            for at, side, n in zip(middle, box, grid, strict=True)
        )
        return row, column


def saliency(picture: Picture) -> Tensor:
    """(h, w) of the grey picture at a small scale."""
    grey = picture.pixels.float().mean(0)[None, None]
    small = F.interpolate(grey, scale_factor=SALIENCY_PX / max(picture.size), mode="area")
    spectrum = torch.fft.fft2(small[0, 0])
    size = (spectrum.abs() + 1e-8).log()
    residual = size - F.avg_pool2d(size[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
    shown = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs() ** 2
    return F.avg_pool2d(shown[None, None], 9, stride=1, padding=4, count_include_pad=False)[0, 0]


MIXES: dict[str, Callable[[], ScoreMix]] = {
    "cutmix": CutMix,
    "saliencymix": SaliencyMix,
    "scoremix": ScoreMix,
    "scoremix-one-minus-p": partial(ScoreMix, complement="one-minus-p"),
}
