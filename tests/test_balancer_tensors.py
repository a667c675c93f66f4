"""Experts of other shapes than the usual two matrices, larger and smaller calls, other domains: the
bits stay. Expected values come from the same experts without any Balancer; one spawn of four ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from balancer_cases import (
    NUM_RANKS,
    PLAIN,
    PROBS,
    Arm,
    Bits,
    Case,
    Outcomes,
    build,
    differences,
    grads,
    layer_spec,
    loss_of,
    make_rows,
    seeded,
)
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import gelu

from feplb import Balancer, BalancerConfig, LayerSpec, SwiGLU, as_compute
from feplb.config import TensorSpec
from feplb.two_phase import run_experts_locally

NUM_RANDOM_STEPS = 25
Tensors = tuple[Tensor, ...]

# One expert: two matrices with biases, and scales that take no gradient.
WITH_BIASES = LayerSpec(
    5, 32, torch.float32, ((48, 32), (48,), (32, 48), (32,), TensorSpec((8,), torch.bfloat16)),
    max_rows=256,
)  # fmt: skip
# Side data of one row: a probability, two expert ids, three halves, a whole vector.
SIDE_DATA = (
    *PROBS,
    TensorSpec((2,), torch.int64),
    TensorSpec((3,), torch.bfloat16),
    TensorSpec((32,), torch.float32),
)
WITH_SIDE_DATA = layer_spec(3, row_data=SIDE_DATA)
WIDE = layer_spec(hidden=512, width=16, max_rows=2048)


def run_with_biases(rows: Tensor, row_data: Tensors, weights: Tensors) -> Tensor:
    w1, b1, w2, b2, scales = weights
    return (gelu(rows @ w1.t() + b1) @ w2.t() + b2) * scales.float().sum()


def run_with_side_data(rows: Tensor, row_data: Tensors, weights: Tensors) -> Tensor:
    probs, ids, halves, vectors = row_data
    mixed = (rows + vectors * ids.sum(dim=1, keepdim=True)) @ weights[0].t()
    factor = probs[:, None] * halves.float().sum(dim=1, keepdim=True)
    return torch.tanh(mixed[:, :48]) @ weights[1].t() * factor


BIASES, SIDES = as_compute(run_with_biases), as_compute(run_with_side_data)


def move_biases(arm: Arm) -> Bits:
    """All tensors of an expert move as one set, those without gradients too."""
    weights, (rows, _) = arm.weights(), arm.rows()
    weights[4].requires_grad_(False)
    out = arm.run(rows, weights, compute=BIASES)
    loss_of(out).backward()
    arm.check()
    return {"out": out.detach(), **grads(rows=rows, weights=weights[:4])}


def move_side_data(arm: Arm) -> Bits:
    rows, row_data = make_rows(WITH_SIDE_DATA, arm.counts(), arm.rank, grad=False)
    ids = torch.randint(0, 9, row_data[1].shape, generator=seeded(arm.rank))
    trained = [row_data[0], row_data[2], row_data[3]]
    for leaf in (rows, *trained):
        leaf.requires_grad_()
    weights = arm.weights()
    row_data = (row_data[0], ids, *row_data[2:])
    out = arm.run(rows, weights, row_data=row_data, compute=SIDES)
    loss_of(out).backward()
    arm.check()
    return {"out": out.detach(), **grads(rows=rows, weights=weights, side=trained)}


def train(arm: Arm, num_steps: int = 2, scale: int = 1) -> Bits:
    arm.scale = scale
    weights = arm.weights()
    bits: Bits = {}
    for step in range(num_steps):
        rows, row_data = arm.rows(step=step)
        out = arm.run(rows, weights, step=step, row_data=row_data)
        loss_of(out).backward()
        arm.check()
        bits |= {f"out {step}": out.detach(), **grads(**{f"rows {step}": rows})}
    return bits | grads(weights=weights)


def train_with_two_threads(arm: Arm) -> Bits:
    """MKL cuts some GEMMs of 1 to 9 rows among threads by their address."""
    torch.set_num_threads(2)
    try:
        return train(arm, num_steps=5)
    finally:
        torch.set_num_threads(1)


def train_on_random_counts(arm: Arm) -> Bits:
    """Skewed at random: many experts without tokens, few with many."""
    generator = seeded(13, arm.rank)
    weights = arm.weights()
    bits: Bits = {}
    for step in range(NUM_RANDOM_STEPS):
        skew = torch.rand(5, generator=generator).pow(6) * 100
        counts = skew.int().tolist()
        rows, _ = make_rows(PLAIN[0], counts, arm.rank, step)
        if arm.balancer is None:
            out = run_experts_locally(rows, counts, weights, SwiGLU())
        else:
            prepared = arm.balancer.prepare_weights(weights, layer=0)
            out = arm.balancer.run_experts(rows, counts, prepared, SwiGLU(), layer=0)
            record = arm.balancer.last_call(0)
            assert record is not None
            arm.num_moves += len(record.moves)
        loss_of(out).backward()
        bits |= {f"out {step}": out.detach(), **grads(**{f"rows {step}": rows})}
    arm.check()
    return bits | grads(weights=weights)


def local(program: Callable[..., Bits], spec: LayerSpec = PLAIN[0]) -> Case:
    return Case(program, (spec,), expected_policy="local")


CASES = {
    "biases": local(move_biases, WITH_BIASES),
    "side data": local(move_side_data, WITH_SIDE_DATA),
    "fp64": local(train, layer_spec(dtype=torch.float64)),
    "small": local(train, layer_spec(8, 16, 8)),
    "chunks": local(functools.partial(train, scale=20), WIDE),
    "random counts": local(train_on_random_counts),
    "two threads": local(train_with_two_threads),
}


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return Outcomes(CASES)


def test_biases_and_gradless_scales_move_with_their_expert(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("biases")


def test_side_data_of_several_dtypes_travels_with_its_rows(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("side data")


def test_fp64_experts_have_the_same_bits(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("fp64")


def test_small_experts_have_the_same_bits(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("small")


def test_moves_of_more_than_one_chunk_have_the_same_bits(outcomes: Outcomes) -> None:
    # The largest move is 20 * 55 rows of 2 KiB; the host lane copies 1 MiB at a time.
    outcomes.assert_same_bits("chunks")


def test_random_counts_have_the_same_bits(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("random counts")


def test_two_compute_threads_give_the_same_bits(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("two threads")


# --------------------------------------------------------------------------------- other domains


def train_in_domain(rank: int, num_ranks: int, members: list[list[int]]) -> tuple[int, list[str]]:
    """Every rank trains in the domain that it is a member of, which knows nothing of the others."""
    groups = [dist.new_group(ranks) for ranks in members]
    mine = next(i for i, ranks in enumerate(members) if rank in ranks)
    rank, num_ranks = members[mine].index(rank), len(members[mine])
    expected = train(Arm(rank, num_ranks, PLAIN, None))
    with Balancer(BalancerConfig(deadline_s=15), groups[mine], layers=PLAIN) as balancer:
        arm = Arm(rank, num_ranks, PLAIN, balancer)
        sentences = differences(train(arm), expected)
        return arm.num_moves, sentences


@pytest.mark.parametrize("members", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1, 2], [3]]])
def test_domains_of_one_job_work_side_by_side(members: list[list[int]]) -> None:
    outcomes = run_ranks(train_in_domain, NUM_RANKS, members)
    assert [sentences for _, sentences in outcomes] == [[]] * NUM_RANKS
    assert [num_moves > 0 for num_moves, _ in outcomes] == [
        len(ranks) > 1 for rank in range(NUM_RANKS) for ranks in members if rank in ranks
    ]


def alternate(rank: int, num_ranks: int) -> list[str]:
    """Two Balancers of the same ranks, called in turns."""
    specs = (PLAIN, (layer_spec(3, 64, 32),))
    found = []
    with build(specs[0]) as first, build(specs[1]) as second:
        arms = [Arm(rank, num_ranks, specs[i], b) for i, b in enumerate((first, second))]
        weights = [arm.weights() for arm in arms]
        for step in range(3):
            for arm, leaves in zip(arms, weights, strict=True):
                rows, _ = arm.rows(step=step)
                out = arm.run(rows, leaves, step=step)
                expected = Arm(rank, num_ranks, arm.specs, None).run(rows, leaves, step=step)
                found += differences({"out": out}, {"out": expected})
                loss_of(out).backward()
        assert all(arm.num_moves > 0 for arm in arms)
    return found


def test_two_balancers_of_the_same_ranks_work_in_turns() -> None:
    assert run_ranks(alternate, NUM_RANKS) == [[]] * NUM_RANKS
