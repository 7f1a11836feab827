"""Where the work is done: devices, named schedulers, and a real Slurm on this machine."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import run
from pipeline.demo import write_slide
from pipeline.deploy import Place, gpus
from pipeline.errors import UsageError
from pipeline.store import BagStore

SLURM = """
ClusterName=one
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
MinJobAge=10
NodeName=localhost CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr("pipeline.deploy._gpus", lambda: 4)


@pytest.mark.parametrize(("said", "found"), [("auto", [0, 1, 2, 3]), ("cpu", []), ("2", [2]), ("3,1", [3, 1])])
def test_devices(said, found, four):
    assert gpus(said) == found


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("4", "no GPU 4: this machine has 4, from 0"),
        ("0,-1", "no GPU -1"),
        ("cuda", "write auto, cpu, or numbers"),
        ("", "write auto, cpu, or numbers"),
        ("1,1", "name each once"),
    ],
)
def test_devices_that_cannot_be(said, words, four):
    with pytest.raises(UsageError, match=words):
        gpus(said)


def test_a_gpu_where_there_is_none(monkeypatch):
    monkeypatch.setattr("pipeline.deploy._gpus", lambda: 0)
    with pytest.raises(UsageError, match="torch finds none here"):
        gpus("0")
    assert gpus("auto") == []


@pytest.mark.parametrize("more", [{"workers": 2}, {"devices": "0"}, {"cluster": "slurm"}])
def test_what_a_named_scheduler_would_ignore_is_refused(more):
    with pytest.raises(UsageError, match="leave --cluster, --workers and --devices out"):
        Place(scheduler="tcp://127.0.0.1:8786", **more)


def test_unknown_cluster():
    with pytest.raises(UsageError, match="Did you mean 'slurm'"):
        Place(cluster="slrum")
    with pytest.raises(UsageError, match="is of this machine"):
        Place(cluster="slurm", devices="0")


def test_each_local_worker_has_its_device(four, monkeypatch):
    """Two of four GPUs: two workers encode, each on its own; the others prepare."""
    from pipeline import deploy

    seen = {}
    monkeypatch.setattr(deploy, "SpecCluster", lambda workers, **_: seen.update(workers))
    deploy._local(Place(workers=4, devices="3,1"), 10)
    options = [seen[name]["options"] for name in range(4)]
    assert [o["env"][deploy.DEVICE] for o in options] == ["cuda:3", "cuda:1", "cpu", "cpu"]
    assert [o["resources"] for o in options] == [{"ENCODER": 1}, {"ENCODER": 1}, {}, {}]
    seen.clear()
    deploy._local(Place(workers=2, devices="cpu"), 10)
    assert [seen[name]["options"]["resources"] for name in range(2)] == [{"ENCODER": 1}] * 2


def test_a_worker_encodes_on_the_device_it_was_given(monkeypatch):
    from pipeline.cluster import _device

    monkeypatch.setenv("SLIDESTREAM_DEVICE", "cuda:3")
    assert _device("0") == "cuda:3"


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm of one node, this machine; its daemons end with the tests."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        pytest.skip("needs root, and slurmctld, slurmd, slurm-client and munge of the system's packages")
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # sockets have short names
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    (folder / "slurm.conf").write_text(SLURM.format(folder=folder, cpus=os.cpu_count(), memory=memory - 1024))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "-F", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    daemons = [subprocess.Popen(munge, **quiet)]
    try:
        wait_for(lambda: (folder / "munge.socket").exists(), "munge")
        daemons += [subprocess.Popen([name, "-D"], **quiet) for name in ("slurmctld", "slurmd")]
        command = ["sinfo", "-h", "-o", "%t"]
        wait_for(
            lambda: subprocess.run(command, capture_output=True, env=environment).stdout.strip() == b"idle", "node"
        )
        yield environment
    finally:
        subprocess.run(["scancel", "-u", "root"], **quiet)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
        shutil.rmtree(folder)


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.2)


def jobs(environment) -> list[str]:
    found = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, env=environment)
    return found.stdout.split()


@pytest.fixture
def slides(tmp_path):
    from skimage.data import immunohistochemistry

    for number in range(3):
        write_slide(tmp_path / f"slides/{number}.svs", immunohistochemistry()[number:], 0.5, downsamples=(4,))
    return tmp_path / "slides"


