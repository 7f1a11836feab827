"""Many slides: which of them need work, the Dask graph that does it, one row for each.

The stages stand in stages.py and know nothing of this. Dask carries names and rows between processes, never pixels.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

import dask
from dask.system import CPU_COUNT  # heeds the limits of a container
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed, get_worker

from extractors import Encoder, EncoderError

from .config import Config, make_config
from .errors import MACHINE_ERRNOS, RunStopped, SlideError, UnreadableSlide, UsageError
from .folder import Folder, find_slides
from .lock import locked, require_current
from .outcome import Outcome, Report, failed, write_outcomes
from .output import check_out, make_writable, write_run, write_totals
from .prediction import Model, find_model, load_model, predict_stored, write_predictions
from .stages import (
    Recipe,
    SlideFile,
    Tiler,
    encode,
    is_current,
    load_tiler,
    make_recipe,
    open_encoder,
    prepare,
    stored_outcome,
)
from .store import BagStore
from .tables import SlideNames, read_mpp_csv

log = logging.getLogger("slidestream")

# What keeps Dask from waiting for ever, or from blaming innocents, when a worker dies.
DASK = {
    "distributed.deploy.lost-worker-timeout": "1h",  # by default a worker that is slow to return is dropped for good
    "distributed.scheduler.no-workers-timeout": "300s",  # by default tasks wait for ever
    "distributed.scheduler.allowed-failures": 0,  # we try suspects again ourselves, each alone
    "distributed.worker.daemon": True,
    "distributed.admin.system-monitor.gil.enabled": False,
}
MAX_WORKERS = 16  # unless told: each holds torch and an encoder
ENCODER = "ENCODER"  # the Dask resource of a worker that may hold an encoder
TOPIC = "slidestream-tiles"


class Progress(Protocol):
    """Who wants to be told while a run goes on."""

    def start(self, total: int, todo: int) -> None: ...
    def slide(self, outcome: Outcome) -> None: ...
    def tiles(self, count: int) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    def start(self, total: int, todo: int) -> None: ...
    def slide(self, outcome: Outcome) -> None: ...
    def tiles(self, count: int) -> None: ...
    def note(self, text: str) -> None: ...


def run(
    slides: str | Path,
    out: str | Path,
    *,
    config: Config | None = None,
    tiler: Tiler | str | None = None,
    mpp_csv: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    redo: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Take a folder (glob, CSV, one slide) of slides to features in `out`; the same call again resumes.

    Keywords besides these are the fields of Config (`encoder="uni", mpp=0.5, levels=3`). A local cluster of `workers`
    processes is started unless `scheduler` (tcp://…) names one. One slide's failure is one row of the report.
    Raises UsageError (nothing was written) and RunStopped (the machine is at fault; what is whole stays).
    """
    started, progress, out = time.time(), progress or Silent(), Path(os.path.abspath(out))
    if config is not None and settings:
        raise UsageError("give either a config or single settings, not both")
    config = config or make_config(**_named(tiler), **settings)
    folder = find_slides(slides, out)
    files, notes = _slide_files(folder, mpp_csv)
    encoder = _encoder_facts(config)
    recipe = make_recipe(config, encoder, tiler if callable(tiler) else load_tiler(config.tiler))
    check_out(out, folder, recipe, redo)
    todo = [file for file in files if not is_current(file, BagStore(out).group(file.name), recipe, deep=redo)]
    if todo:
        _load(encoder)
    make_writable(out)
    with locked(out) as run_id:
        write_run(out, folder, recipe)
        state = _State(out, files, todo, folder.skipped, progress)
        for note in notes:
            progress.note(note)
        try:
            if todo:
                with _interruptible(), dask.config.set(DASK), _client(scheduler, workers, len(todo)) as client:
                    state.interrupted = _drive(client, todo, _Job(out, recipe, run_id), state)
        finally:  # also of a run that has to stop: what it did stands in the table
            state.save()
        report = Report(tuple(state.rows()), state.tiles, time.time() - started, state.interrupted)
        write_totals(out, report)
    return report


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


def _load(encoder: Encoder) -> None:
    """Weights are read once before anything is written: a wrong file is told in the first seconds."""
    try:
        encoder.load("cpu")
    except EncoderError as error:
        raise UsageError(str(error)) from error


class _State:
    """What is known of each slide while the run goes on, kept in slides.csv."""

    def __init__(
        self, out: Path, files: list[SlideFile], todo: list[SlideFile], skipped: tuple[Outcome, ...], progress: Progress
    ) -> None:
        self.path, self.progress = out / "slides.csv", progress
        waiting = {file.name for file in todo}
        store = BagStore(out)
        self.known = {o.slide: o for o in skipped}
        self.known |= {f.name: stored_outcome(f.name, store.group(f.name)) for f in files if f.name not in waiting}
        self.tiles = 0
        self.interrupted = False
        self.saved = 0.0
        progress.start(len(files), len(todo))

    def add(self, outcome: Outcome, tiles: int = 0) -> None:
        self.known[outcome.slide] = outcome
        self.tiles += tiles
        self.progress.slide(outcome)
        if time.time() - self.saved > 2:
            self.save()

    def rows(self) -> Iterator[Outcome]:
        yield from sorted(self.known.values(), key=lambda o: o.slide)

    def save(self) -> None:
        write_outcomes(self.path, self.rows())
        self.saved = time.time()


