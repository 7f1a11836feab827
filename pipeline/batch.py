"""Many slides: which of them need work, one row for each, what is told while it goes on.

The stages stand in stages.py, the cluster that runs them in cluster.py.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from extractors import Encoder, EncoderError

from .cluster import PATIENCE_S, Job, require_encoder, work_through
from .config import Config, digest, make_config
from .deploy import Place, interruptible, reached
from .errors import BrokenBag, SlideError, UsageError, machine_door, slide_door
from .featurefiles import FeatureFiles
from .folder import Folder, find_slides
from .leases import Course, Holder, Leases, alone, joined, living
from .meter import Meter
from .outcome import Outcome, Report, failed, read_outcomes, write_outcomes
from .output import batch_sizes, check_out, make_writable, require_writable, write_json, write_run, write_totals
from .patience import patience
from .places import of_each, placed
from .saving import Saving
from .stages import Recipe, SlideFile, Tiler, is_current, load_tiler, make_recipe, open_encoder, stored_outcome
from .store import BagStore
from .tables import SlideNames, read_mpp_csv

if TYPE_CHECKING:
    from .prediction import Model


class Progress(Protocol):
    """Who wants to be told while a run goes on."""

    def start(self, total: int, todo: int) -> None: ...
    def slide(self, outcome: Outcome) -> None: ...
    def tiles(self, count: int, so_far: Meter) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    def start(self, total: int, todo: int) -> None: ...
    def slide(self, outcome: Outcome) -> None: ...
    def tiles(self, count: int, so_far: Meter) -> None: ...
    def note(self, text: str) -> None: ...


def run(
    slides: str | Path,
    out: str | Path,
    *,
    config: Config | None = None,
    tiler: Tiler | str | None = None,
    mpp_csv: str | Path | None = None,
    workers: int | None = None,
    devices: str = "auto",
    cluster: str = "local",
    scheduler: str | None = None,
    redo: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Take a folder (glob, CSV, one slide) of slides to features in `out`; the same call again resumes.

    Keywords besides these are the fields of Config (`encoder="uni", mpp=0.5, levels=3`). `workers` processes are
    started on this machine, with an encoder on each of `devices` (auto, cpu, "0,1"); or as many jobs or pods of a
    `cluster` (slurm, kubernetes); or `scheduler` (tcp://…) names workers that are there. Several runs may share `out`:
    each slide is worked on by one. One slide's failure is one row of the report.
    Raises UsageError (nothing was written) and RunStopped (the machine is at fault; what is whole stays).
    """
    if config is not None and settings:
        raise UsageError("give either a config or single settings, not both")
    config = config or make_config(**_named(tiler), **settings)
    recipe = make_recipe(config, _encoder_facts(config), tiler if callable(tiler) else load_tiler(config.tiler))
    how: dict[str, Any] = {"mpp_csv": mpp_csv, "redo": redo}
    how |= {"workers": workers, "devices": devices, "cluster": cluster, "scheduler": scheduler}
    return _carry_out(slides, placed(out), recipe, progress or Silent(), **how)


