"""What every head is: a module that reads one bag and says what it needs of it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .bag import Bag, Prediction
from .picture import Picture, Pixels
from .recipe import Recipe
from .tasks import Classification, Task


@dataclass(frozen=True)
class Needs:
    """What a head asks of a bag: this many levels (1: exactly one, a flat head) and columns; or pixels instead."""

    levels: int = 1
    grid: bool = False
    tissue: bool = False
    pixels: bool = False


class Head(nn.Module):
    """`load_head(name, head.dim, head.classes, **head.options)` makes the same head again, weights apart.

    `presets`: options by name (`load_head(name, dim, classes, preset="paper")`); `recipes`: how to train it, by name.
    """

    needs: Needs = Needs()
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    recipes: ClassVar[dict[str, Recipe]] = {}

    def __init__(self, dim: int, classes: int, **options: Any) -> None:
        super().__init__()
        if dim < 1 or classes < 1:
            raise ValueError(f"dim and classes must be at least 1, not {dim} and {classes}")
        self.dim, self.classes, self.options = dim, classes, options

    @classmethod
    def reads_pixels(cls, options: dict[str, Any]) -> bool:
        """Whether it does with these options."""
        return cls.needs.pixels

    def forward(self, bag: Bag) -> Prediction:
        raise NotImplementedError

    def loss(self, prediction: Prediction, target: Any, task: Task | None = None) -> Tensor:
        """Of one bag, a scalar; by default the target is one class and the loss cross-entropy."""
        return (task or self.task).loss(prediction.logits, target)

    def augment(self, picture: Picture) -> Picture:
        """A picture as it might have been, for training; draws from torch's generator."""
        raise ValueError(f"{type(self).__name__} has no augmentation of pictures")

    def attention_map(self, picture: Pixels, edge: int) -> Tensor:
        """(rows, columns): what it makes of places of edge × edge pixels, of a picture of whole places."""
        raise ValueError(f"{type(self).__name__} has no map of a picture")

    @property
    def task(self) -> Task:
        """What the head is asked unless told otherwise."""
        return Classification(self.classes)

    def check(self, bag: Bag | Pixels) -> None:
        """The first line of every `forward`: a bag this head was not made for is refused in words."""
        name = type(self).__name__
        if not isinstance(bag, Bag):
            if not self.needs.pixels:
                raise ValueError(
                    f"{name} reads features of tiles, this is a picture: make its features with `slidestream run`"
                )
            return
        if self.needs.pixels:
            raise ValueError(f"{name} reads pixels, this is a bag of features: give it a folder of images")
        levels = len(bag.levels)
        if self.needs.levels == 1 and levels > 1:
            raise ValueError(
                f"{name} reads one level, this bag has {levels}: choose one with bag.at(mpp) or bag.finest"
            )
        if levels < self.needs.levels:
            raise ValueError(
                f"{name} needs {self.needs.levels} levels or more, this bag has {levels}: make their features with "
                f"`slidestream run SLIDES -o OUT --levels {self.needs.levels}`"
            )
        if bag.dim != self.dim:
            raise ValueError(f"{name} was made for {self.dim} features per tile, this bag has {bag.dim}")
        for column in ("grid", "tissue"):
            if getattr(self.needs, column):
                getattr(bag, column)  # says itself what is missing
