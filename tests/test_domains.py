"""An EP group over several hosts: every host is a domain of its own, found by the Balancer.

Eight ranks stand for two hosts of four: FEPLB_DOMAIN says on which one a rank is.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist
from balancer_cases import PLAIN, Arm, Bits, build, differences, grads, loss_of, uneven_counts
from balancer_scenarios import attempt
from ranks import run_ranks

from feplb import Balancer, BalancerConfig, SwiGLU

NUM_RANKS, PER_HOST = 8, 4
NUM_STEPS = 4
NOTICE_S = 2.0  # a dead peer is noticed within this
SHORT_S = 1.5  # deadline where one is reached


@dataclass
class HostArm(Arm):
    """An arm whose ranks are unevenly loaded on each host, the second host in its own way."""

    def counts(self, layer: int = 0, step: int = 0) -> list[int]:
        host, rank = divmod(self.rank, PER_HOST)
        num_local_experts = self.specs[layer].num_local_experts
        return uneven_counts(rank, PER_HOST, num_local_experts, step + host)


def go_to_host(rank: int, per_host: int = PER_HOST) -> None:
    os.environ["FEPLB_DOMAIN"] = f"host{rank // per_host}"


def train(arm: HostArm) -> Bits:
    bits: Bits = {}
    weights = arm.weights()
    for step in range(NUM_STEPS):
        rows, _ = arm.rows(step=step)
        out = arm.run(rows, weights, step=step, begun=step % 2 == 1)
        loss_of(out).backward()
        bits |= {f"{name}, step {step}": bit for name, bit in grads(rows=rows).items()}
        bits[f"out, step {step}"] = out.detach()
    arm.check()
    return bits | grads(weights=weights)


@dataclass(frozen=True)
class Seen:
    """What one rank of two simulated hosts saw."""

    differing: list[str]
    domain: tuple[int, ...]
    place: tuple[int, int]
    max_load: tuple[int, int]  # before, after; of the last call
    num_moves: int


def train_on_two_hosts(rank: int, num_ranks: int) -> Seen:
    go_to_host(rank)
    expected = train(HostArm(rank, num_ranks, PLAIN, None))
    with build(policy="greedy") as balancer:
        arm = HostArm(rank, num_ranks, PLAIN, balancer)
        seen = train(arm)
        record = balancer.last_call(0)
        assert record is not None
        return Seen(
            differing=differences(seen, expected),
            domain=balancer.global_ranks,
            place=(balancer.rank, balancer.num_ranks),
            max_load=(int(record.loads_before.max()), int(record.loads_after.max())),
            num_moves=arm.num_moves,
        )


@pytest.fixture(scope="module")
def two_hosts() -> list[Seen]:
    return run_ranks(train_on_two_hosts, NUM_RANKS, timeout_s=90)


def test_each_host_is_a_domain(two_hosts: list[Seen]) -> None:
    assert [seen.domain for seen in two_hosts] == [(0, 1, 2, 3)] * 4 + [(4, 5, 6, 7)] * 4
    assert [seen.place for seen in two_hosts] == [(rank % 4, 4) for rank in range(8)]


def test_domains_of_an_ep_group_train_bit_identically(two_hosts: list[Seen]) -> None:
    assert [seen.differing for seen in two_hosts] == [[]] * NUM_RANKS


def test_every_domain_is_balanced(two_hosts: list[Seen]) -> None:
    for seen in two_hosts:
        assert seen.num_moves > 0
        assert seen.max_load[1] < seen.max_load[0]


# ------------------------------------------------------------------------------------ the split


def build_on_hosts_of(rank: int, num_ranks: int, per_host: int, policy: str) -> Any:
    go_to_host(rank, per_host)
    with build(policy=policy) as balancer:
        return balancer.global_ranks


def test_hosts_may_differ_in_their_number_of_ranks() -> None:
    assert run_ranks(build_on_hosts_of, 4, 3, "greedy") == [(0, 1, 2)] * 3 + [(3,)]


def test_group_without_two_ranks_on_a_host_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each of the group's 2 ranks is alone on its host"):
        run_ranks(build_on_hosts_of, 2, 1, "greedy")


def test_reference_arm_needs_no_second_rank_on_a_host() -> None:
    assert run_ranks(build_on_hosts_of, 2, 1, "none") == [(0,), (1,)]


def build_second_group(rank: int, num_ranks: int) -> tuple[Any, str]:
    """Two EP groups of one job: the ranks of the second keep their names."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with Balancer(BalancerConfig(deadline_s=SHORT_S), groups[rank // 2], layers=PLAIN) as balancer:
        arm = Arm(rank % 2, 2, PLAIN, balancer)
        refused = rank == 3
        text = attempt(lambda: balancer.begin([-1] if refused else arm.counts(), layer=0))
        if not refused:
            text += attempt(lambda: balancer.domain.core.wait_plan()[:2])
        return balancer.global_ranks, text


