"""The public names of `pipeline`, and what a user may rely on about them."""

import importlib

import pytest

import pipeline

# Section 10 of the design, what judges heads, draws where they look, and makes encoders.
NAMES = {"open_slide", "find_tissue", "build_quadtree", "QuadTree", "BagStore", "Config", "run", "train", "predict"}
NAMES |= {"compare", "evaluate", "evaluate_labels", "pretrain", "probe", "stitch", "verify"}


def test_public_names_are_those_of_the_design():
    assert set(pipeline.__all__) == NAMES
    assert set(dir(pipeline)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_is_what_its_module_calls_so(name):
    thing = getattr(pipeline, name)
    home = importlib.import_module(f"pipeline.{pipeline._HOME[name]}")
    assert thing is getattr(home, name)
    assert thing.__name__ == name
    assert thing.__module__ == home.__name__, "named where it is defined, not where it is imported to"
    assert thing.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipeline.nothing  # noqa: B018
    assert not hasattr(pipeline, "store_")
