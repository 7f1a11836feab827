"""Hierarchical attention-guided MIL: a transformer for each level, whose attention chooses where the next one looks.

Xiong et al.: Diagnose Like a Pathologist: Transformer-Enabled Hierarchical Attention-Guided Multiple Instance Learning
for Whole Slide Image Classification, IJCAI 2023 (arXiv 2301.08125).

One level (`iat`), for blocks t = 1..4 of widths 1024, 1536, 512, 1024 (option `widths`):

    h ← GELU(LN(h W + b));  h ← ω h + Nys(LN h),  ω = √(9 / ln 9 - 1), two branches a block (Admin, see below)
    g = LN_t(h);  u = GELU(g V0 + b);  a = w (tanh(V u) ⊙ σ(U u))
    z_t = GELU(LN(LN_t(Σ softmax(a)_i h_i) M + b))
    logits = W (Σ_t w_t z_t + b0) + b

The tiles with the highest a of the last block are looked at more closely: their children on the next finer level are
its bag. The finest level's logits are the slide's.

What differs from the paper: k is by default a share of the tiles that a level looks at (preset="paper": its thousands,
which exceed most slides); children are those that the quadtree kept, one to four; eqs 9 to 11 lack the softmax that the
released code has. Tiles stay in the order of the bag. The second loss, on tiles, is CLAM's.

Admin: Liu et al.: Understanding the Difficulty of Training Transformers, EMNLP 2020. The paper counts two residual
branches in each block, of which this transformer has one.

Parameters of a level of T blocks (D → d_1 … d_T): Σ_t [d_{t-1} d_t + 4 d_t² + 8 d_t + 33 · 8 + 512 (d_t + 1) + 512 ·
513 + 257 + d_T (d_t + 1) + 2 d_T] + T + 1 + 1026 C + (d_T + 1) C.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bag import BadBag, Bag, BagLevel, Prediction, TileScores
from .clam_sb import Instances, require_classes
from .head import Head, Needs
from .layers import Attention, NystromAttention
from .recipe import Recipe
from .tasks import Classification, Task

WIDTHS = (1024, 1536, 512, 1024)
HEADS = 8
RECOMPUTED_TILES = 32_768


def admin(branches: int) -> float:
    """Liu et al.'s constant for a network of so many residual branches."""
    return math.sqrt((branches + 1) / math.log(branches + 1) - 1)


class IATBlock(nn.Module):
    """(N, before) → (N, width), raw attention (N,), the tiles as the attention saw them (N, 512), the bag (out,)."""

    omega: Tensor

    def __init__(self, before: int, width: int, out: int, omega: float, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Linear(before, width), nn.LayerNorm(width), nn.GELU())
        self.norm = nn.LayerNorm(width)
        self.mix = NystromAttention(width, landmarks=width // 2, heads=HEADS, dropout=dropout)
        self.register_buffer("omega", torch.tensor(omega), persistent=False)
        self.norm_t = nn.LayerNorm(width)
        self.seen = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Dropout(0.25))
        self.attention = Attention(512, 256, dropout=0.25)
        self.out = nn.Sequential(nn.Linear(width, out), nn.LayerNorm(out), nn.GELU())

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.widen(h)
        h = self.omega * h + self.mix(self.norm(h))
        u = self.seen(self.norm_t(h))
        raw = self.attention(u)[:, 0]
        return h, raw, u, self.out(self.norm_t(raw.softmax(0) @ h))


