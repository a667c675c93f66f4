"""Balancer: the public door. Owns one domain's arena, board, lane and mover.

One object per domain (the ranks that reach each other; for the host lane, the ranks of one host),
found inside the group it is given. Everything collective happens in the constructor and in
``check()``; ``close()`` needs nobody.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import late_grads, two_phase
from .agreed_tiles import agree_on_tiles
from .arguments import check_rows, check_sinks, check_weights, checked_counts
from .call import CallBits, CallRecord, WeightLayout, flatten_weights
from .compute import ExpertCompute
from .config import BalancerConfig, Environment, LayerSpec, check_queues, read_environment
from .connect import Reservation, connect, identity, open_together
from .domain_calls import DomainCalls
from .gpu_costs import layer_costs
from .lanes import gpu_of, lane_name
from .memory import MemoryReport, memory_report
from .peers import Peers, find_domain
from .scheduler.plan import Plan
from .two_phase import ForwardCall

if TYPE_CHECKING:
    from typing_extensions import ParamSpec, Self

    P = ParamSpec("P")

R = TypeVar("R")

logger = logging.getLogger(__name__)

# What a wrong argument may raise while it is looked at; told to the user as ValueError.
_WRONG_ARGUMENT = (ValueError, TypeError, AttributeError, IndexError)


class Ticket(NamedTuple):
    """A call whose counts ``begin`` has published; hand it to ``run_experts`` of the same layer."""

    layer: int
    counts: tuple[int, ...]
    micro_batch: int
    grad_mode: bool


def _ticket_error(layer: int, ticket: Ticket | None, begun: Ticket | None) -> str:
    given = "no ticket" if ticket is None else f"a ticket of layer {ticket.layer}"
    call = "no call" if begun is None else f"layer {begun.layer}"
    return (
        f"run_experts of layer {layer} was given {given}, but the call begun is of {call}; hand "
        "each ticket to the next run_experts, once"
    )


def _read_and_check(config: BalancerConfig, layers: Sequence[LayerSpec]) -> Environment:
    if not layers:
        raise ValueError("Balancer: layers is empty, expected one LayerSpec per MoE layer")
    environment = read_environment()
    if lane_name(config, environment) != "host":
        check_queues(environment, config)
    return environment


def _outside_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """A clean graph break where the surrounding model is compiled; costs nothing where it is not.

    (What ``torch.compiler.disable`` returns sets Dynamo aside in every call.)
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            disabled: Callable[P, R] = torch.compiler.disable(method)
            return disabled(*args, **kwargs)
        return method(*args, **kwargs)

    return call


