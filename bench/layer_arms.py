"""The arms of bench/layer_time.py on one of its two ranks, and the check that each is right.

An arm is a forward whose output gets a gradient; all arms of a unit compute the same experts on
rows of one pool. Scope "experts": rows are a leaf, in place. Scope "layer": MoELayer with its
routing forced to the same loads, so router, EP all-to-all, experts and combine.
Legend: R = 2 ranks, E experts per rank, N rows of a rank, T tokens of a rank, H hidden, F width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from feplb import Balancer, BalancerConfig, ExpertCompute, LayerSpec
from feplb.compute import Saved
from feplb.costs import CPU_GFLOPS_PER_THREAD, LaneRates, predicted_costs
from feplb.moe import MoEConfig, MoELayer
from feplb.router import TopKRouter
from feplb.scheduler import Plan, PlanLimits, make_plan, plan_violations
from feplb.scheduler.workloads import Rows, lognormal_loads
from feplb.two_phase import run_experts_locally

NUM_RANKS = 2
NUM_SLOTS = 8
SIGMA = 0.3
NO_BALANCER, AGAIN, NONE, IDEAL, CEILING = (
    *("no_balancer", "no_balancer_aa", "none", "plan_ideal", "ceiling"),
)
EMPTY_HIDDEN = 16  # of the layer whose experts compute nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One layer; experts are per rank."""

    hidden: int
    ffn: int
    experts: int = 16
    top_k: int = 4
    max_rows_per_expert: int = 256

    def weight_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (2 * self.ffn, self.hidden), (self.hidden, self.ffn)

    def limits(self) -> PlanLimits:
        """What the Balancers are built with."""
        rows = self.experts * self.max_rows_per_expert
        return PlanLimits(
            num_dynamic=self.experts,
            num_slots=NUM_SLOTS,
            num_grad_slots=NUM_SLOTS,
            max_recv_rows=rows,
            max_return_rows=rows,
            grain_rows=0,
        )

    def spec(self) -> LayerSpec:
        """As the Balancers take it."""
        return LayerSpec(
            self.experts, self.hidden, torch.float32, self.weight_shapes(),
            max_rows=self.limits().max_recv_rows,
        )  # fmt: skip


