import sys
from pathlib import Path

import pytest
import torch

import heads
from heads import Head, UnknownName, UnknownOption, list_heads, load_head


def test_every_file_with_a_build_is_a_head_and_no_other():
    folder = Path(heads.__file__).parent
    with_build = {
        file.stem for file in folder.glob("*.py") if "\nbuild = " in (text := file.read_text()) or "def build(" in text
    }
    assert list_heads() == sorted(with_build - {"__init__"})
    assert {"abmil", "max", "mean"} <= set(list_heads())


@pytest.mark.parametrize("name", list_heads())
def test_options_make_the_same_head_again(name):
    head = load_head(name, dim=3, classes=5)
    again = load_head(name, head.dim, head.classes, **head.options)
    assert isinstance(head, Head)
    assert again.options == head.options
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in head.state_dict().items()}


def test_all_options_are_remembered_defaults_too():
    head = load_head("abmil", 11, 3, gated=False, attention=13)
    assert head.options == {"gated": False, "hidden": 512, "attention": 13, "dropout": 0.0}


@pytest.mark.parametrize("name", ["abmill", "train", "__init__", "", ".bag", "a.b", "../abmil", "os", "abmil "])
def test_an_unknown_head_names_the_known_ones(name):
    with pytest.raises(UnknownName, match=r"known: abmil.*mean"):
        load_head(name, 11, 3)


def test_the_nearest_name_is_offered():
    with pytest.raises(UnknownName, match="did you mean 'abmil'"):
        load_head("abmli", 11, 3)
    with pytest.raises(
        UnknownOption, match=r"no option 'gate'; did you mean 'gated'.*attention, dropout, gated, hidden"
    ):
        load_head("abmil", 11, 3, gate=True)
    with pytest.raises(UnknownOption, match="known: none"):
        load_head("mean", 11, 3, hidden=7)


def test_a_name_is_not_imported_before_it_is_known():
    with pytest.raises(UnknownName):
        load_head("antigravity", 11, 3)
    with pytest.raises(UnknownName):
        load_head("not a module:build", 11, 3)
    assert "antigravity" not in sys.modules
    assert "heads.antigravity" not in sys.modules


def test_heads_from_outside(tmp_path, monkeypatch):
    (tmp_path / "mine_73.py").write_text(
        "from heads.mean import Mean\n"
        "def build(dim, classes, *, bias=0.0):\n"
        "    head = Mean(dim, classes)\n"
        "    head.classifier.bias.data.fill_(bias)\n"
        "    return head\n"
        "def free(dim, classes, **options):\n"
        "    return options\n"
        "number = 73\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(load_head("mine_73:build", 11, 3, bias=2.0).classifier.bias, torch.full((3,), 2.0))
    with pytest.raises(UnknownOption, match="did you mean 'bias'"):
        load_head("mine_73:build", 11, 3, bia=2.0)
    with pytest.raises(TypeError, match=r"dict, not a heads\.Head"):
        load_head("mine_73:free", 11, 3, anything=1)
    for wrong in ("mine_73:nothing", "mine_73:number", "mine_74:build"):
        with pytest.raises(UnknownName, match=wrong):
            load_head(wrong, 11, 3)


def test_the_public_face_is_listed_and_sorted():
    assert heads.__all__ == sorted(heads.__all__)
    assert all(hasattr(heads, name) for name in heads.__all__)
