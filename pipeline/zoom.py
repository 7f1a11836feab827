"""Tiles are encoded only below those that a head chooses: coarse levels first, each looked at before the next is read.

A slide goes through the encoder once for each level that the head reads, while others are in flight. The thread that
hands slides to the readers also shows the head what has come home. Features are in memory only, those of one level of a
slide at a time, and end with the look at them: what is not whole is never stored as features.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import torch

from extractors import Encoder
from heads import BadBag, BagLevel
from heads.hagmil import HAGMIL, Descent

from .encode import Encoded, Settings, encode_slides
from .errors import BrokenBag, CorruptTiles, SlideError, UsageError
from .meter import Meter
from .outcome import Outcome, failed
from .prediction import Model, store_prediction, zoomed
from .rows import MAX_INVALID, Held, Work, nothing_of
from .saving import Saving
from .stages import ZOOMED, Recipe, SlideFile, invalid_words, is_prepared, work_on
from .store import BagStore, SlideGroup

WAIT_S = 0.2  # for a slide that comes home, before it is asked whether all is to end


def require_choosing(model: Model) -> HAGMIL:
    """The head, if it says which tiles it wants to see more closely. Raises UsageError."""
    if not isinstance(model.head, HAGMIL):
        raise UsageError(
            f"--zoom needs a head that chooses which tiles it looks at more closely (hagmil, trained on 2 levels or "
            f"more); {model.name} is {model.about['head']}, which reads all tiles: leave --zoom out"
        )
    return model.head


def is_zoomed(file: SlideFile, group: SlideGroup, recipe: Recipe, model: Model) -> bool:
    """True if the store holds what this model says of this slide file by zooming."""
    return is_prepared(file, group, recipe) and zoomed(group, model) is not None


def zoom(
    model: Model,
    slides: Iterable[tuple[SlideFile, Outcome] | None],
    encoder: Encoder,
    out: Path,
    recipe: Recipe,
    device: str = "cpu",
    on_tiles: Callable[[int, Meter], None] = lambda count, so_far: None,
    settings: Settings = Settings(),
) -> Iterator[tuple[Outcome, Encoded]]:
    """Predict prepared slides as they come; yields the row of each as it is finished, with status `done` or `failed`.

    `slides` is taken from by another thread; None: there is none for now. `encoder` is loaded on `device`.
    """
    visits: dict[str, _Visit] = {}
    home: SimpleQueue[_Visit] = SimpleQueue()

    def works() -> Iterator[Work | None]:
        torch.set_num_threads(settings.threads)  # of this thread, for the head
        coming: Iterator[tuple[SlideFile, Outcome] | None] = iter(slides)
        more, inside = True, 0
        while more or inside:
            visit = _first(home, 0)
            if visit is None and more:
                item = next(coming, END)
                if item is END:
                    more = False
                    continue
                if isinstance(item, tuple):
                    file, row = item
                    visit = visits[file.name] = _Visit(file, row, model, out, recipe)
                    inside += 1
            if visit is None:
                yield None  # what has gathered is encoded, so that somebody comes home
                visit = _first(home, 0 if more else WAIT_S)
            if visit is not None:
                work = visit.next_work()
                inside -= visit.closed
                yield work

    for result in encode_slides(works(), encoder, device, on_tiles, settings):
        visit = visits[result.slide]
        visit.come_home(result)
        if visit.closed:
            yield visits.pop(result.slide).row, visit.result
        else:
            home.put(visit)


END = object()


def _first(home: "SimpleQueue[_Visit]", seconds: float) -> "_Visit | None":
    try:
        return home.get(timeout=seconds)
    except Empty:
        return None


class _Visit:
    """One slide that is zoomed into. It is in the hands of one thread at a time.

    `closed`: the last work has been handed out, in which nothing is missing. All slides leave through the encoder, so
    that one that fails before is told of as well.
    """

    def __init__(self, file: SlideFile, row: Outcome, model: Model, out: Path, recipe: Recipe) -> None:
        self.row, self.closed, self.result = row, False, Encoded(file.name)
        self._file, self._model, self._out, self._recipe = file, model, out, recipe
        self._group = BagStore(out).group(file.name)
        self._descent: Descent | None = None
        self._again, self._lost = 0.0, 0

    def come_home(self, result: Encoded) -> None:
        """The level that was asked for, or the end."""
        if self.closed:
            self.row = self.row.after(self.result.meter.seconds).at_speed(self.result.meter)
            return
        if self._descent is not None and self.result.meter.tiles:
            self._again += result.meter.reading
        before, self._lost = self.result, result.invalid
        self.result = replace(result, invalid=before.invalid + result.invalid, meter=before.meter + result.meter)

    def next_work(self) -> Work:
        """The next level to be encoded; at the end of the way the prediction is stored."""
        try:
            if self.result.error is not None:
                raise self.result.error
            self._refuse_damaged()
            descent = self._begin() if self._descent is None else self._look(self._descent)
            if not descent.done:
                return self._level(descent)
            self._finish(descent)
        except SlideError as error:
            fault = failed(self._file.name, error)
            self.row = replace(self.row, status="failed", stage=fault.stage, error=fault.error, message=fault.message)
        self.closed = True
        return nothing_of(self._file.name)

    def _refuse_damaged(self) -> None:
        """Where a coarse tile cannot be read, a tile below it or glass cannot; few of the finest tiles may be lost."""
        finest = len(self._tree.levels[-1].grid) if self._lost else 0
        if self._lost > MAX_INVALID * finest:
            reason = (
                f"{self._lost} tiles of a level cannot be decoded, more than {MAX_INVALID:.0%} of the {finest} finest "
                "tiles: the file is damaged"
            )
            raise CorruptTiles(self._file.name, "encode", reason)

    def _begin(self) -> Descent:
        self._group.drop(f"predictions/{self._model.name}")  # what is made again is not there meanwhile
        self._tree = self._group.tree()
        levels = [BagLevel.of(grid=level.grid, parent=level.parent, mpp=level.mpp) for level in self._tree.levels]
        head = require_choosing(self._model)
        read = range(len(levels) - len(head.levels), len(levels))
        if not set(read) <= set(self._tree.encoded_levels):
            reason = f"{self._model.name} looks at {len(read)} levels; the tree of this slide has not as many to encode"
            raise BrokenBag(self._file.name, "predict", reason)
        self._descent = head.descend(levels)
        return self._descent

    def _level(self, descent: Descent) -> Work:
        """The tiles that the head wants to see next, as rows of those that are encoded without zooming."""
        level = self._tree.levels[descent.level]
        asked = np.zeros(len(self._tree), bool)
        asked[level.start : level.stop] = descent.wanted.numpy()
        config, wanted = self._recipe.config, asked[self._tree.encoded_rows]
        self._held = Held(self._recipe.encoder_key, config.dtype, wanted)
        return work_on(self._file, self._group, self._recipe, self._tree, self._held)

    @torch.no_grad()
    def _look(self, descent: Descent) -> Descent:
        x, valid = self._held.read()
        try:
            descent.look(torch.from_numpy(x).float(), torch.from_numpy(valid))
        except BadBag as error:
            raise BrokenBag(self._file.name, "predict", str(error)) from error
        return descent

    def _finish(self, descent: Descent) -> None:
        meter, invalid, tree = self.result.meter, self.result.invalid, self._tree
        k = require_choosing(self._model).options["k"]
        saving = Saving(k, len(tree.encoded_rows), meter.tiles, self.result.tile_seconds, self._again)
        if self._group.status != "complete":  # which it is where another encoder's features are whole
            counts = {"tiles": [level.stop - level.start for level in tree.levels], "invalid": invalid}
            self._group.update(counts=counts)
        about = {"zoom": asdict(saving), "model_sha256": self._model.sha256, "tiles": tree.hash}
        store_prediction(self._group, self._model, descent.prediction, self._out, **about)
        words = [self.row.message, invalid_words(invalid) if invalid else "", ZOOMED]
        self.row = replace(self.row, status="done", message="; ".join(filter(None, words)))