def _carry_out(
    slides: str | Path,
    out: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    mpp_csv: str | Path | None = None,
    redo: bool = False,
    model: "Model | None" = None,
    **where: Any,
) -> Report:
    """`run`, or with a model its zoom into the slides whose features are not whole. `where`: the fields of Place."""
    started, place = time.time(), Place(**where)
    patient_s = patience("SLIDESTREAM_PATIENCE", PATIENCE_S, least=1)
    folder = find_slides(slides, out)
    files, notes = _slide_files(folder, mpp_csv)
    check_out(out, folder, recipe, redo)

    def is_whole(file: SlideFile) -> bool:
        return is_current(file, BagStore(out).group(file.name), recipe, deep=redo)

    current = list(map(is_whole, files)) if redo else of_each(is_whole, files, out)  # deep: one slide in memory
    todo = [file for file, whole in zip(files, current, strict=True) if not whole]
    if model is not None:
        todo = _to_zoom(files, todo, out, recipe, model, redo)
    sizes = dict(zip([file.name for file in todo], of_each(_size, todo, folder.root), strict=True))
    todo.sort(key=lambda file: sizes[file.name], reverse=True)  # at the end no device is left with a large one
    work = digest([recipe.as_dict(), recipe.encoder_key, recipe.config.dtype, model.about if model else None])
    if redo:
        _require_nobody(out, living(out))
    require_writable(out)
    with machine_door(), ExitStack() as stack:
        client = None
        if todo:
            stack.enter_context(interruptible())
            client = stack.enter_context(reached(place, len(todo), out))
            require_encoder(client, recipe.config)  # a wrong weights file is told before anything is written
        make_writable(out)
        leases = stack.enter_context(joined(out, work))
        with alone(out):  # two runs that begin at the same time may not agree
            check_out(out, folder, recipe, redo)
            if redo:
                _require_nobody(out, leases.others())
            write_run(out, folder, recipe)
        is_done = partial(_is_done, out, recipe, model, redo)
        state = _State(out, files, sizes, folder.skipped, progress, leases, is_done)
        for note in notes:
            progress.note(note)
        try:
            if client is not None:
                found = batch_sizes(out, recipe.encoder_key)
                job = Job(out, recipe, leases.holder.run, found, model.folder if model is not None else None, patient_s)
                state.interrupted = work_through(client, todo, job, state)
        finally:  # also of a run that has to stop: what it did stands in the table
            state.save()
        report = Report(tuple(state.rows()), state.meter, time.time() - started, state.interrupted)
        with alone(out):
            write_totals(out, report, recipe.encoder_key, state.batch_sizes)
    return report


def _require_nobody(out: Path, others: list[Holder]) -> None:
    """--redo deletes what other runs may be about to finish."""
    if others:
        raise UsageError(f"{out} is in use by {others[0].words()}; --redo has to wait for it")


def _is_done(out: Path, recipe: Recipe, model: "Model | None", redo: bool, file: SlideFile) -> bool:
    """True if a slide that was to be worked on has been finished meanwhile, by a run that has left."""
    if redo:
        return False
    group = BagStore(out).group(file.name)
    if is_current(file, group, recipe):
        return True
    if model is None:
        return False
    from .zoom import is_zoomed

    return is_zoomed(file, group, recipe, model)


def _to_zoom(
    files: list[SlideFile], todo: list[SlideFile], out: Path, recipe: Recipe, model: "Model", redo: bool
) -> list[SlideFile]:
    """Of the slides whose features are not whole, those that the model has not predicted yet."""
    from .zoom import is_zoomed

    store = BagStore(out)
    if not todo and any(store.group(file.name).status == "complete" for file in files):
        raise UsageError(
            f"{out} has the features of all {len(files)} slides, so there is nothing to zoom into: leave --zoom out"
        )
    return [file for file in todo if redo or not is_zoomed(file, store.group(file.name), recipe, model)]


def _named(tiler: Tiler | str | None) -> dict[str, str]:
    """The setting that names a tiler; a function goes by where it is defined."""
    if tiler is None:
        return {}
    return {"tiler": tiler if isinstance(tiler, str) else f"{tiler.__module__}:{tiler.__qualname__}"}


def _slide_files(folder: Folder, mpp_csv: str | Path | None) -> tuple[list[SlideFile], list[str]]:
    given, unknown = ({}, []) if mpp_csv is None else read_mpp_csv(mpp_csv, SlideNames(folder.files, folder.root))
    notes = (
        [f"{mpp_csv}: {len(unknown)} rows name no slide of this folder (the first: {unknown[0]})"] if unknown else []
    )
    return [SlideFile(name, path, given.get(name)) for name, path in folder.files.items()], notes


