"""What was not encoded, and what that is worth: an estimate that promises no more than was measured."""

import pytest

from pipeline.saving import Saving


def test_a_tile_is_worth_what_one_took_in_the_fastest_batch():
    saving = Saving(k=0.25, tiles=1000, encoded=250, tile_seconds=0.002, again=0.5)
    assert saving.share == 0.25
    assert saving.seconds == pytest.approx(1.5)
    assert saving.sentence() == (
        "zoom, k = 0.25: 250 of 1000 tiles encoded (25%); the encoder was spared about 1.5 s (750 tiles of 2 ms, as in "
        "the fastest batch); reading again what the model chose cost the readers 0.5 s"
    )


def test_of_several_slides():
    parts = [Saving(3, 100, 30, 0.004, 0.5), Saving(3, 300, 50, 0.002, 0.25)]
    total = Saving.total(parts)
    assert total == Saving(3, 400, 80, 0.002, 0.75)
    assert Saving.total([total]) == total
    assert total.as_dict() == {
        "k": 3, "tiles": 400, "encoded": 80, "tile_seconds": 0.002, "again": 0.75, "share": 0.2, "seconds_saved": 0.64,
    }  # fmt: skip
