"""Dual-stream MIL: the likeliest tile of each class, and an attention that asks who resembles it.

Li, Li, Eliceiri: Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification with
Self-supervised Contrastive Learning, CVPR 2021 (arXiv 2011.08939).

    s_i = W x_i + b                             the first stream: its slide scores are max_i s_ic
    m_c = argmax_i s_ic        q_i = tanh(L2 ReLU(L1 x_i))
    A_ic = softmax_i(q_i · q_{m_c} / √128)      z_c = Σ_i A_ic x_i
    logit_c = Σ_{c'} K_{c c'} · z_{c'} + b_c    the second stream

The loss is half that of each stream. With `tasks.MultiLabel` it is the paper's; the default, one class a slide, takes
cross-entropy instead of logistic units.

Parameters: (dim + 1) C + 128 (dim + 1) + 128 · 129 + C² dim + C.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head
from .recipe import Recipe
from .tasks import Task


class DSMIL(Head):
    recipes: ClassVar = {
        "paper": Recipe(
            betas=(0.5, 0.9), weight_decay=1e-3, schedule="cosine", final_lr=5e-6, patience=10, class_weights=False
        )
    }

    def __init__(self, dim: int, classes: int, *, width: int = 128) -> None:
        super().__init__(dim, classes, width=width)
        self.scores = nn.Linear(dim, classes)
        self.query = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
        self.classifier = nn.Conv1d(classes, classes, dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        x = bag.valid_features
        scores, q = self.scores(x), self.query(x)
        critical = q[scores.argmax(0)]  # (C, width)
        raw = critical @ q.T * q.shape[1] ** -0.5  # (C, N)
        weight = raw.softmax(-1)
        z = weight @ x  # (C, dim)
        logits = self.classifier(z[None])[0, :, 0]
        row = logits.argmax()
        tiles = TileScores.place(bag.valid, raw[row], weight[row], raw)
        return Prediction(logits, z.flatten(), (tiles,), parts={"max": scores.amax(0)})

    def loss(self, prediction: Prediction, target: Any, task: Task | None = None) -> Tensor:
        task = task or self.task
        return 0.5 * task.loss(prediction.logits, target) + 0.5 * task.loss(prediction.parts["max"], target)


build = DSMIL
