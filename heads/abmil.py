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

import torch
from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head


class Attention(nn.Module):
    """(N, dim) -> (N,): the raw score of each tile. V, U and w as in the paper, each with a bias."""

    def __init__(self, dim: int, width: int, gated: bool) -> None:
        super().__init__()
        self.V = nn.Linear(dim, width)
        self.U = nn.Linear(dim, width) if gated else None
        self.w = nn.Linear(width, 1)

    def forward(self, h: Tensor) -> Tensor:
        t = torch.tanh(self.V(h))
        if self.U is not None:
            t = t * torch.sigmoid(self.U(h))
        return self.w(t).squeeze(-1)


class ABMIL(Head):
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
        raw = self.attention(h)  # (N,)
        weight = raw.softmax(dim=0)
        z = weight @ h  # (E,)
        return Prediction(self.classifier(z), z, (TileScores.place(bag.valid, raw, weight),))


build = ABMIL
