"""Several runs in one output folder, on one machine or on many: each slide is worked on by one of them.

OUT/.runs/<run> says who a run is and how far it has come. It is written to every few seconds, so its age is the run's
heartbeat, and locked as long as the process lives: on the same machine a death shows at once, from another machine
after EXPIRY. An object store has no locks, so there the age alone tells (and, within one machine, whether the process
is there). OUT/.runs/slides/…/<slide>.<run> is a lease. A run writes its own and then looks: it holds the slide if no
other living run has one too. A settled slide's lease keeps its row, so that the others need not do it again. Nothing is
left that anyone must delete: who finds a run dead removes what it left.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import RunStopped, UsageError
from .objects import ObjectPath
from .outcome import Outcome
from .places import is_remote, unlink_all

BEAT = 5.0  # seconds between heartbeats
EXPIRY = 60.0  # a run of another machine that was silent for so long is dead; one of NFS may look 30 s older than it is
ABANDONED = 600.0  # the same, judged by a worker, whose clock need not be that of the file system
FOLDER = ".runs"
GUARD = "guard.lock"
GUARDED_S = 10.0  # nobody needs so long for what is done `alone`
ROOM = 1024  # bytes of a run's file, in one write: a reader sees the old or the new text
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Course:
    """How far a run has come. Work is counted in bytes of slide files: slides are unequal, the largest come first."""

    settled: int = 0  # slides, by this run
    left: int = 0  # slides, not settled by anyone
    settled_bytes: int = 0
    left_bytes: int = 0
    seconds: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        return self.settled_bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Holder:
    """Who a run is. `work`: what it makes; a slide that another work settled is not settled for this one."""

    run: str
    work: str
    host: str = field(default_factory=platform.node)
    kernel: str = field(default_factory=lambda: _kernel())
    pid: int = field(default_factory=os.getpid)
    start: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    course: Course = Course()
    processes: str = field(default_factory=lambda: _processes())  # among which `pid` is a number

    def words(self) -> str:
        return f"process {self.pid} on {self.host}, running since {self.start}"


class Leases:
    """The slides that this run holds. Made by `joined`."""

    def __init__(self, out: Path, holder: Holder) -> None:
        self.out, self.holder = out, holder
        self._folder, self._file = out / FOLDER, out / FOLDER / holder.run
        self._pulse = _Put(self._file) if isinstance(self._file, ObjectPath) else _Locked(self._file, holder)
        self._began = self._pulse.write(holder)
        self._beaten = (self._began, time.monotonic())
        self._stopped, self._fault = threading.Event(), ""
        self._heart = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._heart.start()

    def progress(self, course: Course) -> None:
        """What the next heartbeat tells."""
        self.holder = replace(self.holder, course=course)

    def take(self, slide: str) -> "Outcome | Holder | None":
        """None: this run holds the slide now. A Holder: another run has it. An Outcome: another run has settled it."""
        self.require()
        own, stem = self._lease(slide), _stem(slide)
        own.parent.mkdir(parents=True, exist_ok=True)
        _place(own, {"slide": slide, "run": self.holder.run, "work": self.holder.work, "row": None})
        for path in own.parent.glob(f"{stem}.*"):
            if path == own:
                continue
            found = self._judge(path)
            if found is not None:
                own.unlink(missing_ok=True)
                return found
        return None

    def _judge(self, path: Path) -> "Outcome | Holder | None":
        """What the lease of another run says: settled while this run was there, held by a living one, or nothing."""
        lease, written = _read(path)
        if not lease:
            return None  # it was withdrawn
        if lease["row"] is not None:
            news = written >= self._began and lease["work"] == self.holder.work
            return Outcome(**lease["row"]) if news else None
        holder = _living(self._folder / lease["run"], self._now())
        if holder is None:
            _bury(self._folder / lease["run"])
            path.unlink(missing_ok=True)
        return holder

    def settle(self, slide: str, row: Outcome) -> None:
        """Tell the others what became of a slide that this run holds."""
        lease = {"slide": slide, "run": self.holder.run, "work": self.holder.work, "row": asdict(row)}
        _place(self._lease(slide), lease)

    def others(self) -> list[Holder]:
        """The other living runs."""
        return [holder for holder in living(self.out, self._now()) if holder.run != self.holder.run]

    def require(self) -> None:
        """RunStopped if others have found this run dead: it stood still, or its disk did."""
        if self._fault:
            raise RunStopped(self._fault)

    def _lease(self, slide: str) -> Path:
        stem = _stem(slide)
        return self._folder / "slides" / stem[:2] / f"{stem}.{self.holder.run}"

    def _now(self) -> float:
        """By the clock of the file system, which is the same for all machines."""
        at, monotonic = self._beaten
        return at + time.monotonic() - monotonic

    def beat(self) -> None:
        """One heartbeat. A run that was buried stays so."""
        if not self._file.exists():
            self._fault = f"this run was silent for over {EXPIRY:.0f} s, and another run has taken its place"
            return
        self._beaten = (self._pulse.write(self.holder), time.monotonic())

    def _live(self) -> None:
        while not self._stopped.wait(BEAT) and not self._fault:
            try:
                self.beat()
            except OSError as error:
                self._fault = f"{self._file} cannot be written to: {error.strerror}"
            except RunStopped as error:
                self._fault = str(error)

    def leave(self) -> None:
        """End the heartbeat. What this run settled stays for those that are still at work; the last one sweeps."""
        self._stopped.set()
        self._heart.join()
        with suppress(OSError, RunStopped):  # a run may end because its disk is gone
            self._file.unlink(missing_ok=True)
            if not self.others():
                _sweep(self._folder, self._now())
        self._pulse.close()


@contextmanager
def joined(out: Path, work: str) -> Iterator[Leases]:
    """Be one of the runs in OUT. Raises UsageError if nothing can be written there."""
    try:
        (out / FOLDER).mkdir(exist_ok=True)
        leases = Leases(out, Holder(uuid.uuid4().hex, work))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UsageError(f"{out / FOLDER} cannot be written to: {error.strerror}") from error
    try:
        yield leases
    finally:
        leases.leave()


def living(out: Path, now: float | None = None) -> list[Holder]:
    """The runs at work in OUT, the oldest first. `now`: by the clock of its file system, else this machine's."""
    found = (_living(path, time.time() if now is None else now) for path in _runs(out / FOLDER))
    return sorted((holder for holder in found if holder is not None), key=lambda holder: (holder.start, holder.run))


