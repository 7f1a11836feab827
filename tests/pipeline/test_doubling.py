"""A number found by trying: it grows while that pays, goes back where it does not, and comes to rest."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.doubling import Doubling


def tried(number: Doubling, rate: Callable[[int], float], reports: int = 100) -> list[int]:
    """The values it goes through, told the rate of each."""
    values = [number.value]
    for _ in range(reports):
        number.report(rate(number.value) * 3, 3)
        values.append(number.value)
    return values


@pytest.mark.parametrize("most", [16, 31, 32, 100, 1024])
def test_what_makes_things_faster_grows_to_the_most(most):
    number = Doubling(16, most)
    values = tried(number, lambda value: value)
    assert number.settled
    assert max(values) == number.value <= most < 2 * number.value
    assert values == sorted(values)


@pytest.mark.parametrize("best", [1, 2, 4, 8])
def test_it_goes_back_to_the_value_before_the_one_that_was_no_faster(best):
    number = Doubling(1, 64)
    values = tried(number, lambda value: min(value, best))
    assert number.value == best
    assert max(values) == 2 * best, "one step beyond is tried, and no more"
    assert number.settled


@pytest.mark.parametrize(("gain", "taken"), [(1.04, False), (1.06, True)])
def test_it_has_to_be_worth_it(gain, taken):
    number = Doubling(8, 16)
    tried(number, lambda value: gain if value == 16 else 1.0)
    assert number.value == (16 if taken else 8)


def test_the_first_report_of_a_value_counts_for_nothing():
    """Of cold caches and kernels that are chosen: one that is slow costs no step, one that is fast gains none."""
    slow = Doubling(1, 4)
    for rate in (0.001, 1, 0.001, 2, 0.001, 4):
        slow.report(rate, 1)
    assert (slow.value, slow.settled) == (4, True)
    fast = Doubling(1, 4)
    for rate in (1000, 1, 1000, 1):
        fast.report(rate, 1)
    assert (fast.value, fast.settled) == (1, True)


def test_once_settled_it_stays():
    number = Doubling(1, 8)
    tried(number, lambda value: 1.0)
    assert number.value == 1
    assert set(tried(number, lambda value: value**3)) == {1}


@pytest.mark.parametrize(("start", "most"), [(4, 4), (16, 4), (1, 1)])
def test_where_there_is_no_choice_it_is_settled_at_once(start, most):
    number = Doubling(start, most)
    assert (number.value, number.settled) == (most, True)


def test_a_value_that_is_refused_gives_way_to_the_one_before():
    number = Doubling(16, 64)
    number.report(1, 1), number.report(1, 1)
    assert number.value == 32
    number.refuse()
    assert (number.value, number.settled) == (16, True)
    number.report(1, 1e-6), number.report(1, 1e-6)
    assert number.value == 16


def test_the_first_value_has_none_before():
    number = Doubling(16, 64)
    number.refuse()
    assert (number.value, number.settled) == (16, True)


@pytest.mark.parametrize(("cap", "value"), [(64, 32), (32, 32), (8, 8), (1, 1)])
def test_a_cap_is_kept_for_good(cap, value):
    number = Doubling(16, 64)
    number.report(1, 1), number.report(1, 1)
    number.cap(cap)
    assert (number.value, number.settled) == (value, True)
    assert set(tried(number, lambda value: value)) == {value}


def test_work_that_took_no_time_is_no_error():
    number = Doubling(1, 2)
    number.report(5, 0.0), number.report(5, 0.0)
    assert number.value == 2


@given(rates=st.lists(st.floats(0.01, 100), min_size=40, max_size=40), most=st.integers(3, 2000))
def test_whatever_is_told_it_comes_to_rest_within_its_bounds(rates, most):
    number, allowed = Doubling(3, most), {3 * 2**k for k in range(10)}
    for rate in rates:
        number.report(rate, 1)
        assert number.value <= most
        assert number.value in allowed
    assert number.settled, "20 values of two reports each are more than there are between 3 and 2000"
