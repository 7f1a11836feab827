"""The image itself: built on a base made here, run as users that nobody knows, killed, and resumed to the same bytes.

Needs root, buildah and debootstrap, but no engine and no image from elsewhere: Debian with Python stands in for the
base, under its name. Where a folder of wheels (PIP_FIND_LINKS) has a CPU build of torch for that Python, the image
takes it: 2 GB instead of 7. Run by `make image-test`, which shows the figures, and by .ci/run.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.demo import make_slides
from pipeline.outcome import read_outcomes

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
BASE = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE).group(1)
SUITE = BASE.rsplit("-", 1)[1]  # of Debian
COPIED = ("pipeline", "extractors", "heads", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "docker")
STRANGER = "12345:67890"
RUN = ("run", "/slides", "-o", "/out", "-e", "lab_lbp", "--tile-px", "32", "--levels", "2", "--workers", "1")
GB = 1e9


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)


def called(*words: object, **options: Any) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-5000:]}"
    return done.stdout


# -- what the image is made from --


@pytest.fixture(scope="module")
def lab() -> Iterator[Path]:
    """A folder for everything, the store of images included; buildah is told of it by the environment."""
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"the image is not tested: needs root, buildah and debootstrap, and here is no {missing or 'root'}")
    folder = Path(tempfile.mkdtemp(prefix="slidestream-image-"))
    folder.chmod(0o755)
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
    )
    environment = {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield folder
    finally:
        subprocess.run(["buildah", "rm", "--all"], capture_output=True, check=False)
        subprocess.run(["buildah", "rmi", "--all", "--force"], capture_output=True, check=False)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(lab) -> str:
    """Debian with Python, under the name of the image that the Dockerfile starts from."""
    packages = "--include=python3,python3-venv,ca-certificates"
    try:
        with timed("base by debootstrap"):
            called("debootstrap", "--variant=minbase", packages, SUITE, lab / "base")
        with timed("base as an image"):
            container = called("buildah", "from", "scratch").strip()
            called("buildah", "add", "--quiet", container, lab / "base", "/")
            called("buildah", "run", container, "--", "python3", "-c", "pass")
            called("buildah", "commit", "--quiet", container, f"docker.io/library/{BASE}")
            called("buildah", "rm", container)
    except AssertionError as error:  # nothing of ours is in it yet: no mirror of Debian, or no mounts
        pytest.skip(f"the image is not tested: no base can be made and run here: {error}")
    (version,) = (lab / "base/usr/lib").glob("python3.*")
    shutil.rmtree(lab / "base")
    return "cp" + version.name.removeprefix("python").replace(".", "")


@dataclass(frozen=True)
class Wheels:
    """A folder with a CPU build of torch and of torchvision, and their versions."""

    folder: Path
    torch: str
    torchvision: str


@pytest.fixture(scope="module")
def wheels(lab, base) -> Wheels | None:
    found = [
        wheel
        for place in os.environ.get("PIP_FIND_LINKS", "").split()
        for wheel in Path(place).glob(f"torch-*+cpu-{base}-*_{os.uname().machine}.whl")
    ]
    if not found:
        free = shutil.disk_usage(lab).free / GB
        if free < 30:
            pytest.skip(f"the image is not tested: no CPU build of torch is at hand, and only {free:.0f} GB are free")
        return None
    (lab / "wheels").mkdir()
    shutil.copy(found[-1], lab / "wheels")
    version = found[-1].name.split("-")[1]
    return Wheels(lab / "wheels", version, _torchvision(lab / "wheels", version, base))


OPERATORS = b"""
_library = torch.library.Library("torchvision", "DEF")  # in place of those compiled for CUDA
for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def _torchvision(folder: Path, torch: str, python: str) -> str:
    """A stand-in for torchvision's own CPU build, which its index has: the CUDA one without what was compiled.

    timm imports torchvision and calls none of its operators, but torchvision wants two of them to be declared.
    """
    minor = int(torch.split(".")[1]) + 15  # torch 2.6 goes with torchvision 0.21
    with tempfile.TemporaryDirectory() as place:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place]
        called(*fetch, "--python-version", python[2:], "--only-binary=:all:", f"torchvision==0.{minor}.*")
        (wheel,) = Path(place).glob("*.whl")
        old = wheel.name.split("-")[1]
        new = f"{old}+cpu"
        names: list[str] = []
        with (
            zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as source,
            zipfile.ZipFile(
                folder / f"torchvision-{new}-{python}-{python}-linux_{os.uname().machine}.whl", "w"
            ) as target,
        ):
            for name in source.namelist():
                if name.endswith((".so", "/", "/RECORD")) or name.startswith("torchvision.libs/"):
                    continue
                data = source.read(name)
                if name.endswith("/METADATA"):
                    data = data.replace(f"\nVersion: {old}\n".encode(), f"\nVersion: {new}\n".encode(), 1)
                elif name == "torchvision/extension.py":
                    data += OPERATORS
                names.append(name.replace(f"torchvision-{old}.", f"torchvision-{new}."))
                target.writestr(names[-1], data)
            record = f"torchvision-{new}.dist-info/RECORD"
            target.writestr(record, "".join(f"{name},,\n" for name in [*names, record]))
    return new


