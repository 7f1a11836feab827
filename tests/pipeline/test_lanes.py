"""Batches side by side: how many at a time, with how many threads each, and what goes wrong in one of them."""

import threading

import pytest
import torch

from extractors import Encoder, EncoderFacts, Pending
from pipeline.lanes import Lanes

FACTS = EncoderFacts(name="tells", dim=1, tile_px=8, source="", licence="", citation="")


class Tells(Encoder):
    """Its feature is the number of threads that torch uses where it is called."""

    def __init__(self, parallel: bool = True) -> None:
        super().__init__(FACTS)
        self.parallel, self.callers = parallel, []

    def _features(self, tiles):
        self.callers.append(threading.current_thread().name)
        return torch.full((len(tiles), 1), float(torch.get_num_threads()))


def tiles(count: int) -> torch.Tensor:
    return torch.zeros(count, 8, 8, 3, dtype=torch.uint8)


@pytest.mark.parametrize(("parallel", "threads", "count", "each"), [(True, 3, 3, 1), (False, 3, 1, 3), (True, 1, 1, 1)])
def test_the_cores_are_shared_out(parallel, threads, count, each):
    before = torch.get_num_threads()
    with Lanes(Tells(parallel), "cpu", threads) as lanes:
        assert lanes.count == count
        for size in (1, 5):
            pending = lanes.start(tiles(size))
            assert pending.result().tolist() == [[each]] * size
            assert pending.seconds > 0
    assert torch.get_num_threads() == before, "of the thread that gives the work"


def test_a_gpu_is_asked_by_the_thread_that_gives_the_work():
    encoder = Tells()
    with Lanes(encoder, "cuda:1", 8) as lanes:
        assert (lanes.count, lanes.gpu) == (1, True)
        assert isinstance(lanes.start(tiles(2)), Pending)
    assert encoder.callers == [threading.current_thread().name]


def test_a_fault_comes_with_the_result_and_other_batches_go_on():
    class Fails(Tells):
        def _features(self, some):
            if some.any():
                raise MemoryError("no room")
            return super()._features(some)

    with Lanes(Fails(), "cpu", 2) as lanes:
        bad, good = lanes.start(tiles(2) + 1), lanes.start(tiles(3))
        with pytest.raises(MemoryError, match="no room"):
            bad.result()
        assert len(good.result()) == 3


def test_at_the_end_no_thread_is_left_and_what_waited_is_dropped():
    class Slow(Tells):
        def _features(self, some):
            go.wait(20)
            return super()._features(some)

    go, encoder = threading.Event(), Slow()
    with Lanes(encoder, "cpu", 1) as lanes:
        for _ in range(5):
            lanes.start(tiles(1))
        threading.Timer(0.2, go.set).start()
    assert len(encoder.callers) == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("encoder")]