def test_messages_have_the_ranks_of_the_job() -> None:
    seen = run_ranks(build_second_group, 4)
    assert [ranks for ranks, _ in seen] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert "(rank 3, layer 0, micro-batch 0)" in seen[3][1]


# -------------------------------------------------------------------------------------- failures


def step_of(arm: HostArm, *, fails: bool = False) -> None:
    """A step as a careful training loop has it: check() is called, whatever happened before."""
    rows, _ = arm.rows()
    try:
        out = arm.run(rows, arm.weights(), compute=Impatient() if fails else None)
        loss_of(out).backward()
    finally:
        arm.check()


class Impatient(SwiGLU):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("out of patience")


def fail_in_compute(arm: HostArm) -> None:
    step_of(arm, fails=arm.rank == 6)


def die(arm: HostArm) -> None:
    if arm.rank == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    step_of(arm)


def miss_the_check(arm: HostArm) -> None:
    if arm.rank >= PER_HOST:
        time.sleep(2 * SHORT_S)
    else:
        step_of(arm)


DEADLINES_S = {fail_in_compute: 15.0, die: 5.0, miss_the_check: SHORT_S}


def react(rank: int, num_ranks: int, act: Callable[[HostArm], None]) -> tuple[str, float, str]:
    go_to_host(rank)
    balancer = build(deadline_s=DEADLINES_S[act])
    arm = HostArm(rank, num_ranks, PLAIN, balancer)
    dist.barrier()
    start = time.monotonic()
    text = attempt(functools.partial(act, arm))
    seconds = time.monotonic() - start
    later = attempt(lambda: balancer.begin(arm.counts(), layer=0))
    balancer.close()
    return text, seconds, later


def test_failure_in_one_domain_ends_the_step_in_the_other() -> None:
    reactions = run_ranks(react, NUM_RANKS, fail_in_compute, timeout_s=90)
    for rank, (text, _, later) in enumerate(reactions):
        if rank < PER_HOST:
            assert f"check() (rank {rank}): rank " in text, text
            assert "in another domain, has failed" in text
            assert "out of patience" in text
        elif rank != 6:
            assert f"(rank {rank}" in text, text
            assert "rank 6" in text
        assert later.startswith("RuntimeError")


def test_death_in_one_domain_ends_the_step_in_the_other() -> None:
    reactions = run_ranks(react, NUM_RANKS, die, timeout_s=90, may_die=[6])
    for rank, reaction in enumerate(reactions):
        if rank == 6:
            continue
        text, seconds, _ = reaction
        assert text.startswith("RuntimeError"), text
        assert "peer rank 6" in text or rank < PER_HOST, text
        if rank >= PER_HOST:
            assert seconds < NOTICE_S


def test_check_waits_for_other_domains_until_its_deadline() -> None:
    for text, seconds, later in run_ranks(react, NUM_RANKS, miss_the_check, timeout_s=90)[:4]:
        assert f"not every domain of the group has answered within {SHORT_S} s" in text, text
        assert SHORT_S * 0.9 < seconds < 10
        assert later.startswith("RuntimeError")


def test_arms_compare_something() -> None:
    bits = train(HostArm(0, 1, PLAIN, None))
    assert sum(bit.numel() for bit in bits.values()) > 1000
    assert bits["out, step 0"].abs().min() > 0
