"""Weighted k nearest neighbours, by which self-supervised features are watched (Wu et al., CVPR 2018; DINO)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS, TEMPERATURE = 20, 0.07


def votes(queries: Tensor, bank: Tensor, labels: Tensor, classes: int, barred: Tensor | None = None) -> Tensor:
    """Features (Q, D) and (N, D), labels (N,) of the bank → shares of the votes (Q, classes), each row sums to 1.

    The 20 nearest by cosine vote, each with exp(cosine / 0.07). barred: (Q, N) bool, pairs that do not count, such as
    tiles of one slide; a row without any neighbour has equal shares.
    """
    near = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    if barred is not None:
        near = near.masked_fill(barred, -torch.inf)
    near, rows = near.topk(min(NEIGHBOURS, len(bank)), dim=1)
    weight = torch.where(near.isinf(), 0.0, ((near - near[:, :1]) / TEMPERATURE).exp())  # the nearest has 1
    found = torch.zeros(len(queries), classes).scatter_add_(1, labels[rows], weight)
    total = found.sum(1, keepdim=True)
    return torch.where(total > 0, found / total, 1 / classes)


def accuracy(features: Tensor, labels: Tensor, owners: Tensor) -> float:
    """Mean over the classes of the share of tiles that tiles of other owners (slides, patients) classify rightly."""
    barred = owners[:, None] == owners[None]
    right = votes(features, features, labels, int(labels.max()) + 1, barred).argmax(1) == labels
    return float(torch.stack([right[labels == label].float().mean() for label in labels.unique()]).mean())
