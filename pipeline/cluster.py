"""Slides through a Dask cluster, local or named: the only file that names dask.

`prepare` is a task for each slide. `encode` is one long task for each device, which pulls slides from a queue of its
own, so that the encoder is loaded once and never waits between two slides. Names and rows cross between processes,
never pixels.
"""

import logging
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import dask
from dask.system import CPU_COUNT  # heeds the limits of a container
from distributed import (
    Client,
    Future,
    KilledWorker,
    Nanny,
    Queue,
    Scheduler,
    SpecCluster,
    get_worker,
    secede,
)
from distributed.comm import CommClosedError
from distributed.system import MEMORY_LIMIT  # so does this
from distributed.utils import silence_logging_cmgr

from extractors import Encoder, EncoderError

from .agreement import cosine_to_fp32
from .config import Config
from .encode import Encoded, Settings
from .errors import RunStopped, SlideError, UnreadableSlide, UsageError, machine_door
from .fingerprint import device
from .lock import require_current
from .meter import Meter
from .outcome import Outcome, failed
from .stages import Recipe, SlideFile, encode, open_encoder, prepare
from .worker import Watch, expect, importing, set_up_process

# What keeps Dask from waiting for ever, or from blaming innocents, when a worker dies.
DASK: dict[str, Any] = {
    "distributed.deploy.lost-worker-timeout": "1h",  # by default a worker that is slow to return is dropped for good
    "distributed.scheduler.allowed-failures": 0,  # we try suspects again ourselves, each alone
    # A worker that holds too much is not put to sleep, as that helps nobody, but ended, before the machine is.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.9,  # of its share of the memory
    "distributed.worker.daemon": True,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.worker.profile.enabled": False,  # it keeps what every thread did, second by second
}
MAX_WORKERS = 16  # unless told
CORES_PER_ENCODER = 4  # of a CPU: more threads on one batch gain little
ENCODER = "ENCODER"  # the Dask resource of a worker that may hold an encoder
AHEAD_SLIDES, AHEAD_TILES = 32, 4096  # given to one encoder beyond the slide it works on: the lesser of the two
PATIENCE_S = 600.0  # without a sign of life a slide is given up; SLIDESTREAM_PATIENCE says otherwise
SLOWEST = 1e6  # bytes of a slide that are read in a second, at least, beyond that
WITHOUT_WORKERS = 0.4  # of that patience, until a run without workers stops
LOOK_S = 2.0  # between two looks at who is there
FILES, FILES_A_WORKER = 64, 8  # that must be allowed to be open: connections, pipes, slides


class State(Protocol):
    """Who keeps the rows and is told while a run goes on."""

    batch_sizes: dict[str, int]

    def add(self, outcome: Outcome, meter: Meter | None = None) -> None: ...
    def tiles(self, count: int, so_far: Meter) -> None: ...


@dataclass(frozen=True)
class Job:
    """What every task needs to know; small, and sent with each. `batch_sizes`: found before, of each device. `model`:
    the folder of a model that chooses which tiles are encoded, and predicts.
    """

    out: Path
    recipe: Recipe
    run_id: str
    batch_sizes: dict[str, int] = field(default_factory=dict)
    model: Path | None = None
    patience: float = field(default_factory=lambda: float(os.environ.get("SLIDESTREAM_PATIENCE", PATIENCE_S)))

    def seconds_to_prepare(self, file: SlideFile) -> float:
        """How long a slide may take: a file of one huge level is read whole for its thumbnail."""
        try:
            return self.patience + os.stat(file.path).st_size / SLOWEST
        except OSError:
            return self.patience


# -- in the workers --


def _load_task(config: Config) -> None:
    try:
        _device_and_encoder(config)
    except EncoderError as error:
        raise UsageError(str(error)) from error


def _prepare_task(file: SlideFile, job: Job) -> Outcome:
    require_current(job.out, job.run_id)
    expect("prepare", job.seconds_to_prepare(file))
    try:
        with machine_door():
            return prepare(file, job.recipe, job.out)
    finally:
        expect("prepare", None)