def _encoder_facts(config: Config) -> Encoder:
    try:
        encoder = open_encoder(config)
        encoder.weights_sha256  # noqa: B018 - reads the weights file's hash, so that a missing file is told now
        return encoder
    except EncoderError as error:
        raise UsageError(str(error)) from error


class _State:
    """What is known of each slide while the run goes on, kept in slides.csv together with the other runs."""

    def __init__(
        self,
        out: Path,
        files: list[SlideFile],
        todo: dict[str, int],
        skipped: tuple[Outcome, ...],
        progress: Progress,
        leases: Leases,
        is_done: Callable[[SlideFile], bool],
    ) -> None:
        self.out, self.progress, self.leases, self.is_done = out, progress, leases, is_done
        self.waiting = dict(todo)  # the bytes of each
        self.waiting_bytes = sum(todo.values())
        self.names = {file.name for file in files}
        store = BagStore(out)
        self.known = {o.slide: o for o in skipped}
        names = [file.name for file in files if file.name not in todo]
        rows = of_each(lambda name: stored_outcome(name, store.group(name)), names, out)
        self.known |= dict(zip(names, rows, strict=True))
        self.meter = Meter()  # of finished slides
        self.batch_sizes: dict[str, int] = {}  # of each device
        self.interrupted = False
        self.next_save = 0.0
        self.began = time.monotonic()
        self.told: set[str] = set()  # runs that were named
        self._count(0, 0)
        progress.start(len(files), len(todo))

    def take(self, file: SlideFile) -> bool | None:
        """True: the slide is ours to work on. False: it is settled. None: another run works on it."""
        found = self.leases.take(file.name)
        if isinstance(found, Holder):
            if found.run not in self.told:
                self.told.add(found.run)
                self.progress.note(
                    f"another run is at work here: {found.words()}; each slide is worked on by one of us"
                )
            return None
        if found is None and self.is_done(file):  # by a run that has left
            found = stored_outcome(file.name, BagStore(self.out).group(file.name))
            self.leases.settle(file.name, found)
        if found is None:
            return True
        self._know(found)
        return False

    def add(self, outcome: Outcome, meter: Meter | None = None) -> None:
        self.leases.require()
        self.leases.settle(outcome.slide, outcome)
        self.meter += meter or Meter()
        self._count(1, self.waiting.get(outcome.slide, 0))
        self._know(outcome)

    def _know(self, outcome: Outcome) -> None:
        self.waiting_bytes -= self.waiting.pop(outcome.slide, 0)
        self._count(0, 0)
        self.known[outcome.slide] = outcome
        self.progress.slide(outcome)
        if time.monotonic() > self.next_save:
            self.save()

    def _count(self, slides: int, size: int) -> None:
        """For the heartbeat."""
        course = self.leases.holder.course
        now = Course(
            settled=course.settled + slides,
            left=len(self.waiting),
            settled_bytes=course.settled_bytes + size,
            left_bytes=self.waiting_bytes,
            seconds=round(time.monotonic() - self.began, 1),
        )
        self.leases.progress(now)

    def tiles(self, count: int, so_far: Meter) -> None:
        self.leases.require()
        self.progress.tiles(count, so_far)

    def rows(self) -> Iterator[Outcome]:
        yield from sorted(self.known.values(), key=lambda o: o.slide)

    def save(self) -> None:
        """Rows of slides that this run knows nothing of yet are those of the other runs, or of an earlier one."""
        path, began = self.out / "slides.csv", time.monotonic()
        with alone(self.out):
            others = [row for row in read_outcomes(path, self.known) if row.slide in self.names]
            write_outcomes(path, [*others, *self.known.values()])
        ended = time.monotonic()
        self.next_save = ended + max(2.0, 50 * (ended - began))  # of many slides it takes long: 2 % of the time


