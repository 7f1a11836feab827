"""Double-tier feature distillation: pseudo-bags first, then a bag of what each of them found.

Zhang et al.: DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for Histopathology Whole Slide Image
Classification, CVPR 2022 (arXiv 2203.12081).

    h_i = ReLU(P x_i); the tiles are parted at random into G pseudo-bags
    tier 1: gated attention α_i in each, z_g = Σ α_i h_i, logits W z_g + b; a tile's own logits are W (α_i h_i)
    distilled of each pseudo-bag: maxs its likeliest tile of the last class; maxmins that and the least likely; afs z_g
    tier 2: gated attention β over the distilled vectors, logits W' Σ β d + b'

The loss is the mean of tier 1 plus that of tier 2. A tile's weight is α_i times the β that its
pseudo-bag's vectors get.

What differs from the released code: in evaluation the parting is drawn from the bits of the features, so the same
slide always gives the same answer, in any order of its tiles. As there, tier 2 does not train tier 1 (whose gradients
its code computes and throws away); with `joint` it does. maxs and maxmins ask for the last class, so they suit two
classes.

Parameters (E = 512, A = 128): E dim + 2 (2 A (E + 1) + A + 1 + C (E + 1)).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head
from .layers import Attention
from .recipe import Recipe
from .tasks import Task

DISTILL = ("afs", "maxs", "maxmins")


class DTFD(Head):
    recipes: ClassVar = {
        "paper": Recipe(
            weight_decay=1e-4,
            schedule="step",
            step_epoch=100,
            step_factor=0.2,
            epochs=200,
            patience=200,
            keep_from=160,
            clip=5.0,
            class_weights=False,
        )
    }

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        distill: str = "afs",
        groups: int = 4,
        joint: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, classes, distill=distill, groups=groups, joint=joint, dropout=dropout)
        if distill not in DISTILL or groups < 1:
            raise ValueError(f"distill must be one of {', '.join(DISTILL)}, groups at least 1: {distill!r}, {groups}")
        self.projection = nn.Sequential(nn.Linear(dim, 512, bias=False), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.attention, self.classifier = Attention(512, 128), nn.Linear(512, classes)
        self.attention2, self.classifier2 = Attention(512, 128), nn.Linear(512, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        x = bag.valid_features
        h = self.dropout(self.projection(x))
        raw = self.attention(h)[:, 0]
        groups = self._parted(x)
        alpha = torch.cat([raw[rows].softmax(0) for rows in groups])[torch.cat(groups).argsort()]  # in each group
        z = torch.stack([alpha[rows] @ h[rows] for rows in groups])  # (G, E)
        share = torch.stack([vector for rows in groups for vector in self._distilled(rows, alpha, h)])  # (G or 2 G, N)
        vectors = share @ h
        vectors = vectors if self.options["joint"] else vectors.detach()
        beta = self.attention2(self.dropout(vectors))[:, 0].softmax(0)
        embedding = beta @ vectors
        tiles = TileScores.place(bag.valid, raw, self._weights(alpha, beta, groups))
        return Prediction(self.classifier2(embedding), embedding, (tiles,), parts={"tier 1": self.classifier(z)})

    def _parted(self, x: Tensor) -> list[Tensor]:
        """Rows of the pseudo-bags, each with the same number of tiles, or one more."""
        order = torch.randperm(len(x), device=x.device) if self.training else draws(x).argsort(stable=True)
        return list(order.tensor_split(min(self.options["groups"], len(x))))

    def _distilled(self, rows: Tensor, alpha: Tensor, h: Tensor) -> list[Tensor]:
        """Of one pseudo-bag: the vectors that go on, as shares of the tiles (N,)."""
        if self.options["distill"] == "afs":
            return [torch.zeros_like(alpha).index_put((rows,), alpha[rows])]
        own = self.classifier.weight @ (alpha[rows, None] * h[rows]).T  # (C, n), an activation map: no bias
        likely = own.softmax(0)[-1] if self.classes > 1 else own[0]
        chosen = [likely.argmax()] if self.options["distill"] == "maxs" else [likely.argmax(), likely.argmin()]
        return [torch.zeros_like(alpha).index_fill(0, rows[one], 1.0) for one in chosen]

    def _weights(self, alpha: Tensor, beta: Tensor, groups: list[Tensor]) -> Tensor:
        """(N,): attention within the pseudo-bag, times what tier 2 gives to it."""
        each = beta.unflatten(0, (len(groups), -1)).sum(1)
        weights = torch.empty_like(alpha)
        for rows, one in zip(groups, each, strict=True):
            weights = weights.index_put((rows,), alpha[rows] * one)
        return weights

    def loss(self, prediction: Prediction, target: Any, task: Task | None = None) -> Tensor:
        task = task or self.task
        first = torch.stack([task.loss(logits, target) for logits in prediction.parts["tier 1"]]).mean()
        return first + task.loss(prediction.logits, target)


def draws(x: Tensor) -> Tensor:
    """(N, D) float32 → (N,) whole numbers that look random and depend on each row's own bits only."""
    bits = x.detach().contiguous().view(torch.int32).to(torch.int64)
    odd = 2 * torch.arange(x.shape[1], device=x.device) + 1
    mixed = (bits * (odd * 0x9E3779B97F4A7C1 + 0x7F4A7C15)).sum(1)  # wraps around, exactly
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return mixed ^ (mixed >> 32)


build = DTFD
