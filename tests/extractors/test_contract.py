"""One contract, all encoders. What cannot be downloaded here runs with random weights."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from extractors import Encoder, EncoderError, EncoderFacts, list_encoders, load_encoder

LARGE = {"uni", "gigapath"}
UNPUBLISHED = {"vit_tiny_scorenet"}  # everyone trains their own
SMALL = [
    "lab_lbp",
    "resnet50_trunc",
    "timm/resnet18",
    "timm/vit_tiny_patch16_224",
    "vit_small_dino",
    "vit_tiny_scorenet",
]
MIDDLE = [name for name in list_encoders() if name not in {*SMALL, *LARGE}]
NETWORKS = [name for name in [*list_encoders(), "timm/resnet18"] if name != "lab_lbp"]


def make(name: str) -> Encoder:
    return load_encoder(name, None if name == "lab_lbp" else "random")


def tiles_for(encoder: Encoder, count: int, seed: int = 0) -> np.ndarray:
    px = 96 if encoder.facts.any_tile_px else encoder.facts.tile_px  # smaller is faster
    return np.random.default_rng(seed).integers(0, 256, (count, px, px, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", [*list_encoders(), "timm/resnet18"])
def test_facts_are_known_and_plain(name: str) -> None:
    facts = load_encoder(name).facts
    assert facts.name == name
    assert facts.dim > 0
    assert facts.tile_px > 0
    assert facts.licence
    assert facts.citation
    assert json.loads(json.dumps(facts.as_dict())) == facts.as_dict()


@pytest.mark.parametrize("name", NETWORKS)
def test_facts_agree_with_the_network(name: str) -> None:
    """An instance with shapes but no numbers: the largest takes no memory."""
    encoder = load_encoder(name)
    px = encoder.facts.crop_px or encoder.facts.tile_px
    with torch.device("meta"):
        features = encoder.make().eval()(torch.empty(1, 3, px, px))  # type: ignore[attr-defined]
    assert tuple(features.shape) == (1, encoder.facts.dim)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "/" not in name and name not in UNPUBLISHED])
def test_weights_are_pinned_to_a_commit(name: str) -> None:
    revision = load_encoder(name).facts.source.split("@")[1].split(":")[0]
    assert len(revision) == 40
    int(revision, 16)


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in MIDDLE)])
def test_encode(name: str) -> None:
    encoder = make(name)
    assert encoder.load() is encoder
    tiles = tiles_for(encoder, 3)
    features = encoder.encode(tiles)
    assert (features.shape, features.dtype, features.device.type) == ((3, encoder.facts.dim), torch.float32, "cpu")
    assert bool(features.isfinite().all())
    assert not torch.equal(features[0], features[1])
    assert torch.equal(encoder.encode(torch.from_numpy(tiles)), features)
    assert torch.equal(encoder.encode(tiles[::-1])[2], features[0])  # negative strides
    tiles.flags.writeable = False
    assert torch.equal(encoder.load().encode(tiles), features)  # loading again changes nothing
    features.requires_grad_().sum().backward()  # not an inference tensor: a head can be trained on it
    assert encoder.encode(tiles[:0]).shape == (0, encoder.facts.dim)


@pytest.mark.parametrize("name", ["lab_lbp", "timm/resnet18"])
@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        torch.zeros(2, 64, 64, 4, dtype=torch.uint8),
    ],
    ids=["float", "channels first", "one tile", "alpha"],
)
def test_wrong_input_is_refused(name: str, wrong: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"takes (uint8 tiles|tiles of shape)"):
        make(name).load().encode(wrong)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224", "resnet50_trunc", "lab_lbp"])
def test_features_do_not_depend_on_neighbours(name: str) -> None:
    """Bit-identical resume rests on this, and on one shape of batches: alone, a tile may get other last bits."""
    encoder = make(name).load(precision="fp32")
    tiles = tiles_for(encoder, 8)
    together = encoder.encode(tiles)
    order = [6, 4, 0, 2, 7, 5, 3, 1]
    assert torch.equal(encoder.encode(tiles[order]), together[order]), "another place in the batch"
    others = tiles[::-1].copy()
    others[3] = tiles[0]
    assert torch.equal(encoder.encode(others)[3], together[0]), "other neighbours"


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224", "lab_lbp"])
def test_threads_may_call_it_at_the_same_time(name: str) -> None:
    encoder = make(name).load()
    tiles = tiles_for(encoder, 8)
    with ThreadPoolExecutor(4) as pool:  # at once: the first batch decides how the network is laid out
        found = list(pool.map(encoder.encode, [tiles] * 8))
    assert all(torch.equal(features, found[0]) for features in found)


def test_normalisation_is_that_of_the_facts() -> None:
    encoder = load_encoder("timm/vit_tiny_patch16_224", "random").load(
        precision="fp32"
    )  # mean, std 0.5, not ImageNet's
    tiles = tiles_for(encoder, 2)
    images = (torch.from_numpy(tiles).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    expected = encoder._network(images.float())  # type: ignore[attr-defined]
    assert torch.allclose(encoder.encode(tiles), expected, atol=1e-5)


def test_crop_is_the_centre() -> None:
    facts = EncoderFacts(
        name="crop", dim=3, tile_px=6, crop_px=4, mean=(0, 0, 0), std=(1, 1, 1), source="", licence="", citation=""
    )
    from extractors.network import NetworkEncoder

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[2:] == (4, 4)
            return x.mean((2, 3)) * self.scale

    encoder = NetworkEncoder(facts, Mean, "random").load()
    tile = np.zeros((1, 6, 6, 3), np.uint8)
    tile[0, 1:5, 1:5] = (255, 51, 0)  # R, G, B: a swapped channel or a shifted crop changes the numbers
    assert torch.allclose(encoder.encode(tile), torch.tensor([[1.0, 0.2, 0.0]]))
    with pytest.raises(ValueError, match="too small"):
        encoder.encode(tile[:, :3])


def test_random_weights_are_the_same_in_each_process_and_disturb_nobody() -> None:
    script = (
        "import torch, numpy as np; from extractors import load_encoder; torch.manual_seed(7); "
        "e = load_encoder('timm/resnet18', 'random').load(); "
        "print(e.encode(np.full((1, 64, 64, 3), 99, np.uint8)).double().sum().item(), torch.rand(1).item())"
    )
    runs = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout}
    torch.manual_seed(7)
    encoder = load_encoder("timm/resnet18", "random").load()
    here = encoder.encode(np.full((1, 64, 64, 3), 99, np.uint8)).double().sum().item()
    drawn = torch.rand(1).item()
    torch.manual_seed(7)
    assert drawn == torch.rand(1).item()
    assert runs == {f"{here} {drawn}\n"}
    assert encoder.weights_sha256 == "random"
    assert encoder.weights_words == "RANDOM weights: for benchmarks only"


@pytest.mark.parametrize("name", ["resnet50_trunc", "timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_numbers_are_drawn_only_where_they_stay(name: str, tmp_path: Path) -> None:
    """To draw the first weights of a large network takes seconds, and those of a file replace them all."""

    def draws(encoder: Encoder) -> bool:
        states = []
        make = encoder.make  # type: ignore[attr-defined]

        def watched() -> torch.nn.Module:
            states.append(torch.get_rng_state())
            network: torch.nn.Module = make()
            states.append(torch.get_rng_state())
            return network

        encoder.make = watched  # type: ignore[attr-defined]
        encoder.load()
        return not torch.equal(*states)

    save_file(load_encoder(name).make().state_dict(), tmp_path / "own.safetensors")  # type: ignore[attr-defined]
    assert not draws(load_encoder(name, tmp_path / "own.safetensors"))
    assert draws(load_encoder(name, "random"))


def test_a_transformer_says_which_size_it_takes() -> None:
    encoder = load_encoder("timm/vit_tiny_patch16_224", "random").load()
    with pytest.raises(EncoderError, match="cannot take tiles of"):
        encoder.encode(np.zeros((1, 256, 256, 3), np.uint8))


def test_unusable_device_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EncoderError, match="device 'cuda' cannot be used here"):
            load_encoder("timm/resnet18", "random").load("cuda")
    with pytest.raises(EncoderError, match="device 'gpu' cannot be used here"):
        load_encoder("timm/resnet18", "random").load("gpu")


def test_encode_before_load_is_refused() -> None:
    with pytest.raises(RuntimeError, match="load"):
        load_encoder("timm/resnet18", "random").encode(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "tile_px", "mpp", "words"),
    [
        ("uni", 224, 0.5, None),
        ("uni", 224, 0.549, None),
        ("uni", 224, 0.56, "expects 0.5 µm/px, the finest level has 0.56"),
        ("uni", 256, 0.5, "takes tiles of 224 px, these have 256 px"),
        ("lunit_vits", 224, 0.25, None),
        ("lunit_vits", 224, 0.35, "0.25 or 0.5"),
        ("gigapath", 256, 0.5, None),
        ("gigapath", 224, 0.5, None),
        ("gigapath", 512, 0.5, "takes tiles of 256 px"),
        ("lab_lbp", 999, 7.0, None),
        ("resnet50", 256, 2.0, None),
        ("vit_small_dino", 256, 2.0, "takes tiles of 224 px"),
    ],
)
def test_misfit(name: str, tile_px: int, mpp: float, words: str | None) -> None:
    reason = load_encoder(name).facts.misfit(tile_px, mpp)
    assert reason is None if words is None else (words in str(reason) and str(reason).startswith(name))
