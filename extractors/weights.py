"""From what the user wrote to tensors that are known to fit: file or hub → state → strict check.

Nothing is believed: the first bytes decide what a file is, pickles are read as tensors only (never run), every key,
shape and dtype must match, and every number must be finite. torch alone would load int8 or NaN without a word.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import EncoderError, EncoderFacts

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model", "teacher")  # where training programs put the weights
PREFIXES = ("module.", "backbone.", "model.", "encoder.", "_orig_mod.")  # what wrapping a network adds to its keys
PROBE_SECONDS = 5.0
# What torch.load was seen to raise on cut and flipped files, OSError 22 among them.
BROKEN = (
    EOFError,
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
OWN_FILE = "pass a file of your own (--weights FILE)"


# --- which file -------------------------------------------------------------------------------------------------------


def resolve(weights: str | None, facts: EncoderFacts) -> Path:
    """The local file: the user's, or the one of the hub that the facts name."""
    if weights is None:
        return _from_hub(facts)
    path = Path(weights).expanduser()
    if path.is_file() and os.access(path, os.R_OK):
        return path
    if path.is_file():
        raise EncoderError(f"weights of {facts.name}: {path} may not be read by this user. Change its permissions")
    if path.is_dir():
        raise EncoderError(f"weights of {facts.name}: {path} is a folder. Name the file in it")
    raise EncoderError(f"weights of {facts.name}: there is no file {path} (seen from {Path.cwd()})")


