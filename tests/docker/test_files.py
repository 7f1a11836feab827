"""The files of docker/ and the page about them: linted, valid by schemas, of one mind with each other and the code.

Every command in them is parsed by the command line it is meant for, so that no flag in them can go stale.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import kubernetes_validate
import pytest
import typer
import yaml
from distributed.cli import dask_scheduler, dask_worker

from pipeline.cli import app
from pipeline.demo import make_slides
from pipeline.deploy import CLUSTERS, DASK, ENCODER
from pipeline.outcome import read_outcomes

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
PAGE = (ROOT / "docs/containers.md").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
ITEMS = yaml.safe_load((DOCKER / "kubernetes.yaml").read_text())["items"]
OPERATOR = yaml.safe_load((DOCKER / "kubernetes-operator.yaml").read_text())["items"]
DASKCLUSTER = yaml.safe_load((DOCKER / "daskcluster.yaml").read_text())  # its schema: tests/pipeline/test_kubernetes.py
BIN = Path(sys.executable).parent
PATH = os.pathsep.join([str(BIN), os.environ["PATH"]])


def instructions(text: str = DOCKERFILE) -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), lines joined, comments gone."""
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(kept))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


ENV = dict(
    word.split("=", 1) for name, rest in instructions() if name == "ENV" for word in shlex.split(rest) if "=" in word
)
ARGS = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}


# -- the words of a command line, without doing what they say --


def parse(words: list[str]) -> dict[str, Any]:
    """What `slidestream` would be called with. Raises on an unknown command or flag, or a value of the wrong kind."""
    group = typer.main.get_command(app)
    _, command, rest = group.resolve_command(group.make_context("slidestream", list(words)), list(words))
    return command.make_context(words[0], rest).params


def parse_dask(words: list[str]) -> dict[str, Any]:
    main = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[0]]
    return main.make_context(words[0], list(words[1:])).params


def expand(text: str, **given: str) -> str:
    """${NAME:-default} and ${NAME:?message} as compose reads them."""
    return re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda m: given.get(m[1], m[2]), text)


