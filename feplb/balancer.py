"""Balancer: the public door. Owns one domain's arena, board, lane and mover.

One object per domain (the ranks that reach each other; for the host lane, the ranks of one host).
Everything collective happens in the constructor and in ``check()``; ``close()`` needs nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import two_phase
from .compute import ExpertCompute, Segment
from .config import BalancerConfig, LayerSpec, TensorSpec, read_environment
from .memory import MemoryReport, memory_report
from .two_phase import (
    KIND_BACKWARD,
    KIND_CHECK,
    KIND_FORWARD,
    NO_MOVES,
    Agreement,
    CallBits,
    ForwardCall,
    LateGrads,
    LateNode,
    RoutedMove,
    WeightLayout,
)

logger = logging.getLogger(__name__)

_CANARY_BYTES = 1 << 20
_CPU_GFLOPS_PER_THREAD = 50.0


@dataclass(frozen=True)
class Ticket:
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


@dataclass(frozen=True)
class ReceivedViews:
    """A helper's part of the arena for one call: views, valid until they are released."""

    rows: list[Tensor]  # forward: rows, side data; backward: grad rows, rows, side data
    outbox: list[Tensor]  # forward: outputs; backward: grad rows, grads of side data
    segments: list[Segment]  # weight index = slot
    weights: list[list[Tensor]]  # [tensor][slot]
    grad_outbox: list[list[Tensor]]  # [tensor][slot]