def config_of(policy: str) -> BalancerConfig:
    """The Balancers'. A lane rate of the host lane's usual size, and not this start's measured one,
    so that the plan of `auto` is known before it runs; whole experts, whose bits are compared."""
    return BalancerConfig(
        policy=policy, num_slots=NUM_SLOTS, split_experts=False, lane_gbps=10.0,
        gemm_gflops=CPU_GFLOPS_PER_THREAD,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One workload in one scope: the arms of a unit are compared with each other."""

    rows_per_expert: int
    imbalance: float
    seed: int
    scope: str = "experts"

    def counts(self, shape: Shape) -> Rows:
        """[R, E] rows of each expert; no_balancer, none and every policy run these."""
        counts: Rows = lognormal_loads(
            NUM_RANKS,
            shape.experts,
            rows_per_expert=self.rows_per_expert,
            sigma=SIGMA,
            imbalance=self.imbalance,
            seed=self.seed,
        )
        return counts

    def level_counts(self, shape: Shape) -> Rows:
        """[R, E] of the ceiling: each rank's sizes scaled to exactly the mean rank load."""
        mean = shape.experts * self.rows_per_expert
        return np.stack([scaled(sizes, mean) for sizes in self.counts(shape)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What one sample runs. leaves: rows or tokens first, then w1, w2 and what else has grads."""

    forward: Callable[[], Tensor]
    grad_out: Tensor
    leaves: tuple[Tensor, ...]
    balancer: Balancer | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [row_start, row_end) of one expert, as the plan lets one rank compute them."""

    owner: int
    expert: int
    row_start: int
    row_end: int

    @property
    def num_rows(self) -> int:
        return self.row_end - self.row_start

    def rows_of(self, counts: Rows) -> slice:
        """Where the piece lies in its owner's rows."""
        first = int(counts[self.owner, : self.expert].sum())
        return slice(first + self.row_start, first + self.row_end)


def scaled(sizes: Rows, total: int) -> Rows:
    """sizes in the same proportions but adding up to total, largest remainders first."""
    exact = sizes * (total / sizes.sum())
    rows: Rows = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(rows - exact, kind="stable")
    rows[by_remainder[: total - int(rows.sum())]] += 1
    return rows


def pieces_under(plan: Plan, counts: Rows, rank: int) -> list[Piece]:
    """What `rank` computes under the plan: what it keeps, by expert, then what it receives."""
    kept: list[Piece] = []
    for expert, rows in enumerate(counts[rank].tolist()):
        at = 0
        for move in plan.moves:  # ordered by owner, expert, row_start
            if (move.owner_rank, move.expert_idx) == (rank, expert):
                kept.append(Piece(rank, expert, at, move.row_start))
                at = move.row_end
        kept.append(Piece(rank, expert, at, rows))
    received = [
        Piece(move.owner_rank, move.expert_idx, move.row_start, move.row_end)
        for move in plan.moves
        if move.dst_rank == rank
    ]
    return [piece for piece in kept if piece.num_rows] + received


def plan_of(policy: str, counts: Rows, shape: Shape) -> Plan:
    """What a Balancer of this policy will do; check_arms compares."""
    costs = predicted_costs(config_of(policy), shape.spec(), LaneRates(0, 0))
    plan = make_plan(policy, counts, shape.limits(), costs=costs)
    if violations := plan_violations(plan, counts, shape.limits()):
        raise RuntimeError(f"{policy}: " + "; ".join(violations))
    return plan


class Routing:
    """Choices [T, k] of every rank's tokens that give exactly these counts, no expert twice."""

    def __init__(self, counts: Rows, top_k: int) -> None:
        self.counts = counts
        flat = counts.reshape(-1)
        odd = np.cumsum(flat % 2) % 2 * (flat % 2)  # 1 for every other odd expert
        by_source = np.stack([flat // 2 + odd, flat - flat // 2 - odd])
        num_tokens = int(flat.sum()) // (NUM_RANKS * top_k)
        if by_source.max() > num_tokens or set(by_source.sum(axis=1)) != {num_tokens * top_k}:
            raise ValueError(f"counts {counts.tolist()} cannot be routed with top_k={top_k}")
        # Sorted by expert and cut into top_k columns: no expert fills more than one column.
        experts = [np.repeat(np.arange(flat.size), of_rank) for of_rank in by_source]
        self.choices = [each.reshape(top_k, num_tokens).T.copy() for each in experts]
        self._first = np.stack([np.zeros_like(flat), by_source[0]])

    def to_pieces(self, pieces: Sequence[Sequence[Piece]]) -> list[np.ndarray]:
        """The same choices where the i-th piece of rank r is expert r * most + i."""
        most = max(map(len, pieces))
        routed = []
        for first, choices in zip(self._first, self.choices, strict=True):
            row = np.zeros_like(choices)  # of each choice, within its expert on the owner
            for expert in np.unique(choices):
                tokens = choices == expert
                row[tokens] = first[expert] + np.arange(tokens.sum())
            target = np.full_like(choices, -1)
            for rank, of_rank in enumerate(pieces):
                for i, piece in enumerate(of_rank):
                    expert = piece.owner * self.counts.shape[1] + piece.expert
                    within = (row >= piece.row_start) & (row < piece.row_end)
                    target[(choices == expert) & within] = rank * most + i
            routed.append(target)
        return routed


class ForcedRouter(TopKRouter):
    """Does all the work of a router, then hands out the choices it was told."""

    choices: Tensor

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        _, topk_weights = super().forward(tokens)
        return self.choices, topk_weights


class EmptyCompute(ExpertCompute):
    """Experts that compute nothing: what is left is the price of the call."""

    def forward(self, *_: Any, **__: Any) -> Saved:
        return Saved(())

    def backward_rows(self, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        return ()

    def backward_weights(self, *_: Any, **__: Any) -> None:
        return None


class RankLayer:
    """One rank's weights, rows and Balancers, from which the arms of every unit are made."""

    def __init__(self, rank: int, shape: Shape, policies: Sequence[str]) -> None:
        self.rank, self.shape, self.policies = rank, shape, tuple(policies)
        group = dist.group.WORLD
        num_experts = NUM_RANKS * shape.experts
        config = MoEConfig(
            hidden=shape.hidden, ffn_hidden=shape.ffn, num_experts=num_experts, top_k=shape.top_k
        )
        self.moe = MoELayer(config, None, group)
        self.router = ForcedRouter(shape.hidden, num_experts, shape.top_k)
        self.moe.router = self.router
        self.weights: tuple[Tensor, Tensor] = (self.moe.w1, self.moe.w2)
        self.all_weights = [torch.cat(everywhere(w.detach())) for w in self.weights]
        self._placed: dict[str, list[Tensor]] = {}
        pool = torch.Generator().manual_seed(0)
        sizes = (NUM_RANKS, NUM_RANKS * shape.limits().max_recv_rows, shape.hidden)
        self.rows = torch.randn(sizes, generator=pool)  # of every owner, so that helpers have them
        self.grads = torch.randn(sizes, generator=pool)
        self._open = ExitStack()
        sides = Shape(hidden=EMPTY_HIDDEN, ffn=EMPTY_HIDDEN).weight_shapes()
        empty = LayerSpec(shape.experts, EMPTY_HIDDEN, torch.float32, sides)
        self.balancers = {
            policy: self._open.enter_context(
                Balancer(config_of(policy), group, layers=[shape.spec(), empty])
            )
            for policy in (NONE, *self.policies)
        }

    def close(self) -> None:
        self._open.close()

    def end_step(self) -> None:
        """Raise what went wrong on any rank; collective."""
        for balancer in self.balancers.values():
            balancer.check()

    def arms(self, unit: Unit) -> dict[str, Arm]:
        """Every arm of the unit, by name."""
        make = self._experts_arms if unit.scope == "experts" else self._layer_arms
        return make(unit)

    def place(self, policy: str, pieces: Sequence[Piece]) -> tuple[Tensor, ...]:
        """The weights of these pieces as parameters of this rank; the policy's next unit's too."""
        most = self.shape.experts + NUM_SLOTS
        if policy not in self._placed:
            self._placed[policy] = [torch.empty(most, *s) for s in self.shape.weight_shapes()]
        placed = []
        for target, source in zip(self._placed[policy], self.all_weights, strict=True):
            for i, piece in enumerate(pieces):
                target[i] = source[piece.owner * self.shape.experts + piece.expert]
            placed.append(target[: len(pieces)].detach().requires_grad_())
        return tuple(placed)

    def _experts_arms(self, unit: Unit) -> dict[str, Arm]:
        counts = unit.counts(self.shape)
        here, compute = self.rank, self.moe.compute
        whole = slice(0, int(counts[here].sum()))
        rows, grad = self.rows[here, whole].clone().requires_grad_(), self.grads[here, whole]

        def without(rows: Tensor, grad: Tensor, sizes: list[int], weights: Any) -> Arm:
            forward = partial(run_experts_locally, rows, sizes, weights, compute)
            return Arm(forward=forward, grad_out=grad, leaves=(rows, *weights))

        def balanced(policy: str) -> Arm:
            balancer, sizes = self.balancers[policy], counts[here].tolist()
            forward = partial(run_balanced, balancer, rows, sizes, self.weights, compute)
            leaves = (rows, *self.weights)
            return Arm(forward=forward, grad_out=grad, leaves=leaves, balancer=balancer)

        arms = {name: without(rows, grad, counts[here].tolist(), self.weights)
                for name in (NO_BALANCER, AGAIN)}  # fmt: skip
        arms |= {policy: balanced(policy) for policy in (NONE, *self.policies)}
        for policy in self.policies:
            pieces = pieces_under(plan_of(policy, counts, self.shape), counts, here)
            placed = [
                torch.cat([pool[p.owner, p.rows_of(counts)] for p in pieces])
                for pool in (self.rows, self.grads)
            ]
            arms[ideal_of(policy, self.policies)] = without(
                placed[0].requires_grad_(), placed[1], [p.num_rows for p in pieces],
                self.place(policy, pieces),
            )  # fmt: skip
        level = unit.level_counts(self.shape)[here].tolist()
        level_rows = self.rows[here, : sum(level)].clone().requires_grad_()
        arms[CEILING] = without(level_rows, self.grads[here, : sum(level)], level, self.weights)
        return arms

    def _layer_arms(self, unit: Unit) -> dict[str, Arm]:
        counts = unit.counts(self.shape)
        routing = Routing(counts, self.shape.top_k)
        level = Routing(unit.level_counts(self.shape), self.shape.top_k)
        num_tokens = len(routing.choices[self.rank])
        tokens = self.rows[self.rank, :num_tokens].clone().requires_grad_()
        grad = self.grads[self.rank, :num_tokens]

        def through_moe(balancer: Balancer | None, choices: list[np.ndarray]) -> Arm:
            chosen = torch.from_numpy(choices[self.rank])
            leaves = (tokens, *self.weights, self.router.weight)
            forward = partial(self._run_layer, balancer, chosen, tokens)
            return Arm(forward=forward, grad_out=grad, leaves=leaves, balancer=balancer)

        arms = {name: through_moe(None, routing.choices) for name in (NO_BALANCER, AGAIN)}
        for policy in (NONE, *self.policies):
            arms[policy] = through_moe(self.balancers[policy], routing.choices)
        for policy in self.policies:
            plan = plan_of(policy, counts, self.shape)
            pieces = [pieces_under(plan, counts, rank) for rank in range(NUM_RANKS)]
            chosen = torch.from_numpy(routing.to_pieces(pieces)[self.rank])
            weights = self.place(policy, pieces[self.rank])
            forward = partial(self._run_placed, chosen, tokens, weights, max(map(len, pieces)))
            leaves = (tokens, *weights, self.router.weight)
            ideal = Arm(forward=forward, grad_out=grad, leaves=leaves)
            arms[ideal_of(policy, self.policies)] = ideal
        arms[CEILING] = through_moe(None, level.choices)
        return arms

    def _run_layer(self, balancer: Balancer | None, choices: Tensor, tokens: Tensor) -> Tensor:
        self.moe.balancer, self.router.choices = balancer, choices
        out: Tensor = self.moe(tokens)
        return out

    def _run_placed(
        self, choices: Tensor, tokens: Tensor, weights: Sequence[Tensor], most: int
    ) -> Tensor:
        """As MoELayer without balancer, but dispatched to where the plan computes the rows."""
        self.router.choices = choices
        topk_idx, topk_weights = self.router(tokens)
        dispatcher = self.moe.dispatcher
        rows, handle = dispatcher.dispatch(tokens, topk_idx, NUM_RANKS * most)
        counts = handle.counts[: len(weights[0])]  # what follows is padding without rows
        out = run_experts_locally(rows, counts, weights, self.moe.compute)
        return dispatcher.combine(out, topk_weights, handle)

    def empty_arms(self) -> dict[str, Arm]:
        """Calls whose experts compute nothing, on tiny tensors: layer 1 of the Balancers."""
        experts, compute = self.shape.experts, EmptyCompute()
        rows = torch.zeros(experts, EMPTY_HIDDEN).requires_grad_()
        sides = Shape(hidden=EMPTY_HIDDEN, ffn=EMPTY_HIDDEN).weight_shapes()
        weights = tuple(torch.zeros(experts, *side).requires_grad_() for side in sides)
        leaves, counts = (rows, *weights), [1] * experts
        local = partial(run_experts_locally, rows, counts, weights, compute)
        calls: dict[str, Callable[[], Tensor]] = {NO_BALANCER: local, AGAIN: local}
        for name, balancer in self.balancers.items():
            calls[name] = partial(run_balanced, balancer, rows, counts, weights, compute, layer=1)
        grad = torch.zeros(experts, EMPTY_HIDDEN)
        return {
            name: Arm(forward=call, grad_out=grad, leaves=leaves) for name, call in calls.items()
        }


def ideal_of(policy: str, policies: Sequence[str]) -> str:
    """The arm that runs a policy's plan in place; the first policy's has the plain name."""
    return IDEAL if policy == policies[0] else f"{IDEAL}_{policy}"


def run_balanced(
    balancer: Balancer, rows: Tensor, counts: list[int], weights: Sequence[Tensor],
    compute: ExpertCompute, *, layer: int = 0,
) -> Tensor:  # fmt: skip
    """The experts of a layer as MoELayer runs them; late weight grads come in the prepare node."""
    prepared = balancer.prepare_weights(weights, layer=layer)
    return balancer.run_experts(rows, counts, prepared, compute, layer=layer)


def everywhere(tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks, equal in shape; collective."""
    tensors = [torch.empty_like(tensor) for _ in range(NUM_RANKS)]
    dist.all_gather(tensors, tensor)
    return tensors
