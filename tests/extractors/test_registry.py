"""Names: what is found, what is suggested, what never gets imported."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from extractors import EncoderError, UnknownEncoder, list_encoders, load_encoder

MINE = """
from extractors import Encoder, EncoderFacts

FACTS = EncoderFacts(name="mine", dim=2, tile_px=8, source="words", licence="none", citation="none")

class Mine(Encoder):
    def _features(self, tiles):
        import torch
        return torch.zeros(len(tiles), 3)

def make(weights=None):
    return Mine(FACTS, weights)

def number(weights=None):
    return 42
"""


def test_listed_encoders_load_by_name() -> None:
    names = list_encoders()
    assert {"gigapath", "lab_lbp", "lunit_vits", "resnet50", "resnet50_trunc", "uni", "vit_small_dino"} <= set(names)
    assert names == sorted(names)
    assert [load_encoder(name).facts.name for name in names] == names


def test_facts_need_no_torch() -> None:
    script = (
        "import sys; from extractors import list_encoders, load_encoder; "
        "[load_encoder(n).facts.misfit(224, 0.5) for n in list_encoders()]; "
        "load_encoder('lab_lbp').weights_sha256; print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == "False False\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet5", "Did you mean 'resnet50'"),
        ("UNI", "Did you mean 'uni'"),
        ("uni/large", "Did you mean 'uni'"),
        ("xyzzy", "Known: gigapath, lab_lbp"),
        ("timm", "timm .* has no model ''"),
        ("weights", "no encoder is called"),  # modules here, but no encoders
        ("network", "no encoder is called"),
        ("os", "no encoder is called"),
        ("../uni", "no encoder is called"),
        ("", "no encoder is called"),
        ("timm/resnet118", "Did you mean timm/resnet1"),
        ("timm/resnet50.tv_in2k", "Did you mean timm/resnet50.tv"),
        ("timm/", "timm .* has no model ''"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    with pytest.raises(UnknownEncoder, match=words):
        load_encoder(name)


def test_an_unknown_encoder_is_a_value_error() -> None:
    assert issubclass(UnknownEncoder, EncoderError)
    assert issubclass(EncoderError, ValueError)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_encoders.py").write_text(MINE)
    (tmp_path / "broken_encoders.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("mine")
def test_a_private_encoder() -> None:
    encoder = load_encoder("my_encoders:make", weights="w.pt")
    assert (encoder.facts.name, encoder.weights) == ("mine", "w.pt")
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 1 tiles; its facts say 2"):
        encoder.encode(np.zeros((1, 8, 8, 3), np.uint8))


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_encoders:mak", "no function 'mak'. Did you mean 'make'"),
        ("my_encoders:FACTS", "no function 'FACTS'"),
        ("my_encoders:number", "returned int, which has no facts, weights"),
        ("no_such_module:make", "PYTHONPATH"),
        ("broken_encoders:make", "no_such_library"),
        ("my encoders:make", "not of the form"),
        ("my_encoders:make()", "not of the form"),
        (":make", "not of the form"),
    ],
)
def test_faulty_private_encoders(name: str, words: str) -> None:
    with pytest.raises(EncoderError, match=words):
        load_encoder(name)


def test_timm_names_keep_what_was_asked() -> None:
    facts = load_encoder("timm/resnet18").facts
    assert (facts.name, facts.dim, facts.any_tile_px) == ("timm/resnet18", 512, True)
    assert facts.source == "timm/resnet18.a1_in1k@main:model.safetensors"
    assert load_encoder("timm/vit_tiny_patch16_224").facts.any_tile_px is False
