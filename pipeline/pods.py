"""A Dask scheduler and workers as pods of Kubernetes, through Dask's operator (the extra `kubernetes`)."""

import copy
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from dask_kubernetes.operator import KubeCluster
from kr8s import ServerError
from kr8s.objects import new_class

from .config import digest
from .errors import UsageError


def daskcluster(
    described: str | dict[str, Any], workers: int | None, slides: int, work: str, settings: Mapping[str, str]
) -> dict[str, Any]:
    """What a file, or a dictionary, describes, as the DaskCluster of a run that makes `work`: `workers` pods, but not
    more than slides, each with the environment variables `settings` that it does not set itself.

    The same work has the same name, so that the pods of a client that was killed are found again. Raises UsageError.
    """
    try:
        cluster = (
            copy.deepcopy(described) if isinstance(described, dict) else yaml.safe_load(Path(described).read_text())
        )
        if not isinstance(cluster, dict) or cluster.get("kind") != "DaskCluster":
            raise UsageError(f"{described} is no DaskCluster, such as docker/daskcluster.yaml is")
        return _completed(cluster, workers, slides, work, settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{described} is not laid out as docker/daskcluster.yaml is: {_line(error)}") from error
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{described} describes no pods: {_line(error)}") from error


def _completed(
    cluster: dict[str, Any], workers: int | None, slides: int, work: str, settings: Mapping[str, str]
) -> dict[str, Any]:
    spec, name = cluster["spec"], f"{cluster['metadata']['name']}-{digest([work, cluster, workers])[:8]}"
    spec["worker"]["replicas"] = min(workers or spec["worker"].get("replicas", 1), slides)
    for part in ("scheduler", "worker"):
        for container in spec[part]["spec"]["containers"]:
            said = container.setdefault("env", [])
            names = {variable["name"] for variable in said}
            said += [{"name": name, "value": value} for name, value in settings.items() if name not in names]
    cluster["metadata"]["name"] = spec["scheduler"]["service"]["selector"]["dask.org/cluster-name"] = name
    return cluster


class Pods(KubeCluster):
    """A DaskCluster, there as long as this object. Raises UsageError where Kubernetes or the operator does not give it.

    What was asked for is given back also where a start is interrupted or fails, whose pods would take a node later.
    """

    def __init__(self, cluster: dict[str, Any]) -> None:
        logging.getLogger("dask_kubernetes").setLevel(logging.ERROR)
        try:
            _require_operator()
            super().__init__(custom_cluster_spec=cluster, quiet=True)
        except BaseException as error:
            if hasattr(self, "shutdown_on_close"):
                with suppress(Exception):
                    self.close(timeout=10)
                self.shutdown_on_close = False  # not once more when Python ends
            if not isinstance(error, Exception) or isinstance(error, UsageError):
                raise
            raise UsageError(f"--cluster kubernetes: {_line(error)}") from error


def _require_operator() -> None:
    """One question first: of many that fail at the same time, KubeCluster may tell the least telling."""
    try:
        next(iter(new_class("DaskCluster", "kubernetes.dask.org/v1", asyncio=False).list()), None)
    except ServerError as error:
        if error.response is not None and error.response.status_code == 404:
            raise UsageError("--cluster kubernetes: there are no DaskClusters: is the operator installed?") from error
        raise


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
