"""bench/: the cases with Redis count right. Nothing here asserts a speed."""

from collections.abc import Callable

import pytest

from bench import bridge, costs
from bench.bridge import ALONE, BRIDGED, P50, REDIS, TWO
from bench.cases import Bench, Outcome
from bench.costs import GUARDED, OPEN
from tests.conftest import SOAK


def small() -> Bench:
    return Bench(runs=1, seconds=0.5)


def whole(outcome: Outcome) -> None:
    """Nothing was lost and nothing went wrong."""
    for runs in outcome.crowds.values():
        for run in runs:
            assert (run.wrong, run.errors) == (0, {})
            assert run.publishes > 0
            assert run.deliveries >= run.publishes


def guarded(bench: Bench, count: int) -> Outcome:
    """The half of `doors` that has them."""
    return costs.costs(bench, {GUARDED: costs.guards}, count, {GUARDED: costs.token()})


@pytest.mark.parametrize(
    ("case", "peers"),
    [(guarded, (GUARDED,))]
    + [(costs.doors, (OPEN, GUARDED)), (bridge.bridge_cost, (ALONE, BRIDGED))] * SOAK,
)
def test_with_a_part_and_without(case: Callable[..., Outcome], peers: tuple[str, ...]) -> None:
    """A room and streams of tokens, with the bridge, or with all doors, and without."""
    outcome = case(small(), count=7)
    whole(outcome)
    for peer in peers:
        runs = [run for name, found in outcome.runs.items() if peer in name for run in found]
        assert len(runs) == 2
        for run in runs:
            assert (run.lost, run.extra, run.errors) == (0, 0, {})
            assert run.tokens > 0
        crowds = [run for name, found in outcome.crowds.items() if peer in name for run in found]
        assert [run.subscribers for run in crowds] == [7, 7]


def test_two_instances_share_the_readers() -> None:
    """All hear all, in one order, and what that costs Redis is known."""
    outcome = bridge.bridge_two(small(), count=5)
    whole(outcome)
    assert [run.subscribers for runs in outcome.crowds.values() for run in runs] == [5, 10, 10]
    assert outcome.value(P50, TWO) > 0
    assert outcome.value(REDIS, TWO) >= 0


def test_many_rooms() -> None:
    """Each busy room's reader hears it, beside idle ones."""
    outcome = bridge.bridge_rooms(small(), rooms=300, busy=20)
    whole(outcome)
    few, many = (runs[0] for runs in outcome.crowds.values())
    assert (few.subscribers, many.subscribers) == (20, 300)
    assert few.deliveries == few.publishes == many.publishes == 100
