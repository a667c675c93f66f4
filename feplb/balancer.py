"""Balancer: the public door. Owns one domain's arena, board, lane and mover.

One object per domain (the ranks that reach each other; for the host lane, the ranks of one host),
found inside the group it is given. Everything collective happens in the constructor and in
``check()``; ``close()`` needs nobody.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import late_grads, two_phase
from .arena_views import ArenaViews
from .arguments import check_rows, check_sinks, check_weights, checked_counts
from .call import (
    KIND_BACKWARD,
    KIND_CHECK,
    KIND_FORWARD,
    NO_MOVES,
    Agreement,
    CallBits,
    RoutedMove,
    WeightLayout,
    first_rows,
    flatten_weights,
)
from .compute import ExpertCompute
from .config import BalancerConfig, Environment, LayerSpec, read_environment
from .connect import Reservation, connect, identity
from .late_grads import LateGrads, LateNode
from .memory import MemoryReport, memory_report
from .peers import Peers, find_domain
from .two_phase import ForwardCall

if TYPE_CHECKING:
    from typing_extensions import ParamSpec, Self

    P = ParamSpec("P")

R = TypeVar("R")

logger = logging.getLogger(__name__)

# What a wrong argument may raise while it is looked at; told to the user as ValueError.
_WRONG_ARGUMENT = (ValueError, TypeError, AttributeError, IndexError)
_CPU_GFLOPS_PER_THREAD = 50.0
_LEAST_GBPS = 0.1  # a canary of a few bytes measures latency, not rate


class Ticket(NamedTuple):
    """A call whose counts ``begin`` has published; hand it to ``run_experts`` of the same layer."""

    layer: int
    counts: tuple[int, ...]
    micro_batch: int
    grad_mode: bool


@dataclass(frozen=True)
class CallRecord:
    """What one forward call of a layer decided, for reports.

    Args:
        counts: [num_ranks, E] rows per rank and expert.
        moves: [num_moves, 5] expert_idx, owner_rank, dst_rank, row_start, row_end.
        plan_us: time the plan took in the mover, microseconds.
    """

    counts: np.ndarray
    moves: np.ndarray
    plan_us: float


def _ticket_error(layer: int, ticket: Ticket | None, begun: Ticket | None) -> str:
    given = "no ticket" if ticket is None else f"a ticket of layer {ticket.layer}"
    call = "no call" if begun is None else f"layer {begun.layer}"
    return (
        f"run_experts of layer {layer} was given {given}, but the call begun is of {call}; hand "
        "each ticket to the next run_experts, once"
    )


def _read_and_check(layers: Sequence[LayerSpec]) -> Environment:
    if not layers:
        raise ValueError("Balancer: layers is empty, expected one LayerSpec per MoE layer")
    return read_environment()


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


class _OneCaller:
    """Holds a Balancer for one call. (A generator would cost a microsecond more per call.)"""

    __slots__ = ("_balancer", "_what")

    def __init__(self, balancer: Balancer, what: str) -> None:
        self._balancer, self._what = balancer, what

    def __enter__(self) -> None:
        self._balancer.enter(self._what)

    def __exit__(self, *_: object) -> None:
        self._balancer.leave()


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
    Thread/stream: collective over ``group``, blocks. Starts three threads per rank.
    """

    def __init__(
        self,
        config: BalancerConfig,
        group: dist.ProcessGroup | None = None,
        layers: Sequence[LayerSpec] = (),
    ) -> None:
        peers = Peers(group)
        environment = peers.together(lambda: _read_and_check(layers))[peers.rank]
        if environment.log_level is not None:
            logging.getLogger("feplb").setLevel(environment.log_level.upper())
        self.config = config
        self.layers = tuple(layers)
        self.policy = "none" if environment.off else config.policy
        self._closed = False
        self._caller = threading.Lock()
        self._anchor = torch.empty(0, requires_grad=True)
        self._micro_batches = [0] * len(self.layers)
        self._ticket: Ticket | None = None
        self._late: list[LateNode] = []
        self._records: dict[int, CallRecord] = {}
        self._seq = 0
        domain = find_domain(peers, environment.domain, moves_nothing=self.policy == "none")
        self.rank, self.num_ranks = domain.rank, domain.num_ranks
        self.global_ranks = domain.global_ranks
        self.global_rank = domain.global_ranks[domain.rank]
        # The group, where it has other domains too.
        self._group = peers if domain.num_ranks < peers.num_ranks else None
        reservation = self._reserve()
        self.memory = reservation.memory
        own = identity(config, self.policy, self.layers)
        self.core, rate = connect(peers, domain, own, environment, config, reservation)
        self._lane_gbps = config.lane_gbps or max(rate, _LEAST_GBPS)
        self._views: ArenaViews | None = ArenaViews(self.core, self.layers)
        self._stats_at_start: dict[str, int] = self.core.stats()
        logger.info(
            "rank %d: domain of ranks %s, lane host, canary ok, %.1f GB/s\n%s",
            self.global_rank, self.global_ranks, rate, self.memory,
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
        return layout.per_tensor(late_grads.prepare_weights(self, flat))

    @_outside_graphs
    def begin(self, counts: Sequence[int] | Tensor, *, layer: int) -> Ticket:
        """Publish a call's counts the moment the host has them; optional.

        Planning then runs while the payload is in flight. Exactly one ``run_experts`` of the same
        layer must follow on every rank.

        Args:
            counts: [E] host ints, rows received per local expert.
            layer: index into ``layers``.
        Returns:
            The ticket to hand to ``run_experts``.
        Raises:
            ValueError: counts of the wrong length, negative or oversized; peers raise too.
        Thread/stream: never blocks (but after an error, until the peers have seen it).
        """
        self.enter("begin")
        try:
            if self._ticket is not None:
                raise RuntimeError(
                    f"begin of layer {layer} (rank {self.global_rank}): the call begun for layer "
                    f"{self._ticket.layer} has not run. Nothing was sent. Run its experts first."
                )
            micro_batch, grad_mode = self._next_micro_batch(layer), torch.is_grad_enabled()
            published = self._begin_forward(layer, micro_batch, grad_mode, counts)
            self._ticket = Ticket(layer, tuple(published), micro_batch, grad_mode)
            return self._ticket
        finally:
            self.leave()

    def _begin_forward(
        self, layer: int, micro_batch: int, grad_mode: bool, counts: Sequence[int] | Tensor
    ) -> list[int]:
        """Publish a forward's counts; returns them as host ints."""
        if type(counts) is list and self._knows(layer):  # the short way, read by the core
            seq = self.core.begin_forward(layer, micro_batch, grad_mode, counts)
            if seq:
                self._seq = seq
                return counts
        try:
            checked = checked_counts(counts, self._spec(layer).num_local_experts)
        except _WRONG_ARGUMENT as error:
            self._refuse(layer, micro_batch, error)
        self._begin(KIND_FORWARD, layer, micro_batch, int(grad_mode), checked)
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
        with self.one_caller("run_experts"):
            begun = self._take_ticket(ticket, layer)
            micro_batch = begun.micro_batch if begun else self._next_micro_batch(layer)
            try:
                if begun is not ticket:
                    raise ValueError(_ticket_error(layer, ticket, None))
                spec = self._spec(layer)
                layout, flat = flatten_weights(weights, spec.num_local_experts)
                check_weights(layout, flat, spec)
                check_sinks(grad_sinks, spec)
                call = self._forward_call(
                    rows, counts, layout, flat, compute, spec, layer, micro_batch, row_data, begun,
                    grad_sinks,
                )  # fmt: skip
            except _WRONG_ARGUMENT as error:
                if begun is None:
                    self._refuse(layer, micro_batch, error)
                self.core.fail(f"layer {layer}, micro-batch {micro_batch}: {error}")
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
        with self.one_caller("check"):
            try:
                self._end_step()
            except RuntimeError as error:
                if self._group is not None:
                    with contextlib.suppress(RuntimeError):  # this rank has its own error to raise
                        self._group.tell(str(error))
                raise
            if self._group is not None:
                self._hear_other_domains(self._group)
            self._micro_batches = [0] * len(self.layers)

    def _end_step(self) -> None:
        """What ``check()`` does inside the domain."""
        self.take_unconsumed()
        self.core.drain()
        self._begin(KIND_CHECK, -1, 0, 0, [])
        self._agree("check()")

    def _hear_other_domains(self, group: Peers) -> None:
        """Meet the whole group: what went wrong in another domain ends the step here too."""
        where = f"check() (rank {self.global_rank})"
        try:
            texts = group.hear(self.config.deadline_s)
        except RuntimeError as error:
            self.core.fail(f"{where}: not every domain of the group has answered")
            raise RuntimeError(
                f"{where}: not every domain of the group has answered within "
                f"{self.config.deadline_s} s (deadline_s): {error}. The Balancer is closed; "
                "results of this step must not be used."
            ) from error
        for rank, text in zip(group.global_ranks, texts, strict=True):
            if text:
                self.core.fail(f"rank {rank}, in another domain, has failed: {text}")
                raise RuntimeError(
                    f"{where}: rank {rank}, in another domain, has failed: {text} The Balancer is "
                    "closed here too; results of this step must not be used."
                )

    def close(self) -> None:
        """End threads and lane, and give the memory back. Idempotent, not collective.

        Weight grads that are still on their way are taken first, so that a backward still to come
        finds them.
        """
        if self._closed:
            return
        if not self._caller.acquire(blocking=False):
            self.core.fail(
                f"rank {self.global_rank} closed its Balancer during a call of another thread"
            )
            if not self._caller.acquire(timeout=self.config.deadline_s):
                raise RuntimeError(
                    f"close (rank {self.global_rank}): another thread is inside a call and has "
                    f"not left it for {self.config.deadline_s} s. Nothing was given back."
                )
        self._closed = True
        self._caller.release()
        if not self.core.failure_text():
            with contextlib.suppress(RuntimeError):
                self.take_unconsumed()
        self.core.close()
        self._views = None

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
        return self._records.get(layer)

    def lane_stats(self) -> dict[str, int]:
        """Since construction: bytes pushed (rows, weights, returns), copies, copy-thread CPU ns."""
        stats = self.core.stats()
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
        return self._micro_batches[layer] if self._knows(layer) else 0  # else it will be refused

    def _knows(self, layer: int) -> bool:
        return isinstance(layer, int) and 0 <= layer < len(self.layers)

    def _take_ticket(self, ticket: Ticket | None, layer: int) -> Ticket | None:
        """The ticket of the call that was begun, if any; a wrong one ends it on all ranks."""
        begun, self._ticket = self._ticket, None
        if begun is not None and (ticket is not begun or begun.layer != layer):
            text = f"rank {self.global_rank}: {_ticket_error(layer, ticket, begun)}"
            self.core.fail(text)
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
        check_rows(rows, row_data, checked, spec)
        grad_mode = torch.is_grad_enabled()
        if ticket is not None and grad_mode != ticket.grad_mode:
            raise ValueError("grad mode changed between begin() and run_experts")
        return ForwardCall(
            balancer=self,
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

    # ------------------------------------------------------- what two_phase.py asks of the door

    def one_caller(self, what: str) -> _OneCaller:
        """Refuse a second thread while a call runs."""
        return _OneCaller(self, what)

    def enter(self, what: str) -> None:
        """Become the one caller, until ``leave``."""
        if self._closed:
            where = f"{what} (rank {self.global_rank})"
            raise RuntimeError(f"{where}: the Balancer is closed. Build a new one.")
        if not self._caller.acquire(blocking=False):
            raise RuntimeError(
                f"{what} (rank {self.global_rank}): another thread is inside a call of this "
                "Balancer. Nothing was sent. Make one call at a time, in the same order on every "
                "rank."
            )

    def leave(self) -> None:
        """Let others call again."""
        self._caller.release()

    @property
    def closed(self) -> bool:
        """No call may be made any more."""
        return self._closed

    @contextlib.contextmanager
    def failing_all(self, layer: int, micro_batch: int, kind: str) -> Iterator[None]:
        """Whatever escapes a call that is under way ends it on every rank."""
        try:
            yield
        except BaseException as error:
            self.core.fail(
                f"the {kind} of layer {layer}, micro-batch {micro_batch} raised "
                f"{type(error).__name__}: {error}"
            )
            raise

    def own_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Experts compute in their spec's dtype, whatever autocast is around them."""
        if torch.is_autocast_enabled("cpu"):
            return torch.autocast("cpu", enabled=False)
        return contextlib.nullcontext()

    def _begin(
        self, kind: int, layer: int, micro_batch: int, grad_bits: int, counts: list[int],
        error: str = "", moves: np.ndarray = NO_MOVES, plan_hash: int = 0,
    ) -> None:  # fmt: skip
        self._seq = self.core.begin(
            kind, layer, micro_batch, grad_bits, counts, error, moves, plan_hash, 0
        )

    def _refuse(self, layer: int, micro_batch: int, error: Exception) -> NoReturn:
        """Publish this rank's error, so that no peer waits for it, and raise it."""
        text = f"{error} (rank {self.global_rank}, layer {layer}, micro-batch {micro_batch})"
        named = layer if isinstance(layer, int) else -1
        self._begin(KIND_FORWARD, named, micro_batch, 0, [], error=text)
        self.core.wait_plan()
        raise ValueError(f"{text}. Nothing was sent; the Balancer stays usable.") from error

    def publish_forward(self, call: ForwardCall) -> None:
        """Level 0 of a forward that ``begin`` has not begun."""
        self._begin(KIND_FORWARD, call.layer, call.micro_batch, call.bits.packed(), call.counts)

    def publish_backward(self, call: ForwardCall, plan_hash: int, moves: np.ndarray) -> None:
        """Level 0 of a backward, with the plan its forward saved."""
        self._begin(
            KIND_BACKWARD, call.layer, call.micro_batch, call.bits.packed(), [],
            moves=moves, plan_hash=plan_hash,
        )  # fmt: skip

    def _agree(self, what: str) -> tuple[Any, ...]:
        answer: tuple[Any, ...] = self.core.wait_plan()
        refused_by, refusal = answer[:2]
        if refused_by >= 0 and refusal:
            raise RuntimeError(
                f"{what} was refused by rank {self.global_ranks[refused_by]}: {refusal}. Nothing "
                "was sent; the Balancer stays usable."
            )
        return answer

    def wait_plan(self, layer: int, counts: Sequence[int]) -> Agreement:
        """Wait for all counts and the plan; blocks until the deadline, GIL released."""
        answer = self._agree(f"layer {layer} (rank {self.global_rank})")
        _, _, moves, plan_hash, sent, received, all_counts, plan_ns = answer
        agreement = Agreement(
            seq=self._seq,
            moves=moves,
            plan_hash=plan_hash,
            sent=tuple(RoutedMove(*move) for move in sent),
            received=tuple(RoutedMove(*move) for move in received),
            counts=all_counts,
            plan_us=plan_ns / 1000,
        )
        if all_counts.size:
            self._micro_batches[layer] += 1
            by_rank = all_counts.reshape(self.num_ranks, len(counts))
            self._records[layer] = CallRecord(by_rank, moves, agreement.plan_us)
        return agreement

    def post_rows(
        self, sources: Sequence[Tensor], weights: list[Any], sent: Sequence[RoutedMove],
        counts: Sequence[int],
    ) -> None:  # fmt: skip
        """Level 1: hand the mover the addresses of this call, as they are now."""
        if not sent:
            self.core.post_rows([], [], [])
            return
        wanted = {move.expert_idx for move in sent}
        pointers = [
            [tensor[e].data_ptr() if e in wanted else 0 for e in range(len(counts))]
            for tensor in weights
        ]
        self.core.post_rows([source.data_ptr() for source in sources], pointers, first_rows(counts))

    @property
    def views(self) -> ArenaViews:
        """This rank's arena as tensors."""
        assert self._views is not None, (
            "views are used inside calls, which a closed Balancer refuses"
        )
        return self._views

    def rows_in_kept_b(self, spec: LayerSpec, agreement: Agreement) -> int:
        """Rows of kept work that take as long as this rank's returns travel."""
        returning = max(
            sum(move.num_rows for move in agreement.sent),
            sum(move.num_rows for move in agreement.received),
        )
        if returning == 0:
            return 0
        rate = self.config.gemm_gflops or _CPU_GFLOPS_PER_THREAD * torch.get_num_threads()
        seconds_per_row = spec.flops_per_row / (rate * 1e9)
        way_back_s = returning * spec.row_bytes / (self._lane_gbps * 1e9)
        return int(way_back_s / seconds_per_row) + 1

    # --------------------------------------------------------------------------- late weight grads

    def announce(self, node: LateNode, pending: LateGrads) -> None:
        """Weight grads of a backward call are on their way; ``node`` will add them."""
        node.pending = pending
        self._late.append(node)

    def forget(self, node: LateNode) -> None:
        """``node`` has added its grads."""
        self._late = [other for other in self._late if other is not node]

    def take_unconsumed(self) -> None:
        """Take grads that an earlier backward left in the arena, so that their slots are free."""
        for node in self._late:
            if node.pending is not None:
                node.pending.take(self)
        self._late.clear()

    def await_grads(self, pending: LateGrads) -> list[dict[int, Tensor]]:
        """Per sent move, {tensor index: its grad in the arena}; blocks until the deadline."""
        self.core.await_grads(pending.seq, sorted({move.peer_rank for move in pending.sent}))
        return [self.views.grads(pending.layer, move, pending.tensors) for move in pending.sent]

    def release_grads(self, pending: LateGrads) -> None:
        """The grads of ``pending`` have been read; their slots may be overwritten."""
        self.core.release_grads(pending.seq)


__all__ = ["Balancer", "CallRecord", "MemoryReport", "Ticket"]