class Balancer:
    """Balances the experts of a domain's layers, call by call.

    Args:
        config: the same on every rank.
        group: the EP group; None without ``torch.distributed`` (one rank). Split by host into
            domains, each of which balances its own rows. Kept for its lifetime; used in the
            constructor and, where the group has several domains, in ``check()``.
        layers: one spec per layer index, the same on every rank. All layers share one arena.
    Raises:
        ValueError: ranks differ in config, specs, torch version or thread count (both named), or an
            argument is wrong.
        RuntimeError: the machine cannot give what is asked for (shared memory too small, processes
            that cannot be watched, a lane that does not carry data).
    Attributes:
        rank, num_ranks: this rank's place in its domain, and the domain's size.
        global_rank, global_ranks: the same in the numbers of the job, as messages have them.
        memory: what this rank reserves.
        device: where rows, weights and gradients must be: the CPU (host lane) or a GPU (ce, cupy).
        tiles: what all ranks of the group compute 16-bit rows with on GPUs; see agreed_tiles.py.
        domain: the calls under way; for feplb itself.
    Thread/stream: collective over ``group``, blocks. Starts up to four threads per rank.
    """

    def __init__(
        self,
        config: BalancerConfig,
        group: dist.ProcessGroup | None = None,
        layers: Sequence[LayerSpec] = (),
    ) -> None:
        peers = Peers(group)
        environment = peers.together(lambda: _read_and_check(config, layers))[peers.rank]
        if environment.log_level is not None:
            logging.getLogger("feplb").setLevel(environment.log_level.upper())
        self.config = config
        self.layers = tuple(layers)
        self.policy = "none" if environment.off else config.policy
        self._ticket: Ticket | None = None
        ranks = find_domain(peers, environment.domain, moves_nothing=self.policy == "none")
        self.rank, self.num_ranks = ranks.rank, ranks.num_ranks
        self.global_ranks = ranks.global_ranks
        self.global_rank = ranks.global_ranks[ranks.rank]
        # The group, where it has other domains too.
        self._group = peers if ranks.num_ranks < peers.num_ranks else None
        reservation = self._reserve()
        self.memory = reservation.memory
        own = identity(config, self.policy, self.layers, gpu_of(config, environment))
        core, lane = connect(peers, ranks, own, environment, config, reservation)
        try:
            self.tiles = agree_on_tiles(peers, config, self.layers, lane.device)
        except BaseException:
            core.close()  # the traceback keeps this frame, and must not keep mappings
            raise
        for layer, spec in enumerate(self.layers):
            costs = layer_costs(config, spec, lane.rates, lane.machine)
            core.set_costs(layer, asdict(costs))
        open_together(peers, core)
        self.device = lane.device
        self._anchor = torch.empty(0, device=lane.device, requires_grad=True)
        self.domain = DomainCalls(core, ranks, config, self.layers, lane)
        self._stats_at_start: dict[str, int] = core.stats()
        logger.info(
            "rank %d: domain of ranks %s, lane %s, canary ok, %.1f GB/s out, %.1f GB/s in\n%s",
            self.global_rank, self.global_ranks, lane.description,
            lane.rates.out_gbps, lane.rates.in_gbps, self.memory,
        )  # fmt: skip

    def _reserve(self) -> Reservation:
        """Sizes of this domain; a rank alone can move nothing and reserves nothing."""
        from . import _core

        alone = self.num_ranks == 1
        slots = 0 if alone else self.config.num_slots
        grad_slots = 0 if alone else self.config.grad_slots
        shapes = []
        for spec in self.layers:
            max_rows = 0 if alone else spec.max_rows
            shapes.append(
                {
                    "num_local_experts": spec.num_local_experts,
                    "row_bytes": spec.row_bytes,
                    "side_row_bytes": [data.num_bytes for data in spec.row_data],
                    "weight_bytes": [weight.num_bytes for weight in spec.weights],
                    "max_rows": max_rows,
                    "policy": self.policy,
                    "limits": _core.PlanLimits(
                        num_dynamic=self.config.dynamic_experts(spec),
                        num_slots=slots,
                        num_grad_slots=grad_slots,
                        min_tokens=self.config.min_tokens,
                        max_recv_rows=max_rows,
                        max_return_rows=max_rows,
                        max_copies=self.config.copy_budget or 0,
                        target_ppm=round(1e6 * (self.config.target_imbalance or 0)),
                        grain_rows=self.config.grain(self.policy),
                        search_steps=self.config.search_steps or 0,
                    ),
                }
            )
        memory = memory_report(shapes, slots, grad_slots, self.num_ranks)
        return Reservation(shapes, slots, grad_slots, memory)

    # --------------------------------------------------------------------------- the public door

    @_outside_graphs
    def prepare_weights(
        self, weights: Sequence[Tensor | Sequence[Tensor]], *, layer: int
    ) -> list[Tensor | list[Tensor]]:
        """Let this call's weight grads come home late; optional.

        Call it once per ``run_experts``, in the same thread, directly before the layer's dispatch,
        and hand its result to ``run_experts``: autograd then runs its backward after the dispatch's
        backward, where the late grads are awaited and added. Left out, ``run_experts``'s backward
        waits for them itself.

        Args:
            weights: as ``run_experts`` takes them.
            layer: index into ``layers``.
        Returns:
            The same weights, in the same structure.
        Thread/stream: never blocks; its backward blocks until the deadline.
        """
        spec = self._spec(layer)
        layout, flat = flatten_weights(weights, spec.num_local_experts)
        return layout.per_tensor(late_grads.prepare_weights(self.domain, flat))

    @_outside_graphs
    def begin(
        self, counts: Sequence[int] | Tensor, *, layer: int, plan: Plan | None = None
    ) -> Ticket:
        """Publish a call's counts the moment the host has them; optional.

        Planning then runs while the payload is in flight. Exactly one ``run_experts`` of the same
        layer must follow on every rank.

        Args:
            counts: [E] host ints, rows received per local expert.
            layer: index into ``layers``.
            plan: instead of the policy's, where the routing was known ahead (a replay); the same on
                every rank of the domain. ``run_experts`` raises ValueError on every rank, and the
                Balancer stays usable, where it breaks an invariant.
        Returns:
            The ticket to hand to ``run_experts``.
        Raises:
            ValueError: counts of the wrong length, negative or oversized; peers raise too.
        Thread/stream: never blocks (but after an error, until the peers have seen it).
        """
        with self.domain.one_caller("begin"):
            if self._ticket is not None:
                raise RuntimeError(
                    f"begin of layer {layer} (rank {self.global_rank}): the call begun for layer "
                    f"{self._ticket.layer} has not run. Nothing was sent. Run its experts first."
                )
            micro_batch, grad_mode = self._next_micro_batch(layer), torch.is_grad_enabled()
            published = self._begin_forward(layer, micro_batch, grad_mode, counts, plan)
            self._ticket = Ticket(layer, tuple(published), micro_batch, grad_mode)
            return self._ticket

    def _begin_forward(
        self, layer: int, micro_batch: int, grad_mode: bool, counts: Sequence[int] | Tensor,
        plan: Plan | None,
    ) -> list[int]:  # fmt: skip
        """Publish a forward's counts; returns them as host ints."""
        self.domain.refuse_capture(layer, micro_batch)
        if (
            plan is None
            and type(counts) is list
            and self._knows(layer)
            and self.domain.begin_forward(layer, micro_batch, grad_mode, counts)
        ):
            return counts
        try:
            checked = checked_counts(counts, self._spec(layer).num_local_experts)
            given = None if plan is None else plan.as_array()
        except _WRONG_ARGUMENT as error:
            self.domain.refuse(layer, micro_batch, error)
        self.domain.publish_forward(layer, micro_batch, int(grad_mode), checked, given)
        return checked

    @_outside_graphs
    def run_experts(
        self,
        rows: Tensor,
        counts: Sequence[int] | Tensor,
        weights: Sequence[Tensor | Sequence[Tensor]],
        compute: ExpertCompute,
        *,
        layer: int,
        row_data: Sequence[Tensor] = (),
        ticket: Ticket | None = None,
        grad_sinks: Sequence[Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """Run a layer's experts, balanced over the domain.

        Args:
            rows: [N, H] of the spec's dtype, contiguous, sorted by local expert.
            counts: [E] host ints, rows per local expert, adding up to N.
            weights: per tensor of an expert, stacked [E, *S] or E tensors [*S]; or what
                ``prepare_weights`` returned for them. Read until this returns, by their owner.
            compute: what an expert computes, the same on every rank.
            layer: index into ``layers``; every rank runs the same layers in the same order.
            row_data: side data that travels with its rows, each [N, *D] as the spec says.
            ticket: what ``begin`` returned for this call.
            grad_sinks: [tensor][expert] tensors (Megatron's ``main_grad``): weight grads are added
                there instead, and autograd gets zeros.
        Returns:
            [N, H], in the order of ``rows``.
        Raises:
            ValueError: an argument is wrong, by name. Without a ticket nothing was sent, the peers
                raise RuntimeError naming this rank, and the Balancer stays usable; with one (peers
                already wait for this rank's rows) it is closed on every rank.
            RuntimeError: a peer died, timed out, refused, or ranks disagree about the call.
        Thread/stream: one call at a time; blocks, GIL released, until its deadline.
        """
        with self.domain.one_caller("run_experts"):
            begun = self._take_ticket(ticket, layer)
            micro_batch = begun.micro_batch if begun else self._next_micro_batch(layer)
            try:
                if begun is not ticket:
                    raise ValueError(_ticket_error(layer, ticket, None))
                spec = self._spec(layer)
                layout, flat = flatten_weights(weights, spec.num_local_experts)
                check_weights(layout, flat, spec, self.device)
                check_sinks(grad_sinks, spec)
                call = self._forward_call(
                    rows, counts, layout, flat, compute, spec, layer, micro_batch, row_data, begun,
                    grad_sinks,
                )  # fmt: skip
            except _WRONG_ARGUMENT as error:
                if begun is None:
                    self.domain.refuse(layer, micro_batch, error)
                self.domain.core.fail(f"layer {layer}, micro-batch {micro_batch}: {error}")
                raise
            return two_phase.run_experts(call, self._anchor, rows, tuple(row_data), flat)

    @_outside_graphs
    def check(self) -> None:
        """End a step, before the optimizer uses its gradients; collective.

        Takes home weight grads that no backward has asked for, waits until everything enqueued on
        this rank has run, and meets every rank.

        Raises:
            RuntimeError: whatever went wrong in this step, on any rank.
        Thread/stream: blocks, GIL released, until its deadline.
        """
        with self.domain.one_caller("check"):
            try:
                self.domain.meet()
            except RuntimeError as error:
                if self._group is not None:
                    with contextlib.suppress(RuntimeError):  # this rank has its own error to raise
                        self._group.tell(str(error))
                raise
            if self._group is not None:
                self._hear_other_domains(self._group)
            self.domain.micro_batches = [0] * len(self.layers)

    def _hear_other_domains(self, group: Peers) -> None:
        """Meet the whole group: what went wrong in another domain ends the step here too."""
        where = f"check() (rank {self.global_rank})"
        try:
            texts = group.hear(self.config.deadline_s)
        except RuntimeError as error:
            self.domain.core.fail(f"{where}: not every domain of the group has answered")
            raise RuntimeError(
                f"{where}: not every domain of the group has answered within "
                f"{self.config.deadline_s} s (deadline_s): {error}. The Balancer is closed; "
                "results of this step must not be used."
            ) from error
        for rank, text in zip(group.global_ranks, texts, strict=True):
            if text:
                self.domain.core.fail(f"rank {rank}, in another domain, has failed: {text}")
                raise RuntimeError(
                    f"{where}: rank {rank}, in another domain, has failed: {text} The Balancer is "
                    "closed here too; results of this step must not be used."
                )

    def close(self) -> None:
        """End threads and lane, and give the memory back. Idempotent, not collective.

        Weight grads that are still on their way are taken first, so that a backward still to come
        finds them.
        """
        self.domain.close()

    @property
    def closed(self) -> bool:
        """No call may be made any more."""
        return self.domain.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, _: dict[int, Any]) -> Balancer:
        """A copied model (EMA, say) shares the domain's one Balancer."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Balancer owns threads and shared memory and cannot be pickled")

    def last_call(self, layer: int) -> CallRecord | None:
        """The latest forward call of ``layer``: all ranks' counts and the plan."""
        return self.domain.records.get(layer)

    def lane_stats(self) -> dict[str, int]:
        """Since construction: bytes pushed (rows, weights, returns, grads), copies, CPU ns."""
        stats = self.domain.core.stats()
        stats.pop("last_accepted_ns")
        return {name: value - self._stats_at_start[name] for name, value in stats.items()}

    # ------------------------------------------------------------------------------- arguments

    def _spec(self, layer: int) -> LayerSpec:
        if not self._knows(layer):
            raise ValueError(
                f"layer={layer!r} (rank {self.global_rank}), expected 0 to {len(self.layers) - 1}"
            )
        return self.layers[layer]

    def _next_micro_batch(self, layer: int) -> int:
        """The number of the forward to come; it counts once all ranks have agreed on it."""
        if not self._knows(layer):
            return 0  # it will be refused
        return self.domain.micro_batches[layer]

    def _knows(self, layer: int) -> bool:
        return isinstance(layer, int) and 0 <= layer < len(self.layers)

    def _take_ticket(self, ticket: Ticket | None, layer: int) -> Ticket | None:
        """The ticket of the call that was begun, if any; a wrong one ends it on all ranks."""
        begun, self._ticket = self._ticket, None
        if begun is not None and (ticket is not begun or begun.layer != layer):
            text = f"rank {self.global_rank}: {_ticket_error(layer, ticket, begun)}"
            self.domain.core.fail(text)
            raise RuntimeError(text)
        return begun

    def _forward_call(
        self, rows: Tensor, counts: Sequence[int] | Tensor,
        layout: WeightLayout, flat: Sequence[Tensor], compute: ExpertCompute, spec: LayerSpec,
        layer: int, micro_batch: int, row_data: Sequence[Tensor], ticket: Ticket | None,
        grad_sinks: Sequence[Sequence[Tensor]] | None,
    ) -> ForwardCall:  # fmt: skip
        checked = checked_counts(counts, self.layers[layer].num_local_experts)
        if ticket is not None and tuple(checked) != ticket.counts:
            raise ValueError("counts differ from those that begin() published for this call")
        check_rows(rows, row_data, checked, spec, self.device)
        grad_mode = torch.is_grad_enabled()
        if ticket is not None and grad_mode != ticket.grad_mode:
            raise ValueError("grad mode changed between begin() and run_experts")
        return ForwardCall(
            domain=self.domain,
            layer=layer,
            spec=spec,
            compute=compute,
            counts=checked,
            micro_batch=micro_batch,
            begun=ticket is not None,
            weights=layout,
            bits=CallBits(
                grad_mode=grad_mode,
                rows=rows.requires_grad,
                row_data=tuple(data.requires_grad for data in row_data),
                weights=layout.needs_grad(flat),
            ),
            late=late_grads.late_node_of(flat),
            grad_sinks=grad_sinks,
        )


__all__ = ["Balancer", "CallRecord", "MemoryReport", "Ticket"]
