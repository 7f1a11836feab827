"""Where the work is done: workers on this machine, jobs of Slurm, pods of Kubernetes, or a scheduler that is there."""

import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import dask
from dask.system import CPU_COUNT  # heeds the limits of a container
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.deploy import Cluster
from distributed.system import MEMORY_LIMIT  # so does this
from distributed.utils import silence_logging_cmgr

from .errors import UsageError, nearest
from .places import is_remote

T = TypeVar("T")
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
    "distributed.admin.low-level-log-length": 100,  # it keeps every message; with the usual 1,000, 6 MB a worker
}
MAX_WORKERS = 16  # unless told
CORES_PER_ENCODER = 4  # of a CPU: more threads on one batch gain little
DEVICE = "SLIDESTREAM_DEVICE"  # in the environment of a local worker
ENCODER = "ENCODER"  # the Dask resource of a worker that may hold an encoder
CLUSTERS = ("local", "slurm", "kubernetes")
FILES, FILES_A_WORKER = 64, 8  # that must be allowed to be open: connections, pipes, slides


@dataclass(frozen=True)
class Place:
    """What was asked for. `workers`: processes, jobs or pods; `devices`: auto, cpu, or numbers of GPUs (0,1)."""

    cluster: str = "local"
    workers: int | None = None
    devices: str = "auto"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.cluster not in CLUSTERS:
            raise UsageError(nearest(self.cluster, list(CLUSTERS), "cluster"))
        if self.scheduler is not None and (self.cluster, self.workers, self.devices) != ("local", None, "auto"):
            raise UsageError("--scheduler names workers that are there: leave --cluster, --workers and --devices out")
        if self.cluster != "local" and self.devices != "auto":
            raise UsageError("--devices is of this machine; a job or a pod has what its description asks for")


@contextmanager
def reached(place: Place, slides: int, out: Path) -> Iterator[Client]:
    """A Dask client of the workers. What was started for it ends with it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Tracebacks about connections to who has died; we say it in a line.
    with dask.config.set(DASK), silence_logging_cmgr(logging.CRITICAL):
        if place.scheduler is not None:
            with _named(place.scheduler) as client:
                yield client
            return
        cluster = None
        try:
            cluster = _started(place, slides, out)
            with Client(cluster, set_as_default=False) as client:
                if place.cluster != "local":
                    # A queue may be long; Ctrl-C ends it. A scheduler at which a task waits does not count as idle.
                    client.submit(int, pure=False).exception()
                yield client
        finally:
            if cluster is not None:
                with suppress(TimeoutError):  # of pods that take their time to end
                    cluster.close(timeout=10)


def _started(place: Place, slides: int, out: Path) -> SpecCluster | Cluster:
    if place.cluster == "kubernetes":
        return _kubernetes(place, slides, out)
    with _deaf_to_control_c():
        if place.cluster == "slurm":
            return _slurm(place, slides, None if is_remote(out) else out / "logs")
        return _local(place, slides)


@contextmanager
def _named(scheduler: str) -> Iterator[Client]:
    try:
        client = Client(scheduler, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"no scheduler answers at {scheduler}: {error}") from error
    with client:
        if not until(lambda: workers_of(client), 60):
            raise UsageError(f"no worker has joined the scheduler at {scheduler}; start some, then run again")
        yield client


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    workers: dict[str, dict[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    return workers


def until(condition: Callable[[], T], seconds: float) -> T:
    """What it returns once it is true, or at the end."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


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


def gpus(devices: str) -> list[int]:
    """The GPUs that are to encode, none for a CPU. Raises UsageError where one is asked for that is not there."""
    if devices == "cpu":
        return []
    there = _gpus()
    if devices == "auto":
        return list(range(there))
    try:
        chosen = [int(number) for number in devices.split(",")]
    except ValueError:
        raise UsageError(f"--devices {devices!r}: write auto, cpu, or numbers of GPUs, such as 0,1") from None
    for number in chosen:
        if not 0 <= number < there:
            what = f"this machine has {there}, from 0" if there else "torch finds none here; see `slidestream doctor`"
            raise UsageError(f"--devices {devices}: there is no GPU {number}: {what}. --devices cpu needs none")
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--devices {devices}: a GPU has one encoder; name each once")
    return chosen


