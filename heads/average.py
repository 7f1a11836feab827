"""Several trained heads as one: the folds of a cross-validation, or models of different kinds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head
from .tasks import Classification, MultiLabel, Ordinal, Regression, Task

TIES = 1e-3  # the weight of the mean where heads vote


class Average(Head):
    """Says the mean of what its heads say: of probabilities, grades or numbers, not of logits.

    tasks: of each head, of one kind; the average is asked the first. Its logits are those that make the mean. vote: of
    classes, each head has one vote, and a class the share of them; of equals the one with the higher mean is ahead.
    Raises ValueError for tasks whose answers have no mean (survival: risks of different bins), or no votes.
    """

    def __init__(self, heads: Sequence[Head], tasks: Sequence[Task], vote: bool = False) -> None:
        first = heads[0]
        super().__init__(first.dim, first.classes)
        if vote and not isinstance(tasks[0], Classification):
            raise ValueError(f"only classes are voted on, not {type(tasks[0]).__name__}")
        self.vote = vote
        if len({(head.dim, head.classes, head.needs, type(task)) for head, task in zip(heads, tasks, strict=True)}) > 1:
            raise ValueError("only heads of the same features, levels and task can be averaged")
        if not isinstance(tasks[0], Classification | MultiLabel | Ordinal | Regression):
            raise ValueError(f"the answers of {type(tasks[0]).__name__} cannot be averaged")
        self.heads, self.needs, self._tasks = nn.ModuleList(heads), first.needs, tuple(tasks)

    def forward(self, bag: Bag) -> Prediction:
        each = [head(bag) for head in self.heads]
        logits = self._mean([prediction.logits for prediction in each])
        tiles = tuple(_mean_scores(scores) for scores in zip(*(prediction.tiles for prediction in each), strict=True))
        sizes = {len(prediction.embedding) for prediction in each}
        embeddings = [prediction.embedding for prediction in each]
        together = torch.stack(embeddings).mean(0) if len(sizes) == 1 else torch.cat(embeddings)
        return Prediction(logits, together, tiles)

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        first = self._tasks[0]
        if isinstance(first, Classification):
            each = torch.stack([one.softmax(-1) for one in logits])
            return (_votes(each) if self.vote else each.mean(0)).log()
        if isinstance(first, MultiLabel):
            return torch.stack([one.sigmoid() for one in logits]).mean(0).logit()
        if isinstance(first, Regression):
            numbers = [task.predict(one) for task, one in zip(self._tasks, logits, strict=True)]
            return ((torch.stack(numbers).mean(0) - first.centre) / first.scale).reshape(1)
        return torch.stack(list(logits)).mean(0)


def _votes(each: Tensor) -> Tensor:
    """Probabilities (heads, C) → the share of the votes (C,), and so little of the mean that it decides ties only."""
    votes = torch.nn.functional.one_hot(each.argmax(-1), each.shape[-1]).to(each).mean(0)
    return (1 - TIES) * votes + TIES * each.mean(0)


def _mean_scores(scores: Sequence[TileScores]) -> TileScores:
    """A tile that a head did not look at has no weight for it, and no raw score; NaN where none of them looked."""
    raw, weight = torch.stack([one.raw for one in scores]), torch.stack([one.weight for one in scores])
    unseen = weight.isnan().all(0)
    return TileScores(raw.nanmean(0), weight.nan_to_num(0).mean(0).masked_fill(unseen, torch.nan))
