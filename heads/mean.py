"""The mean of all tiles, then a linear classifier: the baseline that every other head has to beat.

z = 1/N Σ x_i        logits = W z + b
"""

from torch import nn

from .bag import Bag, Prediction, TileScores
from .head import Head


class Mean(Head):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        x = bag.valid_features
        z = x.mean(dim=0)
        raw = x.new_zeros(len(x))
        return Prediction(self.classifier(z), z, (TileScores.place(bag.valid, raw, raw.softmax(0)),))


build = Mean