@pytest.fixture(scope="module")
def context(lab, wheels) -> Path:
    """The project as it is copied into the image, with the versions of the CPU build if there is one."""
    folder = lab / "context"
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    shutil.copy2(ROOT / ".dockerignore", folder)
    if wheels is not None:
        pins = (folder / "constraints.txt").read_text()
        for name in ("torch", "torchvision"):
            pins = re.sub(rf"^{name}==.*$", f"{name}=={getattr(wheels, name)}", pins, flags=re.MULTILINE)
        (folder / "constraints.txt").write_text(pins)
    return folder


def build(context: Path, wheels: Wheels | None) -> str:
    """Run docker/build.sh, which finds nothing but buildah; returns what it said."""
    hidden = context.parent / "hidden"
    hidden.mkdir(exist_ok=True)
    for name in ("docker", "podman"):
        (hidden / name).write_text("#!/bin/sh\nexit 1\n")
        (hidden / name).chmod(0o755)
    more = ["--pull-never", "--build-arg", "EXTRAS=h5 survival s3 kubernetes"]
    if wheels is not None:
        more += ["--volume", f"{wheels.folder}:/mnt:ro", "--build-arg", "UV_FIND_LINKS=/mnt"]
    authority = os.environ.get("SSL_CERT_FILE", "")
    if Path(authority).is_file():
        more += ["--secret", f"id=ca,src={authority}"]
    path = os.pathsep.join([str(hidden), os.environ["PATH"]])
    return called(context / "docker/build.sh", "slidestream:test", *more, env=os.environ | {"PATH": path})


@pytest.fixture(scope="module")
def image(context, wheels) -> dict[str, Any]:
    """The configuration of the image, which is there under the name slidestream:test."""
    with timed("build"):
        build(context, wheels)
    (about,) = json.loads(called("buildah", "images", "--json", "slidestream:test"))
    print(f"size: {about['size']}", flush=True)
    return inspected()


def inspected() -> dict[str, Any]:
    return json.loads(called("buildah", "inspect", "--type", "image", "slidestream:test"))


# -- what runs in it --


class Box:
    """A container of the image: every call is `docker run`, as some user, with slides that cannot be written to."""

    def __init__(self, name: str, slides: Path) -> None:
        self.name, self.slides = name, slides

    def command(self, *words: str, out: Path | None, user: str) -> list[str]:
        mounts = ["-v", f"{self.slides}:/slides:ro", *(["-v", f"{out}:/out"] if out else [])]
        return ["buildah", "run", "--user", user, *mounts, self.name, "--", *words]

    def __call__(self, *words: str, out: Path | None = None, user: str = STRANGER) -> tuple[int, str]:
        done = subprocess.run(
            self.command(*words, out=out, user=user),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def slides(lab) -> Path:
    make_slides(lab / "cohort", 4, seed=0)
    return lab / "cohort/slides"


@pytest.fixture(scope="module")
def box(image, slides) -> Box:
    with timed("container"):
        return Box(called("buildah", "from", "--pull-never", "slidestream:test").strip(), slides)


@pytest.fixture
def out(lab) -> Path:
    """A folder that belongs to the stranger."""
    folder = Path(tempfile.mkdtemp(dir=lab, prefix="out-"))
    os.chown(folder, *map(int, STRANGER.split(":")))
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """Every file of the store."""
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "slides").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(lab, box) -> dict[str, bytes]:
    folder = lab / "undisturbed"
    folder.mkdir()
    os.chown(folder, *map(int, STRANGER.split(":")))
    with timed("run on four slides"):
        code, text = box("slidestream", *RUN, out=folder)
    assert code == 0, text
    assert [row.status for row in read_outcomes(folder / "slides.csv")] == ["done"] * 4
    return contents(folder)


