"""Checks the arms of bench/layer_time.py before anything is timed: each must compute what it says.

Run by both ranks together; what differs raises RuntimeError and ends the bench.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from layer_arms import (
    CEILING,
    NO_BALANCER,
    NONE,
    NUM_RANKS,
    Arm,
    RankLayer,
    Unit,
    ideal_of,
    pieces_under,
    plan_of,
)
from torch import Tensor

from feplb.scheduler import Plan


def check_arms(layer: RankLayer, unit: Unit) -> None:
    """Run every arm of the unit once and raise RuntimeError unless each is right; collective."""
    arms, counts = layer.arms(unit), unit.counts(layer.shape)
    level = unit.level_counts(layer.shape)
    loads = {CEILING: level, NO_BALANCER: counts}
    if set(level.sum(axis=1)) != {layer.shape.experts * unit.rows_per_expert}:
        raise RuntimeError(f"{unit}: the ceiling's loads are {level.sum(axis=1)}")
    none = results_of(arms[NONE])
    for name in (NO_BALANCER, *layer.policies, CEILING):
        seen = results_of(arms[name])
        if name != CEILING:
            _expect_same_bits(f"{unit}, {name} against none", seen, none)
        if unit.scope == "experts" and name in loads:
            num_rows = int(loads[name][layer.rank, 0])
            _check_first_expert(f"{unit}, {name}", arms[name], num_rows, seen)
        dispatched = loads.get(name, counts)[layer.rank].tolist()
        if unit.scope == "layer" and layer.moe.last_counts != dispatched:
            raise RuntimeError(f"{unit}, {name}: {layer.moe.last_counts} rows, not {dispatched}")
    for policy in layer.policies:
        plan, call = plan_of(policy, counts, layer.shape), layer.balancers[policy].last_call(0)
        moves = [[m.expert_idx, m.owner_rank, m.dst_rank, m.row_start, m.row_end]
                 for m in plan.moves]  # fmt: skip
        if call is None or call.moves.tolist() != moves:
            raise RuntimeError(f"{unit}: {policy} ran another plan than its plan_ideal: {moves}")
        seen = results_of(arms[ideal_of(policy, layer.policies)])
        _check_placed(layer, unit, plan, seen, none)


def results_of(arm: Arm) -> list[Tensor]:
    """Its output and the grads of its leaves."""
    for leaf in arm.leaves:
        leaf.grad = None
    out = arm.forward()
    out.backward(arm.grad_out)
    return [out.detach(), *(leaf.grad for leaf in arm.leaves if leaf.grad is not None)]


def _check_placed(
    layer: RankLayer, unit: Unit, plan: Plan, seen: list[Tensor], none: list[Tensor]
) -> None:
    """Every piece has the bits that `none` gave it on its owner."""
    counts = unit.counts(layer.shape)
    pieces = pieces_under(plan, counts, layer.rank)
    if unit.scope == "layer":
        _expect_same_bits(f"{unit}, plan_ideal against none", seen[:2], none[:2])
    whole = {i for i, p in enumerate(pieces) if p.num_rows == counts[p.owner, p.expert]}
    for at in range(4):  # out, grad of rows, w1, w2
        by_row = at < 2
        if by_row and unit.scope == "layer":
            continue
        sizes = counts.sum(axis=1).tolist() if by_row else [layer.shape.experts] * NUM_RANKS
        truth = [none[at].new_empty(size, *none[at].shape[1:]) for size in sizes]
        truth[layer.rank] = none[at]
        for owner, tensor in enumerate(truth):
            dist.broadcast(tensor, owner)
        start = 0
        for i, piece in enumerate(pieces):
            mine = seen[at][start : start + piece.num_rows] if by_row else seen[at][i]
            start += piece.num_rows
            of_owner = truth[piece.owner]
            theirs = of_owner[piece.rows_of(counts)] if by_row else of_owner[piece.expert]
            if by_row or i in whole:
                _expect_same_bits(f"{unit}, plan_ideal, {piece}", [mine], [theirs])


def _check_first_expert(what: str, arm: Arm, num_rows: int, seen: list[Tensor]) -> None:
    """Against SwiGLU written down plainly: another order of additions, hence a tolerance."""
    leaves = [leaf.detach() for leaf in arm.leaves]
    rows, w1, w2 = (t.requires_grad_() for t in (leaves[0][:num_rows], leaves[1][0], leaves[2][0]))
    gate, up = (rows @ w1.T).chunk(2, dim=1)
    out = (torch.nn.functional.silu(gate) * up) @ w2.T
    grads = torch.autograd.grad(out, [rows, w1, w2], arm.grad_out[:num_rows])
    firsts = (seen[0][:num_rows], seen[1][:num_rows], seen[2][0], seen[3][0])
    for mine, plain in zip(firsts, (out.detach(), *grads), strict=True):
        # Sums of up to 4096 terms in fp32: 1e-4 of the largest value is far above rounding and far
        # below a wrong term.
        atol = 1e-4 * float(plain.abs().max())
        torch.testing.assert_close(mine, plain, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def _expect_same_bits(what: str, seen: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for mine, theirs in zip(seen, expected, strict=True):
        if not torch.equal(mine.view(torch.int32), theirs.view(torch.int32)):
            raise RuntimeError(f"{what}: the bits differ. Nothing was timed.")
