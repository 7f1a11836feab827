"""Attention-based multiple instance learning.

Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning, ICML 2018 (arXiv 1802.04712).

    h_i = ReLU(P x_i)
    a_i = wᵀ tanh(V h_i)                     plain
    a_i = wᵀ (tanh(V h_i) ⊙ σ(U h_i))        gated
    z = Σ softmax(a)_i h_i        logits = W z + b

A small network scores each tile; the slide is the weighted mean of its tiles. What differs from the paper: tiles come
as features, so one linear layer P (`hidden=None`: none) stands where the paper has a convolutional network; the single
sigmoid output is a linear layer with one logit per class; dropout, off by default, acts on h.
"""

from typing import ClassVar

from torch import nn

from .bag import Bag, Prediction, TileScores
from .head import Head
from .layers import Attention
from .recipe import Recipe


class ABMIL(Head):
    recipes: ClassVar = {"paper": Recipe(lr=5e-4, weight_decay=1e-4, epochs=20, patience=20, class_weights=False)}

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        gated: bool = True,
        hidden: int | None = 512,
        attention: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, classes, gated=gated, hidden=hidden, attention=attention, dropout=dropout)
        width = dim if hidden is None else hidden
        if width < 1 or attention < 1:
            raise ValueError(f"hidden and attention must be at least 1, not {hidden} and {attention}")
        self.projection = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.attention = Attention(width, attention, gated)
        self.classifier = nn.Linear(width, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        h = self.dropout(self.projection(bag.valid_features))  # (N, E)
        raw = self.attention(h)[:, 0]  # (N,)
        weight = raw.softmax(dim=0)
        z = weight @ h  # (E,)
        return Prediction(self.classifier(z), z, (TileScores.place(bag.valid, raw, weight),))


build = ABMIL
