"""`--cluster kubernetes`, with a stand-in for what there is no machine for here: the API server and the nodes.

The client is dask-kubernetes, and the Deployments are those that Dask's operator makes of a DaskCluster, by its own
functions; they are held against Kubernetes' schemas, and their containers are started as processes of this machine.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dask.config
import kubernetes_validate
import pytest
import yaml

from pipeline import run
from pipeline.demo import write_slide
from pipeline.deploy import DASK, settings
from pipeline.errors import UsageError
from pipeline.store import BagStore

dask_kubernetes = pytest.importorskip("dask_kubernetes")
from pipeline.pods import daskcluster  # noqa: E402 - needs it

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker/daskcluster.yaml"
COMMAND = Path(sys.executable).with_name("slidestream")
RECIPE = {"encoder": "lab_lbp", "tile_px": 32, "levels": 2}
FLAGS = ["-e", "lab_lbp", "--tile-px", "32", "--levels", "2", "--cluster", "kubernetes"]
CLUSTERS = "/apis/kubernetes.dask.org/v1/namespaces/default/daskclusters"

# What there is to ask for.
SAID = {
    "/version": {"gitVersion": "v1.34.0", "major": "1", "minor": "34"},
    "/api": {"versions": ["v1"]},
    "/api/v1": {
        "resources": [
            {
                "name": f"{kind.lower()}s",
                "singularName": kind.lower(),
                "kind": kind,
                "namespaced": True,
                "verbs": ["get"],
            }
            for kind in ("Pod", "Service")
        ]
    },
    "/apis": {"groups": []},
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Kubernetes:
    """API server, operator and node. `operator`, `installed`, `allowed`, `schedulable`: what may be missing."""

    def __init__(self) -> None:
        self.operator = self.installed = self.allowed = self.schedulable = True
        self.clusters: dict[str, dict] = {}
        self.seen: list[dict] = []  # DaskClusters that were asked for
        self.objects: dict[str, list[dict]] = {}  # of each cluster: Deployments and Services
        self.containers: dict[str, list[subprocess.Popen]] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(handler) -> None:
                self.answer(handler, None)

            def do_POST(handler) -> None:
                self.answer(handler, json.loads(handler.rfile.read(int(handler.headers["content-length"]))))

            def do_DELETE(handler) -> None:
                handler.rfile.read(int(handler.headers.get("content-length") or 0))
                self.answer(handler, None)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict | None) -> None:
        url = urllib.parse.urlsplit(handler.path)
        code, found = self.found(handler.command, url.path, dict(urllib.parse.parse_qsl(url.query)), body)
        text = json.dumps(found).encode()
        handler.send_response(code)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def found(self, method: str, path: str, query: dict[str, str], body: dict | None) -> tuple[int, dict]:
        if path.rstrip("/") in SAID:
            return 200, SAID[path.rstrip("/")]
        if not self.allowed:
            return 403, {"kind": "Status", "message": 'daskclusters is forbidden: User "ann" cannot list resource'}
        kind, _, name = re.fullmatch(r"/.*/namespaces/default/(\w+)(/([\w.-]+))?", path).groups()
        if kind == "daskclusters" and not self.installed:
            return 404, {"kind": "Status", "message": "the server could not find the requested resource"}
        if method == "POST":
            assert path == CLUSTERS
            return 201, self.create(body)
        there = [one for one in self.everything(kind) if name in (None, one["metadata"]["name"])]
        there = [one for one in there if fits(one, query)]
        if method == "DELETE":
            self.delete(name)
            return 200, {"kind": "Status", "status": "Success"}
        if name is None:
            return 200, {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": there}
        return (200, there[0]) if there else (404, {"kind": "Status", "message": f"{kind} {name} not found"})

    def everything(self, kind: str) -> list[dict]:
        if kind == "daskclusters":
            return list(self.clusters.values())
        objects = [one for of_cluster in self.objects.values() for one in of_cluster]
        if kind == "services":
            return [one for one in objects if one["kind"] == "Service"]
        return [self.pod(one) for one in objects if kind == "pods" and one["kind"] == "Deployment"]

    def pod(self, deployment: dict) -> dict:
        template = deployment["spec"]["template"]
        conditions = [{"type": name, "status": "True"} for name in ("Ready", "ContainersReady")]
        status = {"phase": "Running", "conditions": conditions} if self.schedulable else {"phase": "Pending"}
        return {"apiVersion": "v1", "kind": "Pod", "status": status} | template

    def create(self, cluster: dict) -> dict:
        name = cluster["metadata"]["name"]
        cluster["metadata"] |= {"namespace": "default", "resourceVersion": "1", "uid": name}
        self.seen.append(json.loads(json.dumps(cluster)))
        self.clusters[name] = cluster
        if self.operator:
            self.objects[name] = deployed(cluster)
            cluster["status"] = {"phase": "Running"}
            if self.schedulable:
                pods = [one["spec"]["template"]["spec"] for one in self.objects[name] if one["kind"] == "Deployment"]
                self.containers[name] = [started(container) for pod in pods for container in pod["containers"]]
        return cluster

    def delete(self, name: str) -> None:
        self.clusters.pop(name, None)
        self.objects.pop(name, None)
        for container in self.containers.get(name, []):
            container.terminate()
        for container in self.containers.pop(name, []):
            container.wait(60)

    def close(self) -> None:
        for name in list(self.clusters):
            self.delete(name)
        self.server.shutdown()


def fits(one: dict, query: dict[str, str]) -> bool:
    labels, phase = one["metadata"].get("labels", {}), one.get("status", {}).get("phase")
    wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
    wanted_phase = re.fullmatch(r"(?:status\.phase=(\w+))?(?:metadata\.name=.*)?", query.get("fieldSelector", ""))[1]
    return wanted.items() <= labels.items() and wanted_phase in (None, phase)


def deployed(cluster: dict) -> list[dict]:
    """What Dask's operator makes of a DaskCluster, valid for Kubernetes."""
    from dask_kubernetes.operator.controller import controller as operator

    meta, spec = cluster["metadata"], json.loads(json.dumps(cluster["spec"]))
    name, labels = meta["name"], meta["labels"]
    scheduler, group = spec["scheduler"], f"{name}-default"
    objects = [operator.build_scheduler_deployment_spec(name, scheduler["spec"], {}, labels)]
    objects += [operator.build_scheduler_service_spec(name, scheduler["service"], {}, labels)]
    for number in range(spec["worker"]["replicas"]):
        pod = spec["worker"]["spec"]
        objects.append(operator.build_worker_deployment_spec(group, "default", name, f"{number:04}", pod, {}, labels))
    for one in objects:
        kubernetes_validate.validate(one, "1.34", strict=True)
        one["metadata"]["namespace"] = "default"
    objects[1]["status"] = {"loadBalancer": {"ingress": [{"ip": "127.0.0.1"}]}}
    return objects