def _runs(folder: Path) -> list[Path]:
    """The files of all runs, of those that are over too."""
    try:
        return [path for path in folder.iterdir() if "." not in path.name and path.is_file()]
    except OSError:
        return []


def held(out: Path) -> dict[str, Holder]:
    """The slides that living runs hold and have not settled."""
    runs = {holder.run: holder for holder in living(out)}
    leases = (_read(path)[0] for path in (out / FOLDER / "slides").glob("*/*"))
    return {x["slide"]: runs[x["run"]] for x in leases if x and x["row"] is None and x["run"] in runs}


_looked: dict[tuple[Path, str], float] = {}  # when an object store was last asked for a run


def _is_time_to_look(out: Path, run: str) -> bool:
    """A worker asks with every batch of tiles: an object store is asked once in a heartbeat."""
    if time.monotonic() - _looked.get((out, run), -1e9) < BEAT:
        return False
    _looked[out, run] = time.monotonic()
    return True


def require_current(out: Path, run: str) -> None:
    """In a worker. RunStopped if the run is over: its process ended, or others have found it dead."""
    if is_remote(out) and not _is_time_to_look(out, run):
        return
    try:
        silent = time.time() - (out / FOLDER / run).stat().st_mtime
    except FileNotFoundError:
        raise RunStopped("the run that this work belongs to is over") from None
    if silent > ABANDONED:
        raise RunStopped(f"the run that this work belongs to has been silent for {silent:.0f} s")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Around changes of a file that several runs keep together. Where a file system has no locks, nothing is held."""
    if isinstance(out, ObjectPath):
        with _guarded(out / FOLDER / GUARD):
            yield
        return
    (out / FOLDER).mkdir(exist_ok=True)
    handle = os.open(out / FOLDER / GUARD, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + GUARDED_S
        while not _locked(handle) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


@contextmanager
def _guarded(path: ObjectPath) -> Iterator[None]:
    """An object that one creates, and the others wait until it is gone. One whose maker died stands for GUARDED_S."""
    token, deadline, there = uuid.uuid4().hex.encode(), time.monotonic() + GUARDED_S, b""
    while time.monotonic() < deadline:
        try:
            path.create(token)
            break
        except FileExistsError:
            with suppress(FileNotFoundError):
                before, there = there, path.read_bytes()
                if there == token:  # created, and the answer was lost
                    break
                if there != before:  # another one's turn
                    deadline = time.monotonic() + GUARDED_S
            time.sleep(random.uniform(0.05, 0.2))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            break
    try:
        yield
    finally:
        path.unlink()


def _processes() -> str:
    """The set of processes in which this one's number means something: containers have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_gone(holder: Holder) -> bool:
    """True if it was a process of this machine, and is none any more."""
    if (holder.kernel, holder.processes) != (_kernel(), _processes()):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class _Locked:
    """A run's file on a disk, locked as long as the process lives."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._handle = _register(path, holder)

    def write(self, holder: Holder) -> float:
        """The time of it, by the clock of the file system."""
        _write(self._handle, holder)
        return os.fstat(self._handle).st_mtime

    def close(self) -> None:
        os.close(self._handle)


class _Put:
    """A run's file on an object store, where putting it would bring a buried run back to life."""

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._last = path, 0.0

    def write(self, holder: Holder) -> float:
        """The time of it, by the clock of the server. RunStopped if others may have found this run dead meanwhile."""
        self._path.write_bytes(_text(holder))
        before, self._last = self._last, self._path.stat().st_mtime
        if before and self._last - before > EXPIRY - BEAT:
            self._path.unlink()
            raise RunStopped(
                f"this run was silent for {self._last - before:.0f} s, and others may have taken its place"
            )
        return self._last

    def close(self) -> None:
        pass


