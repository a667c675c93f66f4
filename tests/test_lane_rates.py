"""A lane's rates: what clocks say, by hand; and ranks that agree, whatever each has seen."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import stand_in
import torch.distributed as dist
from balancer_cases import NUM_RANKS, PLAIN, Arm, Heard, build
from balancer_scenarios import attempt, call_and_check
from conftest import put
from ranks import run_ranks

from feplb import connect
from feplb.costs import LaneRates
from feplb.lane_rates import measure_rates, rate_alone, rate_together
from feplb.peers import DomainRanks, Peers

# ---------------------------------------------------------------------------------------- by hand


def test_alone_the_fastest_step_counts() -> None:
    assert rate_alone([100, 120, 125, 165], step_bytes=40) == 8.0


def test_together_only_the_time_counts_in_which_all_push() -> None:
    assert rate_together([[0, 10, 20], [10, 30]], step_bytes=10) == 1.5
    assert rate_together([[0, 10], [0, 10], [0, 10]], step_bytes=10) == 3.0


def test_sources_that_took_turns_are_taken_for_what_they_did() -> None:
    assert rate_together([[0, 10], [10, 30]], step_bytes=15) == 1.0
    assert rate_together([[0, 10], [20, 30]], step_bytes=15) == 1.0


# -------------------------------------------------------------------------------------- the turns


class Clocks:
    """A core whose pushes take what the test says: [from][to], 0 on the diagonal."""

    copies_at_a_time = 2

    def __init__(self, rank: int, times: list[list[int]], began: int = 1000) -> None:
        self.rank, self.times, self.began = rank, times, began
        self.pushed: list[tuple[int, int]] = []

    def push_times(self, dst: int, num_bytes: int, times: int) -> list[int]:
        assert dst != self.rank
        self.pushed.append((dst, num_bytes))
        step = self.times[self.rank][dst]
        return [self.began + step * at for at in range(times + 1)]


def agree(rank: int, num_ranks: int, domains: list[list[int]]) -> list[Any]:
    """Rank s takes 10 + s to send a step of 128 bytes to its neighbour, 100 * (d + 1) to others."""
    own = next(ranks for ranks in domains if rank in ranks)
    domain = DomainRanks(own.index(rank), tuple(own), tuple(own))
    size = len(own)
    times = [
        [10 + s if d == (s + 1) % size else 100 * (d + 1) for d in range(size)]
        for s in range(size)
    ]  # fmt: skip
    found: list[Any] = []
    for has_links in (True, False):
        core = Clocks(domain.rank, times)
        peers = Peers(dist.group.WORLD)
        found += [measure_rates(peers, domain, core, 64, has_links=has_links), core.pushed]
    return found


def test_ranks_agree_on_the_slowest_of_each_direction() -> None:
    of_ranks = run_ranks(agree, 5, [[0, 3, 4], [1, 2]])
    # Of three, rank 2 is the slowest source: 128 bytes in 12 ns. Into rank 2 come two: the one from
    # rank 1 in 11 ns, for two steps; the one from rank 0 in 300, of which only 22 ns count.
    rates_in = 128 / 11 + 128 / 300
    for rank in (0, 3, 4):
        rates, pushed, one_rate, once = of_ranks[rank]
        assert rates.out_gbps == one_rate.out_gbps == one_rate.in_gbps == pytest.approx(128 / 12)
        assert len(pushed) == 3  # to its neighbour alone, and to both with the others
        assert len(once) == 1
    assert of_ranks[0][0].in_gbps == pytest.approx(min(
        rates_in, 128 / 12 + 128 / 100, 128 / 10 + 128 / 200,
    ))  # fmt: skip
    assert of_ranks[0][0] == of_ranks[3][0] == of_ranks[4][0]
    # Two ranks: one direction's rate is the other's.
    for rank in (1, 2):
        rates, pushed, _, _ = of_ranks[rank]
        assert rates == LaneRates(128 / 11, 128 / 11)
        assert len(pushed) == 1


def agree_over_hosts(rank: int, num_ranks: int) -> tuple[LaneRates, list[tuple[int, int]]]:
    """Every clock began at another time; a step of 64 KiB or less takes 1000 ns from everyone."""
    everyone = tuple(range(num_ranks))
    core = Clocks(rank, [[1000] * num_ranks] * num_ranks, began=10**9 * rank)
    domain = DomainRanks(rank, everyone, everyone, over_hosts=True)
    rates = measure_rates(Peers(dist.group.WORLD), domain, core, 65536, has_links=True)
    return rates, core.pushed


def test_hosts_need_no_common_clock_and_many_sources_push_less_each() -> None:
    of_ranks = run_ranks(agree_over_hosts, 10, timeout_s=120)
    less = 65536 * 7 // 9 // 64 * 64
    for rank, (rates, pushed) in enumerate(of_ranks):
        assert rates.out_gbps == pytest.approx(2 * 65536 / 1000)
        assert rates.in_gbps == pytest.approx(9 * 2 * less / 1000)
        others = [dst for dst in range(10) if dst != rank]
        assert pushed == [((rank + 1) % 10, 65536), *((dst, less) for dst in others)]


# ------------------------------------------------------------------------------- real start-ups


def start_up(rank: int, num_ranks: int) -> tuple[LaneRates, str, str]:
    """The rates a Balancer plans with, its line in the log, and whether it works."""
    heard, logger = Heard(), logging.getLogger("feplb")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    with build() as balancer:
        works = call_and_check(Arm(rank, num_ranks, PLAIN, balancer))
        return balancer.domain.lane_rates, heard.texts[-1], works


@pytest.fixture(scope="module", params=["host", "ce"])
def started(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        put(patch, {"FEPLB_LANE": "host"} if request.param == "host" else stand_in.environment())
        yield request.param, run_ranks(start_up, NUM_RANKS)


def test_all_ranks_plan_with_the_same_two_rates_and_log_them(
    started: tuple[str, list[Any]],
) -> None:
    lane, of_ranks = started
    assert len({rates for rates, _, _ in of_ranks}) == 1
    for rates, logged, works in of_ranks:
        assert works == "same bits"
        assert rates.out_gbps > 0
        assert (rates.in_gbps == rates.out_gbps) == (lane == "host")
        assert f"{rates.out_gbps:.1f} GB/s out, {rates.in_gbps:.1f} GB/s in" in logged


def costs_told(rank: int, num_ranks: int) -> list[tuple[int, int]]:
    """What the core is told where the lane takes in four times as fast as it sends."""
    told = []
    for config in ({}, {"lane_gbps": 2.0}):
        with (
            mock.patch.object(connect, "measure_rates", return_value=LaneRates(4.0, 16.0)),
            mock.patch("feplb.balancer.asdict", side_effect=RuntimeError("seen")) as seen,
        ):
            attempt(lambda config=config: build(policy="auto", **config))
        (costs,) = seen.call_args.args
        told.append((costs.row_push, costs.inbound_permille))
    return told


def test_the_cost_model_is_told_both_rates() -> None:
    # Rows of 32 fp32: 128 bytes.
    assert run_ranks(costs_told, 2) == [[(32000, 250), (64000, 1000)]] * 2


def fail_in_its_turn(rank: int, num_ranks: int) -> str:
    if rank == 1:
        os.environ["STAND_IN_FAIL"] = "cuMemcpyBatchAsync:700:25"  # 24 alone, then with another
    return attempt(build)


def test_a_copy_that_fails_while_it_is_timed_is_told_to_all(stand_in_machine: None) -> None:
    texts = run_ranks(fail_in_its_turn, 3)
    assert re.search(r"measuring the lane at start-up.*\(700\)", texts[1]), texts[1]
    for rank in (0, 2):  # by the group, or by the board where it was pushing too
        assert re.match(r"RuntimeError: .*rank 1\b.*\(700\)", texts[rank]), texts[rank]
