"""Slides through a Dask cluster, wherever its workers are (deploy.py).

`prepare` is a task for each slide. `encode` is one long task for each device, which pulls slides from a queue of its
own, so that the encoder is loaded once and never waits between two slides. Names and rows cross between processes,
never pixels.
"""

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from distributed import (
    Client,
    Future,
    KilledWorker,
    Queue,
    get_worker,
    secede,
)
from distributed.comm import CommClosedError

from extractors import Encoder, EncoderError

from .agreement import cosine_to_fp32
from .config import Config
from .deploy import DEVICE, ENCODER, until, workers_of
from .encode import Encoded, Settings
from .errors import RunStopped, SlideError, UnreadableSlide, UsageError, machine_door
from .fingerprint import device
from .leases import require_current
from .meter import Meter
from .outcome import Outcome, failed
from .places import is_remote, placed
from .stages import Recipe, SlideFile, encode, open_encoder, prepare
from .worker import Watch, expect, importing, set_up_process

AHEAD_SLIDES, AHEAD_TILES, AHEAD_S = 32, 4096, 5.0  # given to one encoder ahead of its work: the least of these
PATIENCE_S = 600.0  # without a sign of life a slide is given up, unless SLIDESTREAM_PATIENCE says otherwise
SLOWEST = 1e6  # bytes of a slide that are read in a second, at least, beyond that
WITHOUT_WORKERS = 0.4  # of that patience, until a run without workers stops
LOOK_S = 1.0  # between two looks at who is there


class State(Protocol):
    """Who keeps the rows, knows which slides are ours, and is told while a run goes on."""

    batch_sizes: dict[str, int]

    def take(self, file: SlideFile) -> bool | None:
        """True: the slide is ours to work on. False: it is settled. None: another run works on it."""

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
    patience: float = PATIENCE_S

    def seconds_to_prepare(self, file: SlideFile) -> float:
        """How long a slide may take: a file of one huge level is read whole for its thumbnail."""
        try:
            return self.patience + file.path.stat().st_size / SLOWEST
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
    wait_s = 5 if job.model is None else 0.2
    while True:
        try:
            item = slides.get(timeout=wait_s)
        except TimeoutError:
            require_current(job.out, job.run_id)  # nobody may be there any more
            yield None
            continue
        if item is None:
            return
        name, path, mpp, row = item
        watch.heard(+1)
        yield SlideFile(name, placed(path), mpp), Outcome(**row)


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
    """What a local worker was given; one of others goes by its number, if it has one, among the GPUs it sees."""
    if DEVICE in os.environ:
        return os.environ[DEVICE]
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
    speed: float = 0.0  # tiles/s
    ahead: int = 0  # tiles that it told of, of slides that it has not finished

    @property
    def tiles(self) -> int:
        """To be encoded, at most."""
        return max(0, sum(tiles for _, tiles in self.given.values()) - self.ahead)

    @property
    def most(self) -> float:
        """Tiles that it can begin to encode within AHEAD_S."""
        return min(AHEAD_TILES, AHEAD_S * self.speed)

    @property
    def has_room(self) -> bool:
        """A slide beyond the one it works on, more where they are small: what is given no other encoder can take."""
        return len(self.given) < 2 or (self.tiles < self.most and len(self.given) < AHEAD_SLIDES)

    def give(self, file: SlideFile, tiles: int) -> None:
        if not self.given:
            self.heard, self.ahead = time.monotonic(), 0
        self.given[file.name] = (file, tiles)

    def told(self, count: int, so_far: Meter) -> None:
        self.heard = time.monotonic()
        self.ahead += count
        self.speed = so_far.tiles / so_far.seconds if so_far.seconds else 0.0

    def finished(self, slide: str) -> None:
        if slide in self.given:
            self.heard = time.monotonic()
            self.ahead -= self.given.pop(slide)[1]  # less was told of one that was resumed: mended when it has nothing


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
    """On which devices the slides lay when the run began; what lies on an object store is asked of the store itself."""

    def __init__(self, files: list[SlideFile]) -> None:
        with machine_door():
            real = {f.name: Path(os.path.realpath(f.path)) for f in files if not is_remote(f.path)}
            self._known = {name: (path, device(path)) for name, path in real.items()}

    def require(self, slide: str) -> None:
        """RunStopped if a slide that has failed is gone with the disk it lay on: all others would fail too."""
        if slide not in self._known:
            return
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
    found: list[str] = until(lambda: _encoders(client), 60)
    if not found:
        raise RunStopped("no worker is there that could encode")
    return found


def _encoders(client: Client) -> list[str]:
    """The workers that encode: those with the resource, all where nobody has it."""
    workers = workers_of(client)
    return [a for a, w in workers.items() if w["resources"].get(ENCODER)] or list(workers)


