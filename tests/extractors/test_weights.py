"""Checkpoints made here, good and bad; and a hub that answers what we want."""

import hashlib
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from extractors import EncoderError, load_encoder

NAME = "timm/test_vit"  # 0.4 M parameters
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(3)
    return timm.create_model("test_vit", num_classes=0).state_dict()


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)


def copy(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


def saved(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.suffix != ".pth")
    return path


def load_error(path: Path | str, name: str = NAME) -> str:
    with pytest.raises(EncoderError) as caught:
        load_encoder(name, path).load()
    return str(caught.value)


# --- files that fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_round_trip(state: State, tiles: np.ndarray, tmp_path: Path, suffix: str) -> None:
    path = saved(state, tmp_path / f"w{suffix}")
    encoder = load_encoder(NAME, path)
    assert encoder.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(path) in encoder.weights_words
    network = timm.create_model("test_vit", num_classes=0).eval()
    network.load_state_dict(state)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    with torch.inference_mode():
        expected = network((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std)
    assert torch.allclose(encoder.load(precision="fp32").encode(tiles), expected, atol=1e-5)
    assert encoder.notes == ()


def test_the_content_decides_not_the_name(state: State, tiles: np.ndarray, tmp_path: Path) -> None:
    path = saved(state, tmp_path / "w.safetensors").rename(tmp_path / "w.pt")
    right = load_encoder(NAME, saved(state, tmp_path / "x.pt")).load().encode(tiles)
    assert torch.equal(load_encoder(NAME, path).load().encode(tiles), right)


def test_half_precision_files_give_float32(state: State, tiles: np.ndarray, tmp_path: Path) -> None:
    path = saved({k: v.half() for k, v in state.items()}, tmp_path / "w.safetensors")
    assert load_encoder(NAME, path).load().encode(tiles).dtype == torch.float32


def test_home_and_relative_paths(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(state, tmp_path / "w.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_encoder(NAME, "~/w.pt").weights_sha256 == load_encoder(NAME, "w.pt").weights_sha256


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_wrappers_and_prefixes_are_removed_and_said(
    state: State, tiles: np.ndarray, tmp_path: Path, wrapper: str, prefix: str
) -> None:
    right = load_encoder(NAME, saved(state, tmp_path / "w.pt")).load().encode(tiles)
    wrapped = {wrapper: {prefix + k: v for k, v in state.items()}, "epoch": 3, "args": {"lr": 0.1}}
    encoder = load_encoder(NAME, saved(wrapped, tmp_path / "wrapped.pt")).load()
    assert torch.equal(encoder.encode(tiles), right)
    assert f"weights taken from the entry {wrapper!r} of the file" in encoder.notes
    assert any(f"prefix {prefix!r} removed from all {len(state)} keys" in note for note in encoder.notes) is bool(
        prefix
    )


def test_a_classifier_is_left_out_only_where_the_postcard_says_so(state: State, tmp_path: Path) -> None:
    with_head = {**state, "head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    encoder = load_encoder(NAME, saved(with_head, tmp_path / "w.pt")).load()
    assert encoder.notes == ("left out 2 entries of the file, as this encoder does: head.weight, head.bias",)
    assert "1 unexpected: neck.weight" in load_error(saved({**state, "neck.weight": torch.zeros(1)}, tmp_path / "x.pt"))


def test_a_vit_small_of_ones_own(tmp_path: Path) -> None:
    network = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    path = saved(network.state_dict(), tmp_path / "mine.safetensors")
    encoder = load_encoder("vit_small_dino", path).load(precision="fp32")
    tile = np.full((1, 224, 224, 3), 130, np.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    with torch.inference_mode():
        expected = network((torch.from_numpy(tile).permute(0, 3, 1, 2).float() / 255 - mean) / std)
    assert torch.allclose(encoder.encode(tile), expected, atol=1e-5)


@pytest.mark.slow
def test_the_classifier_of_a_released_vit_small(tmp_path: Path) -> None:
    network = timm.create_model("vit_small_patch16_224", num_classes=0)
    with_head = {**network.state_dict(), "head.weight": torch.zeros(2, 384), "head.bias": torch.zeros(2)}
    path = saved(with_head, tmp_path / "released.pt")
    assert "left out 2 entries" in load_encoder("vit_small_dino", path).load().notes[0]
    assert "2 unexpected: head.weight, head.bias" in load_error(path, "lunit_vits")


def test_the_cut_resnet_says_what_it_leaves_out(tmp_path: Path) -> None:
    network = timm.create_model("resnet50").eval()
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}  # as old files
    encoder = load_encoder("resnet50_trunc", saved(state, tmp_path / "w.pt")).load(precision="fp32")
    assert "left out" in encoder.notes[0]
    assert "layer4.0.conv1.weight" in encoder.notes[0]
    tile = np.random.default_rng(1).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    x = (torch.from_numpy(tile).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.inference_mode():
        x = network.maxpool(network.act1(network.bn1(network.conv1(x))))
        expected = network.layer3(network.layer2(network.layer1(x))).mean((2, 3))
    assert torch.allclose(encoder.encode(tile), expected, atol=1e-5)
    del state["layer3.5.conv3.weight"]
    assert "1 missing: layer3.5.conv3.weight" in load_error(saved(state, tmp_path / "x.pt"), "resnet50_trunc")


# --- files that do not fit --------------------------------------------------------------------------------------------


def _wrong_prefix(state: State) -> State:
    return {f"visual.{k}": v for k, v in state.items()}


def _partial_prefix(state: State) -> State:
    return {(k if k == "cls_token" else f"module.{k}"): v for k, v in state.items()}


def _missing(state: State) -> State:
    return {k: v for k, v in state.items() if k != "cls_token"}


def _shape(state: State) -> State:
    return {**state, "cls_token": torch.zeros(1, 1, 32)}


def _nan(state: State) -> State:
    state["blocks.1.mlp.fc1.bias"][5] = float("nan")
    return state


def _int8(state: State) -> State:
    return {k: v.to(torch.int8) for k, v in state.items()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_wrong_prefix, ["missing: cls_token", "unexpected: visual.cls_token"]),
        (_partial_prefix, ["missing", "unexpected: module."]),
        (_missing, ["1 missing: cls_token"]),
        (_shape, ["1 other shape: cls_token (1, 1, 32) instead of (1, 1, 64)"]),
        (_nan, ["1 NaN or infinite: blocks.1.mlp.fc1.bias"]),
        (_int8, ["not floating: cls_token torch.int8", "more"]),
        (lambda state: {"state_dict": state, "teacher": state}, ["several sets of weights (state_dict, teacher)"]),
        (lambda state: {"weights": state}, ["entries that are no tensors: weights"]),
        (lambda state: {"model": {}}, ["no state_dict but a dict"]),
        (lambda state: [1, 2], ["no state_dict but a list"]),
    ],
)
def test_misfits_are_named(state: State, tmp_path: Path, spoil: Callable[[State], Any], words: list[str]) -> None:
    message = load_error(saved(spoil(copy(state)), tmp_path / "w.pt"))
    assert "w.pt" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("kept", [0.0001, 0.1, 0.5, 0.9, 0.999])
def test_cut_files(state: State, tmp_path: Path, suffix: str, kept: float) -> None:
    whole = saved(state, tmp_path / f"w{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: max(int(kept * len(whole)), 9)])
    assert "is cut or damaged" in load_error(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 86\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<html>404</html>", "web page"),
        (b"\x89HDF\r\n\x1a\n and so on", "neither a safetensors nor a torch file"),
        (b"x", "neither"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    assert words in load_error(path)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_evil_pickles_are_not_run(state: State, tmp_path: Path, suffix: str) -> None:
    marker = tmp_path / "pwned"
    path = saved({**state, "x": Evil(marker)}, tmp_path / f"w{suffix}")
    assert "refused and not run: besides tensors it holds posix.system" in load_error(path)
    bare = tmp_path / "bare.pkl"
    bare.write_bytes(pickle.dumps(Evil(marker)))
    load_error(bare)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


def test_whole_modules_and_namespaces_are_refused(state: State, tmp_path: Path) -> None:
    for name, thing in {"module": torch.nn.Linear(2, 2), "namespace": SimpleNamespace(a=1)}.items():
        assert "refused and not run" in load_error(saved({"state_dict": state, "x": thing}, tmp_path / f"{name}.pt"))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "there is no file" in load_error(tmp_path / "nowhere.pt")
    assert "is a folder" in load_error(tmp_path)
    with pytest.raises(EncoderError, match="there is no file"):
        _ = load_encoder(NAME, tmp_path / "nowhere.pt").weights_sha256


# --- the hub ----------------------------------------------------------------------------------------------------------


def hub_error(kind: type[Exception], text: str = "told so") -> Exception:
    return kind(text, response=SimpleNamespace(headers={}, request=None, status_code=401))  # type: ignore[call-arg]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """A hub whose cache is empty and which answers every question with one error."""

    def answer(error: Exception) -> None:
        def download(*args: Any, local_files_only: bool = False, **kwargs: Any) -> str:
            raise errors.LocalEntryNotFoundError("not cached") if local_files_only else error

        def probe(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", probe)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return answer


def hub_message(name: str) -> str:
    with pytest.raises(EncoderError) as caught:
        _ = load_encoder(name).weights_sha256
    return str(caught.value)


def test_gated(hub: Callable[[Exception], None]) -> None:
    for kind in (errors.GatedRepoError, errors.RepositoryNotFoundError):  # without a token the hub may say either
        hub(hub_error(kind, "401 for token hf_abcDEF123 at https://cdn.example/x?sig=secret"))
        message = hub_message("uni")
        assert "Accept its licence at https://huggingface.co/MahmoodLab/UNI" in message
        assert "HF_TOKEN" in message
        assert "hf_abc" not in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            hub_error(errors.RepositoryNotFoundError),
            "the hub has no model https://huggingface.co/timm/resnet50.tv_in1k",
        ),
        (hub_error(errors.RevisionNotFoundError), "has no revision 78f3ecfdb38e06d9b8397f662e7ab8fee96026fa"),
        (errors.EntryNotFoundError("404"), "has no file model.safetensors"),
        (errors.LocalEntryNotFoundError("no connection"), "on a machine with a network"),
        (ConnectionError("Name or service not known"), "on a machine with a network"),
        (errors.HfHubHTTPError.__bases__[0]("reset by peer"), "reset by peer"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_hub_errors_are_told_apart(hub: Callable[[Exception], None], error: Exception, words: str) -> None:
    hub(error)
    message = hub_message("resnet50")
    assert words in message
    assert "--weights FILE" in message


def test_no_token_and_no_signed_address_in_messages(hub: Callable[[Exception], None]) -> None:
    hub(ConnectionError("GET https://cdn.example/x?X-Amz-Signature=5ecret with Bearer hf_abcDEF123"))
    message = hub_message("resnet50")
    assert "5ecret" not in message
    assert "hf_abc" not in message


def test_offline_mode_does_not_try(hub: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch) -> None:
    hub(AssertionError("asked the network"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in hub_message("resnet50")


def test_no_network_is_known_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real library and a port where nobody listens: one question, not six in 23 s."""
    import huggingface_hub.file_download as library

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(library.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    assert "on a machine with a network" in hub_message("resnet50")
    assert time.monotonic() - start < 10


def test_a_cached_file_is_used_without_asking(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(state, tmp_path / "model.safetensors")
    calls = []

    def download(repo: str, file: str, *, revision: str, local_files_only: bool = False) -> str:
        calls.append((repo, file, revision, local_files_only))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    encoder = load_encoder(NAME)
    assert encoder.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    encoder.load()
    assert calls == [("timm/test_vit.r160_in1k", "model.safetensors", "main", True)]
    assert encoder.weights_words == "weights of timm/test_vit.r160_in1k@main:model.safetensors"
