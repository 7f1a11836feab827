"""The tile with the highest score speaks for the slide: what CLAM's code calls `mil`.

Lu et al.: Data-efficient and weakly supervised computational pathology on whole-slide images, Nat Biomed Eng 2021
(arXiv 2004.09666), the baseline of its comparison.

    h_i = ReLU(P x_i)        s_i = W h_i + b        logits = s_m

With two classes m is the tile that is likeliest of class 1; with more, the one that is surest of any class. Tiles that
tie share, so that nothing depends on their order. A tile's raw score is the probability that was compared.

Parameters: 512 (dim + 1) + 513 classes.
"""

from typing import ClassVar

from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head
from .recipe import Recipe


class MaxScore(Head):
    recipes: ClassVar = {"paper": Recipe(epochs=200, patience=20, min_epochs=50, class_weights=False)}

    def __init__(self, dim: int, classes: int, *, hidden: int = 512, dropout: float = 0.25) -> None:
        super().__init__(dim, classes, hidden=hidden, dropout=dropout)
        self.projection = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        h = self.projection(bag.valid_features)
        scores = self.classifier(h)  # (N, C)
        sure = certainty(scores)
        best = sure.detach() == sure.detach().max()
        weight = best / best.sum()
        tiles = TileScores.place(bag.valid, sure, weight, scores.T)
        return Prediction(weight @ scores, weight @ h, (tiles,))


def certainty(scores: Tensor) -> Tensor:
    """(N, C) → (N,): by what tiles are compared."""
    if scores.shape[1] == 1:
        return scores[:, 0].sigmoid()
    probability = scores.softmax(-1)
    return probability[:, 1] if scores.shape[1] == 2 else probability.amax(-1)


build = MaxScore
