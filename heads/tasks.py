"""What is asked of a slide: a class, several yes or no, a grade, a number, a time. Logits → loss → prediction.

    task = Survival(bins=4)
    head = load_head("abmil", dim=384, classes=task.outputs)
    loss = head.loss(head(bag), (bin, event), task)

A target is what `loss` takes: Classification a class, MultiLabel (C,) of 0 and 1, Ordinal a grade, Regression a number,
Survival (bin of the time, 1 if the event was seen or 0 if the patient was lost from sight).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Task(Protocol):
    """One kind of question, for one slide at a time."""

    @property
    def outputs(self) -> int:
        """Logits that a head must give."""
        ...

    def loss(self, logits: Tensor, target: Any) -> Tensor:
        """A scalar, for one slide."""
        ...

    def predict(self, logits: Tensor) -> Tensor:
        """What the logits (…, outputs) say: probabilities, or a number."""
        ...


@dataclass(frozen=True)
class Classification:
    """One class of several: cross-entropy.

    weights: one for each class, multiplies the loss of its slides. smoothing: this share of the target is spread over
    all classes (Szegedy et al., CVPR 2016).
    """

    classes: int
    weights: tuple[float, ...] | None = None
    smoothing: float = 0.0

    @property
    def outputs(self) -> int:
        return self.classes

    def loss(self, logits: Tensor, target: int) -> Tensor:
        label = torch.as_tensor(target, device=logits.device)
        loss = F.cross_entropy(logits, label, label_smoothing=self.smoothing)
        # not cross_entropy's own `weight`: it divides by the weights of the batch, so with one bag it would do nothing
        return loss if self.weights is None else loss * self.weights[int(target)]

    def predict(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


@dataclass(frozen=True)
class MultiLabel:
    """Any number of classes at a time: a logistic unit for each, their mean cross-entropy.

    weights: of a class where it is there, against 1 where it is not.
    """

    classes: int
    weights: tuple[float, ...] | None = None

    @property
    def outputs(self) -> int:
        return self.classes

    def loss(self, logits: Tensor, target: Any) -> Tensor:
        there = torch.as_tensor(target, dtype=logits.dtype, device=logits.device)
        weights = None if self.weights is None else logits.new_tensor(self.weights)
        return F.binary_cross_entropy_with_logits(logits, there, pos_weight=weights)

    def predict(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


@dataclass(frozen=True)
class Ordinal:
    """Grades 0..grades-1 that have an order: one number, squared error, rounded to the nearest grade."""

    grades: int

    @property
    def outputs(self) -> int:
        return 1

    def loss(self, logits: Tensor, target: int) -> Tensor:
        return (logits.squeeze(-1) - target) ** 2

    def predict(self, logits: Tensor) -> Tensor:
        return logits.squeeze(-1).round().clamp(0, self.grades - 1)


@dataclass(frozen=True)
class Regression:
    """One number: squared error, in units of `scale` around `centre` (the training slides' spread and mean)."""

    centre: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, numbers: Sequence[float] | np.ndarray) -> "Regression":
        """Centred on the numbers of the training slides."""
        spread = float(np.std(numbers))
        return cls(float(np.mean(numbers)), spread if spread > 0 else 1.0)

    @property
    def outputs(self) -> int:
        return 1

    def loss(self, logits: Tensor, target: float) -> Tensor:
        return (logits.squeeze(-1) - (target - self.centre) / self.scale) ** 2

    def predict(self, logits: Tensor) -> Tensor:
        return logits.squeeze(-1) * self.scale + self.centre


@dataclass(frozen=True)
class Survival:
    """Time to an event in `bins` intervals: hazards h = σ(logits), the likelihood of Zadeh and Schmid (TPAMI 2021).

    S(t) = Π_{u ≤ t} (1 - h_u). Event in bin y: -log S(y - 1) - log h(y); lost from sight in bin y: -log S(y).
    alpha: with a share of 1 - alpha the loss is that of all slides, with alpha that of those with an event only.
    cuts: the bins - 1 times between bins, where they are known.
    """

    bins: int = 4
    alpha: float = 0.0
    cuts: tuple[float, ...] = ()

    @classmethod
    def of(cls, times: np.ndarray, seen: np.ndarray, bins: int = 4) -> "Survival":
        """Bins that hold as many seen events each; fewer, where the times do not part so many."""
        events = np.asarray(times, float)[np.asarray(seen, bool)]
        if not len(events):
            raise ValueError("no event was seen: survival cannot be learned from slides without one")
        # cuts are times of events, so that each bin holds the one it begins with
        cuts = np.unique(np.quantile(events, np.arange(1, bins) / bins, method="higher"))
        cuts = cuts[cuts > events.min()]  # else nobody is in the first bin
        return cls(len(cuts) + 1, cuts=tuple(cuts.tolist()))

    def bin(self, time: float) -> int:
        return int(np.searchsorted(self.cuts, time, side="right"))

    @property
    def outputs(self) -> int:
        return self.bins

    def loss(self, logits: Tensor, target: tuple[int, int]) -> Tensor:
        at, seen = target
        # log(1 - σ(x)) is logsigmoid(-x): no difference of almost equal numbers
        survived = F.logsigmoid(-logits).cumsum(-1)  # log S(0), log S(1), …
        if not seen:
            return -(1 - self.alpha) * survived[at]
        before = survived[at - 1] if at > 0 else survived.new_zeros(())
        return -before - F.logsigmoid(logits[at])

    def predict(self, logits: Tensor) -> Tensor:
        """The risk: minus the expected number of bins survived."""
        return -(1 - logits.sigmoid()).cumprod(-1).sum(-1)


KINDS: dict[str, type] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "ordinal": Ordinal,
    "regression": Regression,
    "survival": Survival,
}


def describe(task: Task) -> dict[str, Any]:
    """A task as plain values, for JSON."""
    kind = next(name for name, made in KINDS.items() if isinstance(task, made))
    return {"kind": kind} | asdict(task)  # type: ignore[call-overload]


def task_of(description: dict[str, Any]) -> Task:
    """The task that `describe` described."""
    kind = str(description["kind"])
    fields = {name: value for name, value in description.items() if name != "kind"}
    task: Task = KINDS[kind](**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    return task