class Balancer:
    """Balances the experts of a domain's layers, call by call.

    Args:
        config: the same on every rank.
        group: the process group of the domain's ranks; None without ``torch.distributed`` (one
            rank). Kept for its lifetime; used in the constructor only.
        layers: one spec per layer index, the same on every rank. All layers share one arena.
    Raises:
        ValueError: ranks differ in config, specs, torch version or thread count (both named), or an
            argument is wrong.
        RuntimeError: the machine cannot give what is asked for (shared memory too small, peers on
            another host, a lane that does not carry data).
    Thread/stream: collective over ``group``, blocks. Starts three threads per rank.
    """

    def __init__(
        self,
        config: BalancerConfig,
        group: dist.ProcessGroup | None = None,
        layers: Sequence[LayerSpec] = (),
    ) -> None:
        environment = read_environment()
        if environment.log_level is not None:
            logging.getLogger("feplb").setLevel(environment.log_level.upper())
        self.config = config
        self.layers = tuple(layers)
        self.policy = "none" if environment.off else config.policy
        self._group = group
        self._closed = False
        self._caller = threading.Lock()
        self._anchor = torch.empty(0, requires_grad=True)
        self._micro_batches = [0] * len(self.layers)
        self._ticket: Ticket | None = None
        self._late: list[LateNode] = []
        self._records: dict[int, CallRecord] = {}
        self._views: dict[tuple[int, int, int], tuple[list[Tensor], ...]] = {}
        self._seq = 0
        if not self.layers:
            raise ValueError("Balancer: layers is empty, expected one LayerSpec per MoE layer")
        in_group = dist.is_initialized()
        self.rank = dist.get_rank(group) if in_group else 0
        self.num_ranks = dist.get_world_size(group) if in_group else 1
        alone = self.num_ranks == 1  # nothing can move: reserve nothing
        self._num_slots = 0 if alone else config.num_slots
        self._num_grad_slots = 0 if alone else config.grad_slots
        self._max_rows = [0 if alone else spec.max_rows for spec in self.layers]
        self.memory = memory_report(
            self._shapes(), self._num_slots, self._num_grad_slots, self.num_ranks
        )
        self._connect(environment.job_id, environment.restart_count)
        # A clean graph break where the surrounding model is compiled.
        for name in ("run_experts", "prepare_weights", "begin", "check"):
            setattr(self, name, torch.compiler.disable(getattr(self, name)))

    # ------------------------------------------------------------------------------ start-up

    def _shapes(self) -> list[dict[str, Any]]:
        from . import _core

        return [
            {
                "num_local_experts": spec.num_local_experts,
                "row_bytes": spec.row_bytes,
                "side_row_bytes": [data.num_bytes for data in spec.row_data],
                "weight_bytes": [weight.num_bytes for weight in spec.weights],
                "max_rows": max_rows,
                "policy": self.policy,
                "limits": _core.PlanLimits(
                    num_dynamic=self.config.dynamic_experts(spec),
                    num_slots=self._num_slots,
                    num_grad_slots=self._num_grad_slots,
                    min_tokens=self.config.min_tokens,
                    max_recv_rows=max_rows,
                    max_return_rows=max_rows,
                ),
            }
            for spec, max_rows in zip(self.layers, self._max_rows, strict=True)
        ]

    def _gather(self, value: Any) -> list[Any]:
        """``value`` of every rank; blocks."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _together(self, step: Any) -> list[Any]:
        """Run ``step`` on every rank; if one fails, all raise, the one that failed its own error."""
        error: Exception | None = None
        value: Any = None
        try:
            value = step()
        except (RuntimeError, ValueError, OSError) as caught:
            error = caught
        answers = self._gather((None if error is None else str(error), value))
        if error is not None:
            raise error
        for rank, (text, _) in enumerate(answers):
            if text is not None:
                raise RuntimeError(f"rank {rank} could not build its Balancer: {text}")
        return [value for _, value in answers]

    def _identity(self) -> dict[str, Any]:
        return {
            "host": _boot_id(),
            "pid namespace": _namespace("pid"),
            "torch version": torch.__version__,
            "torch threads": torch.get_num_threads(),
            "config": repr((self.config, self.policy)),
            "layers": repr(self.layers),
        }

    def _connect(self, job_id: str, restart_count: str) -> None:
        from . import _core

        identities = self._gather((self._identity(), os.getpid()))
        _compare_identities([identity for identity, _ in identities])
        pids = [pid for _, pid in identities]
        digest = hashlib.sha256(repr(identities[0][0]).encode()).digest()
        name = f"/feplb-{job_id}-{restart_count}-{pids[0]}-{os.urandom(4).hex()}"
        name = self._gather(name)[0]
        arena_bytes, board_bytes = self.memory.arena_bytes, self.memory.board_bytes
        mine: list[Any] = []

        def create() -> None:
            mine.append(_core.SharedMemory.create(f"{name}-{self.rank}", max(arena_bytes, 64)))
            if self.rank == 0:
                mine.append(_core.SharedMemory.create(f"{name}-board", board_bytes))

        def build() -> Any:
            arenas = [
                mine[0] if r == self.rank else _open(f"{name}-{r}", max(arena_bytes, 64))
                for r in range(self.num_ranks)
            ]
            board = mine[1] if self.rank == 0 else _open(f"{name}-board", board_bytes)
            self.core = _core.Domain(
                rank=self.rank,
                config_hash=int.from_bytes(digest[:8], "little"),
                deadline_s=self.config.deadline_s,
                layers=self._shapes(),
                num_slots=self._num_slots,
                num_grad_slots=self._num_grad_slots,
                pids=pids,
                board=board,
                arenas=arenas,
            )

        _open = _core.SharedMemory.open
        self._together(create)
        try:
            self._together(build)
        finally:
            for segment in mine:
                segment.unlink()
        canary = min(_CANARY_BYTES, arena_bytes // self.num_ranks // 64 * 64)
        rates = self._together(lambda: self.core.prove_lane(canary))
        self._lane_gbps = self.config.lane_gbps or max(min(rates), 0.1)
        self.core.open()
        self._gather(None)  # nobody begins before everybody is open
        self._arena = torch.frombuffer(self.core.arena(), dtype=torch.uint8) if arena_bytes else None
        self._offsets = [self.core.layer_offsets(i) for i in range(len(self.layers))]
        logger.info(
            "rank %d of %d: lane host, canary ok, %.1f GB/s\n%s",
            self.rank, self.num_ranks, min(rates), self.memory,
        )  # fmt: skip

    # --------------------------------------------------------------------------- the public door

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
        layout, flat = two_phase.flatten_weights(weights, spec.num_local_experts)
        return layout.per_tensor(two_phase.prepare_weights(self, flat))

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
        with self.one_caller("begin"):
            self._spec(layer)
            if self._ticket is not None:
                raise RuntimeError(
                    f"begin of layer {layer} (rank {self.rank}): the call begun for layer "
                    f"{self._ticket.layer} has not run. Nothing was sent. Run its experts first."
                )
            micro_batch = self._next_micro_batch(layer)
            try:
                checked = self._check_counts(counts, layer)
            except ValueError as error:
                self._refuse(layer, micro_batch, error)
            grad_mode = torch.is_grad_enabled()
            self._begin(KIND_FORWARD, layer, micro_batch, int(grad_mode), checked)
            self._ticket = Ticket(layer, tuple(checked), micro_batch, grad_mode)
            return self._ticket

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
            spec = self._spec(layer)
            begun = self._take_ticket(ticket, layer)
            micro_batch = begun.micro_batch if begun else self._next_micro_batch(layer)
            try:
                layout, flat = two_phase.flatten_weights(weights, spec.num_local_experts)
                _check_weights(layout, flat, spec)
                call = self._forward_call(
                    rows, counts, layout, flat, compute, spec, layer, micro_batch, row_data, begun,
                    grad_sinks,
                )  # fmt: skip
            except ValueError as error:
                if begun is None:
                    self._refuse(layer, micro_batch, error)
                self.core.fail(f"layer {layer}, micro-batch {micro_batch}: {error}")
                raise
            return two_phase.run_experts(call, self._anchor, rows, tuple(row_data), flat)

    def check(self) -> None:
        """End a step, before the optimizer uses its gradients; collective.

        Takes home weight grads that no backward has asked for, waits until everything enqueued on
        this rank has run, and meets every rank.

        Raises:
            RuntimeError: whatever went wrong in this step, on any rank.
        Thread/stream: blocks, GIL released, until its deadline.
        """
        with self.one_caller("check"):
            self.take_unconsumed()
            self.core.drain()
            self._begin(KIND_CHECK, -1, 0, 0, [])
            self._agree("check()")
            self.core.finish()
            self._micro_batches = [0] * len(self.layers)

    def close(self) -> None:
        """End threads and lane, and give the memory back. Idempotent, not collective.

        Weight grads that are still on their way are taken first, so that a backward still to come
        finds them.
        """
        if self._closed:
            return
        self._closed = True
        core = getattr(self, "core", None)
        if core is None:
            return
        if not core.failure_text():
            with contextlib.suppress(RuntimeError):
                self.take_unconsumed()
        core.close()
        self._views.clear()
        self._arena = None

    def __enter__(self) -> Balancer:
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
        """Bytes this rank pushed (rows, weights, returns), copies, CPU time of the copy thread."""
        stats: dict[str, int] = self.core.stats()
        return stats

    # ------------------------------------------------------------------------------- arguments

    def _spec(self, layer: int) -> LayerSpec:
        if not 0 <= layer < len(self.layers):
            raise ValueError(
                f"layer={layer} (rank {self.rank}), expected 0 to {len(self.layers) - 1}"
            )
        return self.layers[layer]

    def _next_micro_batch(self, layer: int) -> int:
        self._micro_batches[layer] += 1
        return self._micro_batches[layer] - 1

    def _take_ticket(self, ticket: Ticket | None, layer: int) -> Ticket | None:
        outstanding, self._ticket = self._ticket, None
        if ticket is None and outstanding is None:
            return None
        if ticket is not outstanding or ticket is None or ticket.layer != layer:
            begun = "no call" if outstanding is None else f"layer {outstanding.layer}"
            given = "no ticket" if ticket is None else f"a ticket of layer {ticket.layer}"
            text = (
                f"run_experts of layer {layer} (rank {self.rank}) was given {given}, but the call "
                f"begun is of {begun}. Hand each ticket to the next run_experts, once."
            )
            if outstanding is not None:
                self.core.fail(text)
            raise RuntimeError(text)
        return ticket

    def _check_counts(self, counts: Sequence[int] | Tensor, layer: int) -> list[int]:
        if isinstance(counts, Tensor):
            if counts.device.type != "cpu":
                raise ValueError(f"counts are on {counts.device}, expected host ints")
            counts = counts.tolist()
        checked = [int(count) for count in counts]
        num_local_experts = self.layers[layer].num_local_experts
        if len(checked) != num_local_experts:
            raise ValueError(f"counts has {len(checked)} entries, expected {num_local_experts}")
        for expert, count in enumerate(checked):
            if not 0 <= count < 1 << 31:
                raise ValueError(f"counts[{expert}] is {count}, expected 0 to 2^31 - 1")
        return checked

    def _forward_call(
        self, rows: Tensor, counts: Sequence[int] | Tensor,
        layout: WeightLayout, flat: Sequence[Tensor], compute: ExpertCompute, spec: LayerSpec,
        layer: int, micro_batch: int, row_data: Sequence[Tensor], ticket: Ticket | None,
        grad_sinks: Sequence[Sequence[Tensor]] | None,
    ) -> ForwardCall:  # fmt: skip
        checked = self._check_counts(counts, layer)
        if ticket is not None and tuple(checked) != ticket.counts:
            raise ValueError("counts differ from those that begin() published for this call")
        _check_tensor("rows", rows, (sum(checked), spec.hidden), spec.dtype)
        if len(row_data) != len(spec.row_data):
            raise ValueError(f"{len(row_data)} row_data tensors, expected {len(spec.row_data)}")
        for i, (data, want) in enumerate(zip(row_data, spec.row_data, strict=True)):
            _check_tensor(f"row_data[{i}]", data, (sum(checked), *want.shape), want.dtype)
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
            late=two_phase.late_node_of(flat),
            grad_sinks=grad_sinks,
        )

    # ------------------------------------------------------- what two_phase.py asks of the door

    @contextlib.contextmanager
    def one_caller(self, what: str) -> Iterator[None]:
        """Refuse a second thread while a call runs."""
        if self._closed:
            raise RuntimeError(f"{what} (rank {self.rank}): the Balancer is closed. Build a new one.")
        if not self._caller.acquire(blocking=False):
            raise RuntimeError(
                f"{what} (rank {self.rank}): another thread is inside a call of this Balancer. "
                "Nothing was sent. Make one call at a time, in the same order on every rank."
            )
        try:
            yield
        finally:
            self._caller.release()

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
    ) -> int:  # fmt: skip
        self._seq = self.core.begin(
            kind=kind, layer=layer, micro_batch=micro_batch, grad_bits=grad_bits, counts=counts,
            error=error, moves=moves, plan_hash=plan_hash, stream=0,
        )  # fmt: skip
        return self._seq

    def _refuse(self, layer: int, micro_batch: int, error: ValueError) -> NoReturn:
        """Publish this rank's error, so that no peer waits for it, and raise it."""
        text = f"{error} (rank {self.rank}, layer {layer}, micro-batch {micro_batch})"
        self._begin(KIND_FORWARD, layer, micro_batch, 0, [], error=text)
        self.core.wait_plan()
        raise ValueError(f"{text}. Nothing was sent; the Balancer stays usable.") from error

    def publish_forward(self, call: ForwardCall) -> None:
        """Level 0 of a forward that ``begin`` has not begun."""
        self._begin(
            KIND_FORWARD, call.layer, call.micro_batch, call.bits.packed(), call.counts
        )

    def publish_backward(self, call: ForwardCall, plan_hash: int, moves: np.ndarray) -> int:
        """Level 0 of a backward; returns its seq."""
        return self._begin(
            KIND_BACKWARD, call.layer, call.micro_batch, call.bits.packed(), [],
            moves=moves, plan_hash=plan_hash,
        )  # fmt: skip

    def _agree(self, what: str) -> tuple[Any, ...]:
        answer: tuple[Any, ...] = self.core.wait_plan()
        refused_by, refusal = answer[:2]
        if refused_by >= 0 and refusal:
            raise RuntimeError(
                f"{what} was refused by rank {refused_by}: {refusal}. Nothing was sent; the "
                "Balancer stays usable."
            )
        return answer

    def wait_plan(self, layer: int, counts: Sequence[int]) -> Agreement:
        """Wait for all counts and the plan; blocks until the deadline, GIL released."""
        answer = self._agree(f"layer {layer} (rank {self.rank})")
        _, _, moves, plan_hash, sent, received, all_counts, plan_ns = answer
        agreement = Agreement(
            moves=moves,
            plan_hash=plan_hash,
            sent=tuple(RoutedMove(*move) for move in sent),
            received=tuple(RoutedMove(*move) for move in received),
            counts=all_counts,
            plan_us=plan_ns / 1000,
        )
        if all_counts.size:
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
        self.core.post_rows(
            [source.data_ptr() for source in sources], pointers, two_phase.first_rows(counts)
        )

    def received_views(
        self, layer: int, kind: int, received: Sequence[RoutedMove]
    ) -> ReceivedViews:
        """This rank's rows half, outbox half and slots for the moves it received."""
        spec = self.layers[layer]
        rows, outbox, _ = self._half_views(layer, kind)
        num_rows = received[-1].arena_row + received[-1].num_rows
        weights, grads = [], []
        for t, want in enumerate(spec.weights):
            slots = range(len(received))
            weights.append([self._view(self.core.weight_slot(layer, s, t), want) for s in slots])
            grads.append([self._view(self.core.grad_outbox_slot(layer, s, t), want) for s in slots])
        segments = [(m.arena_row, m.arena_row + m.num_rows, m.slot) for m in received]
        return ReceivedViews(
            rows=[piece[:num_rows] for piece in rows],
            outbox=[piece[:num_rows] for piece in outbox],
            segments=segments,
            weights=weights,
            grad_outbox=grads,
        )

    def place_returns(
        self, layer: int, kind: int, sent: Sequence[RoutedMove], counts: Sequence[int],
        targets: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        """Copy what came home from the return half into its rows of ``targets``."""
        _, _, returns = self._half_views(layer, kind)
        first = two_phase.first_rows(counts)
        for move in sent:
            start = first[move.expert_idx] + move.row_start
            for target, piece in zip(targets, returns, strict=True):
                if target is not None:
                    came = piece[move.arena_row : move.arena_row + move.num_rows]
                    target[start : start + move.num_rows].copy_(came)

    def _half_views(self, layer: int, kind: int) -> tuple[list[Tensor], ...]:
        """(rows pieces, outbox pieces, return pieces) of this call's half, at full capacity."""
        half = self._seq & 1
        key = (layer, kind, half)
        if key not in self._views:
            spec, offsets = self.layers[layer], self._offsets[layer]
            row = TensorSpec((spec.hidden,), spec.dtype)
            forward = kind == KIND_FORWARD
            name = "forward" if forward else "backward"
            in_rows = [row, *spec.row_data] if forward else [row, row, *spec.row_data]
            in_returns = [row] if forward else [row, *spec.row_data]

            def pieces(base: int, name: str, specs: list[TensorSpec]) -> list[Tensor]:
                return [
                    self._view(base + at, TensorSpec((spec.max_rows, *want.shape), want.dtype))
                    for at, want in zip(offsets[name], specs, strict=True)
                ]

            self._views[key] = (
                pieces(offsets["rows_half"][half], f"{name}_rows", in_rows),
                pieces(offsets["outbox_half"][half], f"{name}_returns", in_returns),
                pieces(offsets["returns_half"][half], f"{name}_returns", in_returns),
            )
        return self._views[key]

    def _view(self, offset: int, spec: TensorSpec) -> Tensor:
        assert self._arena is not None
        return self._arena[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)

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
        spec = self.layers[pending.layer]
        return [
            {
                t: self._view(self.core.grad_slot(pending.layer, move.slot, t), spec.weights[t])
                for t in pending.tensors
            }
            for move in pending.sent
        ]

    def release_grads(self, pending: LateGrads) -> None:
        """The grads of ``pending`` have been read; their slots may be overwritten."""
        self.core.release_grads(pending.seq)


# ------------------------------------------------------------------------------------ checking


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} are on {tensor.device}, expected cpu: the host lane moves host rows")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} have dtype {tensor.dtype}, expected {dtype} as the LayerSpec says")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} are not contiguous (stride {tensor.stride()}), expected row-major. Call "
            ".contiguous() on them: feplb adds no hidden copy."
        )
    if name == "rows" and tensor.data_ptr() % 16:
        raise ValueError(f"{name} start at an address that is not a multiple of 16 bytes")