class IAT(Head):
    """widths: of the blocks. instance_weight: λ of the loss on tiles, which is added to that of the slide."""

    recipes: ClassVar = {"paper": Recipe(lr=1e-5, epochs=200, patience=20, class_weights=False)}

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        widths: Sequence[int] = WIDTHS,
        dropout: float = 0.3,
        instances: int = 8,
        instance_weight: float = 1.0,
        instance_loss: str = "svm",
        subtyping: bool = False,
    ) -> None:
        if not widths or any(width < HEADS or width % HEADS for width in widths):
            raise ValueError(f"widths must be multiples of {HEADS}, one for each block, not {list(widths)}")
        options: dict[str, Any] = {"widths": list(widths), "dropout": dropout, "subtyping": subtyping}
        options |= {"instances": instances, "instance_weight": instance_weight, "instance_loss": instance_loss}
        super().__init__(dim, classes, **options)
        sizes, out, omega = pairwise((dim, *widths)), widths[-1], admin(2 * len(widths))
        self.blocks = nn.ModuleList(IATBlock(before, width, out, omega, dropout) for before, width in sizes)
        self.fuse = nn.Linear(len(widths), 1)
        self.classifier = nn.Linear(out, classes)
        self.instances = Instances(512, classes, instances, instance_loss, subtyping)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        return self.look(bag.valid_features, bag.valid)

    def look(self, x: Tensor, shown: Tensor) -> Prediction:
        """x: features of the tiles that are looked at; shown (N,) bool: which they are among those of the level."""
        h, raws, bags = x, [], []
        for block in self.blocks:
            h, raw, u, z = checkpoint(block, h, use_reentrant=False) if self._recomputed(h) else block(h)
            raws.append(raw)
            bags.append(z)
        z = self.fuse(torch.stack(bags, dim=-1))[:, 0]
        tiles = TileScores.place(shown, raws[-1], raws[-1].softmax(0))
        parts = {"tiles": u, "raw": raws[-1][None], "blocks": torch.stack(raws)}
        return Prediction(self.classifier(z), z, (tiles,), parts=parts)

    def _recomputed(self, h: Tensor) -> bool:
        """A block keeps 30 to 100 kB of each tile for its gradient; of many tiles it is computed once more instead."""
        return torch.is_grad_enabled() and len(h) > RECOMPUTED_TILES

    def loss(self, prediction: Prediction, target: Any, task: Task | None = None) -> Tensor:
        task, share = task or self.task, self.options["instance_weight"]
        whole = task.loss(prediction.logits, target)
        if share == 0:
            return whole
        require_classes(task)
        return whole + share * self.instances(prediction.parts["tiles"], prediction.parts["raw"], int(target))


