"""Checks the arms of bench/layer_gpus.py before anything is timed; collective.

Whole experts: the bits of none. Where a plan splits an expert, sums run in another order: close.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from gpu_layer import EXPERTS, LAYER, GpuLayer, MicroBatch
from layer_arms import CEILING, NO_BALANCER, NONE, Arm, pieces_under
from layer_check import results_of
from node_layer import everywhere
from torch import Tensor

from feplb.scheduler import Plan
from feplb.scheduler.workloads import Rows

# Of the largest value, in roundings of the dtype: sums of many terms, in another order.
ROUNDINGS = 8
CHECKED = ("output", "grad of rows", "grad of w1", "grad of w2", "grad of the router")


def check(layer: GpuLayer, batch: MicroBatch) -> dict[str, Plan]:
    """Run every arm once; what each policy's plan was.

    Raises:
        RuntimeError: on every rank, where any arm on any rank computes what it should not.
    """
    wrong: list[str] = []
    arms = batch.arms(EXPERTS)
    none = results_of(arms[NONE])
    wrong += [f"{NONE}: {text}" for text in _plain(layer, batch, arms[NONE], none)]
    plans: dict[str, Plan] = {}
    for name in (NO_BALANCER, *layer.policies):
        seen = results_of(arms[name])
        if name in layer.policies:
            plans[name] = layer.plan(name)
        exact = is_whole(plans.get(name, Plan()), batch.skewed.counts)
        wrong += [f"{EXPERTS}, {name}: {text}" for text in differences(seen, none, exact=exact)]
    for policy, ideal in batch.ideals(plans).items():
        ideal.before()
        seen = results_of(ideal)
        texts = _placed(layer, batch, plans[policy], seen, none)
        wrong += [f"the plan of {policy} in place: {text}" for text in texts]
    del none, arms
    wrong += _layer(layer, batch, plans)
    layer.end_step()
    found = [f"rank {r}: {text}" for r, texts in enumerate(everywhere(wrong)) for text in texts]
    if found:
        raise RuntimeError("\n".join([*found[:20], "Nothing was timed."]))
    return plans


def is_whole(plan: Plan, counts: Rows) -> bool:
    """Whether every expert that moves does so with all its rows."""
    return all(move.num_rows == counts[move.owner_rank, move.expert_idx] for move in plan.moves)


def differences(seen: Sequence[Tensor], truth: Sequence[Tensor], *, exact: bool) -> list[str]:
    """What is not as it should be, by name."""
    return [
        f"the {what} is not that of {NONE}"
        for what, mine, theirs in zip(CHECKED, seen, truth, strict=False)
        if not is_same(mine, theirs, exact=exact)
    ]


def is_same(mine: Tensor, theirs: Tensor, *, exact: bool) -> bool:
    """The same bits; or close, where sums may run in another order."""
    if mine.shape != theirs.shape:
        return False
    if exact:
        return torch.equal(
            mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
        )
    if theirs.numel() == 0:
        return True
    off = (mine.float() - theirs.float()).abs().max()
    return bool(off <= ROUNDINGS * torch.finfo(mine.dtype).eps * theirs.float().abs().max())


def _layer(layer: GpuLayer, batch: MicroBatch, plans: dict[str, Plan]) -> list[str]:
    """The arms of the whole layer: dispatched as routed, and as none."""
    wrong, arms, truth = [], batch.arms(LAYER), []
    for name in (NONE, NO_BALANCER, *layer.policies, CEILING):
        seen = results_of(arms[name])
        expected = batch.routing(name).counts[layer.rank].tolist()
        if layer.moe.last_counts != expected:
            wrong.append(f"{LAYER}, {name}: rows {layer.moe.last_counts}, expected {expected}")
        if name == NONE:
            truth = seen
        elif name != CEILING:
            exact = is_whole(plans.get(name, Plan()), batch.skewed.counts)
            texts = differences(seen, truth, exact=exact)
            wrong += [f"{LAYER}, {name}: {text}" for text in texts]
        if name in plans and layer.plan(name) != plans[name]:
            wrong.append(f"{LAYER}, {name}: another plan than in {EXPERTS}")
    return wrong


def _placed(
    layer: GpuLayer, batch: MicroBatch, plan: Plan, seen: Sequence[Tensor], none: Sequence[Tensor]
) -> list[str]:
    """Every piece is what `none` had on its owner."""
    counts, wrong = batch.skewed.counts, []
    pieces = pieces_under(plan, counts, layer.rank)
    starts = [sum(p.num_rows for p in pieces[:i]) for i in range(len(pieces))]
    for owner in range(layer.num_ranks):
        for at, what in enumerate(CHECKED[:4]):
            shape = (int(counts[owner].sum()),) if at < 2 else (counts.shape[1],)
            truth = (
                none[at] if owner == layer.rank else none[at].new_empty(*shape, *none[at].shape[1:])
            )
            dist.broadcast(truth.contiguous() if owner == layer.rank else truth, owner)
            for i, piece in enumerate(pieces):
                whole = piece.num_rows == counts[piece.owner, piece.expert]
                if piece.owner != owner or (at >= 2 and not whole):
                    continue
                mine = seen[at][starts[i] : starts[i] + piece.num_rows] if at < 2 else seen[at][i]
                theirs = truth[piece.rows_of(counts)] if at < 2 else truth[piece.expert]
                if not is_same(mine, theirs, exact=whole):
                    wrong.append(f"the {what} of {piece} is not that of {NONE}")
    return wrong


def _plain(layer: GpuLayer, batch: MicroBatch, arm: Arm, seen: Sequence[Tensor]) -> list[str]:
    """The first expert with rows against SwiGLU written down plainly, in fp32."""
    counts = batch.skewed.counts[layer.rank].tolist()
    expert = next((i for i, count in enumerate(counts) if count), None)
    if expert is None:
        return []
    rows = slice(sum(counts[:expert]), sum(counts[: expert + 1]))
    x, w1, w2 = (
        leaf.detach().float().requires_grad_()
        for leaf in (arm.leaves[0][rows], arm.leaves[1][expert], arm.leaves[2][expert])
    )
    gate, up = (x @ w1.T).chunk(2, dim=1)
    out = (torch.nn.functional.silu(gate) * up) @ w2.T
    grads = torch.autograd.grad(out, [x, w1, w2], arm.grad_out[rows].float())
    mine = (seen[0][rows], seen[1][rows], seen[2][expert], seen[3][expert])
    return [
        f"the {what} of expert {expert} is not SwiGLU's"
        for what, one, plain in zip(CHECKED, mine, (out.detach(), *grads), strict=False)
        if not is_same(one, plain, exact=False)
    ]
