"""A stand-in for the package `deep_ep` on a CPU: V1 `Buffer` and V2 `ElasticBuffer` over gloo.

`install()` puts it into sys.modules, so that code written for DeepEP runs unchanged. It keeps the
contract of DeepEP 1.2.1 and 2.1.0 as their sources have it (names, argument order, shapes, dtypes,
row order, what is asserted), and its traps:
- A token travels once to each rank that has one of its experts. V1 orders by (source rank, token);
  V2 by source rank, inside it arbitrarily, unless `deterministic=True` sorts after the wait.
- recv_topk_idx holds local indices, -1 elsewhere; there V1 zeroes the weights and V2 does not.
- Counts are on the host when dispatch returns, rounded up to the alignment in the numbers only.
- Asynchronous results must not be read before their event is waited for: they are NaN.
- combine adds in fp32 by rank and rounds once. V1 adds the weights of all ranks; V2 takes the
  weight of a choice from its owner.
Not modelled: streams and previous events, timeouts, fp8, low latency; V2's hybrid and expanded
modes and its device-only counts; what only kernels read of a handle (zeros of the right shape); a
second host. It takes other dtypes than bfloat16 only where install() is told so: DeepEP does not.
Shapes: T = tokens, K = top_k, H = hidden, E = num_experts, R = ranks, N = tokens received.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from deepep_wire import (
    EventHandle,
    EventOverlap,
    Sender,
    align,
    count_experts,
    finish,
    host_assert,
    localize,
    splits,
)
from torch import Tensor

VERSIONS = ("1.2.1", "2.1.0")


def install(
    version: str = "1.2.1", dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
) -> ModuleType:
    """Make `import deep_ep` give this stand-in, laid out as that version.

    1.2.1 has V1 alone, and EventOverlap in deep_ep.utils too, where Megatron-Core looks for it;
    2.1.0 has both APIs, and only EventHandle there.
    """
    assert version in VERSIONS, version
    of_install = {"dtypes": tuple(dtypes), "device_types": ("cpu",)}
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.__dict__.update(
        __version__=version, __path__=[], Config=Config, topk_idx_t=torch.int64, utils=utils,
        Buffer=type("Buffer", (Buffer,), dict(of_install)),
        EventHandle=EventHandle, EventOverlap=EventOverlap,
    )  # fmt: skip
    utils.__dict__["EventHandle"] = EventHandle
    if version == "1.2.1":
        utils.__dict__["EventOverlap"] = EventOverlap
    else:
        package.__dict__["ElasticBuffer"] = type("ElasticBuffer", (ElasticBuffer,), of_install)
        package.__dict__["EPHandle"] = EPHandle
    sys.modules.update({"deep_ep": package, "deep_ep.utils": utils})
    return package


class Config:
    """As deep_ep.Config; its hints grow with what the real ones grow with."""

    def __init__(
        self, num_sms: int, nvl_send: int, nvl_recv: int, rdma_send: int = 6, rdma_recv: int = 128
    ) -> None:
        host_assert(num_sms % 2 == 0 and nvl_send < nvl_recv, "Config")
        self.num_sms, self.num_nvl_tokens, self.num_rdma_tokens = num_sms, nvl_recv, rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_sms // 2 * min(num_ranks, 8) * self.num_nvl_tokens * (hidden_bytes + 2064)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= 8:
            return 0
        return self.num_sms // 2 * (num_ranks // 8) * self.num_rdma_tokens * (hidden_bytes + 2064)


class Buffer(Sender):
    """V1. A handle is (rank_prefix_matrix [R, R], channel_prefix_matrix, recv_channel_prefix_matrix
    [R, C], recv_src_idx [N], is_token_in_rank [T, R], send_head [T, R])."""

    num_sms = 20

    def __init__(
        self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0,
        low_latency_mode: bool = False, num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
        explicitly_destroy: bool = False, enable_shrink: bool = False, comm: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(group)
        self.group_size = self.num_ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        sizes: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(sizes, num_nvl_bytes, group)
        host_assert(len(set(sizes)) == 1, f"num_nvl_bytes differ: {sizes}")

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        known = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
        assert num_ranks in known, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 6, 256)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Buffer.get_dispatch_config(num_ranks)

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:  # fmt: skip
        host_assert(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx")
        host_assert(topk_idx.dtype == torch.int64 and num_experts % self.num_ranks == 0, "topk_idx")
        in_rank = self.ranks_of(topk_idx, num_experts)
        per_expert = count_experts(topk_idx, num_experts)
        return in_rank.sum(0).int(), None, per_expert, in_rank, finish(lambda: None, async_finish)

    def dispatch(
        self, x: Tensor, handle: Any = None, num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None, is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None, topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None, expert_alignment: int = 1, num_worst_tokens: int = 0,
        config: Config | None = None, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        self._check_call(x, config, previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            received, event = self._receive([x], handle[0], handle[4], len(handle[3]), async_finish)
            return received[0], None, None, None, None, event
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        host_assert((topk_idx is None) == (topk_weights is None), "topk_idx and topk_weights")
        host_assert(num_worst_tokens == 0 or topk_idx is not None, "num_worst_tokens")
        sent, counts = self.gather_counts(num_tokens_per_rank, num_tokens_per_expert)
        prefix = sent.cumsum(0).int()
        num_rows = num_worst_tokens or int(prefix[-1, self.rank])
        tensors = [x, torch.arange(len(x), dtype=torch.int32)[:, None]]
        if topk_idx is not None and topk_weights is not None:
            tensors += [topk_idx, topk_weights]
        received, event = self._receive(
            tensors, prefix, is_token_in_rank, num_rows, async_finish, len(counts)
        )
        recv_x, src_idx, *choices = received
        recv_idx, recv_weights = choices or (None, None)
        channels = torch.zeros(self.num_ranks, Buffer.num_sms // 2, dtype=torch.int32)
        send_head = torch.zeros(is_token_in_rank.shape, dtype=torch.int32)
        handle = (prefix, channels, channels, src_idx[:, 0], is_token_in_rank, send_head)
        aligned = [] if num_worst_tokens else align(counts, expert_alignment)
        return recv_x, recv_idx, recv_weights, aligned, handle, event

    def _receive(
        self, tensors: list[Tensor], prefix: Tensor, in_rank: Tensor, num_rows: int,
        is_async: bool, num_local: int = 0,
    ) -> tuple[list[Tensor], EventOverlap]:  # fmt: skip
        """Send tensors [T, *]; of choices and weights, if any, only what the receiver owns."""
        host_assert(len(in_rank) == len(tensors[0]), "is_token_in_rank.size(0) == x.size(0)")

        def parts_of(rank: int, tokens: Tensor) -> list[Tensor]:
            parts = [tensor[tokens] for tensor in tensors]
            if len(parts) == 4:
                host_assert(parts[3].dtype == torch.float32, "topk_weights are fp32")
                parts[2] = localize(parts[2], rank, num_local)
                parts[3] = parts[3].masked_fill(parts[2] < 0, 0)
            return parts

        flight = self.fly_out(parts_of, in_rank, splits(prefix[:, self.rank]))
        received = flight.unset(num_rows)

        def arrive() -> None:
            for whole, part in zip(received, flight.land(), strict=True):
                whole[: len(part)] = part
            for recv_idx in received[2:3]:
                recv_idx[int(prefix[-1, self.rank]) :] = -1

        return received, finish(arrive, is_async)

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, bias: Any = None,
        config: Config | None = None, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        self._check_call(x, config, previous_event, async_finish, allocate_on_comm_stream)
        prefix, _, _, src_idx, in_rank, _ = handle
        host_assert(len(src_idx) == len(x), "src_idx.size(0) == num_tokens")
        parts = [x] if topk_weights is None else [x, topk_weights]
        num_rows = int(prefix[-1, self.rank])
        recv = splits(prefix[:, self.rank])
        flight = self.fly_home([part[:num_rows] for part in parts], in_rank, recv)
        out, *weights = flight.unset(len(in_rank))

        def arrive() -> None:
            spread = self.add_up(flight, in_rank, bias, out)
            if spread is not None:
                weights[0].zero_()
                for rank in range(self.num_ranks):
                    weights[0].add_(spread[:, rank])

        return out, weights[0] if weights else None, finish(arrive, async_finish)

    def _check_call(
        self, x: Tensor, config: Config | None, previous_event: Any, is_async: bool, on_comm: bool
    ) -> None:
        self.check_rows(x)
        host_assert(not on_comm or (previous_event is not None and is_async), "previous_event")
        config = config or self.get_dispatch_config(self.num_ranks)
        size = config.get_nvl_buffer_size_hint(x.shape[1] * x.element_size(), self.num_ranks)
        host_assert(size <= self.num_nvl_bytes, f"{size} <= num_nvl_bytes={self.num_nvl_bytes}")


class EPHandle:
    """V2's handle. Row i of recv_src_metadata [N, K + 2] starts with its source rank *
    num_max_tokens_per_rank + its token there; the rest of it is not modelled."""

    do_expand = False
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    recv_src_metadata: Tensor


class ElasticBuffer(Sender):
    """V2, direct mode, with the counts on the host."""

    def __init__(
        self, group: Any, num_bytes: int | None = None, num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0,
        use_fp8_dispatch: bool = False, deterministic: bool = False, allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True, prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3, num_allocated_qps: int = 0, num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100, explicitly_destroy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(group)
        self.rank_idx = self.rank
        sizes = (num_max_tokens_per_rank, hidden, num_topk)
        self.num_bytes = num_bytes or self.get_buffer_size_hint(group, *sizes)
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self._disorder = torch.Generator().manual_seed(self.rank)
        dist.barrier(group)

    @staticmethod
    def get_buffer_size_hint(
        group: Any, num_max_tokens_per_rank: int, hidden: int, num_topk: int = 0,
        use_fp8_dispatch: bool = False, allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:  # fmt: skip
        token_bytes = 2 * hidden + 12 * num_topk + 32
        return align([int(group.size()) * num_max_tokens_per_rank * token_bytes], 2**21)[0]

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        assert num_experts % self.num_ranks == 0  # TypeError where a cached dispatch names none
        return 24

    def dispatch(
        self, x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None, num_experts: Any = None,
        num_max_tokens_per_rank: int | None = None, expert_alignment: int | None = None,
        num_sms: int = 0, num_qps: int = 0, previous_event: Any = None,
        previous_event_before_epilogue: Any = None, async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False, handle: EPHandle | None = None,
        do_handle_copy: bool = True, do_cpu_sync: bool | None = None, do_expand: bool = False,
        do_zero_padding: bool = False, use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, EPHandle, EventOverlap]:  # fmt: skip
        self.check_rows(x)
        host_assert(previous_event is None or allocate_on_comm_stream, "previous_event")
        assert not do_expand, "the expanded mode is not modelled"
        assert do_cpu_sync is not False, "device-only counts are not modelled"
        choices = topk_idx if handle is None else handle.topk_idx
        assert choices is not None
        num_sms = num_sms or self.get_theoretical_num_sms(num_experts, choices.shape[1])
        is_cached = handle is not None
        if handle is None:
            most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
            copied = choices.clone() if do_handle_copy else choices
            handle = self._new_handle(copied, num_experts, expert_alignment or 1, most, num_sms)
        assert topk_idx is None or not is_cached
        host_assert(len(x) == len(handle.topk_idx), "num_tokens == num_tokens_")
        host_assert(len(x) <= handle.num_max_tokens_per_rank, "too many tokens")
        is_async = async_with_compute_stream
        received, event = self._receive(x, topk_weights, handle, is_cached, is_async)
        weights = received[3] if topk_weights is not None else None
        return received[0], received[2], weights, handle, event

    def _new_handle(
        self, topk_idx: Tensor, num_experts: int, alignment: int, most: int, num_sms: int
    ) -> EPHandle:
        host_assert(topk_idx.dtype == torch.int64 and topk_idx.shape[1] <= 32, "topk_idx")
        host_assert(num_experts % self.num_ranks == 0, "num_experts % num_ranks == 0")
        ordered = topk_idx.sort(1).values
        double = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        host_assert(not double.any(), "ptx::deduplicate(dst_expert_idx, lane_idx)")
        per_rank = self.ranks_of(topk_idx, num_experts).sum(0).int()
        sent, counts = self.gather_counts(per_rank, count_experts(topk_idx, num_experts))
        handle = EPHandle()
        handle.topk_idx, handle.num_experts, handle.num_sms = topk_idx, num_experts, num_sms
        handle.num_max_tokens_per_rank, handle.expert_alignment = most, alignment
        per_source = sent[:, self.rank].cumsum(0).int()
        handle.psum_num_recv_tokens_per_scaleup_rank = per_source
        handle.num_recv_tokens = int(per_source[-1])
        handle.num_recv_tokens_per_expert_list = aligned = align(counts, alignment)
        handle.psum_num_recv_tokens_per_expert = torch.tensor(aligned).cumsum(0).int()
        return handle

    def _receive(
        self, x: Tensor, weights: Tensor | None, handle: EPHandle, is_cached: bool, is_async: bool
    ) -> tuple[list[Tensor], EventOverlap]:
        """Send x, metadata, choices and, where given, weights; a cached one lands as the first."""
        num_local = handle.num_experts // self.num_ranks
        metadata = torch.zeros(len(x), handle.topk_idx.shape[1] + 2, dtype=torch.int32)
        metadata[:, 0] = self.rank * handle.num_max_tokens_per_rank + torch.arange(len(x))

        def parts_of(rank: int, tokens: Tensor) -> list[Tensor]:
            local = localize(handle.topk_idx[tokens], rank, num_local)
            unmasked = [] if weights is None else [weights[tokens]]
            return [x[tokens], metadata[tokens], local, *unmasked]

        in_rank = self.ranks_of(handle.topk_idx, handle.num_experts)
        per_source = splits(handle.psum_num_recv_tokens_per_scaleup_rank)
        flight = self.fly_out(parts_of, in_rank, per_source)
        received = flight.unset(handle.num_recv_tokens)
        if not is_cached:
            handle.recv_src_metadata = received[1]

        def arrive() -> None:
            parts = flight.land()
            if is_cached:
                order = torch.searchsorted(
                    parts[1][:, 0].contiguous(), handle.recv_src_metadata[:, 0].contiguous()
                )
            else:
                order = self._any_order(per_source)
            for whole, part in zip(received, parts, strict=True):
                whole.copy_(part[order])

        def sort() -> None:
            order = received[1][:, 0].argsort()
            for whole in received:
                whole.copy_(whole[order])

        event = finish(arrive, is_async)
        if self.deterministic and not is_cached:
            event.register_hook_after_wait(sort) if is_async else sort()
        return received, event

    def _any_order(self, per_source: list[int]) -> Tensor:
        """Slots inside a source rank are taken by atomic counters: another order in each call."""
        starts = torch.tensor([0, *per_source]).cumsum(0).tolist()
        shuffled = [torch.randperm(count, generator=self._disorder) for count in per_source]
        return torch.cat([part + start for part, start in zip(shuffled, starts, strict=False)])

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None, bias: Any = None,
        num_sms: int = 0, num_qps: int = 0, previous_event: Any = None,
        previous_event_before_epilogue: Any = None, async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        self.check_rows(x)
        host_assert(x.shape[1] % 256 == 0, "kHidden % (32 * sizeof(int4) / sizeof(nv_bfloat16))")
        host_assert(previous_event is None or allocate_on_comm_stream, "previous_event")
        host_assert(len(x) == handle.num_recv_tokens, "num_reduced_tokens == num_tokens")
        in_rank = self.ranks_of(handle.topk_idx, handle.num_experts)
        order = handle.recv_src_metadata[:, 0].argsort()
        parts = [x[order]] if topk_weights is None else [x[order], topk_weights[order]]
        per_source = splits(handle.psum_num_recv_tokens_per_scaleup_rank)
        flight = self.fly_home(parts, in_rank, per_source)
        out, *weights = flight.unset(len(in_rank))

        def arrive() -> None:
            spread = self.add_up(flight, in_rank, bias, out)
            if spread is not None:
                num_local = handle.num_experts // self.num_ranks
                owner = handle.topk_idx.clamp(min=0).div(num_local, rounding_mode="floor")
                of_owner = spread.gather(1, owner[:, None])[:, 0]
                weights[0].copy_(of_owner.masked_fill(handle.topk_idx < 0, 0))

        event = finish(arrive, async_with_compute_stream)
        return out, weights[0] if weights else None, event