def _gpus() -> int:
    if not any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg")):
        return 0  # torch, which takes seconds to import, need not be asked
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _default_workers(gpus: int) -> int:
    """With GPUs a process for each and more that prepare; without, one for every few cores, each with an encoder."""
    return max(gpus, min(CPU_COUNT, MAX_WORKERS)) if gpus else min(max(1, CPU_COUNT // CORES_PER_ENCODER), MAX_WORKERS)


def _local(place: Place, slides: int) -> SpecCluster:
    """Worker processes on this machine. On a GPU box only as many of them encode as there are GPUs."""
    chosen = gpus(place.devices)
    workers = min(place.workers or _default_workers(len(chosen)), slides)
    _require_open_files(FILES + FILES_A_WORKER * workers)
    environment = {
        "SLIDESTREAM_THREADS": str(max(1, CPU_COUNT // min(workers, len(chosen) or workers))),
        "PYTHONDONTWRITEBYTECODE": "",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages for what an encoder allocates: 1.5 % on a CPU
        "OMP_WAIT_POLICY": "PASSIVE",  # threads of an encoder that wait for each other leave the core to readers
    }

    def options(name: int) -> dict[str, Any]:
        device = f"cuda:{chosen[name]}" if name < len(chosen) else "cpu"
        return {
            "nthreads": 1,
            "memory_limit": MEMORY_LIMIT // workers,
            "dashboard": False,
            "silence_logs": logging.CRITICAL,
            "env": environment | {DEVICE: device},
            "resources": {ENCODER: 1} if device != "cpu" or not chosen else {},
            "preload": ["pipeline.worker"],
        }

    spec = {name: {"cls": Nanny, "options": options(name)} for name in range(workers)}
    # Even without a dashboard the scheduler serves HTTP: on loopback, on any free port.
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1", "port": 0}
    server = {"cls": Scheduler, "options": quiet}
    return SpecCluster(workers=spec, scheduler=server, silence_logs=logging.CRITICAL)


def _slurm(place: Place, slides: int, logs: Path | None) -> SpecCluster:
    """A job for each worker, and another for each that ends. Cores, memory, partition, GPUs … stand in Dask's own file.

    https://jobqueue.dask.org: ~/.config/dask/jobqueue.yaml, or variables such as DASK_JOBQUEUE__SLURM__CORES.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise UsageError("--cluster slurm needs dask-jobqueue: pip install 'slidestream[slurm]'") from error
    cores = dask.config.get("jobqueue.slurm.cores", None)
    if cores is None or dask.config.get("jobqueue.slurm.memory", None) is None:
        raise UsageError(
            "--cluster slurm: what is a job to have? Say cores and memory below jobqueue: slurm: in "
            "~/.config/dask/jobqueue.yaml, or as DASK_JOBQUEUE__SLURM__CORES=8 DASK_JOBQUEUE__SLURM__MEMORY=32GB"
        )
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = dask.config.get("jobqueue.slurm")
    exports = [f"export {name}={value}" for name, value in {"SLIDESTREAM_THREADS": str(cores), **settings()}.items()]
    threads = ["--nthreads", "1", "--resources", f"{ENCODER}=1", "--preload", "pipeline.worker", "--no-dashboard"]
    cluster = SLURMCluster(
        processes=1,
        worker_extra_args=[*known.get("worker-extra-args", []), *threads],
        job_script_prologue=[*known.get("job-script-prologue", []), *exports],
        log_directory=known.get("log-directory") or (None if logs is None else str(logs)),
        scheduler_options={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        silence_logs=logging.CRITICAL,
    )
    jobs = min(place.workers or 1, slides)
    cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
    return cluster


def settings() -> dict[str, str]:
    """DASK as environment variables, for processes that others start."""
    return {f"DASK_{key.upper().replace('-', '_').replace('.', '__')}": str(value) for key, value in DASK.items()}


def _kubernetes(place: Place, slides: int, out: Path) -> Cluster:
    """A scheduler and workers as pods, by Dask's operator. A file says what they have, such as docker/daskcluster.yaml.

    https://kubernetes.dask.org: `kubernetes: custom-cluster-spec:` in ~/.config/dask, or the variable below.
    """
    try:
        from .pods import Pods, daskcluster
    except ImportError as error:
        raise UsageError("--cluster kubernetes needs dask-kubernetes: pip install 'slidestream[kubernetes]'") from error
    described = dask.config.get("kubernetes.custom-cluster-spec", None)
    if described is None:
        raise UsageError(
            "--cluster kubernetes: what are the pods to have? Name a DaskCluster, such as docker/daskcluster.yaml: "
            "DASK_KUBERNETES__CUSTOM_CLUSTER_SPEC=daskcluster.yaml"
        )
    return Pods(daskcluster(described, place.workers, slides, str(out), settings()))


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
