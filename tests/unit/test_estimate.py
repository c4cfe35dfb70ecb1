"""Estimate: maps, units, clamps, and what it says of itself."""

import math

from perplexit.metrics.estimate import Estimate

FOUND = Estimate(1.0, 0.5, 1.5, "document", 24, 0.95, 0.2, 20.0)


def test_a_map_takes_the_ends_with_it_and_drops_the_error_in_the_old_unit() -> None:
    mapped = FOUND.mapped(math.exp)
    assert (mapped.value, mapped.low, mapped.high) == tuple(map(math.exp, (1.0, 0.5, 1.5)))
    assert mapped.standard_error is None
    assert (mapped.method, mapped.num_clusters, mapped.degrees_of_freedom) == ("document", 24, 20.0)


def test_a_change_of_unit_takes_the_error_with_it() -> None:
    assert FOUND.scaled(2).standard_error == 0.4
    assert FOUND.scaled(2).high == 3.0


def test_clamping_moves_the_ends_and_leaves_the_value() -> None:
    assert FOUND.clamped(0.75, 1.25).low == 0.75
    assert FOUND.clamped(0.75, 1.25).high == 1.25
    assert FOUND.clamped(1.2).value == 1.0


def test_without_an_interval_nothing_is_invented() -> None:
    bare = Estimate(3.0, method="window-block", num_clusters=1, reason="too few tokens")
    for found in (bare.mapped(math.exp), bare.scaled(3), bare.clamped(0, 1)):
        assert (found.low, found.high, found.basis) == (None, None, "")
        assert found.reason == "too few tokens"
    assert bare.should_have_interval
    assert not Estimate(3.0).should_have_interval


def test_the_basis_counts_its_clusters() -> None:
    assert FOUND.basis == "95 %, 24 clusters: document"
