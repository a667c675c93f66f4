"""What the test_balancer_* files share: small layers, uneven counts, and arms to compare.

An arm runs the same program with one policy ("none", "greedy"), or without any Balancer ("local").
Programs run inside a rank's process and return tensors by name; arms are compared there, bit by
bit, and only sentences about differences travel back.

Tensors are made on the CPU from seeds and moved to where the lane of the environment has them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_gpu, run_ranks
from torch import Tensor

from feplb import Balancer, BalancerConfig, LayerSpec, SwiGLU
from feplb.config import TensorSpec
from feplb.device_swiglu import DeviceSwiGLU
from feplb.two_phase import run_experts_locally

Bits = dict[str, Tensor]
Weights = list[Any]  # per tensor of an expert: one stacked tensor, or one tensor per expert

NUM_RANKS = 4
DEADLINE_S = 15.0  # never reached where all is well; spawned processes share two cores
PROBS = (TensorSpec((), torch.float32),)


def device() -> torch.device:
    """Where the tensors of this rank live."""
    return torch.device("cuda" if on_gpu() else "cpu")


def experts() -> Any:
    """A SwiGLU for them."""
    return DeviceSwiGLU() if on_gpu() else SwiGLU()


def layer_spec(
    num_local_experts: int = 5,
    hidden: int = 32,
    width: int = 48,
    dtype: torch.dtype = torch.float32,
    row_data: tuple[TensorSpec, ...] = (),
    max_rows: int = 256,
) -> LayerSpec:
    """A SwiGLU layer: w1 [2F, H] and w2 [H, F] per expert."""
    shapes = ((2 * width, hidden), (hidden, width))
    return LayerSpec(num_local_experts, hidden, dtype, shapes, row_data, max_rows)


PLAIN = (layer_spec(),)
TWO_LAYERS = (layer_spec(), layer_spec())
# Different H, F, E and dtype in one arena; the last two carry router probabilities.
MIXED = (
    layer_spec(),
    layer_spec(3, 64, 32, row_data=PROBS),
    layer_spec(4, 48, 40, torch.bfloat16, row_data=PROBS),
)


def seeded(*key: int) -> torch.Generator:
    """A generator that depends on every number of ``key``."""
    seed = 0
    for number in key:
        seed = seed * 1009 + number + 1
    return torch.Generator().manual_seed(seed)


def make_weights(
    spec: LayerSpec, rank: int, layer: int = 0, *, stacked: bool = True, grad: bool = True
) -> Weights:
    """Leaves: per tensor of an expert [E, *S], or E tensors [*S]."""
    generator = seeded(7, rank, layer)
    weights: Weights = []
    for want in spec.weights:
        shape = (spec.num_local_experts, *want.shape)
        values = torch.randn(shape, generator=generator) / want.shape[-1] ** 0.5
        values = values.to(want.dtype).to(device())
        entries = [values] if stacked else [value.clone() for value in values]
        leaves = [entry.requires_grad_(grad) for entry in entries]
        weights.append(leaves[0] if stacked else leaves)
    return weights


def flat(weights: Weights) -> list[Tensor]:
    """All leaves of ``weights`` in a row."""
    return [leaf for entry in weights for leaf in ([entry] if isinstance(entry, Tensor) else entry)]


def uneven_counts(rank: int, num_ranks: int, num_local_experts: int, step: int = 0) -> list[int]:
    """Rank step % n is overloaded, the next has one full expert, the one after it has no tokens.

    Example, 4 ranks, step 0: rank 0 [24, 35, 37, 48, 50], rank 1 [0, 38, 4, 0, 5], rank 2 nothing,
    rank 3 [0, 5, 1, 6, 2]. Greedy moves five experts; rank 1 helps and is helped.
    """
    if rank == (step + 2) % num_ranks and num_ranks > 2:
        return [0] * num_local_experts
    counts = [(3 * rank + 5 * e + 7 * step) % 9 for e in range(num_local_experts)]
    counts[step % num_local_experts] = 0
    if rank == step % num_ranks:
        return [c + 24 + 6 * ((e + step) % num_local_experts) for e, c in enumerate(counts)]
    if rank == (step + 1) % num_ranks:
        counts[(step + 1) % num_local_experts] += 30
    return counts


def make_rows(
    spec: LayerSpec, counts: Sequence[int], *key: int, grad: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows [N, H] and side data, as leaves."""
    generator = seeded(11, *key)
    num_rows = sum(counts)
    rows = torch.randn(num_rows, spec.hidden, generator=generator).to(spec.dtype).to(device())
    row_data = [
        torch.rand(num_rows, *want.shape, generator=generator).to(want.dtype).to(device())
        for want in spec.row_data
    ]
    return rows.requires_grad_(grad), tuple(data.requires_grad_(grad) for data in row_data)