class _Job:
    """What every task needs to know; small, and sent with each."""

    def __init__(self, out: Path, recipe: Recipe, run_id: str) -> None:
        self.out, self.recipe, self.run_id = out, recipe, run_id


def _prepare_task(file: SlideFile, job: _Job) -> tuple[Outcome, int]:
    require_current(job.out, job.run_id)
    return prepare(file, job.recipe, job.out), 0


def _encode_task(file: SlideFile, row: Outcome, job: _Job) -> tuple[Outcome, int]:
    """The slide's row, and how many tiles were encoded for it now."""
    worker, counts = get_worker(), []

    def on_tiles(count: int) -> None:
        require_current(job.out, job.run_id)
        worker.log_event(TOPIC, count)
        counts.append(count)

    require_current(job.out, job.run_id)
    device = _device(worker.name)
    encoder = _worker_encoder(job.recipe.config, device)
    (outcome,) = encode([(file, row)], encoder, job.out, job.recipe, device, on_tiles)
    return outcome, sum(counts)


@lru_cache(maxsize=1)
def _worker_encoder(config: Config, device: str) -> Encoder:
    """One encoder a process, for all its slides."""
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("SLIDESTREAM_THREADS", "1"))))
    return open_encoder(config).load(device)


def _device(worker: object) -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(str(worker)) % count if str(worker).isdigit() else 0}" if count else "cpu"


def _drive(client: Client, todo: list[SlideFile], job: _Job, state: _State) -> bool:
    """Two tasks a slide, prepare and encode; a bounded number of slides in flight. True if the user interrupted."""
    client.subscribe_topic(TOPIC, lambda event: state.progress.tiles(event[1]))
    try:
        suspects = _pass(client, deque(todo), job, state, in_flight=2 * max(1, len(_workers(client))))
        # A worker's death makes suspects of all it held; tried again alone, only the culprit dies twice.
        for file in suspects:
            for culprit in _pass(client, deque([file]), job, state, in_flight=1):
                reason = "the process that worked on it died twice (killed by the system, or a crash in a library)"
                state.add(failed(culprit.name, UnreadableSlide(str(culprit.path), "encode", reason)))
        return False
    except KeyboardInterrupt:
        return True
    finally:
        client.unsubscribe_topic(TOPIC)


