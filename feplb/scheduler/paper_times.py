"""The per-layer times of arXiv 2604.19654, predicted from a model fitted to four of their cells.

Fitted on what the paper gives "before" balancing at EP 2 and 4, and nothing else; predicted are
EP 8 before, and FEPLB at EP 2, 4 and 8. The model, forward and backward each:

    time = row_ms * rows + expert_ms * experts + rest_ms, of the slowest rank

row_ms        one row through one expert. From the paper's GEMM straggler (ms) over its token
              straggler (rows), both before balancing at EP 2 and 4; a backward row costs two.
expert_ms     each expert that a rank computes: launches, weights read, in backward grads written.
rest_ms       what depends on neither: router, permute, dispatch, combine.

expert_ms and rest_ms of forward and of backward solve the two cells of each: four constants, four
cells. A dispatch that takes longer at higher EP is not told apart from rest_ms: with two degrees it
would be a fifth constant. Tiles and the reading of weights are left to expert_ms.

rows are those of the calibrated workload, mean over micro-batches; the cost model adds to FEPLB's
what its copies expose, at the preset's rates (weight grads in fp32 and under the dispatch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from feplb.scheduler.cost_model import CallTime, UnitCosts, predict
from feplb.scheduler.machines import GLM5, Machine, unit_costs
from feplb.scheduler.microbatches import MicroBatch, Source
from feplb.scheduler.plan import Plan, rank_loads
from feplb.scheduler.simulate import PAPER_DYNAMIC, Arm, place

# Milliseconds per MoE layer (forward, backward) by EP degree, as printed in the paper.
BEFORE = {2: (8.2, 14.9), 4: (7.3, 13.2), 8: (6.9, 12.5)}
FEPLB = {2: (7.9, 14.4), 4: (6.8, 12.1), 8: (6.0, 10.6)}
FITTED_ON = (2, 4)
# Before balancing: token straggler in rows, GEMM straggler in milliseconds.
STRAGGLERS = {2: (2278, 0.316), 4: (4649, 0.652)}
PASSES = ("forward", "backward")
ROW_COSTS = (1, 2)  # of forward and backward, in forwards of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What the four cells come to, milliseconds; pairs are (forward, backward)."""

    row_ms: float
    expert_ms: tuple[float, float]
    rest_ms: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure of the paper beside the model's.

    Args:
        arm: before or FEPLB.
        is_fitted: the model was made from this cell, so it says nothing that it agrees.
    """

    ep_size: int
    arm: str
    direction: str
    paper_ms: float
    modelled_ms: float
    is_fitted: bool

    @property
    def off_pct(self) -> float:
        return 100 * (self.modelled_ms / self.paper_ms - 1)


def paper_cells(machine: Machine, *, steps: int, seed: int) -> tuple[Constants, list[Cell]]:
    """The constants, and every cell of the paper's table that the model can speak of.

    Raises:
        ValueError: steps or seed is too small.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps}, expected 1 or more")
    batches = {
        ep: [Source(workload="calibrated", ep_size=ep, seed=seed).make(i) for i in range(steps)]
        for ep in BEFORE
    }
    constants = fitted({ep: _fullest(batches[ep]) for ep in FITTED_ON}, BEFORE)
    cells = [
        Cell(
            ep_size=ep,
            arm=arm,
            direction=PASSES[at],
            paper_ms=paper[ep][at],
            modelled_ms=modelled[at],
            is_fitted=arm == "before" and ep in FITTED_ON,
        )
        for arm, paper in (("before", BEFORE), ("FEPLB", FEPLB))
        for ep in BEFORE
        for modelled in [_modelled(batches[ep], constants, machine, balanced=arm == "FEPLB")]
        for at in range(2)
    ]
    return constants, cells


def fitted(
    fullest: dict[int, float], before: dict[int, tuple[float, float]], num_experts: int = 128
) -> Constants:
    """Constants from the slowest rank's rows, and its times, at two EP degrees."""
    low, high = FITTED_ON
    row_ms = float(np.mean([ms / rows for rows, ms in STRAGGLERS.values()]))
    experts = {ep: num_experts // ep for ep in FITTED_ON}
    expert_ms, rest_ms = [], []
    for at, cost in enumerate(ROW_COSTS):
        left = {ep: before[ep][at] - cost * row_ms * fullest[ep] for ep in FITTED_ON}
        expert_ms.append((left[low] - left[high]) / (experts[low] - experts[high]))
        rest_ms.append(left[low] - expert_ms[-1] * experts[low])
    return Constants(
        row_ms=row_ms,
        expert_ms=(expert_ms[0], expert_ms[1]),
        rest_ms=(rest_ms[0], rest_ms[1]),
    )


def _fullest(batches: Sequence[MicroBatch]) -> float:
    return float(np.mean([rank_loads(batch.counts).max() for batch in batches]))


def _modelled(
    batches: Sequence[MicroBatch], constants: Constants, machine: Machine, *, balanced: bool
) -> tuple[float, float]:
    """Mean milliseconds of forward and backward, un-balanced or under the paper's greedy."""
    rows_per_rank = float(rank_loads(batches[0].counts).mean())
    costs = _costs(constants, machine, rows_per_rank)
    arm = Arm(policy="greedy", num_dynamic=PAPER_DYNAMIC)
    times = []
    for batch in batches:
        plan = place(arm, batch, costs).plan if balanced else Plan()
        time = predict(batch.counts, plan, costs)
        experts = _experts(batch, plan)
        times.append(
            [
                constants.rest_ms[at] + _slowest_ms(call, experts, constants.expert_ms[at])
                for at, call in enumerate((time.forward, time.backward))
            ]
        )
    forward, backward = np.mean(times, axis=0).tolist()
    return forward, backward


def _costs(constants: Constants, machine: Machine, rows_per_rank: float) -> UnitCosts:
    """The machine's copies with the fitted GEMMs: no tiles, no reading of weights of its own."""
    row = round(constants.row_ms * 1e9)
    return replace(
        unit_costs(machine, GLM5, rows_per_rank=rows_per_rank),
        tile_rows=1,
        weight_read=0,
        row_forward=row,
        row_dgrad=row,
        row_wgrad=row,
    )


def _experts(batch: MicroBatch, plan: Plan) -> list[int]:
    """Experts that each rank computes; the plan's are whole ones."""
    experts = (batch.counts > 0).sum(axis=1)
    for move in plan.moves:
        experts[move.owner_rank] -= 1
        experts[move.dst_rank] += 1
    counted: list[int] = experts.tolist()
    return counted


def _slowest_ms(call: CallTime, experts: Sequence[int], expert_ms: float) -> float:
    return max(ps / 1e9 + num * expert_ms for ps, num in zip(call.by_rank, experts, strict=True))
