"""ScoreMix: a box of one image on another, chosen by what each of them shows there.

Stegmüller et al., WACV 2023 (arXiv 2202.07570). For images with a map each, one number for a place of `edge` pixels:

    1 - λ ~ U(0, 1);  the box has ⌈(1 - λ) N⌉ of the N places;  λ is then 1 - its share of the image
    where it is cut: by the sum of the source's map in it;  where it is put: by the complement of the target's
    loss = λ loss(target's label) + (1 - λ) loss(source's label)

complement, of the sums S over all positions of the box: "range-shift", max S - S, as the released code has it, or
"one-minus-p", 1 - S / ΣS, as the paper says, which of more than a few positions makes all but equal chances. What
differs from the code: it draws boxes that are never taller than wide, here the sides change places half of the time.

    mixed = mix(target, source, target_map, source_map, edge=128)
    loss = mixed.loss(head, head(Picture(mixed.pixels)), label, other_label)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bag import Prediction
from .head import Head
from .picture import Picture
from .tasks import Task

COMPLEMENTS = ("range-shift", "one-minus-p")


class Mixed(NamedTuple):
    """An image with a box of another."""

    pixels: Tensor  # (3, H, W)
    share: float  # λ, of the target
    cut: tuple[int, int]  # row and column of the box in the source's map, places
    put: tuple[int, int]  # and in the target's
    box: tuple[int, int]  # its height and width, places

    def loss(self, head: Head, prediction: Prediction, target: Any, source: Any, task: Task | None = None) -> Tensor:
        """Of the label of the target image and that of the source."""
        own, other = (head.loss(prediction, label, task) for label in (target, source))
        return self.share * own + (1 - self.share) * other


@dataclass(frozen=True)
class ScoreMix:
    """A step on a picture of `pictures` that has, with this probability, a box of another one of them.

    The maps are those of the head itself at this moment (`attention_map`), without dropout. Random numbers are those of
    torch's generator, on the CPU.
    """

    probability: float = 0.5
    edge: int = 128
    complement: str = "range-shift"

    def loss(self, head: Head, pictures: Sequence[Picture], targets: Any, i: int, task: Task) -> Tensor:
        device = next(head.parameters()).device
        own = pictures[i].to(device)
        if float(torch.rand(())) >= self.probability or len(pictures) < 2:
            return head.loss(head(own), targets[i], task)
        j = (i + 1 + int(torch.randint(len(pictures) - 1, ()))) % len(pictures)
        own, other = own.trimmed(self.edge), pictures[j].to(device).trimmed(self.edge)
        mixed = self.mixed(head, own, other)
        return mixed.loss(head, head(own.of_pixels(mixed.pixels)), targets[i], targets[j], task)

    def mixed(self, head: Head, own: Picture, other: Picture) -> Mixed:
        maps = [self._map(head, picture) for picture in (own, other)]
        return mix(own.pixels, other.pixels, *maps, edge=self.edge, complement=self.complement)

    def _map(self, head: Head, picture: Picture) -> Tensor:
        training = head.training
        head.eval()
        try:
            return head.attention_map(picture, self.edge)
        finally:
            head.train(training)


def mix(
    target: Tensor,
    source: Tensor,
    target_map: Tensor,
    source_map: Tensor,
    *,
    edge: int = 128,
    complement: str = "range-shift",
    generator: torch.Generator | None = None,
) -> Mixed:
    """Images (3, H, W), which may differ in size, and their maps (H / edge, W / edge), which have no gradient here."""
    if complement not in COMPLEMENTS:
        raise ValueError(f"complement must be one of {', '.join(COMPLEMENTS)}, not {complement!r}")
    for image, where in ((target, target_map), (source, source_map)):
        if tuple(n // edge for n in image.shape[1:]) != tuple(where.shape):
            raise ValueError(f"a map of {tuple(where.shape)} is not that of {tuple(image.shape[1:])} px by {edge}")
    grid = tuple(map(min, zip(target_map.shape, source_map.shape, strict=True)))
    box = draw_box(grid[0], grid[1], generator)
    cut = draw_place(chances(box_sums(source_map.detach(), box)), generator)
    put = draw_place(chances(box_sums(target_map.detach(), box), complement), generator)
    return paste(target, source, cut, put, box, edge)


def paste(
    target: Tensor, source: Tensor, cut: tuple[int, int], put: tuple[int, int], box: tuple[int, int], edge: int
) -> Mixed:
    """The box of the source, at this place of the target; all in places of `edge` pixels."""
    pixels = target.clone()
    (top, left), (height, width) = ((edge * a, edge * b) for a, b in (put, box))
    y, x = edge * cut[0], edge * cut[1]
    pixels[:, top : top + height, left : left + width] = source[:, y : y + height, x : x + width]
    share = 1 - height * width / (target.shape[1] * target.shape[2])
    return Mixed(pixels, share, cut, put, box)


def draw_box(rows: int, columns: int, generator: torch.Generator | None) -> tuple[int, int]:
    """Height and width of a box in a grid of so many places."""
    share = float(torch.rand((), generator=generator))
    count = max(1, math.ceil(share * rows * columns))
    tallest = max(1, math.ceil(math.sqrt(count)) - 1)
    short = 1 + int(torch.randint(tallest, (), generator=generator))
    sides = (short, math.ceil(count / short))
    if float(torch.rand((), generator=generator)) < 0.5:
        sides = (sides[1], sides[0])
    return min(sides[0], rows), min(sides[1], columns)


def box_sums(where: Tensor, box: tuple[int, int]) -> Tensor:
    """Of the map inside the box, at each of its positions (rows, columns)."""
    return F.avg_pool2d(where[None, None], box, stride=1)[0, 0] * (box[0] * box[1])


def chances(sums: Tensor, complement: str | None = None) -> Tensor:
    """A distribution over positions, by what is in the box there, or by what is not."""
    if complement is None:
        weight = sums - sums.min()
    elif complement == "range-shift":
        weight = sums.max() - sums
    else:
        weight = 1 - sums / sums.sum()
    return weight / weight.sum() if float(weight.sum()) > 0 else torch.full_like(sums, 1 / sums.numel())


def draw_place(chance: Tensor, generator: torch.Generator | None) -> tuple[int, int]:
    at = int(torch.multinomial(chance.flatten().cpu(), 1, generator=generator))
    return at // chance.shape[1], at % chance.shape[1]