def loss_of(out: Tensor) -> Tensor:
    """A scalar whose gradient differs in every element."""
    slope = torch.linspace(-1, 1, out.numel()).to(out.device).view(out.shape)
    return (out.float() * (slope + out.float())).sum()


def grads(**tensors: Any) -> Bits:
    """The gradients of what is given by name: a tensor, or weights."""
    bits: Bits = {}
    for name, entry in tensors.items():
        for i, leaf in enumerate([entry] if isinstance(entry, Tensor) else flat(entry)):
            assert leaf.grad is not None, f"{name} {i} has no grad"
            bits[f"grad of {name} {i}"] = leaf.grad
    return bits


@dataclass
class Arm:
    """One rank of one arm; ``run`` is the block every program runs."""

    rank: int
    num_ranks: int
    specs: tuple[LayerSpec, ...]
    balancer: Balancer | None
    num_moves: int = 0
    scale: int = 1  # of the counts

    @property
    def door(self) -> Balancer:
        """The Balancer, in programs that make no sense without one."""
        assert self.balancer is not None
        return self.balancer

    def counts(self, layer: int = 0, step: int = 0) -> list[int]:
        num_local_experts = self.specs[layer].num_local_experts
        counts = uneven_counts(self.rank, self.num_ranks, num_local_experts, step)
        return [self.scale * count for count in counts]

    def rows(
        self, layer: int = 0, step: int = 0, grad: bool = True
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return make_rows(
            self.specs[layer], self.counts(layer, step), self.rank, layer, step, grad=grad
        )

    def weights(self, layer: int = 0, *, stacked: bool = True, grad: bool = True) -> Weights:
        return make_weights(self.specs[layer], self.rank, layer, stacked=stacked, grad=grad)

    def run(
        self,
        rows: Tensor,
        weights: Weights,
        *,
        layer: int = 0,
        step: int = 0,
        row_data: Sequence[Tensor] = (),
        prepared: bool = True,
        begun: bool = False,
        compute: Any = None,
        grad_sinks: Any = None,
    ) -> Tensor:
        counts = self.counts(layer, step)
        compute = experts() if compute is None else compute
        if self.balancer is None:
            return run_experts_locally(rows, counts, weights, compute, row_data)
        if prepared:
            weights = self.balancer.prepare_weights(weights, layer=layer)
        ticket = self.balancer.begin(counts, layer=layer) if begun else None
        out = self.balancer.run_experts(
            rows, counts, weights, compute,
            layer=layer, row_data=row_data, ticket=ticket, grad_sinks=grad_sinks,
        )  # fmt: skip
        record = self.balancer.last_call(layer)
        assert record is not None
        self.num_moves += len(record.moves)
        return out

    def check(self) -> None:
        if self.balancer is not None:
            self.balancer.check()


Program = Callable[[Arm], Bits]


def run_arm(
    rank: int,
    num_ranks: int,
    specs: tuple[LayerSpec, ...],
    policy: str,
    program: Program,
    **config: Any,
) -> tuple[Bits, int]:
    """(what the program returned, moves it saw); collective unless the policy is "local"."""
    if policy == "local":
        return program(Arm(rank, num_ranks, specs, None)), 0
    with build(specs, policy=policy, **config) as balancer:
        arm = Arm(rank, num_ranks, specs, balancer)
        return program(arm), arm.num_moves


def warm_up(spec: LayerSpec) -> None:
    """Compile and load the kernels of a SwiGLU layer on a GPU: it takes longer than a deadline."""
    chosen: Any = DeviceSwiGLU().choice(torch.empty(0, dtype=spec.dtype, device=device()))
    if spec in _WARM or isinstance(chosen, SwiGLU):
        return
    _WARM.add(spec)
    probs = spec.row_data[0].dtype if spec.row_data else None
    width = spec.weights[1].shape[1]
    chosen.warm_up(spec.hidden, width, dtype=spec.dtype, device=device(), probs_dtype=probs)


_WARM: set[LayerSpec] = set()


def build(specs: Sequence[LayerSpec] = PLAIN, *, group: Any = None, **config: Any) -> Balancer:
    """A Balancer over all ranks of the process group, or of ``group``."""
    config.setdefault("deadline_s", DEADLINE_S)
    for spec in specs if on_gpu() else ():
        warm_up(spec)
    return Balancer(BalancerConfig(**config), group or dist.group.WORLD, layers=specs)


class Heard(logging.Handler):
    """Keeps what feplb logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def resources_in_use(*, num_threads: int | None = None) -> dict[str, Any]:
    """What this process holds of the kinds that feplb takes.

    A thread that was joined is listed in /proc a moment longer, until the kernel is through with
    it: with ``num_threads`` given, wait up to a second for that many.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threads_of_feplb(num_threads),
        "mappings": sorted(line.split()[-1] for line in maps if "/dev/shm/feplb-" in line),
        "in /dev/shm": sorted(path.name for path in Path("/dev/shm").glob("feplb-*") if ours(path)),
    }


