"""Every knob of feplb, validated, and the only reader of environment variables.

``BalancerConfig`` is one domain's; ``LayerSpec`` describes one layer's experts. Both are frozen and
equal on every rank: construction compares them and names the ranks that differ.

Environment (read once, by ``read_environment``): ``FEPLB_LOG`` a logging level for the ``feplb``
logger; ``FEPLB_LANE`` the lane where the config says ``lane="auto"``; ``FEPLB_OFF=1`` turns every
policy into ``none``; ``FEPLB_DOMAIN`` names the domain of this rank where its host's name would not
do (containers that share a host but no memory; hosts that one NVLink fabric joins);
``FEPLB_HOST_ADDRESS`` where ranks on other hosts reach this one; ``FEPLB_LIBCUDA`` the driver's
library where it is not ``libcuda.so.1``. Any other ``FEPLB_*`` variable is an error: a misspelt
switch must not pass silently. Of torchrun's own, the job's name and ``MASTER_ADDR``; of CUDA's,
``CUDA_DEVICE_MAX_CONNECTIONS`` and ``CUDA_DEVICE_MAX_COPY_CONNECTIONS`` (``check_queues``); for
``feplb doctor`` also ``CUDA_VISIBLE_DEVICES`` and torch's ``PYTORCH_ALLOC_CONF`` (or
``PYTORCH_CUDA_ALLOC_CONF``).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LANES = ("auto", "host", "ce", "cupy")
COPY_CALLS = ("auto", "batch", "peer", "plain")
FLAG_CALLS = ("auto", "memops", "write", "copy")
ARENA_HANDLES = ("auto", "vmm", "ipc", "fabric")
TILES = ("measure", "default")
POLICIES = ("none", "greedy", "refine", "split", "auto")
_KNOWN_VARIABLES = (
    "FEPLB_LOG", "FEPLB_LANE", "FEPLB_OFF", "FEPLB_DOMAIN", "FEPLB_HOST_ADDRESS", "FEPLB_LIBCUDA",
)  # fmt: skip
# Measured: GEMM bits change with 1 to 3 rows at addresses that are not multiples of this.
_BYTE_MULTIPLE = 16


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Environment:
    """What the process environment says about feplb and the job it runs in."""

    log_level: str | None
    lane: str | None
    off: bool
    domain: str | None
    host_address: str | None
    master_address: str | None
    job_id: str
    restart_count: str
    cuda_connections: str | None
    cuda_copy_connections: str | None
    cuda_library: str | None
    cuda_visible_devices: str | None
    alloc_conf: str | None


def read_environment() -> Environment:
    """Read and check the ``FEPLB_*`` variables, and what torchrun says of the job.

    Raises:
        ValueError: an unknown ``FEPLB_*`` variable, or a value that is not allowed.
    """
    unknown = sorted(name for name in os.environ if name.startswith("FEPLB_"))
    unknown = [name for name in unknown if name not in _KNOWN_VARIABLES]
    _require(
        not unknown,
        f"unknown environment variable {', '.join(unknown)}; feplb knows "
        f"{', '.join(_KNOWN_VARIABLES)}. Unset it or correct its name.",
    )
    off = os.environ.get("FEPLB_OFF", "0")
    _require(off in ("0", "1"), f"FEPLB_OFF={off!r}, expected 0 or 1")
    lane = os.environ.get("FEPLB_LANE")
    _require(lane is None or lane in LANES, f"FEPLB_LANE={lane!r}, expected one of {LANES}")
    job = os.environ.get("TORCHELASTIC_RUN_ID", "job")
    return Environment(
        log_level=os.environ.get("FEPLB_LOG"),
        lane=lane,
        off=off == "1",
        domain=os.environ.get("FEPLB_DOMAIN"),
        host_address=os.environ.get("FEPLB_HOST_ADDRESS"),
        master_address=os.environ.get("MASTER_ADDR"),
        job_id="".join(c if c.isalnum() else "-" for c in job)[:32],
        restart_count=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        cuda_connections=os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        cuda_copy_connections=os.environ.get("CUDA_DEVICE_MAX_COPY_CONNECTIONS"),
        cuda_library=os.environ.get("FEPLB_LIBCUDA"),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        alloc_conf=os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF")),
    )


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor of an expert, or of one row of side data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one such tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerSpec:
    """One layer's experts on one rank, the same on every rank of the domain.

    Args:
        num_local_experts: experts that live on each rank.
        hidden: row width H, in elements.
        dtype: of the rows, and of weights whose spec names none.
        weights: one entry per tensor of an expert: its shape, or a ``TensorSpec``. All tensors of
            an expert (biases, scales too) move together or the expert does not move.
        row_data: one entry per side tensor: the ``TensorSpec`` of one row, e.g.
            ``TensorSpec((), torch.float32)`` for router probabilities [N].
        max_rows: most rows that may move into, or out of, one rank in one call. Sizes the arena;
            plans respect it.
    Raises:
        ValueError: a size that is not positive, or a row, weight row or bias whose bytes are not a
            multiple of 16 (the CPU's GEMM would give other bits on a helper).
    """

    num_local_experts: int
    hidden: int
    dtype: torch.dtype
    weights: tuple[TensorSpec, ...]
    row_data: tuple[TensorSpec, ...]
    max_rows: int

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        dtype: torch.dtype,
        weights: tuple[tuple[int, ...] | TensorSpec, ...],
        row_data: tuple[TensorSpec, ...] = (),
        max_rows: int = 0,
    ) -> None:
        specs = tuple(
            w if isinstance(w, TensorSpec) else TensorSpec(tuple(w), dtype) for w in weights
        )
        for name, value in (
            ("num_local_experts", num_local_experts),
            ("hidden", hidden),
            ("dtype", dtype),
            ("weights", specs),
            ("row_data", tuple(row_data)),
            ("max_rows", max_rows),
        ):
            object.__setattr__(self, name, value)
        self._validate()

    def _validate(self) -> None:
        for name in ("num_local_experts", "hidden"):
            _require(
                getattr(self, name) > 0, f"LayerSpec.{name}={getattr(self, name)}, expected > 0"
            )
        _require(self.max_rows >= 0, f"LayerSpec.max_rows={self.max_rows}, expected >= 0")
        _require(bool(self.weights), "LayerSpec.weights is empty, expected an expert's tensors")
        _require(len(self.row_data) <= 8, f"{len(self.row_data)} row_data tensors, expected <= 8")
        _require(len(self.weights) <= 20, f"{len(self.weights)} weight tensors, expected <= 20")
        _require(
            self.row_bytes % _BYTE_MULTIPLE == 0,
            f"a row of hidden={self.hidden} {self.dtype} has {self.row_bytes} bytes, expected a "
            f"multiple of {_BYTE_MULTIPLE}: unaligned rows change the bits of small GEMMs",
        )
        for i, spec in enumerate(self.weights):
            last = spec.shape[-1] if spec.shape else 1
            _require(
                last * spec.dtype.itemsize % _BYTE_MULTIPLE == 0,
                f"weight {i} of shape {spec.shape} {spec.dtype} has rows of "
                f"{last * spec.dtype.itemsize} bytes, expected a multiple of {_BYTE_MULTIPLE}",
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * self.dtype.itemsize

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return sum(spec.num_bytes for spec in self.weights)

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's forward GEMMs."""
        return 2 * sum(math.prod(spec.shape) for spec in self.weights if len(spec.shape) >= 2)


@dataclass(frozen=True, kw_only=True)
class BalancerConfig:
    """How one domain balances.

    Args:
        policy: ``"none"`` (the reference arm: same compute, no moves); ``"greedy"`` (whole experts,
            the paper's); ``"refine"`` (whole experts, searched for: every bit as with ``none``);
            ``"split"`` (row ranges: one expert may be shared by several ranks); ``"auto"``
            (whichever the cost model predicts to be done first, ``none`` included).
        num_dynamic: how many of each rank's experts may move, the last ones (paper: dyn); None:
            all.
        num_slots: received experts a rank can hold (paper: max_num_dyn).
        num_grad_slots: moves whose weight grads an owner can take back in one call; None: as
            num_slots.
        min_tokens: fewest rows worth a move (paper: tau).
        copy_budget: most weight copies of a call, over all ranks of the domain; None: at least
            four, one per rank with whole experts, two with ``split``.
        target_imbalance: max / mean of the ranks' rows to be reached, with as few copies as that
            takes; None: as near 1 as pays. Not for ``greedy``.
        grain_rows: ``split`` sends multiples of this; None: 16, since the host lane's GEMMs have no
            tiles worth more.
        split_experts: False keeps ``auto`` to whole experts, and so to the bits of ``none``.
        search_steps: steps of ``refine``'s search; None: about 20 us for 8 ranks x 128 experts, 400
            take about 70 us and leave a fifth less.
        deadline_s: longest any wait may last, in seconds; below NCCL's and DeepEP's 100 s.
        lane: how bytes travel; ``"host"`` (CPU tensors, shared memory), ``"ce"`` (CUDA tensors,
            copy engines), ``"cupy"`` (as ce, submitted from Python over CuPy and cuda-python on the
            caller's thread), ``"auto"``: ce where PyTorch has a GPU.
        copy_call: on the ce and cupy lanes, ``"batch"`` (one driver call for all copies of a
            submission, from CUDA 12.8), ``"plain"`` (one per copy), ``"peer"`` (the same, naming
            both GPUs); ``"auto"``: batch where the driver has it.
        flag_call: on the ce and cupy lanes, how a stream writes a flag: ``"memops"`` (one call for
            all), ``"write"`` (one per flag), ``"copy"`` (a 4-byte copy); ``"auto"`` is memops.
        arena_handle: on the ce lane, how peers map an arena: ``"vmm"`` (file descriptors) or
            ``"ipc"`` (CUDA IPC) or ``"fabric"`` (handles that hold on other hosts of one NVLink
            fabric, too); ``"auto"``: fabric where the domain spans hosts, else vmm where the GPU
            has it. The cupy lane has ipc alone.
        gemm_gflops: a rank's expert GEMM rate in 10^9 operations per second, to size kept B (the
            work that hides the way back) and for ``auto``; None: 120 per CPU thread.
        lane_gbps: rate of the lane, out of a source and into a destination, in 10^9 bytes per
            second; None: both as measured at start-up.
        tiles: on GPUs, the grouped GEMM's of 16-bit rows: ``"default"`` (a fixed one),
            ``"measure"`` (every rank times six configurations at start-up, compiling them first,
            and all agree on one: ``Balancer.tiles``).
        late_stream: on GPUs, add weight grads that come home to ``grad_sinks`` on a stream of their
            own, beside the dispatch's backward, and not behind it. Needs ``prepare_weights``, and
            sinks that nothing else reads or writes before its backward.
        allow_single_queue: on GPUs, accept ``CUDA_DEVICE_MAX_CONNECTIONS=1`` without a setting for
            copies: they then wait behind kernels, and little is gained.
    """

    policy: str = "greedy"
    num_dynamic: int | None = None
    num_slots: int = 8
    num_grad_slots: int | None = None
    min_tokens: int = 1
    copy_budget: int | None = None
    target_imbalance: float | None = None
    grain_rows: int | None = None
    split_experts: bool = True
    search_steps: int | None = None
    deadline_s: float = 60.0
    lane: str = "auto"
    copy_call: str = "auto"
    flag_call: str = "auto"
    arena_handle: str = "auto"
    gemm_gflops: float | None = None
    lane_gbps: float | None = None
    tiles: str = "default"
    late_stream: bool = False
    allow_single_queue: bool = False

    def __post_init__(self) -> None:
        _require(self.policy in POLICIES, f"policy={self.policy!r}, expected one of {POLICIES}")
        for name, known in (
            ("lane", LANES),
            ("copy_call", COPY_CALLS),
            ("flag_call", FLAG_CALLS),
            ("arena_handle", ARENA_HANDLES),
            ("tiles", TILES),
        ):
            value = getattr(self, name)
            _require(value in known, f"{name}={value!r}, expected one of {known}")
        for name in ("num_slots", "num_grad_slots", "num_dynamic"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name}={value}, expected >= 0")
        _require(self.min_tokens >= 1, f"min_tokens={self.min_tokens}, expected >= 1")
        _require(self.deadline_s > 0, f"deadline_s={self.deadline_s}, expected > 0")
        for name in ("copy_budget", "grain_rows", "search_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}={value}, expected >= 1")
        target = self.target_imbalance
        _require(
            target is None or 1 <= target <= 1000,
            f"target_imbalance={target}, expected 1 to 1000: max / mean of the ranks' rows",
        )
        for name in ("gemm_gflops", "lane_gbps"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name}={value}, expected > 0")

    @property
    def grad_slots(self) -> int:
        """Weight-grad slots per owner."""
        return self.num_slots if self.num_grad_slots is None else self.num_grad_slots

    def grain(self, policy: str) -> int:
        """Rows that ``policy`` sends together; 0 where it may not split an expert."""
        if policy == "auto" and not self.split_experts:
            return 0
        return 16 if self.grain_rows is None else self.grain_rows

    def dynamic_experts(self, spec: LayerSpec) -> int:
        """How many of a layer's local experts may move."""
        if self.num_dynamic is None:
            return spec.num_local_experts
        return min(self.num_dynamic, spec.num_local_experts)


def check_queues(environment: Environment, config: BalancerConfig) -> None:
    """Refuse one hardware queue for kernels and copies together, or for two streams of kernels.

    Raises:
        ValueError: CUDA_DEVICE_MAX_CONNECTIONS=1 without the setting that gives copies their own,
            or with ``late_stream``.
    """
    is_single = environment.cuda_connections == "1"
    has_own = environment.cuda_copy_connections not in (None, "1")
    _require(
        not is_single or has_own or config.allow_single_queue,
        "CUDA_DEVICE_MAX_CONNECTIONS=1 puts kernels and copies into one queue. Set "
        "CUDA_DEVICE_MAX_COPY_CONNECTIONS=8 beside it, before CUDA starts, or pass "
        "BalancerConfig(allow_single_queue=True).",
    )
    _require(
        not is_single or not config.late_stream,
        "CUDA_DEVICE_MAX_CONNECTIONS=1 puts all streams of kernels into one queue, where "
        "late_stream=True would hold up the dispatch's backward until weight grads are home. Unset "
        "one of the two.",
    )