def pods() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each workload its manifest and its pod."""
    for item in ITEMS:
        if item["kind"] in ("Job", "Deployment"):
            yield item, item["spec"]["template"]["spec"]


def calls() -> Iterator[tuple[str, list[str]]]:
    """(entry point, words) of every container that compose or Kubernetes starts."""
    for service in COMPOSE["services"].values():
        words = service["command"]
        words = shlex.split(expand(words)) if isinstance(words, str) else words
        yield (service.get("entrypoint") or ["slidestream"])[0], words
    of_operator = [DASKCLUSTER["spec"][part]["spec"] for part in ("scheduler", "worker")]
    of_operator += [i["spec"]["template"]["spec"] for i in OPERATOR if i["kind"] == "Job"]
    for pod in [*(pod for _, pod in pods()), *of_operator]:
        for container in pod["containers"]:
            yield (container.get("command") or ["slidestream"])[0], container["args"]


def page_lines() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


# -- linters and schemas --


def test_dockerfile_by_hadolint():
    done = subprocess.run(
        [shutil.which("hadolint", path=PATH), DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_by_shellcheck(script):
    assert os.access(script, os.X_OK)
    for command in (["bash", "-n"], [shutil.which("shellcheck", path=PATH)]):
        done = subprocess.run([*command, script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_compose_by_compose():
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed, so its opinion of compose.yaml is not known")
    command = ["docker-compose", "-f", DOCKER / "compose.yaml", "config", "-q"]
    folders = {"SLIDES": "/data/slides", "OUT": "/data/out"}
    done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    without = {k: v for k, v in os.environ.items() if k not in folders}
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "say which folder" in done.stderr


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
def test_kubernetes_by_its_schemas(version):
    for item in [*ITEMS, *OPERATOR]:
        kubernetes_validate.validate(item, version, strict=True)


# -- the image --


def test_what_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    sources = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    for source in {name for names in sources for name in names}:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert {f"!{name}" for names in sources for name in names} == {line for line in ignored if line[0] == "!"}


def test_versions_are_pinned():
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE).group(1)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    assert {rest for name, rest in instructions() if name == "FROM"} == {"${BASE}", "${BASE} AS code"}
    assert "-c /opt/constraints.txt -r /opt/pyproject.toml" in DOCKERFILE
    assert re.search(r"^ARG UV=\d+\.\d+\.\d+$", DOCKERFILE, re.MULTILINE)
    for words in re.findall(r"bin/pip install (.*?)(?:&&|$)", DOCKERFILE.replace("\\\n", " "), re.MULTILINE):
        packages = [w for w in words.split() if not w.startswith("-") and not w.endswith(".txt")]
        assert all("==" in package for package in packages), packages


def test_the_dependencies_come_before_the_code():
    """Otherwise every change of the code would install torch anew."""
    image = DOCKERFILE[DOCKERFILE.rindex("FROM ${BASE}") :]
    assert image.index("-r /opt/pyproject.toml") < image.index("COPY --from=code")
    assert "pipeline" not in image[: image.index("COPY --from=code")].replace("pyproject", "")


def test_labels_and_the_end():
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', DOCKERFILE))
    project = importlib.metadata.metadata("slidestream")
    assert labels["title"] == project["Name"]
    assert labels["version"] == project["Version"]
    assert labels["licenses"] == project["License-Expression"]
    last = dict(instructions())
    assert json.loads(last["ENTRYPOINT"]) == ["slidestream"]
    assert last["STOPSIGNAL"] == "SIGTERM"
    uid, gid = last["USER"].split(":")
    assert int(uid) > 0  # a number, so that Kubernetes sees that it is not root
    assert gid == "0"


@pytest.mark.parametrize(
    ("slides", "mode", "healthy"), [("slides", 0o755, True), ("gone", 0o755, False), ("slides", 0o555, False)]
)
def test_the_health_check(tmp_path, slides, mode, healthy):
    (check,) = (json.loads(rest.split("CMD ", 1)[1]) for name, rest in instructions() if name == "HEALTHCHECK")
    (tmp_path / "slides").mkdir()
    (tmp_path / "out").mkdir(mode=mode)
    check[-1] = check[-1].replace("/slides", str(tmp_path / slides)).replace("/out", str(tmp_path / "out"))
    tmp_path.chmod(0o755)
    (tmp_path / "out").chmod(mode)
    nobody = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    for parent in [
        p for p in tmp_path.parents if nobody and p.stat().st_uid == 0 and p.stat().st_mode & 0o777 == 0o700
    ]:
        parent.chmod(0o711)  # pytest's folders are closed to others
    if nobody and mode & 0o200:
        os.chown(tmp_path / "out", 65534, 65534)
    done = subprocess.run(check, capture_output=True, check=False, **nobody)
    assert (done.returncode == 0) == healthy


# -- compose, Kubernetes, Slurm, Apptainer --


def test_every_command_is_one():
    entries = [entry for entry, _ in calls()]
    assert set(entries) == {"slidestream", "dask"}
    for entry, words in calls():
        params = (parse if entry == "slidestream" else parse_dask)(words)
        if entry == "slidestream":
            assert (words[0], params["slides"], str(params["out"])) == ("run", "/slides", "/out")
            assert params["cluster"] in (None, *CLUSTERS)
        elif words[0] == "worker":
            assert params["preload"] == ("pipeline.worker",)
            assert params["resources"] in (None, f"{ENCODER}=1")


@pytest.mark.parametrize("words", [["run", "/slides"], ["run", "/slides", "-o", "/out", "--levls", "3"], ["rum"]])
def test_a_stale_command_would_be_seen(words):
    with pytest.raises(typer.TyperException):
        parse(words)


def test_the_cluster_is_as_patient_as_our_own():
    """A scheduler that others start does not read the settings of our client."""
    settings = [COMPOSE["services"][name]["environment"] for name in ("scheduler", "encode", "prepare")]
    settings += [item["data"] for item in ITEMS if item["kind"] == "ConfigMap"]
    assert len(settings) == 4
    for environment in settings:
        found = dask.config.collect_env({k: v for k, v in environment.items() if k.startswith("DASK_")})
        with dask.config.set(DASK):
            wanted = {key: dask.config.get(key) for key in DASK}
        assert {key: dask.config.get(key, config=found) for key in DASK} == wanted


def test_one_scheduler_one_that_encodes_one_that_does_not():
    for calls_of in (
        [s["command"] for s in COMPOSE["services"].values() if s.get("entrypoint") == ["dask"]],
        [c["args"] for _, pod in pods() for c in pod["containers"] if c.get("command") == ["dask"]],
    ):
        assert sorted((words[0], f"{ENCODER}=1" in words) for words in calls_of) == [
            ("scheduler", False),
            ("worker", False),
            ("worker", True),
        ]
    addresses = {word for _, words in calls() for word in words if word.startswith("tcp://")}
    (service,) = (item for item in ITEMS if item["kind"] == "Service")
    assert "scheduler" in COMPOSE["services"]
    assert addresses == {"tcp://scheduler:8786", f"tcp://{service['metadata']['name']}:8786"}


def test_compose_services():
    for name, service in COMPOSE["services"].items():
        assert service["image"] == "${IMAGE:-slidestream}"
        assert service["init"] is True
        mounts = dict(re.fullmatch(r"(.+?):(/\w+)(?::ro)?", mount).group(2, 0) for mount in service["volumes"])
        assert mounts.keys() == {"/slides", "/out", "/cache"}
        assert mounts["/slides"].endswith(":ro")
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "a port for all the world"
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert bool(devices) == (name in ("one", "encode"))
        assert all(device["capabilities"] == ["gpu"] for device in devices)
        assert set(service.get("depends_on", {})) == (
            {"scheduler"} if name in ("encode", "prepare", "client") else set()
        )


def test_kubernetes_names_fit_together():
    claims = {item["metadata"]["name"] for item in ITEMS if item["kind"] == "PersistentVolumeClaim"}
    images, gpus = set(), {}
    for item, pod in pods():
        labels = item["spec"]["template"]["metadata"]["labels"]
        selector = item["spec"].get("selector", {"matchLabels": {}})["matchLabels"]
        assert selector.items() <= labels.items()
        assert "namespace" not in item["metadata"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or claim["claimName"] in claims
        (container,) = pod["containers"]
        images.add(container["image"])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"requests", "limits"} <= container["resources"].keys()
        gpus[item["metadata"]["name"]] = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
        assert {mount["name"] for mount in mounts.values()} == volumes.keys()
        if mounts:
            assert mounts.keys() == {"/slides", "/out", "/cache", "/dev/shm"}
            assert mounts["/slides"]["readOnly"] is True
        if item["kind"] == "Job":
            assert pod["restartPolicy"] == "Never"
            for rule in item["spec"]["podFailurePolicy"]["rules"]:
                codes = rule.get("onExitCodes", {"containerName": container["name"], "values": []})
                assert codes["containerName"] == container["name"]
                assert not {0, 4, 130, 137} & set(codes["values"]), "these are worth another start"
    assert len(images) == 1
    assert {name for name, count in gpus.items() if count} == {"slidestream", "slidestream-encode"}
    (service,) = (item["spec"]["selector"] for item in ITEMS if item["kind"] == "Service")
    matching = [
        i["metadata"]["name"]
        for i, _ in pods()
        if service.items() <= i["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert matching == ["slidestream-scheduler"]


def test_the_client_of_the_operator_has_what_it_needs():
    """The same volumes as its workers, the right to ask for them, a way to them, and the file that describes them."""
    by_kind = {item["kind"]: item for item in OPERATOR}
    job, policy = by_kind["Job"], by_kind["NetworkPolicy"]["spec"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    workers = DASKCLUSTER["spec"]["worker"]["spec"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert pod["serviceAccountName"] == by_kind["ServiceAccount"]["metadata"]["name"]
    assert by_kind["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": pod["serviceAccountName"]}]
    assert by_kind["RoleBinding"]["roleRef"]["name"] == by_kind["Role"]["metadata"]["name"]
    rights = {(r, verb) for rule in by_kind["Role"]["rules"] for r in rule["resources"] for verb in rule["verbs"]}
    assert {("daskclusters", verb) for verb in ("get", "list", "create", "delete")} <= rights
    assert {("pods", "list"), ("pods/log", "get"), ("services", "get"), ("daskworkergroups", "get")} <= rights
    assert labels == DASKCLUSTER["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
    assert policy["ingress"][0] == {"from": [{"podSelector": {"matchLabels": labels}}]}
    volumes = [volume for volume in pod["volumes"] if volume["name"] != "daskcluster"]
    assert volumes == workers["volumes"]
    assert container["volumeMounts"][:-1] == workers["containers"][0]["volumeMounts"]
    folder = container["volumeMounts"][-1]["mountPath"]
    assert container["env"] == [{"name": "DASK_KUBERNETES__CUSTOM_CLUSTER_SPEC", "value": f"{folder}/daskcluster.yaml"}]
    assert {c["image"] for part in (workers, pod) for c in part["containers"]} == {"slidestream:latest"}
    assert not {0, 4, 130, 137} & set(job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"])


class Stubs:
    """A folder of commands that write down what they were called with, one line a call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        folder.mkdir()
        self.log.touch()

    def add(self, name: str, then: str = "exit 0") -> None:
        script = self.folder / name
        script.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.log}"\n{then}\n')
        script.chmod(0o755)

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.folder), "/usr/bin", "/bin"])
        return subprocess.Popen(
            list(map(str, words)),
            env={"PATH": path, "HOME": "/nowhere"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def called(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def stubs(tmp_path) -> Stubs:
    return Stubs(tmp_path / "bin")


JOB = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}
STOPPED_CLEANLY = "sleep 30 & trap 'kill %1; exit 130' TERM; wait"
FINISHED_NEVERTHELESS = "sleep 30 & trap 'kill %1; exit 0' TERM; wait"
SOME_FAILED_MEANWHILE = "sleep 30 & trap 'kill %1; exit 3' TERM; wait"


@pytest.mark.parametrize(
    ("then", "restarts", "code", "requeued"),
    [
        (STOPPED_CLEANLY, "0", 130, True),
        ("exec sleep 30", "1", 143, True),  # before it could answer signals
        (STOPPED_CLEANLY, "50", 130, False),
        (FINISHED_NEVERTHELESS, "0", 0, False),
        (SOME_FAILED_MEANWHILE, "0", 3, False),
    ],
)
def test_slurm_hands_the_signal_on(stubs, then, restarts, code, requeued):
    stubs.add("slidestream", then)
    stubs.add("scontrol")
    job = stubs.start(DOCKER / "slurm.sh", "s", "o", "-e", "lab_lbp", SLURM_RESTART_COUNT=restarts, **JOB)
    deadline = time.monotonic() + 20
    while not stubs.called() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # until the stub has set its trap
    job.send_signal(signal.SIGTERM)
    text, _ = job.communicate(timeout=20)
    assert job.returncode == code, text
    assert stubs.called() == ["slidestream run s -o o -e lab_lbp", *(["scontrol requeue 11_3"] if requeued else [])]


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_slurm_without_a_signal(stubs, code):
    stubs.add("slidestream", f"exit {code}")
    stubs.add("scontrol")
    job = stubs.start(DOCKER / "slurm.sh", "a slide*.svs", "o", "--levels", "3", **JOB)
    job.communicate(timeout=20)
    assert job.returncode == code
    assert stubs.called() == ["slidestream run a slide*.svs -o o --levels 3"]


def test_slurm_in_an_image(stubs, tmp_path):
    """Folders have the same path inside as outside, so that OUT can go on without the image."""
    (tmp_path / "slides").mkdir()
    stubs.add("apptainer")
    job = stubs.start(DOCKER / "slurm.sh", tmp_path / "slides", tmp_path / "out", IMAGE="x.sif", **JOB)
    text, _ = job.communicate(timeout=20)
    assert job.returncode == 0, text
    slides, out = tmp_path / "slides", tmp_path / "out"
    assert stubs.called() == [
        f"apptainer run --nv --bind {slides}:{slides}:ro --bind {out} x.sif run {slides} -o {out}"
    ]
    assert out.is_dir()
    job = stubs.start(DOCKER / "slurm.sh", tmp_path / "slides/*.svs", out, IMAGE="x.sif", **JOB)
    text, _ = job.communicate(timeout=20)
    assert (job.returncode, "SLIDES is a folder" in text) == (1, True)


@pytest.mark.parametrize(
    ("works", "fails", "called"),
    [
        ("docker podman buildah", "", "docker build"),
        ("podman buildah", "docker", "podman build"),  # the client without its engine
        ("buildah", "", "buildah bud"),
        ("", "buildah", None),
    ],
)
def test_build_takes_what_works(stubs, works, fails, called):
    for name in ("docker", "podman", "buildah"):  # hides those of this machine
        if name in works.split():
            stubs.add(name)
        else:
            stubs.add(name, "exit 1")
    build = stubs.start(DOCKER / "build.sh", "mine:1", "--build-arg", "TORCH_BACKEND=cpu")
    text, _ = build.communicate(timeout=20)
    if called is None:
        assert (build.returncode, "neither" in text) == (1, True)
        return
    assert build.returncode == 0, text
    last = stubs.called()[-1]
    assert last.startswith(called)
    assert " -t mine:1 " in last
    assert last.endswith(" --build-arg TORCH_BACKEND=cpu .")


@pytest.mark.parametrize("bound", [False, True])
def test_apptainer_moves_what_would_be_in_a_read_only_cache(tmp_path, bound):
    text = (DOCKER / "apptainer.def").read_text()
    script = re.search(r"^%environment\n(.*?)^%", text, re.MULTILINE | re.DOTALL).group(1)
    cache = tmp_path / "cache"
    if bound:
        cache.mkdir()
    script = script.replace("/cache ]", f"{cache} ]")
    environment = ENV | {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    command = ["sh", "-euc", script + "\nenv -0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    inside = {name for name, value in ENV.items() if value.startswith("/cache") and name != "HOME"}
    place = "/cache" if bound else str(tmp_path / "home/.cache/slidestream")
    assert {name for name in inside if found[name].startswith(place)} == inside
    assert len(inside) >= 6


# -- the page --


def test_every_command_of_the_page():
    """By the command line that it is meant for, as far as that is ours; otherwise by what it names."""
    seen = set()
    for line in page_lines():
        words = shlex.split(line.replace("$(id -u)", "12345").replace("$(id -g)", "67890"))
        while "=" in words[0]:
            words = words[1:]
        seen.add(words[0])
        if words[0] in ("docker", "podman") and words[1] == "run":
            check_engine(words)
        elif words[0] == "apptainer" and words[1] == "run":
            params = parse(words[words.index("slidestream.sif") + 1 :])
            assert f"{params['slides']}:{params['slides']}:ro" in words
        elif words[:2] == ["docker", "compose"]:
            check_compose(words)
        elif words[0] == "dask":
            parse_dask(words[1:])
        elif words[0] == "slidestream":
            parse(words[1:])
        elif words[0] == "sbatch":
            at = words.index("docker/slurm.sh")
            parse(["run", words[at + 1], "-o", words[at + 2], *words[at + 3 :]])
        elif words[0] == "kubectl":
            parts = re.search(r"part(?: in \(|=)([\w, ]+)", line)
            assert set(parts[1].split(", ") if parts else ()) <= {item["metadata"]["labels"]["part"] for item in ITEMS}
            for file in re.findall(r"docker/[\w.-]+", line):
                assert (ROOT / file).is_file()
        elif words[0] == "docker/build.sh":
            assert {word.split("=")[0] for i, word in enumerate(words) if words[i - 1] == "--build-arg"} <= ARGS
        elif words[0] == "make":
            done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        else:
            assert line.split()[0] in ("export", "docker", "apptainer"), f"no test knows {line}"
    assert {"docker", "podman", "apptainer", "dask", "slidestream", "sbatch", "kubectl", "make"} <= seen


def check_engine(words: list[str]) -> None:
    at = (
        len(words) - 1 - words[::-1].index("slidestream")
        if "--entrypoint" not in words
        else words.index("slidestream") + 1
    )
    mounts = [words[i + 1] for i, word in enumerate(words) if word == "-v"]
    if mounts:
        assert {mount.removesuffix(":ro").split(":")[1] for mount in mounts} == {"/slides", "/out", "/cache"}
        assert any(mount.endswith("/slides:ro") for mount in mounts)
    parse(words[at + 1 :])


def check_compose(words: list[str]) -> None:
    assert words[words.index("-f") + 1] == "docker/compose.yaml"
    services = COMPOSE["services"]
    if "run" in words:
        name = words[words.index("--rm") + 1]
        assert name in services
        parse(words[words.index("--rm") + 2 :])
    else:
        started = {name for name, s in services.items() if words[words.index("--profile") + 1] in s["profiles"]}
        assert {words[words.index("--scale") + 1].split("=")[0], words[words.index("--exit-code-from") + 1]} <= started


def test_names_in_the_page_exist():
    compose = set(re.findall(r"\$\{(\w+):", (DOCKER / "compose.yaml").read_text()))
    known = ENV.keys() | ARGS | compose | {"SLIDESTREAM_THREADS", "HF_TOKEN", "OUT", "IMAGE", "ENCODER", "BASE"}
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    names = {name for span in spans for name in re.findall(r"\b[A-Z][A-Z_]{3,}\b", span)} - {"FILE", "FOLDER", "PATH"}
    assert {name for name in names if not name.startswith("DASK_")} <= known
    folders = {folder for span in spans for folder in re.findall(r"(?<![\w.~/])/\w+\b", span)} - {"/dev", "/info"}
    assert folders == {"/slides", "/out", "/cache"}
    (made,) = (rest for name, rest in instructions() if name == "RUN" and "mkdir" in rest)
    assert folders <= set(made.split())
    assert {name for name in ARGS if f"`{name}`" not in PAGE} == {"UV"}  # the version of what installs


# -- the cluster of compose, on this machine --


@pytest.mark.slow
def test_the_cluster_of_compose_runs(tmp_path):
    """Its scheduler, a worker of each kind and its client as processes here: only ports and folders are others."""
    make_slides(tmp_path, 2, seed=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, **places: str) -> subprocess.Popen[bytes]:
        service = COMPOSE["services"][name]
        command = service["command"]
        words = shlex.split(expand(command, FLAGS="-e lab_lbp")) if isinstance(command, str) else list(command)
        places |= {"tcp://scheduler:8786": f"tcp://127.0.0.1:{port}", "8786": str(port), ":8787": "127.0.0.1:0"}
        places |= {"0.0.0.0": "127.0.0.1"}
        words = [(service.get("entrypoint") or ["slidestream"])[0], *(places.get(word, word) for word in words)]
        given = service["environment"] if isinstance(service["environment"], dict) else {}
        given = {key: expand(value) for key, value in given.items() if value is not None}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | given
        how: dict[str, Any] = {"env": environment, "cwd": tmp_path, "start_new_session": True}
        with open(tmp_path / f"{name}.log", "wb") as log:
            process = subprocess.Popen([BIN / words[0], *words[1:]], stdout=log, stderr=log, **how)
        processes.append(process)
        return process

    try:
        start("scheduler")
        start("encode")
        start("prepare")
        client = start("client", **{"/slides": str(tmp_path / "slides"), "/out": str(tmp_path / "out")})
        assert client.wait(timeout=180) == 0, (tmp_path / "client.log").read_text()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    assert [row.status for row in read_outcomes(tmp_path / "out/slides.csv")] == ["done", "done"]