def started(container: dict) -> subprocess.Popen:
    """A container's command as a process, in its environment."""
    said = {variable["name"]: variable.get("value", "1") for variable in container["env"]}
    words = [re.sub(r"\$\((\w+)\)", lambda m: said[m[1]], word) for word in container["args"]]
    assert container["command"] == ["dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DASK_")} | said
    return subprocess.Popen([sys.executable, "-m", "dask", *words], env=environment, **quiet)


@pytest.fixture
def kubernetes():
    server = Kubernetes()
    yield server
    server.close()


@pytest.fixture
def environment(kubernetes, tmp_path):
    """Of a client: a kubeconfig, and a DaskCluster for a node that has no names, only ports of this machine."""
    server = f"http://127.0.0.1:{kubernetes.server.server_address[1]}"
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
    config["contexts"] = [{"name": "here", "context": {"cluster": "here", "user": "ann", "namespace": "default"}}]
    config |= {"clusters": [{"name": "here", "cluster": {"server": server}}], "users": [{"name": "ann", "user": {}}]}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    cluster, ports = yaml.safe_load(FILE.read_text()), [free_port(), free_port()]
    scheduler = cluster["spec"]["scheduler"]
    words = ["scheduler", "--port", str(ports[0]), "--dashboard-address", f":{ports[1]}", "--host", "127.0.0.1"]
    scheduler["spec"]["containers"][0]["args"] = words
    scheduler["service"]["type"] = "LoadBalancer"
    for port, number in zip(scheduler["service"]["ports"], ports, strict=True):
        port["port"] = number
    address = {"name": "DASK_SCHEDULER_ADDRESS", "value": f"tcp://127.0.0.1:{ports[0]}"}
    for container in cluster["spec"]["worker"]["spec"]["containers"]:
        container.setdefault("env", []).append(address)
        if "--nworkers" in container["args"]:
            container["args"][container["args"].index("--nworkers") + 1] = "1"
    (tmp_path / "daskcluster.yaml").write_text(yaml.safe_dump(cluster))
    said = {"KUBECONFIG": str(tmp_path / "kubeconfig"), "DASK_KUBERNETES__RESOURCE_TIMEOUT": "3"}
    return os.environ | said | {"DASK_KUBERNETES__CUSTOM_CLUSTER_SPEC": str(tmp_path / "daskcluster.yaml")}


