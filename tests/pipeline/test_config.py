"""Settings: one name everywhere, bounds, and a digest that notices every change."""

import hashlib
import inspect
import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli
from pipeline.config import (
    PRESETS,
    Config,
    EncodeConfig,
    EngineConfig,
    TileConfig,
    TissueConfig,
    difference,
    digest,
    make_config,
    read_toml,
)
from pipeline.errors import UsageError

# Another valid value for every setting.
OTHER = {
    "tissue_mpp": 4.0,
    "min_density": 0.1,
    "min_area_um2": 0.0,
    "max_hole_um2": 1.0,
    "remove_pen": False,
    "mpp": 0.25,
    "levels": 1,
    "tile_px": 256,
    "min_tissue": 0.5,
    "min_region_tissue": 0.2,
    "keep_background": True,
    "encode_levels": "finest",
    "overlap": 0.5,
    "origin": (3.0, 4.0),
    "tiler": "mine:tiles",
    "allow_upsampling": True,
    "encoder": "uni",
    "weights": "w.safetensors",
    "force_scale": True,
    "dtype": "float32",
    "precision": "fp32",
    "compile": True,
    "batch_size": 8,
    "readers": 3,
    "queue_mb": 64,
    "reader": "tiffslide",
}


def changed(name: str) -> Config:
    return make_config(**{name: OTHER[name]} | ({"levels": 1} if name == "overlap" else {}))


def test_every_setting_has_another_value_here():
    assert set(OTHER) == set(Config.model_fields)


def test_settings_of_the_parts_make_up_the_whole():
    parts = [*TissueConfig.model_fields, *TileConfig.model_fields, *EncodeConfig.model_fields]
    parts += [*EngineConfig.model_fields, "reader"]
    assert sorted(parts) == sorted(Config.model_fields), "no field in two parts, none left out"
    config = changed("min_density")
    assert config.tissue == TissueConfig(min_density=0.1)
    assert changed("min_tissue").tile == TileConfig(min_tissue=0.5)
    assert changed("dtype").encode == EncodeConfig(dtype="float32")


def test_flags_are_the_fields():
    flags = {p.name: p.annotation.__metadata__[0] for p in cli._flags()}
    assert set(flags) == set(Config.model_fields)
    for name, option in flags.items():
        dashed = "--" + name.replace("_", "-")
        assert option.default.split("/")[0] == dashed
        assert Config.model_fields[name].description in option.help
        if isinstance(Config.model_fields[name].default, bool):
            assert option.default == f"{dashed}/--no-{dashed[2:]}"


def test_every_setting_can_be_given_as_flag_toml_and_keyword(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "make_config", lambda **settings: seen.update(settings) or _stop())
    for name in OTHER:
        config = changed(name)
        value = getattr(config, name)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments = [flag if value else flag.replace("--", "--no-", 1)]
        else:
            arguments = [flag, *([str(v) for v in value] if isinstance(value, tuple) else [str(value)])]
        seen.clear()
        with pytest.raises(_Stop):
            cli.app(["run", "slides", "-o", "out", *arguments], standalone_mode=False)
        assert make_config(**{"levels": config.levels} | seen) == config
        toml = tmp_path / f"{name}.toml"
        toml.write_text(f"{name} = {_toml(value)}\n" + ("levels = 1\n" if name == "overlap" else ""))
        assert make_config(**read_toml(toml)) == config


class _Stop(Exception):
    pass


def _stop() -> None:
    raise _Stop


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mpp", 0.009),
        ("mpp", 501),
        ("mpp", math.nan),
        ("mpp", math.inf),
        ("mpp", "fine"),
        ("levels", 0),
        ("levels", 9),
        ("levels", 2.5),
        ("tile_px", 7),
        ("tile_px", 8193),
        ("min_tissue", -0.01),
        ("min_tissue", 1.01),
        ("min_region_tissue", 2),
        ("overlap", 0.95),
        ("overlap", -0.1),
        ("tissue_mpp", 0.5),
        ("tissue_mpp", 65),
        ("min_density", 0),
        ("min_density", 1.1),
        ("min_area_um2", -1),
        ("max_hole_um2", -1),
        ("encoder", ""),
        ("dtype", "bfloat16"),
        ("reader", "cucim"),
        ("origin", (math.nan, 0)),
        ("origin", (1, 2, 3)),
        ("encode_levels", "coarsest"),
        ("encode_levels", 0.5),
        ("encode_levels", []),
        ("encode_levels", "0"),
        ("encode_levels", [-0.5]),
        ("encode_levels", "0.5,0.7"),  # no such level: told before anything runs
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("mpp", 0.01), ("mpp", 500), ("levels", 8), ("tile_px", 8), ("min_tissue", 0), ("min_tissue", 1)],
)
def test_bounds_themselves_are_allowed(name, value):
    assert getattr(make_config(**{name: value}), name) == value