def _encode_task(slides: str, topic: str, job: Job) -> None:
    """Encode what comes through the queue `slides` until it says None; tell of it through `topic`."""
    worker, config = get_worker(), job.recipe.config
    secede()  # prepares slides meanwhile
    set_up_process()
    device, encoder = _device_and_encoder(config)
    live, watch = _Live(worker, topic, slides), Watch("encode", job.patience)

    def on_tiles(count: int, so_far: Meter) -> None:
        require_current(job.out, job.run_id)
        watch.heard()
        live.tell(count, so_far)

    settings = Settings(
        batch_size=config.batch_size or job.batch_sizes.get(device_name(device)),
        readers=config.readers,
        threads=_threads(),
        queue_bytes=config.queue_mb << 20,
    )
    pulled = _pulled(Queue(slides), job, watch)
    if job.model is None:
        rows = encode(filter(None, pulled), encoder, job.out, job.recipe, device, on_tiles, settings)
    else:
        rows = _zoom(job.model)(pulled, encoder, job.out, job.recipe, device, on_tiles, settings)
    try:
        with machine_door():
            for outcome, result in rows:
                watch.heard(-1)
                sizes = {device_name(device): result.batch_size} if result.batch_size else {}
                worker.log_event(topic, {"row": asdict(outcome), "meter": asdict(result.meter), "batch_sizes": sizes})
    finally:
        watch.close()


def _zoom(model: Path) -> Callable[..., Iterator[tuple[Outcome, Encoded]]]:
    """Where a model chooses; it needs torch, which the process of the client does not."""
    from .prediction import load_model
    from .zoom import zoom

    return partial(zoom, load_model(model))


def _pulled(slides: Queue, job: Job, watch: Watch) -> Iterator[tuple[SlideFile, Outcome] | None]:
    """None: there is none for now. Slides that are zoomed into come back meanwhile, and are not to wait for long."""
    patience = 5 if job.model is None else 0.2
    while True:
        try:
            item = slides.get(timeout=patience)
        except TimeoutError:
            require_current(job.out, job.run_id)  # nobody may be there any more
            yield None
            continue
        if item is None:
            return
        name, path, mpp, row = item
        watch.heard(+1)
        yield SlideFile(name, Path(path), mpp), Outcome(**row)


class _Live:
    """Tells of encoded tiles a few times a second, however fast the device is."""

    def __init__(self, worker: Any, topic: str, slot: str) -> None:
        self._worker, self._topic, self._slot, self._count, self._told = worker, topic, slot, 0, 0.0

    def tell(self, count: int, so_far: Meter) -> None:
        self._count += count
        if time.monotonic() - self._told > 0.2:
            self._worker.log_event(self._topic, {"tiles": self._count, "slot": self._slot, "so_far": asdict(so_far)})
            self._count, self._told = 0, time.monotonic()


def _device_and_encoder(config: Config) -> tuple[str, Encoder]:
    with importing():
        device = _device(get_worker().name)
        return device, _worker_encoder(config, device)


@lru_cache(maxsize=1)
def _worker_encoder(config: Config, device: str) -> Encoder:
    """One encoder a process, for all its slides."""
    import torch

    torch.set_num_threads(_threads())
    encoder = open_encoder(config).load(device, config.precision, config.compile)
    cosine = cosine_to_fp32(encoder, device, config.tile_px or encoder.facts.tile_px, config.compile)
    encoder.cosine_to_fp32 = round(cosine, 6)
    return encoder


def _threads() -> int:
    return max(1, int(os.environ.get("SLIDESTREAM_THREADS", "1")))


def _device(worker: object) -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(str(worker)) % count if str(worker).isdigit() else 0}" if count else "cpu"