@pytest.fixture
def slides(tmp_path):
    from skimage.data import immunohistochemistry

    for number in range(3):
        write_slide(tmp_path / f"slides/{number}.svs", immunohistochemistry()[number:], 0.5, downsamples=(4,))
    return tmp_path / "slides"


def begun(slides: Path, out: Path, environment: dict[str, str], *more: str) -> subprocess.Popen:
    command = [COMMAND, "run", slides, "-o", out, *FLAGS, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_pods_make_the_same_bytes_and_are_gone_then(kubernetes, environment, slides, tmp_path):
    here = run(slides, tmp_path / "here", workers=1, **RECIPE)
    client = begun(slides, tmp_path / "there", environment, "--workers", "2")
    text, _ = client.communicate(timeout=300)
    assert client.returncode == 0, text
    assert here.counts == {"done": 3}
    for slide in ("0.svs", "1.svs", "2.svs"):
        mine, theirs = (BagStore(tmp_path / name).group(slide).features("lab_lbp").read() for name in ("here", "there"))
        assert mine[0].tobytes() == theirs[0].tobytes()
    (asked,) = kubernetes.seen
    assert asked["spec"]["worker"]["replicas"] == 2
    assert kubernetes.clusters == kubernetes.containers == {}


@pytest.mark.slow
def test_a_client_that_was_killed_finds_its_pods_again(kubernetes, environment, slides, tmp_path):
    client = begun(slides, tmp_path / "out", environment)
    until(lambda: (tmp_path / "out/run.json").exists(), 120)
    client.kill()
    client.communicate()
    (name,) = kubernetes.clusters
    again = begun(slides, tmp_path / "out", environment)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    assert [one["metadata"]["name"] for one in kubernetes.seen] == [name], "no second cluster was asked for"
    assert kubernetes.clusters == kubernetes.containers == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_the_pods_wait_for_a_node(kubernetes, environment, slides, tmp_path, number):
    kubernetes.schedulable = False
    client = begun(slides, tmp_path / "out", environment)
    until(lambda: kubernetes.seen)
    time.sleep(1)
    client.send_signal(number)
    text, _ = client.communicate(timeout=60)
    assert client.returncode == 130, text
    assert "Traceback" not in text
    assert kubernetes.clusters == {}, "nothing is left that would take a node for itself later"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("operator", "is the Dask Operator running"),
        ("installed", "is the operator installed"),
        ("allowed", "forbidden"),
    ],
)
def test_a_kubernetes_that_is_not_ready_is_one_line(kubernetes, environment, slides, tmp_path, missing, words):
    setattr(kubernetes, missing, False)
    client = begun(slides, tmp_path / "out", environment)
    text, _ = client.communicate(timeout=60)
    assert client.returncode == 1, text
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert words in lines[0]
    assert kubernetes.clusters == {}
    assert not (tmp_path / "out/run.json").exists()


