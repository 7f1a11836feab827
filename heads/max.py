"""The maximum of each channel over all tiles, then a linear classifier.

    z_d = max_i x_id        logits = W z + b

A tile's raw score is the number of channels it wins, its weight the share of them; tiles that tie share the channel, so
that scores (and gradients) do not depend on the order of the tiles.
"""

import torch
from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head


class Max(Head):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        x = bag.valid_features
        z = x.amax(dim=0)
        won = channels_won(x, z)
        return Prediction(self.classifier(z), z, (TileScores.place(bag.valid, won, won / self.dim),))


@torch.no_grad()
def channels_won(x: Tensor, z: Tensor) -> Tensor:
    wins = x == z  # (N, D)
    return wins.to(x.dtype) @ (1 / wins.sum(dim=0))


build = Max
