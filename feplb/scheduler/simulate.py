"""Tries policies on micro-batches and says what each would bring: loads, copies, modelled time.

Pure mathematics on counts; the time is the cost model's (cost_model.py), never a measurement. Every
plan is checked before it counts: a broken invariant is a RuntimeError.

An EP group wider than a domain is balanced inside each domain only; a layer then waits for the
slowest rank of all domains, and loads are judged over the whole group.

How a rival's Outcome is costed. One that moves rows after the dispatch is costed like ours. One
that reroutes (Outcome.reroutes) sends rows straight to where they are computed, so no row is moved
twice: its rows cost nothing to push, to return or to place, and only its weight copies and their
grads travel; each of these pays the fixed time of a copy. What it pays for knowing the counts
before its dispatch is left out, in its favour. Copies made ahead (copies_ahead) cost no push
either. A copy that got no row still travels. An ideal (is_ideal) takes the ceiling's time.

Worked example, 2 ranks, one expert each, 6 and 2 rows, a row takes 10 ps to compute, all else
nothing, no backward: un-balanced 60 ps, ceiling 40. A plan that moves 1 row takes 50: it recovers
50 %, and removes half of the token straggler (6 - 4 rows before, 5 - 4 after).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from feplb.scheduler.baselines import (
    BASELINES,
    Baseline,
    BaselineInput,
    Outcome,
    outcome_violations,
)
from feplb.scheduler.cost_model import LayerTime, UnitCosts, predict
from feplb.scheduler.microbatches import MicroBatch
from feplb.scheduler.plan import Move, Plan, PlanLimits, plan_violations, rank_loads
from feplb.scheduler.policies import POLICIES, load_core, make_plan
from feplb.scheduler.program import split_floor

PAPER_DYNAMIC = 4  # dynamic experts per rank of the paper's greedy, and its slots below
PAPER_SLOTS = 8
# Who may leave a rank with more rows than the fullest had, by the rules of its own papers.
MAY_EXCEED = {"fastermoe", "eplb_previous", "eplb_oracle", "lplb"}
MAY_EXCEED |= {"llep", "llep_1.0", "llep_1.1"}

BestLoad = Callable[["Arm", npt.NDArray[np.int64], Plan], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A policy with its parameters.

    Args:
        policy: a name of POLICIES or BASELINES; of both, ours.
        copies_per_rank: weight copies that a plan may have, times the ranks of a domain; None: as
            the core chooses.
        grain_rows: of split; None where it has no meaning.
        target: max / mean to be reached; 0: the least there is.
        num_dynamic: the last so many experts of each rank may move; None: all.
        num_slots: experts of others that a rank can hold.
        baseline: a rival with other parameters than BASELINES has; policy is then its label.
    """

    policy: str
    copies_per_rank: int | None = None
    grain_rows: int | None = None
    target: float = 0.0
    num_dynamic: int | None = None
    num_slots: int = PAPER_SLOTS
    baseline: Baseline | None = None

    @property
    def is_ours(self) -> bool:
        return self.baseline is None and self.policy in POLICIES

    @property
    def label(self) -> str:
        """For a table: the policy and what tells it from its other variants."""
        budget = "" if self.copies_per_rank is None else f" {self.copies_per_rank}R"
        return self.policy + budget + ("" if self.grain_rows is None else f" g{self.grain_rows}")

    def limits(self, counts: npt.NDArray[np.int64]) -> PlanLimits:
        """Of a domain with these counts. Rows in and out are not limited, only slots are."""
        num_ranks, num_local_experts = counts.shape
        dynamic = num_local_experts if self.num_dynamic is None else self.num_dynamic
        return PlanLimits(
            num_dynamic=min(dynamic, num_local_experts),
            num_slots=self.num_slots,
            num_grad_slots=self.num_slots,
            max_recv_rows=int(counts.sum()),
            max_return_rows=int(counts.sum()),
            max_copies=(self.copies_per_rank or 0) * num_ranks,
            target_ppm=round(self.target * 1e6),
            grain_rows=128 if self.grain_rows is None else self.grain_rows,
        )


def arms_of(policies: Iterable[str]) -> list[Arm]:
    """The arms of these policies: refine with R and 2R copies, split in grains of 128 and 16 rows.

    Raises:
        ValueError: a name that is neither one of ours nor a rival's.
    """
    known = dict.fromkeys((*POLICIES, *BASELINES))
    arms: list[Arm] = []
    for policy in policies:
        if policy not in known:
            raise ValueError(f"policy {policy!r}, expected one of {', '.join(known)}")
        if policy == "greedy":
            arms.append(Arm(policy=policy, num_dynamic=PAPER_DYNAMIC))
        elif policy == "refine":
            arms += [Arm(policy=policy, copies_per_rank=copies) for copies in (1, 2)]
        elif policy == "split":
            arms += [Arm(policy=policy, grain_rows=grain) for grain in (128, 16)]
        else:
            arms.append(Arm(policy=policy))
    return arms