def device_name(device: str) -> str:
    """What the device is: a batch size that was found on one fits another of its kind."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


# -- in the client --


@dataclass(eq=False)
class _Slot:
    """A worker that encodes: its queue, and what was given to it and is not finished."""

    worker: str
    queue: Queue
    task: Future
    given: dict[str, tuple[SlideFile, int]] = field(default_factory=dict)
    heard: float = 0.0  # when it last told of tiles, or had nothing to do

    @property
    def tiles(self) -> int:
        return sum(tiles for _, tiles in self.given.values())

    @property
    def has_room(self) -> bool:
        return len(self.given) < 2 or (self.tiles < AHEAD_TILES and len(self.given) < AHEAD_SLIDES)


def work_through(client: Client, todo: list[SlideFile], job: Job, state: State) -> bool:
    """Every slide through `prepare` and `encode`, a bounded number in flight. True if the user interrupted."""
    disks = _Disks(todo)
    try:
        suspects = _Pass(client, todo, job, state, disks).run()
        # A worker's death makes suspects of all it held; tried again alone, only the culprit dies twice.
        for suspect in suspects:
            for culprit in _Pass(client, [suspect.file], job, state, disks).run():
                disks.require(culprit.file.name)
                error = UnreadableSlide(str(culprit.file.path), culprit.stage, _why(client, culprit, job))
                state.add(failed(culprit.file.name, error))
        return False
    except KeyboardInterrupt:
        return True
    except (OSError, CancelledError) as error:
        if client.status == "running" and not isinstance(error, CommClosedError | CancelledError):
            raise
        raise RunStopped("the connection to the scheduler was lost") from error


@dataclass(frozen=True)
class _Suspect:
    """A slide whose worker has died: which, at what, and for how long nothing had been heard of it."""

    file: SlideFile
    stage: str
    worker: str
    quiet: float


def _why(client: Client, suspect: _Suspect, job: Job) -> str:
    """What is known of how a worker died that had nothing but this slide."""
    too_large = {event["worker"] for _, event in client.get_events("worker-restart-memory")}
    if suspect.worker in too_large:
        return "it takes more memory than a worker has; with fewer --workers each has more"
    limit = job.seconds_to_prepare(suspect.file) if suspect.stage == "prepare" else job.patience
    if suspect.quiet >= limit:
        return f"it took longer than {limit:.0f} s, twice; a library that reads it hangs, or its disk"
    return "the process that worked on it died twice (killed by the system, or a crash in a library)"


class _Disks:
    """On which devices the slides lay when the run began."""

    def __init__(self, files: list[SlideFile]) -> None:
        with machine_door():
            real = {file.name: Path(os.path.realpath(file.path)) for file in files}
            self._known = {name: (path, device(path)) for name, path in real.items()}

    def require(self, slide: str) -> None:
        """RunStopped if a slide that has failed is gone with the disk it lay on: all others would fail too."""
        path, before = self._known[slide]
        with machine_door():
            if not os.path.exists(path) and device(path) != before:
                raise RunStopped(f"{path} is gone with its disk, which is not mounted any more")


def require_encoder(client: Client, config: Config) -> None:
    """Load the encoder in a worker, which keeps it. Raises UsageError where its weights do not fit."""
    place = {"workers": _require_encoders(client)[:1], "allow_other_workers": False, "pure": False, "retries": 0}
    future = client.submit(_load_task, config, **place)
    if isinstance(future.exception(), KilledWorker):
        raise RunStopped("the process that loaded the encoder died (killed by the system?)")
    _result(future)


def _require_encoders(client: Client) -> list[str]:
    """Those that are there, or come up within a minute: a nanny needs a moment to start its worker again."""
    found: list[str] = _until(lambda: _encoders(client), 60)
    if not found:
        raise RunStopped("no worker is there that could encode")
    return found


def _encoders(client: Client) -> list[str]:
    """The workers that encode: those with the resource, all where nobody has it."""
    workers = _workers(client)
    return [a for a, w in workers.items() if w["resources"].get(ENCODER)] or list(workers)


def _workers(client: Client) -> dict[str, dict[str, Any]]:
    workers: dict[str, dict[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    return workers


class _Pass:
    """Takes every slide through both tasks once; `run` returns those whose worker died."""

    def __init__(self, client: Client, files: list[SlideFile], job: Job, state: State, disks: _Disks) -> None:
        self._client, self._job, self._state, self._disks = client, job, state, disks
        self._waiting = deque(files)
        self._preparing: dict[Future, tuple[SlideFile, float]] = {}  # since when
        self._ready: deque[tuple[SlideFile, Outcome]] = deque()
        self._slots: list[_Slot] = []
        self._suspects: dict[str, _Suspect] = {}
        self._inbox: SimpleQueue[Any] = SimpleQueue()  # futures that are done, and events
        self._so_far: dict[str, Meter] = {}  # of each encoder
        self._topic = f"slidestream-{job.run_id}"
        self._looked = self._peopled = time.monotonic()  # when it was last looked who is there, and anybody was

    def run(self) -> list[_Suspect]:
        self._client.subscribe_topic(self._topic, lambda event: self._inbox.put(event[1]))
        try:
            encoders = _require_encoders(self._client)
            self._in_flight = 2 * len(_workers(self._client)) + AHEAD_SLIDES * len(encoders)
            for worker in encoders[: len(self._waiting)]:
                self._start_slot(worker)
            while self._waiting or self._preparing or self._ready:
                self._submit()
                if self._ready or self._preparing:
                    self._answer_next()
            for slot in self._slots:
                slot.queue.put(None)  # no more will come: what has gathered is encoded at once
            while any(slot.given for slot in self._slots):
                self._answer_next()
            for slot in self._slots:
                _result(slot.task)
            return list(self._suspects.values())
        finally:
            if self._client.status == "running":
                for slot in self._slots:
                    slot.queue.close()
                self._client.unsubscribe_topic(self._topic)

    def _start_slot(self, worker: str) -> None:
        queue = Queue(f"{self._topic}-{worker}-{time.monotonic_ns()}", client=self._client)
        place = {"workers": [worker], "allow_other_workers": False, "pure": False, "retries": 0, "priority": 1}
        task = self._client.submit(_encode_task, queue.name, self._topic, self._job, **place)
        task.add_done_callback(self._inbox.put)
        self._slots.append(_Slot(worker, queue, task))

    def _submit(self) -> None:
        """New slides to be prepared, and prepared ones to the encoder that has least to do."""
        given = sum(len(slot.given) for slot in self._slots)
        while self._waiting and len(self._preparing) + len(self._ready) + given < self._in_flight:
            file = self._waiting.popleft()
            future = self._client.submit(_prepare_task, file, self._job, pure=False, retries=0)
            self._preparing[future] = file, time.monotonic()
            future.add_done_callback(self._inbox.put)
        while self._ready and self._slots:
            slot = min(self._slots, key=lambda slot: slot.tiles)
            if not slot.has_room:
                break
            file, row = self._ready.popleft()
            if not slot.given:
                slot.heard = time.monotonic()
            slot.given[file.name] = (file, row.tiles or 0)
            slot.queue.put((file.name, str(file.path), file.mpp, asdict(row)))

    def _answer_next(self) -> None:
        """What is in the inbox next; while nothing is, it is looked who is there."""
        while True:
            try:
                message = self._inbox.get(timeout=LOOK_S)
            except Empty:
                self._look()
                continue
            if time.monotonic() - self._looked > 10 * LOOK_S:
                self._look()
            return self._answer(message)

    def _look(self) -> None:
        """Raise RunStopped if nobody is there any more; a scheduler of others may wait for ever for one that died."""
        if self._client.status != "running":
            raise RunStopped("the connection to the scheduler was lost")
        there, now = _workers(self._client), time.monotonic()
        self._looked = now
        if there:
            self._peopled = now
        elif now - self._peopled > self._job.patience * WITHOUT_WORKERS:
            raise RunStopped(f"there has been no worker for {now - self._peopled:.0f} s")
        for slot in [slot for slot in self._slots if there and slot.worker not in there]:
            slot.task.cancel()
            self._bury(slot)

    def _answer(self, message: Any) -> None:
        if isinstance(message, dict):
            self._hear(message)
        elif message in self._preparing:
            (file, began), outcome = self._preparing.pop(message), _result(message)
            if outcome is None:
                quiet, last = time.monotonic() - began, message.exception().last_worker.address
                self._suspects[file.name] = _Suspect(file, "prepare", last, quiet)
            elif outcome.status == "ready":
                self._ready.append((file, outcome))
            else:
                self._add(outcome)
        else:
            for slot in [slot for slot in self._slots if slot.task is message]:
                _result(message)  # its process has died, or there was no more to do; what else it met is raised
                self._bury(slot)

    def _add(self, outcome: Outcome, meter: Meter | None = None) -> None:
        if outcome.status == "failed":
            self._disks.require(outcome.slide)
        self._state.add(outcome, meter)

    def _hear(self, event: dict[str, Any]) -> None:
        """Of tiles that were encoded, or of a slide that is finished."""
        if "tiles" in event:
            for slot in self._slots:
                if slot.queue.name == event["slot"]:
                    slot.heard = time.monotonic()
            self._so_far[event["slot"]] = Meter(**event["so_far"])
            self._state.tiles(event["tiles"], sum(self._so_far.values(), Meter()))
            return
        outcome = Outcome(**event["row"])
        for slot in self._slots:
            if slot.given.pop(outcome.slide, None):
                slot.heard = time.monotonic()
        self._suspects.pop(outcome.slide, None)  # its process died after it was told of
        self._state.batch_sizes |= event["batch_sizes"]
        self._add(outcome, Meter(**event["meter"]))

    def _bury(self, slot: _Slot) -> None:
        """An encoder has ended: its slides are suspects, and another worker takes its place."""
        self._slots.remove(slot)
        quiet = time.monotonic() - slot.heard
        for file, _ in slot.given.values():
            self._suspects[file.name] = _Suspect(file, "encode", slot.worker, quiet)
        if not (self._waiting or self._preparing or self._ready):
            return
        busy = {slot.worker for slot in self._slots}
        free = _until(lambda: [worker for worker in _encoders(self._client) if worker not in busy], 60)
        if free:
            self._start_slot(free[0])
        elif not self._slots:
            raise RunStopped("no worker is left that could encode")


def _until(condition: Any, seconds: float) -> Any:
    """What it returns once it is true, or at the end: a nanny needs a moment to start its worker again."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _result(future: Future) -> Any:
    """What a task returned, None if its worker died. What is not a slide's fault is raised here."""
    error = future.exception()
    if error is None:
        result = future.result()
        future.release()
        return result
    if isinstance(error, KilledWorker):
        return None
    if isinstance(error, RunStopped | UsageError):
        raise error
    if isinstance(error, SlideError):
        raise RuntimeError("a stage let a SlideError through") from error
    raise error