class Going:
    """`slidestream run` in a container, until its first features are on the disk."""

    def __init__(self, box: Box, out: Path) -> None:
        self.process = subprocess.Popen(
            box.command("slidestream", *RUN, out=out, user=STRANGER),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 120
        while not any(out.glob("slides/*/features/*/x/c/*/0")):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.inside = [p for p in family if p.cmdline()[:1] and "/opt/slidestream/" in p.cmdline()[0]]
        self.first = next(p for p in self.inside if "/opt/slidestream/bin/slidestream" in p.cmdline())
        assert len(self.inside) >= 2, "the command and its worker"

    def end(self, number: int, processes: list[psutil.Process]) -> str:
        for process in processes:
            process.send_signal(number)
        text, _ = self.process.communicate(timeout=120)
        _, alive = psutil.wait_procs(self.inside, timeout=60)
        assert alive == []
        return text


# -- the tests --


def test_what_it_says_of_itself(image):
    config = image["Docker"]["config"]
    assert (config["Entrypoint"], config["Cmd"]) == (["slidestream"], ["--help"])
    assert (config["User"], config["WorkingDir"], config["StopSignal"]) == ("10001:0", "/out", "SIGTERM")
    assert config["Volumes"] == {"/cache": {}}
    assert config["Healthcheck"]["Test"][-1] == "ls /slides > /dev/null && test -w /out"
    assert config["Labels"]["org.opencontainers.image.title"] == "slidestream"


@pytest.mark.parametrize("user", [STRANGER, "12345:0", "10001:0"])
def test_it_works_for_anybody(box, user):
    with timed(f"--help as {user}"):
        code, text = box("slidestream", "--help", user=user)
    assert (code, "A folder of whole slides" in text) == (0, True), text
    with timed(f"doctor -e lab_lbp as {user}"):
        code, text = box("slidestream", "doctor", "-e", "lab_lbp", user=user)
    assert code == 0, text
    code, text = box("slidestream", "doctor", "-e", "timm/resnet18", "--weights", "random", user=user)
    assert (code, "timm/resnet18: works here" in text) == (0, True), text


def test_the_health_check(box, lab, out):
    (lab / "not_ours").mkdir(mode=0o755, exist_ok=True)
    check = inspected()["Docker"]["config"]["Healthcheck"]["Test"][1:]
    with timed("health check"):
        assert box(*check, out=out)[0] == 0
    assert box(*check, out=lab / "not_ours")[0] != 0


def test_nothing_else_can_be_written_to(box, out):
    code, text = box("touch", "/slides/x", out=out)
    assert (code == 0, "Read-only" in text) == (False, True)
    _, text = box("sh", "-c", "find / -xdev -writable -not -type l -not -path '/proc/*' 2> /dev/null; true", out=out)
    found = set(text.splitlines())
    places = ("/out", "/cache", "/tmp", "/var/tmp", "/dev", "/run/lock")
    assert {name for name in found if not name.startswith(places)} == set()
    assert "/cache" in found


def test_no_tools_are_left_and_all_is_compiled(box):
    for tool in ("uv", "hatchling", "gcc", "cc"):
        assert box("sh", "-c", f"command -v {tool}")[0] != 0
    script = """
import pathlib, pipeline, struct, importlib.util
files = [f for p in ("pipeline", "extractors", "heads", "torch", "timm", "dask")
         for f in pathlib.Path(pipeline.__file__).parents[1].joinpath(p).rglob("*.py")]
stale = []
for file in files:
    code = pathlib.Path(importlib.util.cache_from_source(str(file)))
    if not code.exists() or struct.unpack("<I", code.read_bytes()[8:12])[0] != int(file.stat().st_mtime):
        stale.append(str(file))
print(len(files), [name for name in stale if "/_internal/" not in name])
"""
    code, text = box("python", "-c", script)
    assert code == 0, text
    number, stale = text.split(maxsplit=1)
    assert int(number) > 2000
    assert stale.strip() == "[]"


def test_extras_are_there(box):
    assert box("python", "-c", "import h5py, sksurv") == (0, "")
    assert box("python", "-c", "import lightly")[0] != 0, "nobody asked for it"


def test_results_belong_to_who_ran_it(undisturbed, lab):
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (lab / "undisturbed").rglob("*")}
    assert owners == {tuple(map(int, STRANGER.split(":")))}


