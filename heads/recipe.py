"""How a head is trained: optimiser, schedule, end, the weights that are kept. Of a paper: `head.recipes["paper"]`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
    "sgd": torch.optim.SGD,
}
SCHEDULES, KEEP = ("constant", "cosine", "step"), ("best", "last", "average5")
MIXES = ("none", "cutmix", "saliencymix", "scoremix", "scoremix-one-minus-p")


@dataclass(frozen=True)
class Recipe:
    """Defaults are ours; a bag is a step unless `accumulation` says more."""

    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0  # of sgd
    lookahead: int = 0  # steps between two of the slow weights (Zhang et al., NeurIPS 2019), 0: none
    schedule: str = "constant"  # cosine: from lr to final_lr over all epochs; step: times step_factor at step_epoch
    final_lr: float = 0.0
    step_epoch: int = 0
    step_factor: float = 1.0
    epochs: int = 50
    patience: int = 10  # epochs without a lower validation loss before it ends
    min_epochs: int = 0  # it never ends before
    keep: str = "best"  # of all epochs the best, the last, or the mean of the weights of the 5 best, by validation loss
    keep_from: int = 0  # the first epoch that may be kept
    accumulation: int = 1  # bags a step
    clip: float | None = None  # largest norm of the gradient
    class_weights: bool = True  # rare classes count as much as frequent ones
    eps: float = 1e-8  # of Adam and its kin
    warmup_epochs: int = 0  # before the schedule begins, in which the rate rises to lr from a thousandth of it
    augment: bool = False  # of heads of pixels: each picture as the head's `augment` makes it
    mix: str = "none"  # of heads of pixels: half of the pictures have a box of another (heads/mixing.py)

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("keep", KEEP), ("mix", MIXES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("epochs", "patience", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be fewer than the {self.epochs} epochs, not {self.warmup_epochs}")
        if not 0 <= self.keep_from < self.epochs:
            raise ValueError(f"keep_from must be one of the {self.epochs} epochs, not {self.keep_from}")

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        own: dict[str, Any] = (
            {"momentum": self.momentum} if self.optimizer == "sgd" else {"betas": self.betas, "eps": self.eps}
        )
        if self.optimizer != "radam":  # which has it not
            own["fused"] = True  # in one pass over the weights: a quarter of the time of a step on a small bag
        return OPTIMIZERS[self.optimizer](parameters, lr=self.lr, weight_decay=self.weight_decay, **own)  # type: ignore[call-arg]

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """To be stepped once after each epoch."""
        from torch.optim.lr_scheduler import LinearLR, SequentialLR

        after = self._after_warmup(optimizer)
        if not self.warmup_epochs:
            return after
        rising = LinearLR(optimizer, start_factor=1e-3, total_iters=self.warmup_epochs)
        return SequentialLR(optimizer, [rising, after], [self.warmup_epochs])

    def _after_warmup(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR

        if self.schedule == "cosine":
            return CosineAnnealingLR(optimizer, self.epochs - self.warmup_epochs, self.final_lr)
        if self.schedule == "step":
            return MultiStepLR(optimizer, [self.step_epoch], self.step_factor)
        return ConstantLR(optimizer, factor=1.0)


class Lookahead:
    """Slow weights that follow the fast ones half of the way every `every` steps; from there the fast ones go on."""

    def __init__(self, module: nn.Module, every: int) -> None:
        self._fast = list(module.parameters())
        self._slow = [p.detach().clone() for p in self._fast]
        self._every, self._steps = every, 0

    @torch.no_grad()
    def step(self) -> None:
        self._steps += 1
        if self._every and self._steps % self._every == 0:
            for slow, fast in zip(self._slow, self._fast, strict=True):
                slow.lerp_(fast, 0.5)
                fast.copy_(slow)


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight; whole numbers are those of the last state."""
    last = states[-1]
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in last.items()
    }
