"""Where the time went: sums that add up, shares that are shares, and a sentence for each thing that bounds."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.meter import Meter

NAMES = [f.name for f in fields(Meter)]
SHARES = (
    *("encoder_busy", "waited_for_tiles", "waited_for_slides", "waited_for_writer"),
    *("readers_busy", "disk", "writer_busy", "unneeded"),
)
seconds = st.floats(0, 1e6, allow_subnormal=False)
whole = st.integers(0, 10**12)
meters = st.builds(Meter, **{f.name: whole if f.type in (int, "int") else seconds for f in fields(Meter)})


def test_meters_add_up_in_every_field():
    one = Meter(*range(1, len(NAMES) + 1))
    other = Meter(*(100 * k for k in range(1, len(NAMES) + 1)))
    total = one + other
    assert [getattr(total, name) for name in NAMES] == [101 * k for k in range(1, len(NAMES) + 1)]
    assert [getattr(one, name) for name in NAMES] == list(range(1, len(NAMES) + 1)), "neither is changed"
    assert sum([one, other], Meter()) == total
    assert Meter() + one == one


def test_time_with_several_readers_is_available_to_each():
    meter = Meter()
    meter.spend(2, 3)
    meter.spend(0.5, 4)
    assert (meter.seconds, meter.available) == (2.5, 8)


CASES = {"encoding": "encoding", "reading": "waiting", "segmenting": "starving", "writing": "stalled"}


@pytest.mark.parametrize(("word", "name"), CASES.items())
def test_what_took_longest_bounds(word, name):
    meter = Meter(tiles=1, seconds=10, encoding=2, waiting=2, starving=2, stalled=2)
    assert replace(meter, **{name: 5}).bound_by == word
    assert replace(meter, **{name: 5}, reading=99, writing=99, disk=99).bound_by == word, "threads beside do not count"
    assert replace(meter, **{name: 5}, tiles=0).bound_by == "", "where nothing was encoded nothing bounded it"


@pytest.mark.parametrize(
    ("encoding", "waiting", "word"),
    [
        (9.5, 9.0, "encoding"),  # tiles were waited for while the encoder worked
        (6.0, 9.0, "reading"),  # the encoder worked longer than it waited, but more tiles would have made it faster
        (6.0, 2.0, "reading"),
        (6.0, 1.0, "encoding"),  # why it rested is not known: a run of a few batches
    ],
)
def test_an_encoder_that_works_beside(encoding, waiting, word):
    assert Meter(tiles=1, seconds=10, encoding=encoding, waiting=waiting).bound_by == word


@pytest.mark.parametrize(
    ("meter", "sentence"),
    [
        (Meter(seconds=10, waiting=10), "nothing was encoded"),
        (Meter(tiles=9, seconds=10, encoding=9.4), "bound by encoding: the encoder was busy 94% of the time"),
        (
            Meter(tiles=9, seconds=10, encoding=4, waiting=6, reading=29.4, available=30),
            "bound by reading: 3 reader threads at 98%; the encoder waited 60%",
        ),
        (
            Meter(tiles=9, seconds=10, encoding=4, waiting=9, reading=8, available=10, disk=2),
            "bound by reading: 1 reader thread at 80%, 25% of it waiting for the disk; the encoder waited 60%",
        ),
        (
            Meter(tiles=9, seconds=10, starving=7),
            "bound by segmenting: the encoder waited 70% for slides that were being segmented",
        ),
        (Meter(tiles=9, seconds=10, stalled=5), "bound by writing: the encoder waited 50% for the writer"),
    ],
)
def test_the_sentence_says_what_bounded_it(meter, sentence):
    assert meter.sentence() == sentence


def test_rates_are_of_all_seconds():
    spent = {"seconds": 20.0, "encoding": 10.0, "waiting": 4.0, "starving": 2.0, "stalled": 1.0, "writing": 5.0}
    read = {"reading": 30.0, "available": 40.0, "disk": 3.0, "decoded": 400_000_000, "needed": 300_000_000}
    meter = Meter(tiles=300, **spent, **read)
    assert meter.rates() == {
        **{"tiles_per_s": 15.0, "mpx_per_s": 20.0, "encoder_busy": 0.5, "waited_for_tiles": 0.2},
        **{"waited_for_slides": 0.1, "waited_for_writer": 0.05, "readers_busy": 0.75, "disk": 0.1},
        **{"writer_busy": 0.25, "unneeded": 0.25},
    }


def test_of_nothing_there_are_rates_too():
    assert set(Meter().rates().values()) == {0.0}


def test_pixels_that_nobody_counted_are_not_unneeded():
    """A reader that does not say what it decoded; and upsampling, which needs more pixels than there are."""
    assert Meter(tiles=1, seconds=1, needed=1000).rates()["unneeded"] == 0
    assert Meter(tiles=1, seconds=1, needed=1000, decoded=500).rates()["unneeded"] == 0


@given(meters)
def test_shares_are_between_nothing_and_all(meter):
    """Also those of one slide, whose tiles may be encoded in the time of the next."""
    rates = meter.rates()
    assert all(0 <= rates[name] <= 1 for name in SHARES), rates
    assert set(rates) == {*SHARES, "tiles_per_s", "mpx_per_s"}
    assert meter.sentence()


@given(meters)
def test_a_meter_survives_json(meter):
    again = Meter(**json.loads(json.dumps(meter.as_dict())))
    assert all(getattr(again, name) == pytest.approx(getattr(meter, name), abs=1e-3) for name in NAMES)