def test_killed_and_resumed_to_the_same_bytes(box, out, undisturbed):
    run = Going(box, out)
    run.end(signal.SIGKILL, run.inside)
    assert run.process.returncode != 0
    assert contents(out) != undisturbed
    code, text = box("slidestream", *RUN, out=out)
    assert code == 0, text
    assert contents(out) == undisturbed
    code, text = box("slidestream", *RUN, out=out)
    assert (code, "4 finished before, 0 to do" in text) == (0, True), text


def test_stopped_and_resumed_to_the_same_bytes(box, out, undisturbed):
    run = Going(box, out)
    with timed("stopped by SIGTERM"):
        text = run.end(signal.SIGTERM, [run.first])
    assert run.process.returncode == 130, text
    assert "the same command resumes" in text
    code, text = box("slidestream", *RUN, out=out)
    assert code == 0, text
    assert contents(out) == undisturbed


def test_the_cluster_of_compose_in_the_image(box, out, undisturbed):
    """Scheduler, both workers and client as containers, which share this machine's network and meet on loopback."""
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    places = {"tcp://scheduler:8786": "tcp://127.0.0.1:28786", "8786": "28786", ":8787": "127.0.0.1:28787"}
    places |= {"0.0.0.0": "127.0.0.1"}
    started = []
    try:
        for name in ("scheduler", "encode", "prepare"):
            words = ["dask", *(places.get(word, word) for word in services[name]["command"])]
            started.append(subprocess.Popen(box.command(*words, out=out, user=STRANGER), stderr=subprocess.DEVNULL))
        cluster = RUN[: RUN.index("--workers")]
        code, text = 1, ""
        deadline = time.monotonic() + 60
        while code == 1 and time.monotonic() < deadline:  # until the scheduler is there
            code, text = box("slidestream", *cluster, "--scheduler", "tcp://127.0.0.1:28786", out=out)
        assert code == 0, text
    finally:
        family = [p for each in started for p in psutil.Process(each.pid).children(recursive=True)]
        for process in family:
            if process.is_running():
                process.terminate()
        for each in started:
            each.wait(timeout=60)
    assert contents(out) == undisturbed


def test_a_change_of_the_code_rebuilds_the_last_layers_only(context, wheels, image):
    before = inspected()["OCIv1"]["rootfs"]["diff_ids"]
    with open(context / "pipeline/errors.py", "a") as file:
        file.write("\nCHANGED = True\n")
    with timed("build after a change of the code"):
        build(context, wheels)
    after = inspected()["OCIv1"]["rootfs"]["diff_ids"]
    kept = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    container = called("buildah", "from", "--pull-never", "slidestream:test").strip()
    assert called("buildah", "run", container, "--", "python", "-c", "from pipeline.errors import CHANGED") == ""
    script = "from pathlib import Path; import pipeline; print(Path(pipeline.__file__).parents[1])"
    place = called("buildah", "run", container, "--", "python", "-c", script).strip()
    changed = subprocess.run(
        ["buildah", "run", container, "--", "du", "-sm", f"{place}/pipeline", f"{place}/torch"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    print(f"layers kept: {kept} of {len(after)}; MB: {changed.stdout.split()}", flush=True)
    assert kept >= len(after) - 3