def threads_of_feplb(expected: int | None) -> list[str]:
    give_up = time.monotonic() + 1.0
    while True:
        names = [name for name in thread_names() if name.startswith("feplb")]
        if expected in (None, len(names)) or time.monotonic() > give_up:
            return sorted(names)
        time.sleep(0.001)


def thread_names() -> Iterator[str]:
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            yield Path(f"/proc/self/task/{task}/comm").read_text().strip()


def ours(segment: Path) -> bool:
    """Was it made by ranks of this spawn? (Other tests may run on this machine.)

    The last but one part of its name is the pid of rank 0; all ranks have the same parent.
    """
    try:
        stat = Path(f"/proc/{segment.name.split('-')[-2]}/stat").read_text()
    except OSError:
        return False
    return int(stat.rsplit(")", 1)[1].split()[1]) == os.getppid()


# ----------------------------------------------------------------------------------- comparing


def differences(seen: Bits, expected: Bits) -> list[str]:
    """One sentence per tensor whose bits differ; NaN equals the same NaN."""
    sentences = [f"{name} is missing" for name in expected.keys() - seen.keys()]
    for name, tensor in seen.items():
        want = expected[name]
        if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
            sentences.append(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{tuple(want.shape)} {want.dtype}"
            )
            continue
        wrong = as_bytes(tensor) != as_bytes(want)
        if wrong.any():
            first = int(wrong.nonzero()[0]) // tensor.element_size()
            sentences.append(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} bytes differ, element {first} is "
                f"{tensor.flatten()[first].item()}, expected {want.flatten()[first].item()}"
            )
    return sentences


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Case:
    """Two programs whose tensors must have the same bits on every rank."""

    seen: Program
    specs: tuple[LayerSpec, ...] = PLAIN
    expected: Program | None = None  # None: the same program
    seen_policy: str = "greedy"
    expected_policy: str = "none"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One case on one rank."""

    differences: list[str]
    num_moves: int = 0
    error: str = ""


def run_case(rank: int, num_ranks: int, case: Case, **config: Any) -> Outcome:
    """Both programs, each with a Balancer of its own; collective."""
    try:
        expected, _ = run_arm(
            rank, num_ranks, case.specs, case.expected_policy, case.expected or case.seen, **config
        )
        seen, num_moves = run_arm(
            rank, num_ranks, case.specs, case.seen_policy, case.seen, **case.config, **config
        )
    except Exception:
        return Outcome([], 0, traceback.format_exc())
    return Outcome(differences(seen, expected), num_moves)


def _run_cases(rank: int, num_ranks: int, cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """Case after case; one that raises does not disturb the next."""
    outcomes: dict[str, Outcome] = {}
    for name, case in cases.items():
        outcomes[name] = run_case(rank, num_ranks, case)
        dist.barrier()
    return outcomes


class Outcomes:
    """What all ranks found in all cases of a file; one spawn.

    ``by_rank`` has them where they were found another way.
    """

    def __init__(
        self,
        cases: Mapping[str, Case],
        num_ranks: int = NUM_RANKS,
        *,
        by_rank: list[dict[str, Outcome]] | None = None,
    ) -> None:
        self.by_rank = by_rank or run_ranks(_run_cases, num_ranks, cases, timeout_s=120)

    def assert_same_bits(self, name: str, *, moved: bool = True) -> None:
        """Same bits on every rank; and rows did move, else the case shows nothing."""
        outcomes = [by_case[name] for by_case in self.by_rank]
        for rank, outcome in enumerate(outcomes):
            assert not outcome.error, f"rank {rank}:\n{outcome.error}"
            assert not outcome.differences, f"rank {rank}: {outcome.differences}"
        assert (outcomes[0].num_moves > 0) == moved, f"{outcomes[0].num_moves} moves"