def _from_hub(facts: EncoderFacts) -> Path:
    match = re.fullmatch(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+):(?P<file>.+)", facts.source)
    if match is None:
        raise EncoderError(f"{facts.name} has no weights to download ({facts.source}); {OWN_FILE}")
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        return Path(hub.hf_hub_download(repo, file, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        if hub.constants.HF_HUB_OFFLINE:
            raise EncoderError(_offline(facts, "HF_HUB_OFFLINE is set")) from error
    return _download(facts, repo, revision, file)


def _download(facts: EncoderFacts, repo: str, revision: str, file: str) -> Path:
    """From the hub, with its many errors told apart."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    network: tuple[type[Exception], ...] = (OSError, *errors.HfHubHTTPError.__bases__)  # whatever HTTP library it uses
    page, what = f"https://huggingface.co/{repo}", f"weights of {facts.name}"
    try:
        # One question first: without a network hf_hub_download asks six times, which takes 23 s.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, revision=revision), timeout=PROBE_SECONDS)
        return Path(hub.hf_hub_download(repo, file, revision=revision))
    except (
        errors.RepositoryNotFoundError
    ) as error:  # GatedRepoError is one; without a token, a hidden model looks so too
        if not (facts.gated or isinstance(error, errors.GatedRepoError)):
            raise EncoderError(f"{what}: the hub has no model {page}; {OWN_FILE}") from error
        raise EncoderError(
            f"{what}: the model is gated. Accept its licence at {page}, then set HF_TOKEN to a token of that account; "
            f"or {OWN_FILE}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise EncoderError(f"{what}: {page} has no revision {revision}; {OWN_FILE}") from error
    except errors.LocalEntryNotFoundError as error:  # an EntryNotFoundError by name; what it means is "no network"
        raise EncoderError(_offline(facts, _words(error))) from error
    except errors.EntryNotFoundError as error:
        raise EncoderError(f"{what}: {page} at revision {revision} has no file {file}; {OWN_FILE}") from error
    except network as error:
        raise EncoderError(_offline(facts, _words(error))) from error


def _offline(facts: EncoderFacts, reason: str) -> str:
    return (
        f"weights of {facts.name} ({facts.source}) are not in the cache and cannot be downloaded: {reason}. "
        f"Run once on a machine with a network, or point HF_HOME at a cache that has them, or {OWN_FILE}"
    )


def _words(error: Exception) -> str:
    """First line of an error, without tokens and signed addresses."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"hf_\w+|\?\S+", "…", f"{type(error).__name__}: {line}")


def sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what is in it ----------------------------------------------------------------------------------------------------


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a safetensors or torch file by name, and what was unwrapped."""
    path = Path(path)
    kind = _kind(path)
    return _unwrap(_read_safetensors(path) if kind == "safetensors" else read_torch(path), path)


def _kind(path: Path) -> str:
    """ "safetensors" or "torch", by the first bytes; names lie."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise EncoderError(f"{path} is empty. Download it again")
    if head.startswith(b"version https://git-lfs"):
        raise EncoderError(f"{path} is a git-lfs pointer, not the weights. Run `git lfs pull` where it came from")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise EncoderError(f"{path} is a web page, not weights: an error or login page was saved. Download it again")
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # zip (torch ≥ 1.6) or a bare pickle
        return "torch"
    raise EncoderError(f"{path} is neither a safetensors nor a torch file: it begins with {head[:8]!r}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise EncoderError(_damaged(path, error)) from error


def read_torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise EncoderError(
                f"{path} was refused and not run: besides tensors it holds {refused[1]}, and loading that could run "
                f"any code. If you trust it, save its state_dict() as safetensors where it was made"
            ) from error
        raise EncoderError(_damaged(path, error)) from error
    except BROKEN as error:
        raise EncoderError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is cut or damaged ({_words(error)}). Copy or download it again"


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors at the top, or under exactly one of the known names."""
    import torch

    notes = []
    if isinstance(content, dict):
        inner = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if len(inner) > 1:
            raise EncoderError(f"{path} holds several sets of weights ({', '.join(inner)}). Save the one that is meant")
        if inner:
            content = content[inner[0]]
            notes.append(f"weights taken from the entry {inner[0]!r} of the file")
    strange = [k for k, v in content.items() if not isinstance(v, torch.Tensor)] if isinstance(content, Mapping) else []
    if not isinstance(content, Mapping) or not content or strange:
        found = f"entries that are no tensors: {_few(strange)}" if strange else f"a {type(content).__name__}"
        raise EncoderError(f"{path} holds no state_dict but {found}. Looked at the top and in {', '.join(WRAPPERS)}")
    return dict(content), notes


# --- does it fit ------------------------------------------------------------------------------------------------------


def fit(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], drop: tuple[str, ...], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state under exactly the expected keys and with sound values, and what was done to it; or an error."""
    state, notes = _strip_prefix(dict(state), expected)
    dropped = [key for key in state if key.startswith(drop) and key not in expected] if drop else []
    if dropped:
        state = {key: value for key, value in state.items() if key not in dropped}
        notes.append(f"left out {len(dropped)} entries of the file, as this encoder does: {_few(dropped)}")
    for key in expected:  # batch norm's count of batches: absent from old files, and not used when encoding
        if key.endswith("num_batches_tracked") and key not in state:
            state[key] = expected[key]
    faults = _faults(state, expected)
    if faults:
        raise EncoderError(f"{path} does not fit the network: {'; '.join(faults)}")
    return state, notes


def _strip_prefix(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Without the one prefix that all keys have, if the network's keys have it not."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in expected):
            return {key.removeprefix(prefix): value for key, value in state.items()}, [
                f"prefix {prefix!r} removed from all {len(state)} keys"
            ]
    return state, []


def _faults(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    both = [key for key in expected if key in state]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in both
        if state[k].shape != expected[k].shape
    ]
    floats = [k for k in both if expected[k].is_floating_point()]
    dtypes = [f"{k} {state[k].dtype}" for k in floats if not state[k].is_floating_point()]
    groups = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "other shape": shapes,
        "not floating": dtypes,
        "NaN or infinite": [k for k in floats if state[k].is_floating_point() and not bool(state[k].isfinite().all())],
    }
    return [f"{len(keys)} {fault}: {_few(keys)}" for fault, keys in groups.items() if keys]


def _few(keys: list[str], count: int = 3) -> str:
    return ", ".join(map(str, keys[:count])) + (f" and {len(keys) - count} more" if len(keys) > count else "")