class _Pass:
    """Takes every slide through both tasks once; `run` returns those whose worker died."""

    def __init__(self, client: Client, files: list[SlideFile], job: Job, state: State, disks: _Disks) -> None:
        self._client, self._job, self._state, self._disks = client, job, state, disks
        self._waiting = deque(files)
        self._elsewhere: list[SlideFile] = []  # other runs work on them
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
            self._workers = len(workers_of(self._client))
            for worker in encoders[: len(self._waiting)]:
                self._start_slot(worker)
            self._submit()
            while self._waiting or self._elsewhere or self._preparing or self._ready:
                self._listen()
                self._submit()
            while any(slot.given for slot in self._slots):
                self._share()
                if not any(slot.queue.qsize() for slot in self._slots):
                    break
                self._listen()
            for slot in self._slots:
                slot.queue.put(None)  # no more will come: what has gathered is encoded at once
            while self._slots:  # until each has ended; one whose worker is gone never does, and is found by looking
                self._listen()
            return list(self._suspects.values())
        finally:
            if self._client.status == "running":
                for slot in self._slots:
                    slot.queue.close()
                self._client.unsubscribe_topic(self._topic)

    def _listen(self) -> None:
        """To what is in the inbox next; while nothing is, it is looked who is there and what other runs have left."""
        try:
            # Not the same for all runs: two that want the same slide at the same moment both stand back.
            message = self._inbox.get(timeout=LOOK_S * random.uniform(0.5, 1.5))
        except Empty:
            self._look()
            self._waiting.extend(self._elsewhere)
            self._elsewhere.clear()
            return
        if time.monotonic() - self._looked > 10 * LOOK_S:
            self._look()
        self._answer(message)

    def _share(self) -> None:
        """What one encoder was given and has not begun goes to another that has nothing to do."""
        for idle in [slot for slot in self._slots if not slot.given]:
            rich = max(self._slots, key=lambda slot: slot.tiles)
            if len(rich.given) < 2:
                return
            with suppress(TimeoutError):  # it has taken all of them from its queue
                item = rich.queue.get(timeout=0.1)
                idle.give(*rich.given.pop(item[0]))
                idle.queue.put(item)

    def _start_slot(self, worker: str) -> None:
        queue = Queue(f"{self._topic}-{worker}-{time.monotonic_ns()}", client=self._client)
        place = {"workers": [worker], "allow_other_workers": False, "pure": False, "retries": 0, "priority": 1}
        task = self._client.submit(_encode_task, queue.name, self._topic, self._job, **place)
        task.add_done_callback(self._inbox.put)
        self._slots.append(_Slot(worker, queue, task))

    def _submit(self) -> None:
        """New slides to be prepared, and prepared ones to the encoder that has least to do."""
        while self._waiting and self._wants_more():
            file = self._waiting.popleft()
            mine = self._state.take(file)
            if mine is None:
                self._elsewhere.append(file)
            if not mine:
                continue
            future = self._client.submit(_prepare_task, file, self._job, pure=False, retries=0)
            self._preparing[future] = file, time.monotonic()
            future.add_done_callback(self._inbox.put)
        while self._ready and self._slots:
            slot = min(self._slots, key=lambda slot: slot.tiles)
            if not slot.has_room:
                break
            file, row = self._ready.popleft()
            slot.give(file, row.tiles or 0)
            slot.queue.put((file.name, str(file.path), file.mpp, asdict(row)))

    def _wants_more(self) -> bool:
        """A bounded number ahead of the encoders: what this run holds no other run can work on."""
        slots = max(1, len(self._slots))
        tiles, most = sum(row.tiles or 0 for _, row in self._ready), sum(slot.most for slot in self._slots)
        ahead = len(self._ready) < slots or (tiles < most and len(self._ready) < AHEAD_SLIDES * slots)
        return ahead and len(self._preparing) < 2 * max(1, self._workers)

    def _look(self) -> None:
        """Raise RunStopped if nobody is there any more; a scheduler of others may wait for ever for one that died."""
        if self._client.status != "running":
            raise RunStopped("the connection to the scheduler was lost")
        there, now = workers_of(self._client), time.monotonic()
        self._looked = now
        if there:
            self._peopled = now
        elif now - self._peopled > self._job.patience * WITHOUT_WORKERS:
            raise RunStopped(f"there has been no worker for {now - self._peopled:.0f} s")
        for slot in [slot for slot in self._slots if there and slot.worker not in there]:
            slot.task.cancel()
            self._bury(slot)
        self._welcome()

    def _welcome(self) -> None:
        """Workers that have come meanwhile encode, too: a job may wait for hours in its queue."""
        self._workers = len(workers_of(self._client))
        busy = {slot.worker for slot in self._slots}
        new = [worker for worker in _encoders(self._client) if worker not in busy]
        slides = len(self._waiting) + len(self._preparing) + len(self._ready)
        for worker in new[: max(0, slides - len(self._slots))]:
            self._start_slot(worker)

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
            so_far = self._so_far[event["slot"]] = Meter(**event["so_far"])
            for slot in self._slots:
                if slot.queue.name == event["slot"]:
                    slot.told(event["tiles"], so_far)
            self._state.tiles(event["tiles"], sum(self._so_far.values(), Meter()))
            return
        outcome = Outcome(**event["row"])
        for slot in self._slots:
            slot.finished(outcome.slide)
        self._suspects.pop(outcome.slide, None)  # its process died after it was told of
        self._state.batch_sizes |= event["batch_sizes"]
        self._add(outcome, Meter(**event["meter"]))

    def _bury(self, slot: _Slot) -> None:
        """An encoder has ended: its slides are suspects, and another worker takes its place."""
        self._slots.remove(slot)
        slot.queue.close()
        quiet = time.monotonic() - slot.heard
        for file, _ in slot.given.values():
            self._suspects[file.name] = _Suspect(file, "encode", slot.worker, quiet)
        if not (self._waiting or self._preparing or self._ready):
            return
        busy = {slot.worker for slot in self._slots}
        free = until(lambda: [worker for worker in _encoders(self._client) if worker not in busy], 60)
        if free:
            self._start_slot(free[0])
        elif not self._slots:
            raise RunStopped("no worker is left that could encode")


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