@pytest.mark.slow
def test_jobs_of_slurm_make_the_same_bytes(slurm, slides, tmp_path):
    recipe = {"encoder": "lab_lbp", "tile_px": 32, "levels": 2}
    here = run(slides, tmp_path / "here", workers=1, **recipe)
    flags = ["-e", "lab_lbp", "--tile-px", "32", "--levels", "2", "--cluster", "slurm", "--workers", "2"]
    command = [Path(sys.executable).with_name("slidestream"), "run", slides, "-o", tmp_path / "there", *flags]
    wanted = {"DASK_JOBQUEUE__SLURM__CORES": "1", "DASK_JOBQUEUE__SLURM__MEMORY": "2GB"}
    wanted |= {"DASK_JOBQUEUE__SLURM__INTERFACE": "lo"}
    done = subprocess.run(command, env=slurm | wanted, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert here.counts == {"done": 3}
    for slide in ("0.svs", "1.svs", "2.svs"):
        mine, theirs = (BagStore(tmp_path / name).group(slide).features("lab_lbp").read() for name in ("here", "there"))
        assert mine[0].tobytes() == theirs[0].tobytes()
    wait_for(lambda: jobs(slurm) == [], "end of the jobs")
    assert list((tmp_path / "there/logs").glob("dask-worker-*.err")), "a job's log stands with the output"


def test_slurm_without_a_word_on_what_a_job_has(slides, tmp_path):
    pytest.importorskip("dask_jobqueue")
    with pytest.raises(UsageError, match=r"DASK_JOBQUEUE__SLURM__CORES"):
        run(slides, tmp_path / "out", encoder="lab_lbp", tile_px=32, cluster="slurm")
    assert not (tmp_path / "out/run.json").exists()


# --- two nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes():
    """Two network namespaces that see each other and nothing else: (run in one of them, its address) for each."""
    names = [f"slidestream-{os.getpid()}-{letter}" for letter in "ab"]
    links, addresses = [f"ss{os.getpid() % 100000}{letter}" for letter in "ab"], ["10.77.0.1", "10.77.0.2"]
    commands = [["netns", "add", name] for name in names]
    commands += [["link", "add", links[0], "type", "veth", "peer", "name", links[1]]]
    for name, link, address in zip(names, links, addresses, strict=True):
        commands += [["link", "set", link, "netns", name]]
        inside = [
            ["addr", "add", f"{address}/24", "dev", link],
            ["link", "set", link, "up"],
            ["link", "set", "lo", "up"],
        ]
        commands += [["-n", name, *command] for command in inside]
    try:
        for command in commands:
            made = subprocess.run(["ip", *command], capture_output=True, text=True) if shutil.which("ip") else None
            if made is None or made.returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr if made else 'no command ip'}")
        yield [(["ip", "netns", "exec", name], address) for name, address in zip(names, addresses, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_nodes_make_the_same_bytes(nodes, slides, tmp_path):
    """The scheduler, a worker and the client on one, the worker that encodes on the other."""
    recipe = {"encoder": "lab_lbp", "tile_px": 32, "levels": 2}
    run(slides, tmp_path / "here", workers=1, **recipe)
    (first, address), (second, other) = nodes
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask, scheduler = [sys.executable, "-m", "dask"], f"tcp://{address}:8786"
    common = ["--nthreads", "1", "--no-dashboard", "--preload", "pipeline.worker", "--death-timeout", "60"]
    commands = [
        [*first, *dask, "scheduler", "--host", address, "--port", "8786", "--no-dashboard"],
        [*first, *dask, "worker", scheduler, "--host", address, *common, "--local-directory", tmp_path / "w1"],
        [*second, *dask, "worker", scheduler, "--host", other, "--resources", "ENCODER=1", *common],
    ]
    processes = [subprocess.Popen([str(word) for word in command], **quiet) for command in commands]
    try:
        flags = ["-e", "lab_lbp", "--tile-px", "32", "--levels", "2", "--scheduler", scheduler]
        command = [
            *first,
            Path(sys.executable).with_name("slidestream"),
            "run",
            slides,
            "-o",
            tmp_path / "there",
            *flags,
        ]
        wait_for(lambda: listens(first, address), "scheduler")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
    assert done.returncode == 0, done.stdout + done.stderr
    for slide in ("0.svs", "1.svs", "2.svs"):
        mine, theirs = (BagStore(tmp_path / name).group(slide).features("lab_lbp").read() for name in ("here", "there"))
        assert mine[0].tobytes() == theirs[0].tobytes()


def listens(node: list[str], address: str) -> bool:
    code = f"import socket; socket.create_connection(({address!r}, 8786), 1)"
    return subprocess.run([*node, sys.executable, "-c", code], capture_output=True).returncode == 0