def _check_weights(layout: WeightLayout, flat: Sequence[Tensor], spec: LayerSpec) -> None:
    views = layout.per_tensor(flat)
    if len(views) != len(spec.weights):
        raise ValueError(f"{len(views)} weight tensors per expert, expected {len(spec.weights)}")
    for t, (view, want) in enumerate(zip(views, spec.weights, strict=True)):
        if len(view) != spec.num_local_experts:
            raise ValueError(f"weights[{t}] has {len(view)} experts, expected {spec.num_local_experts}")
        for expert in [view[0]] if isinstance(view, Tensor) else view:
            if tuple(expert.shape) != want.shape or expert.dtype != want.dtype:
                raise ValueError(
                    f"weights[{t}] of an expert is {tuple(expert.shape)} {expert.dtype}, expected "
                    f"{want.shape} {want.dtype} as the LayerSpec says"
                )
            if not expert.is_contiguous() or expert.device.type != "cpu":
                raise ValueError(
                    f"weights[{t}] of an expert is not contiguous on the cpu "
                    f"(stride {expert.stride()}, {expert.device})"
                )
        grads = layout.per_tensor([w.requires_grad for w in flat])[t]
        if not isinstance(grads, bool) and any(grads) and not all(grads):
            raise ValueError(f"weights[{t}]: some experts need grad and some do not; freeze all or none")


def _compare_identities(identities: list[dict[str, Any]]) -> None:
    """Ranks of one domain must agree about everything that decides bits or addresses."""
    for rank, other in enumerate(identities):
        for name, mine in identities[0].items():
            if other[name] != mine:
                raise ValueError(
                    f"ranks differ in {name}: rank 0 has {mine}, rank {rank} has {other[name]}. "
                    "Nothing was reserved. All ranks of a domain must be equal in it."
                )


def _boot_id() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{platform.node()} {file.read().strip()}"
    return platform.node()


def _namespace(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/ns/{name}")
    return "unknown"


__all__ = ["Balancer", "CallRecord", "MemoryReport", "Ticket"]