class HAGMIL(Head):
    """levels: how many, the finest ones of the bag. widths: of the blocks of each.

    k: the tiles of a level that are looked at more closely, an int their number, a float their share of those it looked
    at; k_train: while training, by default the same. smoothing: of the labels on all levels but the finest, unless the
    task has more.
    """

    presets: ClassVar = {"paper": {"k": 10_000, "k_train": 7_000}}
    recipes: ClassVar = IAT.recipes

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        levels: int = 3,
        k: int | float = 0.25,
        k_train: int | float | None = None,
        smoothing: float = 0.1,
        widths: Sequence[int] = WIDTHS,
        dropout: float = 0.3,
        instances: int = 8,
        instance_weight: float = 1.0,
        instance_loss: str = "svm",
        subtyping: bool = False,
    ) -> None:
        each: dict[str, Any] = {
            "widths": list(widths),
            "dropout": dropout,
            "instances": instances,
            "instance_weight": instance_weight,
            "instance_loss": instance_loss,
            "subtyping": subtyping,
        }
        super().__init__(dim, classes, levels=levels, k=k, k_train=k_train, smoothing=smoothing, **each)
        if levels < 2:
            raise ValueError(f"levels must be 2 or more, not {levels}: for one level take the head iat")
        for value in (k, k if k_train is None else k_train):
            if value <= 0 or (value > 1 and not isinstance(value, int)):
                raise ValueError(f"k must be a whole number of tiles or a share in 0..1, not {value}")
        self.needs = Needs(levels=levels)
        self.levels = nn.ModuleList(IAT(dim, classes, **each) for _ in range(levels))

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        self._require_features(bag, bag.levels[-len(self.levels) :])
        descent = self.descend(bag.levels)
        while not descent.done:
            level = bag.levels[descent.level]
            assert level.features is not None
            descent.look(level.features[descent.wanted], level.valid[descent.wanted])
        return descent.prediction

    def descend(self, levels: Sequence[BagLevel]) -> "Descent":
        """`forward` step by step, for one who has the features of a tile only once they are asked for.

        levels: of the whole tree, coarse → fine; of them only `parent` is read.
        """
        if len(levels) < len(self.levels):
            raise BadBag(f"HAGMIL looks at {len(self.levels)} levels, this tree has {len(levels)}")
        return Descent(self, levels)

    def chosen(self, raw: Tensor) -> Tensor:
        """(N,) scores, NaN where not looked → (N,) bool: the k highest; of equals the first."""
        k_train = self.options["k_train"]
        k = k_train if self.training and k_train is not None else self.options["k"]
        count = int((~raw.isnan()).sum())
        most = min(count, k) if isinstance(k, int) else math.ceil(k * count)
        order = raw.detach().nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        return torch.zeros_like(raw, dtype=torch.bool).index_fill(0, order[:most], True)

    def loss(self, prediction: Prediction, target: Any, task: Task | None = None) -> Tensor:
        """The sum over levels, as the paper's; no gradient crosses from one to another."""
        finest = coarser = task or self.task
        if isinstance(finest, Classification):
            coarser = replace(finest, smoothing=max(finest.smoothing, self.options["smoothing"]))
        parts, total = prediction.parts, prediction.logits.new_zeros(())
        for i, iat in enumerate(self.levels):
            assert isinstance(iat, IAT)
            own = {name: parts[f"{name} {i}"] for name in ("tiles", "raw")}
            look = Prediction(parts[f"logits {i}"], prediction.embedding, (), parts=own)
            total = total + iat.loss(look, target, finest if i == len(self.levels) - 1 else coarser)
        return total

    def _require_features(self, bag: Bag, levels: Any) -> None:
        bare = [(i, level) for i, level in enumerate(levels) if level.features is None]
        missing = [f"{level.mpp:g}" if level.mpp else str(i) for i, level in bare]
        if missing:
            raise BadBag(
                f"bag {bag.slide!r} has no features at {', '.join(missing)} µm/px; HAGMIL looks at {len(levels)} "
                "levels: run again with all of them encoded"
            )


class Descent:
    """The way of one slide from the coarsest level that is read to the finest.

    `wanted` (N,) bool: the tiles of the level `level` that the next look asks for: all of them at first, then the
    children of those that were chosen.
    """

    def __init__(self, head: HAGMIL, levels: Sequence[BagLevel]) -> None:
        self._head, self._levels = head, levels
        self._looks: list[Prediction] = []
        self.level = len(levels) - len(head.levels)
        self.wanted = torch.ones_like(levels[self.level].valid)

    @property
    def done(self) -> bool:
        return self.level == len(self._levels)

    def look(self, features: Tensor, valid: Tensor) -> None:
        """features (n, D) and valid (n,) of the wanted tiles, in their order. BadBag if none of them is valid."""
        if not bool(valid.any()):
            raise BadBag(f"none of the {len(valid)} tiles to be looked at on level {self.level} is valid")
        shown = self.wanted.clone()
        shown[self.wanted] = valid
        iat = self._head.levels[len(self._looks)]
        assert isinstance(iat, IAT)
        self._looks.append(iat.look(features[valid], shown))
        self.level += 1
        if not self.done:
            chosen = self._head.chosen(self._looks[-1].tiles[0].raw)
            self.wanted = chosen[self._levels[self.level].parent]

    @property
    def prediction(self) -> Prediction:
        """Of the slide, once all levels have been looked at."""
        looks = self._looks
        unseen = [never_looked(level) for level in self._levels[: -len(looks)]]
        tiles = (*unseen, *(look.tiles[0] for look in looks))
        parts = {f"{name} {i}": value for i, look in enumerate(looks) for name, value in look.parts.items()}
        parts |= {f"logits {i}": look.logits for i, look in enumerate(looks)}
        return Prediction(looks[-1].logits, looks[-1].embedding, tiles, parts=parts)


def never_looked(level: BagLevel) -> TileScores:
    nothing = torch.full((len(level),), torch.nan, device=level.valid.device)
    return TileScores(nothing, nothing)


build = HAGMIL
