"""Clustering-constrained attention MIL, with one attention (SB) or one for each class (MB, `clam_mb`).

Lu et al.: Data-efficient and weakly supervised computational pathology on whole-slide images, Nat Biomed Eng 2021
(arXiv 2004.09666).

    h_i = ReLU(P x_i)        a_i = w (tanh(V h_i) ⊙ σ(U h_i))        z_c = Σ softmax(a_·c)_i h_i
    SB: logits = W z + b     MB: logit_c = W_c · z_c + b_c

and a second loss on tiles: those with the highest attention are examples of the slide's class, those with the lowest
are not, as a small classifier of each class has to learn.

What differs from the released code: with few tiles fewer are taken, min(instances, ⌊N / 2⌋), so that none is labelled
both ways; with one tile there is no second loss.

Parameters (E = 512, A = 256 small or 384 big): E (dim + 1) + 2 A (E + 1) + R (A + 1) + 3 classes (E + 1), with
R = 1 (SB) or classes (MB) rows of attention.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head
from .layers import Attention
from .recipe import Recipe
from .tasks import Classification, Task

SIZES = {"small": (512, 256), "big": (512, 384)}  # widths of the tiles and of the attention


class CLAM(Head):
    """instance_weight: share of the second loss. subtyping: what one class attends to is no example of another."""

    attention_per_class: ClassVar[bool] = False
    recipes: ClassVar = {"paper": Recipe(epochs=200, patience=20, min_epochs=50, class_weights=False)}

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        size: str = "small",
        dropout: float = 0.25,
        instances: int = 8,
        instance_weight: float = 0.3,
        instance_loss: str = "svm",
        subtyping: bool = False,
    ) -> None:
        options: dict[str, Any] = {"size": size, "dropout": dropout, "instances": instances, "subtyping": subtyping}
        super().__init__(dim, classes, **options, instance_weight=instance_weight, instance_loss=instance_loss)
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
        if not 0 <= instance_weight <= 1:
            raise ValueError(f"instance_weight must lie in 0..1, not be {instance_weight}")
        width, attention = SIZES[size]
        rows = classes if self.attention_per_class else 1
        self.projection = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.attention = Attention(width, attention, rows=rows, dropout=dropout)
        self.classifier = nn.Linear(width, classes)
        self.instances = Instances(width, classes, instances, instance_loss, subtyping)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        h = self.projection(bag.valid_features)  # (N, E)
        raw = self.attention(h).T  # (R, N)
        weight = raw.softmax(-1)
        z = weight @ h  # (R, E)
        logits = (self.classifier.weight * z).sum(-1) + self.classifier.bias
        row = logits.argmax() if self.attention_per_class else 0
        tiles = TileScores.place(bag.valid, raw[row], weight[row], raw if self.attention_per_class else None)
        return Prediction(logits, z[row], (tiles,), parts={"tiles": h, "raw": raw})

    def loss(self, prediction: Prediction, target: Any, task: Task | None = None) -> Tensor:
        share = self.options["instance_weight"]
        whole = super().loss(prediction, target, task)
        if share == 0:
            return whole
        require_classes(task or self.task)
        parts = prediction.parts
        return (1 - share) * whole + share * self.instances(parts["tiles"], parts["raw"], int(target))


def require_classes(task: Task) -> None:
    if not isinstance(task, Classification):
        raise ValueError("the loss on tiles needs one class a slide; for other tasks set instance_weight=0")


class Instances(nn.Module):
    """CLAM's loss on tiles: a classifier of two outputs a class, for the tiles that attention puts first and last.

    tiles (N, width), raw (R, N) with R = 1 or classes, the slide's class → a scalar. Parameters: 2 classes (width + 1).
    """

    def __init__(self, width: int, classes: int, count: int, loss: str, subtyping: bool) -> None:
        super().__init__()
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"svm": top1_svm, "ce": F.cross_entropy}
        if loss not in losses:
            raise ValueError(f"instance_loss must be one of {', '.join(losses)}, not {loss!r}")
        if count < 1:
            raise ValueError(f"instances must be at 1 or more, not {count}")
        self.count, self.subtyping, self.one_loss = count, subtyping, losses[loss]
        self.classifiers = nn.ModuleList(nn.Linear(width, 2) for _ in range(classes))

    def forward(self, tiles: Tensor, raw: Tensor, target: int) -> Tensor:
        count = min(self.count, len(tiles) // 2)
        if count == 0:
            return tiles.new_zeros(())
        total = tiles.new_zeros(())
        for label, classifier in enumerate(self.classifiers):
            order = raw[label if len(raw) > 1 else 0].argsort(stable=True)
            first, last = tiles[order[-count:]], tiles[order[:count]]
            if label == target:
                both = torch.cat([first, last])
                total = total + self.one_loss(classifier(both), _first(count, both))
            elif self.subtyping:
                total = total + self.one_loss(classifier(first), _first(0, first))
        return total / len(self.classifiers) if self.subtyping else total


def _first(count: int, tiles: Tensor) -> Tensor:
    """Labels: 1 for the first `count` tiles, 0 for the rest."""
    return (torch.arange(len(tiles), device=tiles.device) < count).long()


def top1_svm(scores: Tensor, labels: Tensor) -> Tensor:
    """Smooth top-1 loss of (n, C) scores, margin 1 and temperature 1, mean over n (Berrada et al., ICLR 2018).

    log Σ_j exp(s_j + [j ≠ y] - s_y), and where the largest leads by more than ln 1000 the maximum instead.
    """
    own = scores.gather(1, labels[:, None])
    margins = scores + 1 - F.one_hot(labels, scores.shape[1]) - own
    top = margins.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] >= torch.log(torch.tensor(1000.0))
    return torch.where(clear, top[:, 0], margins.logsumexp(1)).mean()


build = CLAM