def test_overlap_needs_one_level():
    with pytest.raises(UsageError, match="levels = 1"):
        make_config(overlap=0.5)
    assert make_config(overlap=0.5, levels=1).overlap == 0.5


@pytest.mark.parametrize("text", ["0.5,2", "0.5, 2.0", "2,.5"])
def test_levels_to_encode_as_text(text):
    assert set(make_config(encode_levels=text).encode_levels) == {0.5, 2.0}


def test_levels_to_encode_are_free_where_a_tiler_makes_the_levels():
    assert make_config(encode_levels=[0.7], tiler="mine:tiles").encode_levels == (0.7,)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("min_tisue", "min_tissue"), ("tile-px", "tile_px"), ("encodr", "encoder"), ("level", "levels")],
)
def test_an_unknown_setting_is_refused_with_the_nearest(wrong, meant):
    with pytest.raises(UsageError, match=f"Did you mean '{meant}'"):
        make_config(**{wrong: 1})


def test_unknown_setting_in_a_file_too(tmp_path):
    (tmp_path / "c.toml").write_text("mppp = 1\n")
    with pytest.raises(UsageError, match="Did you mean 'mpp'"):
        make_config(**read_toml(tmp_path / "c.toml"))
    with pytest.raises(ValueError, match="mppp"):
        Config(mppp=1)


def test_nobody_changes_a_config():
    with pytest.raises(ValueError, match="frozen"):
        Config().mpp = 1.0


def test_later_wins_preset_file_keywords(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('preset = "hipt"\nmin_tissue = 0.3\nmpp = 1.0\n')
    config = make_config(**read_toml(file) | {"mpp": 2.0})
    assert (config.levels, config.min_tissue, config.mpp) == (5, 0.3, 2.0)
    assert config.min_region_tissue == PRESETS["hipt"]["min_region_tissue"]
    assert make_config(**read_toml(file) | {"preset": "hvit"}).levels == 4, (
        "a preset given wins over the one in the file"
    )


def test_presets_are_those_of_the_design():
    for name, levels in (("hvit", 4), ("hipt", 5)):
        assert make_config(name) == make_config(
            levels=levels, min_tissue=0, min_region_tissue=0.1, keep_background=True, encode_levels="finest"
        )


def test_unknown_preset():
    with pytest.raises(UsageError, match="Did you mean 'hvit'"):
        make_config("hvitt")


@pytest.mark.parametrize("text", ["preset = 4", "preset = ['hvit']"])
def test_a_preset_that_is_no_text(tmp_path, text):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match="preset"):
        make_config(**read_toml(tmp_path / "c.toml"))


@pytest.mark.parametrize("content", [b"mpp 1", b"\xff\xfe", None])
def test_a_file_that_is_no_toml(tmp_path, content):
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"c\.toml"):
        make_config(**read_toml(file))


def test_digest_is_stable():
    # The spelling is fixed: another one would make every stored slide stale.
    assert digest({"b": 1, "a": [1.5, None]}) == hashlib.sha256(b'{"a":[1.5,null],"b":1}').hexdigest()
    assert digest(Config()) == digest(Config.model_validate(tomllib.loads("mpp = 0.5")))
    assert digest(Config()) == digest(Config().model_dump(mode="json"))


@pytest.mark.parametrize("name", OTHER)
def test_digest_sees_every_setting(name):
    base = make_config(levels=1) if name == "overlap" else Config()
    assert getattr(changed(name), name) != getattr(base, name)
    assert digest(changed(name)) != digest(base)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 3)), st.dictionaries(st.text(max_size=3), st.integers(0, 3)))
def test_digests_differ_where_values_do(a, b):
    assert (digest(a) == digest(b)) == (a == b)


def test_difference_names_what_changed_and_nothing_else():
    old, new = Config().model_dump(mode="json"), make_config(mpp=0.25, min_tissue=0.5).model_dump(mode="json")
    assert difference(old, new) == ["min_tissue: 0.1 → 0.5", "mpp: 0.5 → 0.25"]
    assert difference(old, old) == []
    assert difference({"a": 1}, {"b": 2}) == ["a: 1 → None", "b: None → 2"]


def test_flags_have_no_default_of_their_own():
    # A flag that is not given must not win over a TOML file.
    assert all(p.default is None and p.kind is inspect.Parameter.KEYWORD_ONLY for p in cli._flags())