def _size(file: SlideFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError:
        return 0  # told where it is opened


def predict(
    source: str | Path,
    model: str | Path | Sequence[str],
    out: str | Path | None = None,
    *,
    zoom: bool = False,
    folds: bool = False,
    vote: bool = False,
    **options: Any,
) -> Report:
    """Predict slides with a trained model.

    source: an output folder of `run` (then its complete slides are predicted), a folder of feature files (likewise, but
    for attention and heatmaps), or slides, whose features are first made in `out` by the model's own recipe. A model
    of pixels reads them from the slides; of a folder of images it writes beside them, if there is no `out`. `model`: a
    model folder, or a name below OUT/models; several are averaged, with `folds` those of its cross-validation, or
    `vote`. `zoom`: only tiles below those that the model (hagmil) chooses are encoded; predictions are the same,
    features are not kept. `options` go to `run` (workers, scheduler, mpp_csv, progress; `weights`, where the model's
    own file has moved).
    Writes predictions/<model>.csv (and .zoom.json: what was saved), the attention into the store, and heatmaps.
    Raises UsageError, RunStopped.
    """
    is_store = (placed(source) / "run.json").is_file()
    if not is_store and out is None and not options and not zoom and FeatureFiles.are_in(source):
        return _predict_files(FeatureFiles(source), model, folds, vote)
    if not is_store and out is None:
        out = _of_pixels(source, model, folds)
    if is_store and (out is not None or options or zoom):
        flags = ", ".join([*(["-o"] if out is not None else []), *(["--zoom"] if zoom else []), *options])
        raise UsageError(f"{source} is an output folder, which is predicted as it is: leave {flags} out")
    from .prediction import choose_models  # torch, which `run` does not need in this process

    place = placed(source if is_store else out or "")
    trained = choose_models(model, place, folds, vote)
    if trained.head.needs.pixels:
        if zoom:
            raise UsageError(f"--zoom: {trained.name} reads pixels, and encodes nothing")
        return _predict_pixels(source, place, trained, **options)
    if is_store:
        return _predict_store(place, trained)
    if zoom:
        from .zoom import require_choosing

        require_choosing(trained)
    progress = options.pop("progress", None)
    config = make_config(**trained.about["recipe"] | {k: options.pop(k) for k in ("weights",) if k in options})
    encoder = _encoder_facts(config)
    if encoder.weights_sha256 != trained.about["weights_sha256"]:
        raise UsageError(f"{trained.name} was trained on features of other weights; pass the right file with --weights")
    if zoom:
        recipe = make_recipe(config, encoder, load_tiler(config.tiler))
        made = _carry_out(source, place, recipe, progress or Silent(), model=trained, **options)
    else:
        made = run(source, place, config=config, progress=progress, **options)
    report = _predict_store(place, trained, {outcome.slide for outcome in made.outcomes if outcome.ok})
    predicted = {outcome.slide for outcome in report.outcomes}
    rest = [outcome for outcome in made.outcomes if outcome.slide not in predicted]
    outcomes, seconds = (*report.outcomes, *rest), made.seconds + report.seconds
    return replace(report, outcomes=outcomes, seconds=seconds, meter=made.meter, interrupted=made.interrupted)


def _of_pixels(source: str | Path, model: str | Path | Sequence[str], folds: bool) -> str | Path:
    """The folder itself, if the model reads the pixels of the images in it. Otherwise a UsageError."""
    from .pictures import ImageFolder

    if ImageFolder.is_one(source):
        from .prediction import choose_models

        if choose_models(model, Path(os.path.abspath(source)), folds).head.needs.pixels:
            return source
    raise UsageError(f"{source} is no output folder of `slidestream run`; for slides, say with -o where features go")


def _predict_pixels(
    source: str | Path,
    out: Path,
    model: "Model",
    *,
    mpp_csv: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    from .pictures import ImageFolder, Pictures
    from .sight import predict_pictures

    if options:
        raise UsageError(f"{', '.join(options)}: {model.name} reads pixels in this process, without an encoder")
    progress = progress or Silent()
    if (out / "run.json").is_file() and placed(source) == out:
        store = BagStore(out)
        slides = [slide for slide in store.slides() if store.group(slide).status == "complete"]
        return predict_pictures(Pictures.of_store(store, slides), slides, model, out, progress, stored=True)
    if placed(source) == out:
        images = ImageFolder(source)
        pictures, slides = images.pictures(images.slides()), images.slides()
    else:
        files, notes = _slide_files(find_slides(source, out), mpp_csv)
        for note in notes:
            progress.note(note)
        levels = [] if model.level is None else [model.level]
        slides = [file.name for file in files]
        pictures = Pictures({file.name: (file.path, file.mpp) for file in files}, levels, "auto")
    if model.level is not None and not pictures.levels:
        raise UsageError(
            f"{model.name} reads {model.level:g} µm/px, which images of a folder do not say; `slidestream run` them"
        )
    return predict_pictures(pictures, slides, model, out, progress, stored=False)


def _predict_store(out: Path, model: "Model", only: set[str] | None = None) -> Report:
    """Every slide of a store that is complete, or was zoomed into. UsageError if none has features that fit."""
    from .prediction import fitting_features, predict_stored, stored_answer, write_predictions, zoomed

    started, store = time.time(), BagStore(out)
    table: list[tuple[str, Any]] = []
    outcomes = []
    savings: dict[str, Saving] = {}
    for slide in store.slides():
        group = store.group(slide)
        status = group.status
        saving = None if fitting_features(group, model) else zoomed(group, model)
        if (only is not None and slide not in only) or (status == "writing" and saving is None):
            continue
        if status == "empty":
            outcomes.append(Outcome(slide, "empty", "predict", message="no tissue, so no prediction"))
            continue
        try:
            if saving is None:
                table.append((slide, predict_stored(store, slide, model)))
            else:
                table.append((slide, stored_answer(group, model)))
                savings[slide] = saving
            outcomes.append(Outcome(slide, "done", "predict"))
        except SlideError as error:
            outcomes.append(failed(slide, error))
    faults = [outcome for outcome in outcomes if outcome.status == "failed"]
    if not table and faults and all(outcome.stage == "predict" for outcome in faults):
        raise UsageError(f"{out}: {faults[0].message}")
    write_predictions(out / "predictions" / f"{model.name}.csv", model, table)
    total = _write_savings(out / "predictions" / f"{model.name}.zoom.json", savings)
    return Report(tuple(outcomes), seconds=time.time() - started, saving=total)


def _predict_files(files: FeatureFiles, model: str | Path | Sequence[str], folds: bool, vote: bool) -> Report:
    """Bags of other tools have no pictures: only the table is written."""
    from .prediction import choose_models, predict_slide, write_predictions
    from .verdict import answer

    started, trained = time.time(), choose_models(model, files.root, folds, vote)
    table: list[tuple[str, Any]] = []
    outcomes = []
    for slide in files.slides():
        try:
            with slide_door(slide, "predict", BrokenBag):
                table.append((slide, answer(trained.task, predict_slide(trained, files.bag(slide)).logits)))
            outcomes.append(Outcome(slide, "done", "predict"))
        except SlideError as error:
            outcomes.append(failed(slide, error))
    write_predictions(files.root / "predictions" / f"{trained.name}.csv", trained, table)
    return Report(tuple(outcomes), seconds=time.time() - started)


def _write_savings(path: Path, savings: dict[str, Saving]) -> Saving | None:
    """What zooming saved, in all and of each slide; no file where no slide was zoomed into."""
    if not savings:
        path.unlink(missing_ok=True)
        return None
    total = Saving.total(savings.values())
    slides = {slide: saving.as_dict() for slide, saving in savings.items()}
    write_json(path, total.as_dict() | {"sentence": total.sentence(), "slides": slides})
    return total
