"""The arms of bench/layer_gpus.py on one of its ranks: one layer, its rows and its Balancers.

Workload: micro-batches of the calibrated workload. Scope "experts": rows are a leaf, in place, and
nothing but a Balancer makes ranks wait for each other. Scope "layer": MoELayer with its routing
forced to the same choices, so router, EP all-to-all, experts and combine.
Legend: R ranks, E experts per rank, N rows of a rank, T tokens of a rank, H hidden, F width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from layer_arms import (
    AGAIN,
    CEILING,
    NO_BALANCER,
    NONE,
    Arm,
    ForcedRouter,
    Piece,
    pieces_under,
    run_balanced,
)
from node_layer import Routing, level
from torch import Tensor

from feplb import Balancer, BalancerConfig, MoEConfig, MoELayer
from feplb.scheduler import Move, Plan
from feplb.scheduler.workloads import calibrated_by_source
from feplb.two_phase import run_experts_locally

EXPERTS, LAYER = SCOPES = ("experts", "layer")
NUM_SLOTS = 8
DEADLINE_S = 60.0
STD = 0.02
# Keys of generators, beside the micro-batch and the owner.
ROWS, GRADS, TOKENS, EVEN = range(4)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The layer, and how much is measured; the same on every rank. The default is GLM-5's.

    Args:
        tokens: of each rank and micro-batch.
        steps: micro-batches, each with a routing of its own.
        rounds: samples of every arm on every micro-batch.
    """

    hidden: int = 6144
    ffn: int = 2048
    num_experts: int = 128
    top_k: int = 8
    tokens: int = 4096
    steps: int = 5
    rounds: int = 10
    seed: int = 2000
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def config(self) -> MoEConfig:
        """Of the layer."""
        return MoEConfig(
            hidden=self.hidden, ffn_hidden=self.ffn, num_experts=self.num_experts,
            top_k=self.top_k, dtype=self.dtype, seed=self.seed,
        )  # fmt: skip

    def bytes_needed(self, ranks: int, num_policies: int) -> int:
        """About what a rank's GPU must have free: an upper estimate, imbalance of 2 included."""
        item = self.dtype.itemsize
        expert = 3 * self.hidden * self.ffn * item
        rows = 2 * self.tokens * self.top_k
        row = self.hidden * item
        # Own and placed weights with their grads; a step's received ones; then arenas.
        experts = (4 * (self.num_experts // ranks + NUM_SLOTS) + NUM_SLOTS * num_policies) * expert
        arenas = (1 + num_policies) * (3 * NUM_SLOTS * expert + 3 * rows * row)
        pools = (6 + 2 * num_policies) * rows * row
        activations = rows * (6 * self.hidden + 8 * self.ffn) * item
        return experts + arenas + pools + activations


def routing_of(size: Size, ranks: int, step: int) -> Routing:
    """One micro-batch: no expert twice in a token."""
    by_source = calibrated_by_source(
        ranks, seed=size.seed, step=step, layer=step, num_experts=size.num_experts,
        num_tokens=size.tokens, top_k=size.top_k,
    )  # fmt: skip
    order, choices = np.random.default_rng(step), []
    for counts in by_source:
        # A draw may give an expert more rows than there are tokens: others get them.
        while (excess := counts - size.tokens).max() > 0:
            counts[counts.argmax()] = size.tokens
            counts[counts.argmin()] += excess.max()
        # Sorted by expert and cut into top_k columns: no expert fills more than one column.
        by_token = np.repeat(np.arange(len(counts)), counts).reshape(size.top_k, -1).T
        choices.append(order.permutation(by_token))
    return Routing(counts=by_source.sum(axis=0).reshape(ranks, -1), choices=np.stack(choices))


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuArm(Arm):
    """before: what must be in place when a sample begins, and is not timed."""

    before: Callable[[], None] = lambda: None


class _DrawnThere(MoELayer):
    """A layer whose experts are drawn where they live, in a second and not in minutes."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        first = self.dispatcher.ep_rank * self.num_local_experts
        for idx in range(self.num_local_experts):
            drawn = draw_expert(self.config, first + idx, self.w1.device)
            self.w1[idx], self.w2[idx] = drawn


def draw_expert(config: MoEConfig, idx: int, device: torch.device) -> tuple[Tensor, ...]:
    """w1 and w2 of an expert by its global index: the same on every rank."""
    generator = torch.Generator(device).manual_seed(config.seed * config.num_experts + idx)
    shapes = (2 * config.ffn_hidden, config.hidden), (config.hidden, config.ffn_hidden)
    return tuple(
        torch.randn(*shape, generator=generator, device=device).mul_(STD).to(config.dtype)
        for shape in shapes
    )


class GpuLayer:
    """One rank's layer, rows and Balancers, from which all arms are made. Collective; close it."""

    def __init__(self, size: Size, policies: Sequence[str]) -> None:
        group = dist.group.WORLD
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.size, self.policies = size, tuple(policies)
        self.device = torch.device(size.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        torch.manual_seed(size.seed)  # the router's weights: equal on every rank
        with self.device:
            self.moe = _DrawnThere(size.config(), None, group)
            self.router = ForcedRouter(size.hidden, size.num_experts, size.top_k)
        self.moe.router = self.router
        self.weights: tuple[Tensor, Tensor] = (self.moe.w1, self.moe.w2)
        self._room: list[Tensor] = []
        spec = size.config().layer_spec(self.num_ranks, max_rows=size.tokens * size.top_k)
        self._open = ExitStack()
        self.balancers = {
            policy: self._open.enter_context(Balancer(self._config(policy), group, [spec]))
            for policy in (NONE, *self.policies)
        }

    def _config(self, policy: str) -> BalancerConfig:
        return BalancerConfig(
            policy=policy, num_slots=NUM_SLOTS, lane="ce", deadline_s=DEADLINE_S
        )  # fmt: skip

    def close(self) -> None:
        """Also after an error."""
        self._open.close()

    def end_step(self) -> None:
        """Raise what went wrong on any rank; collective."""
        for balancer in self.balancers.values():
            balancer.check()

    def plan(self, policy: str) -> Plan:
        """What the policy's latest call did."""
        call = self.balancers[policy].last_call(0)
        if call is None:
            raise RuntimeError(f"{policy} has run no call")
        names = [each.name for each in fields(Move)]
        moves = (dict(zip(names, move, strict=True)) for move in call.moves.tolist())
        return Plan.from_moves(Move(**move) for move in moves)

    def draw(self, *shape: int, key: Sequence[int]) -> Tensor:
        """Normal numbers that depend on every number of ``key`` and on nothing else."""
        seed = self.size.seed
        for number in key:
            seed = seed * 1009 + number + 1
        generator = torch.Generator(self.device).manual_seed(seed % 2**63)
        drawn = torch.randn(*shape, generator=generator, device=self.device)
        return drawn.to(self.size.dtype)


class MicroBatch:
    """One rank's tensors of one micro-batch, and its arms."""

    def __init__(self, layer: GpuLayer, step: int) -> None:
        self._layer, self.step = layer, step
        self.skewed = routing_of(layer.size, layer.num_ranks, step)
        self.even = level(self.skewed, step)
        self._own = (self.pool(layer.rank, ROWS).requires_grad_(), self.pool(layer.rank, GRADS))
        mean, hidden = layer.size.tokens * layer.size.top_k, layer.size.hidden
        self._even = (
            layer.draw(mean, hidden, key=(step, EVEN, layer.rank)).requires_grad_(),
            layer.draw(mean, hidden, key=(step, GRADS, layer.rank)),
        )
        tokens = layer.size.tokens, hidden
        self._tokens = (
            layer.draw(*tokens, key=(step, TOKENS, layer.rank)).requires_grad_(),
            layer.draw(*tokens, key=(step, TOKENS, layer.rank, 1)),
        )

    def pool(self, owner: int, what: int) -> Tensor:
        """[N, H] of any rank: its rows, or the grads of its outputs."""
        num_rows = int(self.skewed.counts[owner].sum())
        return self._layer.draw(num_rows, self._layer.size.hidden, key=(self.step, what, owner))

    def routing(self, name: str) -> Routing:
        """What this arm's tokens choose."""
        return self.even if name == CEILING else self.skewed

    def arms(self, scope: str) -> dict[str, GpuArm]:
        """All but those that run a plan in place."""
        make = self._experts_arm if scope == EXPERTS else self._layer_arm
        names = (NO_BALANCER, AGAIN, NONE, *self._layer.policies, CEILING)
        return {name: make(name) for name in names}

    def _experts_arm(self, name: str) -> GpuArm:
        layer = self._layer
        rows, grad = self._even if name == CEILING else self._own
        counts, balancer = self.routing(name).counts[layer.rank].tolist(), layer.balancers.get(name)
        compute, weights = layer.moe.compute, layer.weights
        forward = partial(run_experts_locally, rows, counts, weights, compute)
        if balancer is not None:
            forward = partial(run_balanced, balancer, rows, counts, weights, compute)
        leaves = (rows, *weights)
        return GpuArm(forward=forward, grad_out=grad, leaves=leaves, balancer=balancer)

    def _layer_arm(self, name: str) -> GpuArm:
        layer = self._layer
        tokens, grad = self._tokens
        choices = torch.from_numpy(self.routing(name).choices[layer.rank]).to(layer.device)
        balancer = layer.balancers.get(name)

        def forward() -> Tensor:
            layer.moe.balancer, layer.router.choices = balancer, choices
            out: Tensor = layer.moe(tokens)
            return out

        leaves = (tokens, *layer.weights, layer.router.weight)
        return GpuArm(forward=forward, grad_out=grad, leaves=leaves, balancer=balancer)

    # ------------------------------------------------------------------------- plans in place

    def ideals(self, plans: Mapping[str, Plan]) -> dict[str, GpuArm]:
        """By policy: its plan's loads with rows and weights in place, in scope "experts"."""
        layer, counts = self._layer, self.skewed.counts
        pieces = {policy: pieces_under(plan, counts, layer.rank) for policy, plan in plans.items()}
        most = max(map(len, pieces.values()))
        if not layer._room or len(layer._room[0]) < most:
            layer._room = []
            layer._room = [w.detach().new_empty(most, *w.shape[1:]) for w in layer.weights]
        return {policy: self._ideal(of_policy) for policy, of_policy in pieces.items()}

    def _ideal(self, pieces: Sequence[Piece]) -> GpuArm:
        layer = self._layer
        rows, grad = (self._placed(pieces, what) for what in (ROWS, GRADS))
        per_rank = self.skewed.counts.shape[1]
        received = {
            i: draw_expert(layer.moe.config, p.owner * per_rank + p.expert, layer.device)
            for i, p in enumerate(pieces)
            if p.owner != layer.rank
        }
        weights = tuple(room[: len(pieces)].detach().requires_grad_() for room in layer._room)

        @torch.no_grad()
        def place() -> None:
            own = [(i, p.expert) for i, p in enumerate(pieces) if i not in received]
            for tensor, room in enumerate(layer._room):
                for i, expert in own:
                    room[i].copy_(layer.weights[tensor][expert])
                for i, drawn in received.items():
                    room[i].copy_(drawn[tensor])

        sizes = [piece.num_rows for piece in pieces]
        rows.requires_grad_()
        forward = partial(run_experts_locally, rows, sizes, weights, layer.moe.compute)
        return GpuArm(forward=forward, grad_out=grad, leaves=(rows, *weights), before=place)

    def _placed(self, pieces: Sequence[Piece], what: int) -> Tensor:
        """Rows of these pieces, one after the other; one owner's pool at a time."""
        counts: Any = self.skewed.counts
        parts: dict[int, Tensor] = {}
        for owner in dict.fromkeys(piece.owner for piece in pieces):
            pool = self.pool(owner, what)
            for i, piece in enumerate(pieces):
                if piece.owner == owner:
                    parts[i] = pool[piece.rows_of(counts)].clone()
        return torch.cat([parts[i] for i in range(len(pieces))])
