"""Views of tiles for DINO: crops with other places, sizes and colours. Each tile of a batch draws numbers of its own.

torchvision's transforms draw one set for a batch of tensors; one call a tile takes as long as the network. So a batch
is cropped by one sampling grid, and coloured by one 3 × 3 matrix a tile: brightness, contrast and saturation are such
matrices, hue is a turn about the grey axis. All numbers come from one generator on the CPU, whatever the device.

Strengths are DINO's (Caron et al., ICCV 2021, appendix). A tile of tissue has no upper end: it is turned over as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

JITTERED, GREYED, SOLARISED = 0.8, 0.2, 0.2  # shares of the views; only the second wide one is solarised
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
SIGMA_PX = (0.1, 2.0)
TAPS = 4  # on each side: twice the widest blur
ASPECT = 4 / 3
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Look:
    """A kind of view: its edge, the share of the tile's area that it shows, how often it is blurred and solarised.

    px: None for the whole tile as it lies, of which other colours only are seen.
    """

    px: int | None
    area: tuple[float, float]
    blurred: float
    solarised: float = 0.0


def looks(
    wide_px: int | None, small_px: int, wide: tuple[float, float], small: tuple[float, float], count: int
) -> list[Look]:
    """DINO's two wide views, which differ in blur, and `count` small ones."""
    return [Look(wide_px, wide, 1.0), Look(wide_px, wide, 0.1, SOLARISED), *[Look(small_px, small, 0.5)] * count]


def view(tiles: Tensor, look: Look, numbers: Generator) -> Tensor:
    """Tiles (B, 3, H, W) in 0..1 → (B, 3, px, px) in 0..1."""
    images = tiles if look.px is None else _crop(tiles, look.px, look.area, numbers)
    images = _colour(images, numbers)
    images = _blur(images, look.blurred, numbers)
    chosen = _chance(len(tiles), look.solarised, numbers).to(images.device)[:, None, None, None]
    return torch.where(chosen & (images >= 0.5), 1 - images, images)


def _uniform(count: int, low: float, high: float, numbers: Generator) -> Tensor:
    return torch.rand(count, generator=numbers) * (high - low) + low


def _chance(count: int, share: float, numbers: Generator) -> Tensor:
    return torch.rand(count, generator=numbers) < share


def _crop(tiles: Tensor, px: int, area: tuple[float, float], numbers: Generator) -> Tensor:
    """A part of each tile, turned over by chance along both axes and the diagonal."""
    count = len(tiles)
    side = _uniform(count, *area, numbers).sqrt()
    stretch = _uniform(count, -math.log(ASPECT) / 2, math.log(ASPECT) / 2, numbers).exp()
    size = torch.stack([side * stretch, side / stretch], dim=1).clamp(max=1)  # of the tile's width and height
    centre = (1 - size) * (2 * torch.rand(count, 2, generator=numbers) - 1)
    sign = 1 - 2 * torch.randint(2, (count, 2), generator=numbers)
    scale = torch.diag_embed(size * sign)
    scale = torch.where(_chance(count, 0.5, numbers)[:, None, None], scale.flip(2), scale)
    theta = torch.cat([scale, centre[:, :, None]], dim=2).to(tiles.device)
    grid = F.affine_grid(theta, [count, 3, px, px], align_corners=False)
    return F.grid_sample(tiles, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _colour(images: Tensor, numbers: Generator) -> Tensor:
    count = len(images)
    jittered, greyed = _chance(count, JITTERED, numbers), _chance(count, GREYED, numbers)
    light, contrast, colour, turn = (
        torch.where(jittered, _uniform(count, -most, most, numbers), 0.0)
        for most in (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    )
    colour = torch.where(greyed, -1.0, colour)  # no saturation is grey
    grey = torch.tensor(LUMA).expand(3, 3)
    mixed = _turned(turn) @ (torch.eye(3) * (1 + colour)[:, None, None] - grey * colour[:, None, None])
    matrix, lit, apart = (
        part.to(images.device) for part in (mixed * ((1 + light) * (1 + contrast))[:, None, None], 1 + light, contrast)
    )
    flat = images.flatten(2)
    middle = lit * (flat.mean(2) @ torch.tensor(LUMA, device=flat.device))  # what contrast is about
    coloured = torch.baddbmm((-apart * middle)[:, None, None], matrix, flat).clamp_(0, 1)
    return coloured.unflatten(2, images.shape[2:])


def _turned(turn: Tensor) -> Tensor:
    """(B,) parts of a whole turn → (B, 3, 3): rotations about the grey axis, which leave R + G + B as it is."""
    axis = 3**-0.5
    cross = axis * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    angle = (2 * math.pi * turn)[:, None, None]
    return angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) / 3


def _blur(images: Tensor, share: float, numbers: Generator) -> Tensor:
    """Gaussian, for a share of the images."""
    sigma = _uniform(len(images), *SIGMA_PX, numbers)
    rows = _chance(len(images), share, numbers).nonzero()[:, 0]
    if not len(rows):
        return images
    kernels = torch.exp(-0.5 * (torch.arange(-TAPS, TAPS + 1) / sigma[rows, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, dim=0).to(images.device)
    rows = rows.to(images.device)
    chosen = images[rows].flatten(0, 1)[None]  # images and colours as channels, each with a kernel of its own
    for kernel, pad in ((kernels[:, None, None], (TAPS, TAPS, 0, 0)), (kernels[:, None, :, None], (0, 0, TAPS, TAPS))):
        chosen = F.conv2d(F.pad(chosen, pad, mode="reflect"), kernel, groups=len(kernels))
    return images.index_copy(0, rows, chosen[0].unflatten(0, (len(rows), 3)))