def place(arm: Arm, domain: MicroBatch, costs: UnitCosts) -> Outcome:
    """What the arm does with one domain's micro-batch, checked.

    Raises:
        RuntimeError: the plan breaks an invariant.
    """
    if not arm.is_ours:
        return _rival(arm, domain)
    limits = arm.limits(domain.counts)
    plan = make_plan(
        arm.policy, domain.counts, limits, costs=costs if arm.policy == "auto" else None
    )
    _refuse(arm, plan_violations(plan, domain.counts, limits))
    return Outcome(policy=arm.policy, plan=plan, reroutes=False)


def _rival(arm: Arm, domain: MicroBatch) -> Outcome:
    given = BaselineInput(previous=domain.previous, by_source=domain.by_source)
    baseline = BASELINES[arm.policy] if arm.baseline is None else arm.baseline
    outcome = baseline(domain.counts, given)
    num_ranks, num_local_experts = domain.counts.shape
    total = int(domain.counts.sum())
    roomy = PlanLimits(
        num_dynamic=num_local_experts,
        num_slots=domain.counts.size,
        num_grad_slots=domain.counts.size * num_ranks,
        max_recv_rows=total,
        max_return_rows=total,
    )
    found = plan_violations(outcome.plan, domain.counts, roomy)
    _refuse(arm, found + outcome_violations(outcome, domain.counts))
    return outcome


def _refuse(arm: Arm, violations: Sequence[str]) -> None:
    if arm.policy in MAY_EXCEED:
        violations = [text for text in violations if not text.startswith("the fullest rank")]
    if violations:
        raise RuntimeError(f"{arm.label} made an invalid plan: " + "; ".join(violations))


# ------------------------------------------------------------------------------- modelled time


@lru_cache(maxsize=64)
def costs_of(costs: UnitCosts, *, reroutes: bool, copies_ahead: bool) -> UnitCosts:
    """The layer's costs as a rival's way of moving meets them; see the top of this file."""
    if reroutes:
        costs = replace(
            costs,
            row_push=0,
            row_push_backward=0,
            row_return=0,
            row_return_backward=0,
            row_place=0,
            weight_push=costs.weight_push + costs.copy,
            grad_push=costs.grad_push + costs.copy,
            copy=0,
        )
    return replace(costs, weight_push=0) if copies_ahead else costs


def time_of(counts: npt.ArrayLike, outcome: Outcome, costs: UnitCosts) -> LayerTime:
    """Modelled time of one domain under an outcome that is not ideal."""
    moves = list(outcome.plan.moves)
    with_rows = {(move.owner_rank, move.expert_idx, move.dst_rank) for move in moves}
    moves += [
        Move(expert_idx=idx, owner_rank=owner, dst_rank=dst, row_start=0, row_end=0)
        for owner, idx, dst in outcome.copies
        if (owner, idx, dst) not in with_rows
    ]
    met = costs_of(costs, reroutes=outcome.reroutes, copies_ahead=outcome.copies_ahead)
    return predict(counts, moves, met)


def slowest(times: Sequence[LayerTime]) -> int:
    """Picoseconds of a layer whose ranks lie in several domains: each pass ends with the last."""
    forward = max(time.forward.slowest for time in times)
    return forward + max(time.backward.slowest for time in times)


def even_share(unbalanced: Sequence[LayerTime]) -> int:
    """The ceiling over several domains, picoseconds: all un-balanced work spread evenly."""
    by_rank = [ps for time in unbalanced for ps in (*time.forward.by_rank, *time.backward.by_rank)]
    return 2 * sum(by_rank) // max(1, len(by_rank))