def test_no_kubernetes_at_all(environment, slides, tmp_path):
    nowhere = environment | {"KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)}
    client = begun(slides, tmp_path / "out", nowhere)
    text, _ = client.communicate(timeout=60)
    assert client.returncode == 1
    assert "credentials" in text
    assert "Traceback" not in text


def test_without_a_word_on_what_a_pod_has(slides, tmp_path):
    with pytest.raises(UsageError, match="DASK_KUBERNETES__CUSTOM_CLUSTER_SPEC"):
        run(slides, tmp_path / "out", cluster="kubernetes", **RECIPE)
    assert not (tmp_path / "out/run.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: Pod", "no DaskCluster"),
        ("- a", "no DaskCluster"),
        ("kind: DaskCluster\nmetadata: {name: a}\nspec: {scheduler: {}}", "is not laid out .* 'worker'"),
        ("kind: DaskCluster\nmetadata: {name: a}\nspec: null", "is not laid out"),
        ("kind: DaskCluster\nmetadata: {name: a}\nspec: {worker: [1], scheduler: []}", "is not laid out"),
        ("kind: [", "while parsing"),
        (None, "No such file"),
    ],
)
def test_a_file_that_describes_no_cluster(slides, tmp_path, text, words):
    file = tmp_path / "pods.yaml"
    if text is not None:
        file.write_text(text)
    with (
        dask.config.set({"kubernetes.custom-cluster-spec": str(file)}),
        pytest.raises(UsageError, match=words) as caught,
    ):
        run(slides, tmp_path / "out", cluster="kubernetes", **RECIPE)
    assert "\n" not in str(caught.value)


def test_without_the_library(slides, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "pipeline.pods")
    monkeypatch.setitem(sys.modules, "dask_kubernetes.operator", None)
    with pytest.raises(UsageError, match=r"pip install 'slidestream\[kubernetes\]'"):
        run(slides, tmp_path / "out", cluster="kubernetes", **RECIPE)


def test_the_file_is_what_the_operator_takes():
    """By the schema of its own resource definition; names, settings and labels as the run completes them."""
    import jsonschema

    folder = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm/dask-kubernetes-operator/crds"
    schema = yaml.safe_load((folder / "daskcluster.yaml").read_text())["spec"]["versions"][0]["schema"]
    cluster = daskcluster(str(FILE), 3, 100, "/out", settings())
    jsonschema.validate(cluster, schema["openAPIV3Schema"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"spec": {"worker": {}}}, schema["openAPIV3Schema"])
    objects = deployed(cluster)
    assert [one["kind"] for one in objects] == ["Deployment", "Service", "Deployment", "Deployment", "Deployment"]
    labels = objects[0]["spec"]["template"]["metadata"]["labels"]
    assert objects[1]["spec"]["selector"].items() <= labels.items()
    for one in objects[2:]:
        assert not objects[1]["spec"]["selector"].items() <= one["spec"]["template"]["metadata"]["labels"].items()
    for one in [one for one in objects if one["kind"] == "Deployment"]:
        for container in one["spec"]["template"]["spec"]["containers"]:
            said = {variable["name"]: variable.get("value", "") for variable in container["env"]}
            found = dask.config.collect_env({k: v for k, v in said.items() if k.startswith("DASK_DISTRIBUTED")})
            with dask.config.set(DASK):
                assert {k: dask.config.get(k, config=found) for k in DASK} == {k: dask.config.get(k) for k in DASK}


def test_one_name_for_one_work():
    works = [(2, 9, "/out"), (2, 1, "/out"), (3, 9, "/out"), (2, 9, "/out2")]  # of the second fewer slides are left
    names = [daskcluster(str(FILE), pods, left, out, {})["metadata"]["name"] for pods, left, out in works]
    assert names[0] == names[1]
    assert len(set(names[1:])) == len(names[1:])
    assert all(re.fullmatch(r"slidestream-[0-9a-f]{8}", name) for name in names)


def test_no_more_pods_than_slides_and_what_is_said_stays():
    cluster = yaml.safe_load(FILE.read_text())
    own = {"name": "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE", "value": "0.8"}
    cluster["spec"]["worker"]["spec"]["containers"][0]["env"] = [own]
    made = daskcluster(cluster, None, 1, "/out", settings())
    assert made["spec"]["worker"]["replicas"] == 1
    said = made["spec"]["worker"]["spec"]["containers"][0]["env"]
    assert [variable for variable in said if variable["name"] == own["name"]] == [own]
    assert "replicas" in cluster["spec"]["worker"]
    assert cluster["metadata"]["name"] == "slidestream", "the description itself is not changed"
