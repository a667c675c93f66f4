"""The caller's side of a domain: what a call asks of the C++ core, step by step.

One object per Balancer. It owns the core (threads, lane, arena) until ``close``, lets one thread in
at a time, and remembers which weight grads are still on their way. A method that waits says so.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from .arena_views import ArenaViews
from .call import (
    KIND_BACKWARD,
    KIND_CHECK,
    KIND_FORWARD,
    NO_MOVES,
    Agreement,
    CallRecord,
    RoutedMove,
    first_rows,
    rows_on_the_way_back,
)
from .config import BalancerConfig, LayerSpec
from .costs import lane_rates
from .gpu_costs import rank_gflops
from .lanes import ProvenLane
from .peers import DomainRanks
from .scheduler.plan import hash_integers

logger = logging.getLogger(__name__)

_EMPTY_PLAN = 1  # what a plan from outside without moves is called; 0 says there is none


class _OneCaller:
    """Holds a domain for one call. (A generator would cost a microsecond more per call.)"""

    __slots__ = ("_domain", "_what")

    def __init__(self, domain: DomainCalls, what: str) -> None:
        self._domain, self._what = domain, what

    def __enter__(self) -> None:
        self._domain.enter(self._what)

    def __exit__(self, *_: object) -> None:
        self._domain.leave()


def _addresses(tensor: Any, wanted: set[int], num_experts: int) -> list[int]:
    """Where the experts of one weight tensor begin, stacked or one by one; 0 if not wanted."""
    if isinstance(tensor, Tensor):
        first, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
        return [first + expert * step for expert in range(num_experts)]
    return [tensor[e].data_ptr() if e in wanted else 0 for e in range(num_experts)]


class OnItsWay(Protocol):
    """Something a backward left in the arena and nobody has fetched yet."""

    def take(self, domain: DomainCalls) -> None:
        """Wait for it and copy it out of the arena."""
        ...


class DomainCalls:
    """One rank's calls in its domain.

    Args:
        core: the open C++ Domain; closed by ``close``.
        ranks: who is in the domain.
        config, layers: as the Balancer has them.
        lane: as proven at start-up.
    Attributes:
        lane_rates: those of the lane that are planned with.
    """

    def __init__(
        self, core: Any, ranks: DomainRanks, config: BalancerConfig,
        layers: Sequence[LayerSpec], lane: ProvenLane,
    ) -> None:  # fmt: skip
        self.core = core
        self.num_ranks = ranks.num_ranks
        self.global_ranks = ranks.global_ranks
        self.global_rank = ranks.global_ranks[ranks.rank]
        self.records: dict[int, CallRecord] = {}
        self.micro_batches = [0] * len(layers)
        self._config = config
        self._rank = ranks.rank
        self.lane_rates = lane_rates(config, lane.rates)
        self._gemm_gflops = rank_gflops(config, lane.machine)
        self._device = lane.device
        self._gpu = lane.device.index if lane.device.type == "cuda" else None
        self._side: torch.cuda.Stream | None = None
        self._views: ArenaViews | None = ArenaViews(core, layers, lane.device)
        self._caller = threading.Lock()
        self._closed = False
        self._unconsumed: list[OnItsWay] = []
        self._seq = 0

    # -------------------------------------------------------------------------- one call at a time

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

    def close(self) -> None:
        """End threads and lane; blocks while another thread is inside a call, until the deadline.

        Raises:
            RuntimeError: that thread has not left its call.
        """
        if self._closed:
            return
        if not self._caller.acquire(blocking=False):
            self.core.fail(
                f"rank {self.global_rank} closed its Balancer during a call of another thread"
            )
            if not self._caller.acquire(timeout=self._config.deadline_s):
                raise RuntimeError(
                    f"close (rank {self.global_rank}): another thread is inside a call and has "
                    f"not left it for {self._config.deadline_s} s. Nothing was given back."
                )
        self._closed = True
        self._caller.release()
        if not self.core.failure_text():
            with contextlib.suppress(RuntimeError):
                self.take_unconsumed()
        self._views = None
        self.core.close()
        ranks = self.core.still_mapped_by()
        if ranks:
            logger.warning(
                "close (rank %d): rank %s still maps this rank's arena, which stays reserved until "
                "the process ends. Close the Balancers of all ranks at about the same time.",
                self.global_rank, ", ".join(map(str, ranks)),
            )  # fmt: skip

    # -------------------------------------------------------------------------- level 0: agreement

    def begin_forward(
        self, layer: int, micro_batch: int, grad_mode: bool, counts: list[int]
    ) -> bool:
        """The short way, where the core reads the counts; False: they are not all good ints."""
        seq = self.core.begin_forward(layer, micro_batch, grad_mode, counts)
        self._seq = seq or self._seq
        return bool(seq)

    def publish_forward(
        self, layer: int, micro_batch: int, grad_bits: int, counts: list[int],
        plan: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Level 0 of a forward; with a plan, [num_moves, 5], that is not the policy's."""
        if plan is None:
            self._begin(KIND_FORWARD, layer, micro_batch, grad_bits, counts)
            return
        plan_hash = hash_integers(plan.ravel().tolist()) or _EMPTY_PLAN
        self._begin(
            KIND_FORWARD, layer, micro_batch, grad_bits, counts, moves=plan, plan_hash=plan_hash
        )

    def publish_backward(
        self, layer: int, micro_batch: int, grad_bits: int, plan_hash: int, moves: np.ndarray
    ) -> None:
        """Level 0 of a backward, with the plan its forward saved."""
        self._begin(
            KIND_BACKWARD, layer, micro_batch, grad_bits, [], moves=moves, plan_hash=plan_hash
        )

    def refuse(
        self, layer: int, micro_batch: int, error: Exception, kind: int = KIND_FORWARD
    ) -> NoReturn:
        """Publish this rank's error, so that no peer waits for it, and raise it. Blocks."""
        text = f"{error} (rank {self.global_rank}, layer {layer}, micro-batch {micro_batch})"
        named = layer if isinstance(layer, int) else -1
        self._begin(kind, named, micro_batch, 0, [], error=text)
        self.core.wait_plan()
        raise ValueError(f"{text}. Nothing was sent; the Balancer stays usable.") from error

    def refuse_capture(self, layer: int, micro_batch: int, kind: int = KIND_FORWARD) -> None:
        """Refuse a call inside a CUDA graph, before its header; peers are told. Then it blocks."""
        stream = self._stream()
        if stream is None:
            return
        try:
            self.core.refuse_capture(stream)
        except ValueError as error:
            self.refuse(layer, micro_batch, error, kind)

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
            self.micro_batches[layer] += 1
            by_rank = all_counts.reshape(self.num_ranks, len(counts))
            self.records[layer] = CallRecord(by_rank, moves, agreement.plan_us)
        return agreement

    def meet(self) -> None:
        """What ``check()`` does inside the domain: end a step. Blocks until the deadline."""
        self.take_unconsumed()
        self.core.drain()
        self._begin(KIND_CHECK, -1, 0, 0, [])
        self._agree("check()")

    def _begin(
        self, kind: int, layer: int, micro_batch: int, grad_bits: int, counts: list[int],
        error: str = "", moves: np.ndarray = NO_MOVES, plan_hash: int = 0,
    ) -> None:  # fmt: skip
        self._seq = self.core.begin(
            kind, layer, micro_batch, grad_bits, counts, error, moves, plan_hash
        )

    def _agree(self, what: str) -> tuple[Any, ...]:
        answer: tuple[Any, ...] = self.core.wait_plan()
        refused_by, refusal = answer[:2]
        if refusal and refused_by >= 0 and self.global_ranks[refused_by] == self.global_rank:
            raise ValueError(
                f"{what}: the plan handed in cannot be carried out: {refusal}. Nothing was sent; "
                "the Balancer stays usable."
            )
        if refused_by >= 0 and refusal:
            raise RuntimeError(
                f"{what} was refused by rank {self.global_ranks[refused_by]}: {refusal}. Nothing "
                "was sent; the Balancer stays usable."
            )
        return answer

    # -------------------------------------------------------------------- levels 1 and 2, and GEMMs

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
        if torch.is_autocast_enabled(self._device.type):
            return torch.autocast(self._device.type, enabled=False)
        return contextlib.nullcontext()

    def post_rows(
        self, sources: Sequence[Tensor], weights: list[Any], sent: Sequence[RoutedMove],
        counts: Sequence[int],
    ) -> None:  # fmt: skip
        """Level 1: hand the mover the addresses of this call, as they are now."""
        self._bind_stream()
        if not sent:
            self.core.post_rows([], [], [])
            return
        wanted = {move.expert_idx for move in sent}
        pointers = [_addresses(tensor, wanted, len(counts)) for tensor in weights]
        self.core.post_rows([source.data_ptr() for source in sources], pointers, first_rows(counts))

    def _bind_stream(self) -> None:
        """What the core enqueues from here on goes to the stream that PyTorch uses here."""
        stream = self._stream()
        if stream is not None:
            self.core.bind_compute(stream)

    def _stream(self) -> int | None:
        """The handle of that stream; None where tensors live on the CPU."""
        if self._gpu is None:
            return None
        return torch._C._cuda_getCurrentRawStream(self._gpu)  # without a Stream object around it

    @property
    def views(self) -> ArenaViews:
        """This rank's arena as tensors."""
        assert self._views is not None, (
            "views are used inside calls, which a closed Balancer refuses"
        )
        return self._views

    def rows_in_kept_b(self, spec: LayerSpec, agreement: Agreement) -> int:
        """Rows of kept work that take as long as what this rank waits for, or sends, travels."""
        if not agreement.sent and not agreement.received:
            return 0
        rows_out, rows_in = rows_on_the_way_back(self._rank, agreement.moves)
        ns_per_row = spec.flops_per_row / self._gemm_gflops
        rates = self.lane_rates
        way_back_ns = spec.row_bytes * max(rows_out / rates.out_gbps, rows_in / rates.in_gbps)
        return int(way_back_ns / ns_per_row) + 1

    # ------------------------------------------------------------------------ level 3, weight grads

    @property
    def adds_beside(self) -> bool:
        """Whether weight grads may be added beside what the compute stream does next."""
        return self._config.late_stream

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside runs on a stream of its own, behind all that was launched so far.

        The next call of this domain, on whatever stream, comes after it (``bind_compute``); others
        that use what it writes must ``join_beside`` first. On a CPU everything runs at once.
        """
        if self._gpu is None:
            yield
            return
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def join_beside(self) -> None:
        """The current stream goes on behind what was launched ``beside`` it."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def announce(self, late: OnItsWay) -> None:
        """Weight grads of a backward call are on their way; ``late`` will fetch them."""
        self._unconsumed.append(late)

    def forget(self, late: OnItsWay) -> None:
        """``late`` has fetched its grads."""
        self._unconsumed = [other for other in self._unconsumed if other is not late]

    def take_unconsumed(self) -> None:
        """Take what earlier backwards left in the arena, so that its slots are free. Blocks."""
        for late in self._unconsumed:
            late.take(self)
        self._unconsumed.clear()

    def await_grads(
        self, seq: int, layer: int, sent: Sequence[RoutedMove], tensors: Sequence[int]
    ) -> list[dict[int, Tensor]]:
        """Per sent move, {tensor index: its grad in the arena}; blocks until the deadline."""
        self._bind_stream()
        self.core.await_grads(seq, sorted({move.peer_rank for move in sent}))
        return [self.views.grads(layer, move, tensors) for move in sent]

    def release_grads(self, seq: int) -> None:
        """The grads of call ``seq`` have been read; their slots may be overwritten."""
        self.core.release_grads(seq)
