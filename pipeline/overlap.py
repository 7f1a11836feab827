"""Does a head look where people annotated? Figures of one slide, in areas of level-0 pixels.

    tile_figures(ground, boxes, weight, raw, threshold=0.5)     # {"auc_weight": 0.91, "dice_10": 0.32, …}
    region_figures(ground, Choice(chosen, among), threshold=0.5)   # {"hit_rate": 0.7, "hit_rate_of_all": 0.4, …}

The share of a box is of the part of it that lies on the slide: a tile over the slide's edge is annotated where all that
it shows is. It is positive from `threshold` on. What is not defined is NaN: an AUC of tiles of one kind only, and all
that asks for annotated area where there is none.

Dice of the top k %: 2 |T ∩ A| / (|T| + |A|), with T the union of the chosen tiles and A all that is annotated. HATNet
(Mehta et al., arXiv 2007.13007, footnote 1) takes of the chosen only those inside the annotated structure into T, which
forgives what is looked at outside: `dice_inside`, here of the chosen tiles that are positive.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from heads.metrics import Metrics, auc

from .tissue import TissueMask

SHARES = (10, 20, 30, 40, 50, 60)  # k %, HATNet's
NOTHING = (
    1e-6  # a share as small is none, and one that much below the threshold reaches it: sums of floats are not exact
)


@dataclass(frozen=True, eq=False)
class Ground:
    """What is annotated on a slide of `size` (width, height); the mask covers the slide, no more and no less."""

    mask: TissueMask
    size: tuple[int, int]

    @cached_property
    def area(self) -> float:
        """Annotated px²."""
        x, y = self.mask.downsample
        return float(np.count_nonzero(self.mask.image)) * x * y

    def share(self, boxes: np.ndarray) -> np.ndarray:
        """(n, 4) → (n,) in 0..1."""
        return self.mask.fraction(self._on_slide(boxes)).astype(np.float64)

    def covered(self, boxes: np.ndarray) -> tuple[float, float]:
        """px² of the slide under these boxes, which may overlap, and how many of them are annotated."""
        parts = self._on_slide(disjoint(boxes))
        areas = parts[:, 2] * parts[:, 3]
        return float(areas.sum()), float(areas @ self.share(parts))

    def dice(self, boxes: np.ndarray) -> float:
        chosen, both = self.covered(boxes)
        return 2 * both / (chosen + self.area) if self.area else np.nan

    def _on_slide(self, boxes: np.ndarray) -> np.ndarray:
        low, high = (np.clip(corner, 0, self.size) for corner in (boxes[:, :2], boxes[:, :2] + boxes[:, 2:]))
        return np.concatenate([low, high - low], axis=1)


@dataclass(frozen=True, eq=False)
class Choice:
    """Boxes (n, 4) that a head chose to look at, and all those among which it did."""

    chosen: np.ndarray
    among: np.ndarray


def tile_figures(
    ground: Ground, boxes: np.ndarray, weight: np.ndarray, raw: np.ndarray, threshold: float, score: str = "weight"
) -> Metrics:
    """Of the tiles (n, 4) of one level and their scores (n,), NaN where the head never looked.

    score: weight or raw, by which tiles are ranked; of equals the one with more of the other, then the first. k % are
    of all tiles of the level, rounded up: the same number for a head that looks at few of them and one that looks at
    all. Where fewer were looked at, these are taken.
    """
    seen, positive = np.isfinite(weight), ground.share(boxes) > threshold - NOTHING
    first, second = (weight, raw) if score == "weight" else (raw, weight)
    ranked = np.lexsort((-second, -first))
    ranked = ranked[seen[ranked]]
    found: Metrics = {"tiles": len(boxes), "looked_at": int(seen.sum()), "positive": int(positive.sum())}
    found["annotated_share"] = ground.area / (ground.size[0] * ground.size[1])
    found["annotated_in_tiles"] = ground.covered(boxes)[1] / ground.area if ground.area else np.nan
    both_kinds = len(np.unique(positive[seen])) == 2
    for name, values in (("weight", weight), ("raw", raw)):
        found[f"auc_{name}"] = auc(values[seen], positive[seen]) if both_kinds else np.nan
    for k in SHARES:
        top = ranked[: -(-k * len(boxes) // 100)]
        found[f"dice_{k}"] = ground.dice(boxes[top])
        found[f"dice_inside_{k}"] = ground.dice(boxes[top[positive[top]]])
    return found


def region_figures(ground: Ground, choice: Choice | None, threshold: float) -> Metrics:
    """How many of the chosen boxes contain annotation (`hit_rate`) and are positive (`positive_rate`).

    `…_of_all`: the same of all boxes that could have been chosen, which is what choosing at random would reach.
    """
    found: Metrics = {"regions": 0, "chosen": 0}
    shares = {"": np.zeros(0), "_of_all": np.zeros(0)}
    if choice is not None:
        found = {"regions": len(choice.among), "chosen": len(choice.chosen)}
        shares = {"": ground.share(choice.chosen), "_of_all": ground.share(choice.among)}
    for name, least in (("hit_rate", NOTHING), ("positive_rate", threshold - NOTHING)):
        for whose, share in shares.items():
            found[name + whose] = float((share > least).mean()) if len(share) and ground.area else np.nan
    return found


def disjoint(boxes: np.ndarray) -> np.ndarray:
    """The union of boxes (n, 4) as boxes that do not overlap: bands between their edges, runs in each band."""
    x, y = boxes[:, :2].T
    right, bottom = (boxes[:, :2] + boxes[:, 2:]).T
    parts = [boxes[:0]]
    for top, low in pairwise(np.unique(np.concatenate([y, bottom]))):
        here = np.flatnonzero((y <= top) & (bottom >= low))
        if not len(here):
            continue
        here = here[np.argsort(x[here], kind="stable")]
        left, reach = x[here], np.maximum.accumulate(right[here])
        begins = np.flatnonzero(np.append(True, left[1:] > reach[:-1]))
        ends = np.append(begins[1:] - 1, len(here) - 1)
        band = np.full(len(begins), top)
        parts.append(np.stack([left[begins], band, reach[ends] - left[begins], np.full_like(band, low - top)], axis=1))
    return np.concatenate(parts)