# ------------------------------------------------------------------------- one micro-batch, one arm


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one arm did with one micro-batch of the whole EP group.

    Args:
        mean_load, max_before, max_after: rows per rank.
        none_ps, plan_ps, ceiling_ps: modelled forward and backward of the layer.
        copies: weight copies, all ranks together.
        copies_of_owner: of the rank that sends most of them.
        moved_rows: rows that another rank than the owner computes.
        engine_ps: how long the busiest copy engine works, modelled; 0 if not asked for.
        most_rows: the most that one rank gave away or took in.
        reroutes: those rows went straight there, not by way of their owner.
        best_load: the least rows of the fullest rank that this kind of plan allows, where known.
    """

    mean_load: float
    max_before: int
    max_after: int
    none_ps: int
    plan_ps: int
    ceiling_ps: int
    copies: int
    copies_of_owner: int
    moved_rows: int
    engine_ps: int = 0
    most_rows: int = 0
    reroutes: bool = False
    best_load: int | None = None

    @property
    def max_over_mean(self) -> float:
        return self.max_after / self.mean_load if self.mean_load else 1.0

    @property
    def recovered(self) -> float | None:
        """Share of the way from un-balanced to the ceiling; None where there is no way to go."""
        way = self.none_ps - self.ceiling_ps
        return (self.none_ps - self.plan_ps) / way if way > 0 else None


def samples_of(
    micro_batch: MicroBatch,
    arms: Sequence[Arm],
    costs: UnitCosts,
    *,
    domain: int,
    with_engines: bool = False,
    best_load: BestLoad | None = None,
) -> list[Sample]:
    """Every arm on one micro-batch, in the arms' order.

    Args:
        domain: ranks that reach each other; must divide the EP group.
        with_engines: Sample.engine_ps is wanted; slower.
        best_load: asked where no closed form says how far a domain's plan is from the best.
    """
    domains = micro_batch.domains(domain)
    unbalanced = [predict(each.counts, (), costs) for each in domains]
    group = _Group(domains, unbalanced, costs, with_engines)
    return [_sample(arm, group, best_load) for arm in arms]


def _sample(arm: Arm, group: _Group, best_load: BestLoad | None) -> Sample:
    domains = group.domains
    outcomes = [place(arm, each, group.costs) for each in domains]
    pairs = list(zip(outcomes, domains, strict=True))
    before = np.concatenate([rank_loads(each.counts) for each in domains])
    after = np.concatenate([outcome.loads_after(each.counts) for outcome, each in pairs])
    copies = [_copies(outcome) for outcome in outcomes]
    best = [_best_load(arm, each.counts, outcome, best_load) for outcome, each in pairs]
    known = [rows for rows in best if rows is not None]
    plan_ps, engine_ps = group.time_under(outcomes)
    return Sample(
        mean_load=float(before.mean()),
        max_before=int(before.max()),
        max_after=int(after.max()),
        none_ps=slowest(group.unbalanced),
        plan_ps=plan_ps,
        ceiling_ps=even_share(group.unbalanced),
        copies=sum(sum(owners.values()) for owners in copies),
        copies_of_owner=max(max(owners.values(), default=0) for owners in copies),
        moved_rows=sum(outcome.num_rows_moved for outcome in outcomes),
        engine_ps=engine_ps,
        most_rows=max(_most_rows(outcome.plan) for outcome in outcomes),
        reroutes=outcomes[0].reroutes,
        best_load=max(known) if len(known) == len(best) else None,
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """One micro-batch of an EP group: its domains, and their modelled times without a plan."""

    domains: list[MicroBatch]
    unbalanced: list[LayerTime]
    costs: UnitCosts
    with_engines: bool

    def time_under(self, outcomes: Sequence[Outcome]) -> tuple[int, int]:
        """Modelled picoseconds of the layer, and of the busiest engine (0 if not asked for)."""
        first = outcomes[0]
        if first.is_ideal:
            # It balances inside each domain, so the layer still waits for the fullest domain.
            return max(even_share([none]) for none in self.unbalanced), 0
        if len(outcomes) == 1 and not self.with_engines and not first.copies:
            return self._by_core(first.plan), 0
        times = [
            time_of(each.counts, outcome, self.costs)
            if outcome.plan.moves or outcome.copies
            else none
            for outcome, each, none in zip(outcomes, self.domains, self.unbalanced, strict=True)
        ]
        engines = [max(time.forward.engine) + max(time.backward.engine) for time in times]
        return slowest(times), max(engines)

    def _by_core(self, plan: Plan) -> int:
        """The core's twin of predict(): the same figure, many times faster, for one domain."""
        if not plan.moves:
            return self.unbalanced[0].total
        moves = [
            (m.expert_idx, m.owner_rank, m.dst_rank, m.row_start, m.row_end) for m in plan.moves
        ]
        counts = self.domains[0].counts.astype(np.int32)
        time: int = load_core().predict(counts, np.array(moves, dtype=np.int32), asdict(self.costs))
        return time


def _copies(outcome: Outcome) -> Counter[int]:
    """Weight copies by the rank that sends them."""
    if outcome.copies or outcome.is_ideal:
        return Counter(copy.owner_rank for copy in outcome.copies)
    pairs = {(move.owner_rank, move.expert_idx, move.dst_rank) for move in outcome.plan.moves}
    return Counter(owner for owner, _, _ in pairs)


def _most_rows(plan: Plan) -> int:
    given: Counter[int] = Counter()
    taken: Counter[int] = Counter()
    for move in plan.moves:
        given[move.owner_rank] += move.num_rows
        taken[move.dst_rank] += move.num_rows
    return max([*given.values(), *taken.values()], default=0)


def _best_load(
    arm: Arm, counts: npt.NDArray[np.int64], outcome: Outcome, best_load: BestLoad | None
) -> int | None:
    """Least rows of the fullest rank: by row ranges in closed form, else as best_load says."""
    if arm.policy == "split" and arm.is_ours:
        return split_floor(rank_loads(counts), arm.limits(counts).grain_rows)
    if outcome.reroutes:
        return split_floor(rank_loads(counts), 1)
    return None if best_load is None else best_load(arm, counts, outcome.plan)