@contextmanager
def local_or_named(scheduler: str | None, workers: int | None, slides: int) -> Iterator[Client]:
    """A Dask client of the scheduler that is named, else of a local cluster that ends with it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Tracebacks about connections to who has died; we say it in a line.
    with dask.config.set(DASK), silence_logging_cmgr(logging.CRITICAL):
        if scheduler is not None:
            try:
                client = Client(scheduler, timeout=20, set_as_default=False)
            except (OSError, ValueError) as error:
                raise UsageError(f"no scheduler answers at {scheduler}: {error}") from error
            with client:
                if not _until(lambda: _workers(client), 60):
                    raise UsageError(f"no worker has joined the scheduler at {scheduler}; start some, then run again")
                yield client
            return
        cluster, count = None, min(workers or _default_workers(), slides)
        _require_open_files(FILES + FILES_A_WORKER * count)
        try:
            with _deaf_to_control_c():
                cluster = _local_cluster(count)
            with Client(cluster, set_as_default=False) as client:
                yield client
        finally:
            if cluster is not None:
                cluster.close(timeout=10)


def _require_open_files(count: int) -> None:
    """Raise the limit of this process, and so of its workers, where it is too low; UsageError if that may not be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise UsageError(f"{hard} files may be open at a time, and a run needs {count}: raise it with `ulimit -n`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@contextmanager
def _deaf_to_control_c() -> Iterator[None]:
    """Threads and processes started in here never see SIGINT; ours is answered on the way out.

    A worker that is still importing would answer Ctrl-C with 60 lines of traceback: pipeline.worker comes too late.
    """
    resource_tracker.ensure_running()  # when it starts it unblocks what is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gpus() -> int:
    if not any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg")):
        return 0  # torch, which takes seconds to import, need not be asked
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _default_workers() -> int:
    """With GPUs a process for each and more that prepare; without, one for every few cores, each with an encoder."""
    gpus = _gpus()
    return max(gpus, min(CPU_COUNT, MAX_WORKERS)) if gpus else min(max(1, CPU_COUNT // CORES_PER_ENCODER), MAX_WORKERS)


def _local_cluster(workers: int) -> SpecCluster:
    """Worker processes on this machine. On a GPU box only as many of them encode as there are GPUs."""
    gpus = _gpus()
    threads = max(1, CPU_COUNT // min(workers, gpus or workers))
    environment = {
        "SLIDESTREAM_THREADS": str(threads),
        "PYTHONDONTWRITEBYTECODE": "",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages for what an encoder allocates: 1.5 % on a CPU
        "OMP_WAIT_POLICY": "PASSIVE",  # threads of an encoder that wait for each other leave the core to readers
    }

    def options(name: int) -> dict[str, Any]:
        encodes = not gpus or name < gpus
        return {
            "nthreads": 1,
            "memory_limit": MEMORY_LIMIT // workers,
            "dashboard": False,
            "silence_logs": logging.CRITICAL,
            "env": environment,
            "resources": {ENCODER: 1} if encodes else {},
            "preload": ["pipeline.worker"],
        }

    spec = {name: {"cls": Nanny, "options": options(name)} for name in range(workers)}
    # Even without a dashboard the scheduler serves HTTP: on loopback, on any free port.
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "port": 0}
    server = {"cls": Scheduler, "options": quiet}
    return SpecCluster(workers=spec, scheduler=server, silence_logs=logging.CRITICAL)


@contextmanager
def interruptible() -> Iterator[None]:
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