def _kernel() -> str:
    """Of this machine since it was started; the containers on it have the same, and their locks meet."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _stem(slide: str) -> str:
    return hashlib.sha256(os.fsencode(slide)).hexdigest()[:32]


def _register(path: Path, holder: Holder) -> int:
    """The run's file, locked before it has its name, so that nobody sees it without its lock."""
    part = path.with_name(f"{path.name}.partial")
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)  # not inherited by child processes (PEP 446)
    try:
        _locked(handle)
        _write(handle, holder)
        os.rename(part, path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _locked(handle: int) -> bool:
    """Take the lock if it is free. True where there are no locks: then the age alone tells."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _write(handle: int, holder: Holder) -> None:
    os.pwrite(handle, _text(holder), 0)


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode().ljust(ROOM)


def _living(path: Path, now: float) -> Holder | None:
    """The run of this file, None if it is over."""
    if isinstance(path, ObjectPath):
        return _living_object(path, now)
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if now - os.fstat(handle).st_mtime > EXPIRY:
            return None
        holder = _holder(path.name, os.pread(handle, ROOM, 0))
        return None if holder.kernel == _kernel() and _is_free(handle) else holder
    finally:
        os.close(handle)


def _living_object(path: ObjectPath, now: float) -> Holder | None:
    try:
        if now - path.stat().st_mtime > EXPIRY:
            return None
        holder = _holder(path.name, path.read_bytes())
    except FileNotFoundError:
        return None
    return None if _is_gone(holder) else holder


def _holder(run: str, text: bytes) -> Holder:
    """What a run's file says; of one that makes no sense, or is just being written, that somebody is there."""
    try:
        about = json.loads(text)
        return Holder(**about | {"course": Course(**about["course"])})
    except (ValueError, KeyError, TypeError):
        return Holder(run, "?", "?", "?", 0, "?")


def _is_free(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False  # it is held, or this file system has no locks
    fcntl.flock(handle, fcntl.LOCK_UN)
    return True


def _bury(run: Path) -> None:
    """Whoever worked for it notices."""
    run.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], float]:
    """A lease and the time it was written; {} if it is not there any more."""
    try:
        return dict(json.loads(path.read_bytes())), path.stat().st_mtime
    except (FileNotFoundError, ValueError):
        return {}, 0.0


def _place(path: Path, lease: dict[str, Any]) -> None:
    if is_remote(path):
        path.write_bytes(json.dumps(lease).encode())
        return
    part = path.with_name(f".{path.name}.partial")
    part.write_text(json.dumps(lease))
    os.replace(part, path)


def _sweep(folder: Path, now: float) -> None:
    """Remove what runs left that are over. A run that has just come has its own file first, so its leases stay."""
    for run in [path for path in folder.iterdir() if path.is_file() and path.name != GUARD]:
        if _living(run, now) is None:
            _bury(run)
    leases = [*folder.glob("slides/*/*"), *folder.glob("slides/*/.*.partial")]
    runs = {path.name for path in _runs(folder)}  # looked for after their leases
    unlink_all([path for path in leases if path.name.removesuffix(".partial").rpartition(".")[2] not in runs])