def _workers(client: Client) -> dict[str, dict[str, Any]]:
    workers: dict[str, dict[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    return workers


def _pass(client: Client, waiting: deque[SlideFile], job: _Job, state: _State, in_flight: int) -> list[SlideFile]:
    """Take every slide through both tasks; returns those whose worker died."""
    resources = {ENCODER: 1} if any(w["resources"].get(ENCODER) for w in _workers(client).values()) else None
    live: dict[Future, SlideFile] = {}
    completed = as_completed(loop=client.loop, raise_errors=False)
    suspects: list[SlideFile] = []

    def submit(task: Callable[..., tuple[Outcome, int]], file: SlideFile, *args: Any, **options: Any) -> None:
        future = client.submit(task, file, *args, pure=False, retries=0, **options)
        live[future] = file
        completed.add(future)

    for _ in range(min(in_flight, len(waiting))):
        submit(_prepare_task, waiting.popleft(), job)
    for future in completed:
        file, result = live.pop(future), _result(future)
        if result is None:
            suspects.append(file)
        elif result[0].status == "ready":
            submit(_encode_task, file, result[0], job, resources=resources, priority=1)
            continue
        else:
            state.add(*result)
        if waiting:
            submit(_prepare_task, waiting.popleft(), job)
    return suspects


def _result(future: Future) -> tuple[Outcome, int] | None:
    """What a task returned, None if its worker died. What is not a slide's fault is raised here."""
    error = future.exception()
    if error is None:
        result: tuple[Outcome, int] = future.result()
        future.release()
        return result
    if isinstance(error, KilledWorker):
        return None
    if isinstance(error, RunStopped | UsageError):
        raise error
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        raise RunStopped(f"{error.strerror}{f': {error.filename}' if error.filename else ''}") from error
    if isinstance(error, SlideError):
        raise RuntimeError("a stage let a SlideError through") from error
    raise error


@contextmanager
def _client(scheduler: str | None, workers: int | None, slides: int) -> Iterator[Client]:
    """A Dask client of the scheduler that is named, else of a local cluster that ends with it."""
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=20, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"no scheduler answers at {scheduler}: {error}") from error
        with client:
            if not _workers(client):
                client.wait_for_workers(1, timeout=60)
            yield client
        return
    cluster = None
    try:
        with _deaf_to_control_c():
            cluster = _local_cluster(min(workers or min(CPU_COUNT, MAX_WORKERS), slides))
        with Client(cluster, set_as_default=False) as client:
            yield client
    finally:
        if cluster is not None:
            cluster.close(timeout=10)


@contextmanager
def _deaf_to_control_c() -> Iterator[None]:
    """Threads and processes started in here never see SIGINT; ours is answered on the way out.

    A worker that is still importing would answer Ctrl-C with 60 lines of traceback: pipeline.quiet comes too late.
    """
    resource_tracker.ensure_running()  # when it starts it unblocks what is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _local_cluster(workers: int) -> SpecCluster:
    """Worker processes on this machine. On a GPU box only as many of them encode as there are GPUs."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    threads = max(1, CPU_COUNT // workers)
    environment = {"SLIDESTREAM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": ""}

    def options(name: int) -> dict[str, Any]:
        encodes = not gpus or name < gpus
        return {
            "nthreads": 1,
            "dashboard": False,
            "silence_logs": logging.CRITICAL,
            "env": environment,
            "resources": {ENCODER: 1} if encodes else {},
            "preload": ["pipeline.quiet"],
        }

    spec = {name: {"cls": Nanny, "options": options(name)} for name in range(workers)}
    # Even without a dashboard the scheduler serves HTTP: on loopback, on any free port.
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "port": 0}
    server = {"cls": Scheduler, "options": quiet}
    return SpecCluster(workers=spec, scheduler=server, silence_logs=logging.CRITICAL)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM (a pre-empted node) ends the run as Ctrl-C does: cleanly, exit 130; a second signal ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def stop(number: int, _: Any) -> None:
        if seen:
            os._exit(130)
        seen.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def predict(source: str | Path, model: str | Path, out: str | Path | None = None, **options: Any) -> Report:
    """Predict slides with a trained model.

    source: an output folder of `run` (then its complete slides are predicted), or slides, whose features are first
    made in `out` by the model's own recipe. `model`: a model folder, or a name below OUT/models. `options` go to `run`
    (workers, scheduler, mpp_csv, progress; `weights`, where the model's own file has moved). Writes
    predictions/<model>.csv, the attention into the store, and heatmaps. Raises UsageError, RunStopped.
    """
    is_store = (Path(source) / "run.json").is_file()
    if not is_store and out is None:
        raise UsageError(
            f"{source} is no output folder of `slidestream run`; for slides, say with -o where features go"
        )
    if is_store and (out is not None or options):
        raise UsageError(
            f"{source} is an output folder, which is predicted as it is: leave {', '.join(['-o', *options])} out"
        )
    place = Path(os.path.abspath(source if is_store else out or ""))
    trained = load_model(find_model(model, place))
    if is_store:
        return _predict_store(place, trained)
    progress = options.pop("progress", None)
    config = make_config(**trained.about["recipe"] | {k: options.pop(k) for k in ("weights",) if k in options})
    if _encoder_facts(config).weights_sha256 != trained.about["weights_sha256"]:
        raise UsageError(f"{trained.name} was trained on features of other weights; pass the right file with --weights")
    made = run(source, place, config=config, progress=progress, **options)
    names = {outcome.slide for outcome in made.outcomes}
    report = _predict_store(place, trained, names)
    predicted = {outcome.slide for outcome in report.outcomes}
    rest = [outcome for outcome in made.outcomes if outcome.slide not in predicted]
    return replace(
        report, outcomes=(*report.outcomes, *rest), tiles_encoded=made.tiles_encoded, interrupted=made.interrupted
    )


def _predict_store(out: Path, model: Model, only: set[str] | None = None) -> Report:
    """Every slide of a store that is complete. UsageError if none has features that fit the model."""
    store = BagStore(out)
    table: list[tuple[str, Any]] = []
    outcomes = []
    for slide in store.slides():
        status = store.group(slide).status
        if (only is not None and slide not in only) or status == "writing":
            continue
        if status == "empty":
            outcomes.append(Outcome(slide, "empty", "predict", message="no tissue, so no prediction"))
            continue
        try:
            table.append((slide, predict_stored(store, slide, model)))
            outcomes.append(Outcome(slide, "done", "predict"))
        except SlideError as error:
            outcomes.append(failed(slide, error))
    faults = [outcome for outcome in outcomes if outcome.status == "failed"]
    if not table and faults and all(outcome.stage == "predict" for outcome in faults):
        raise UsageError(f"{out}: {faults[0].message}")
    write_predictions(out / "predictions" / f"{model.name}.csv", model.classes, table)
    return Report(tuple(outcomes))
