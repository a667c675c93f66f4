"""Balanced calls, forward and backward, of two ranks on one GPU: what bench/sanitizer.py runs.

Small and checked: outputs of whole-expert policies have the bits of experts without a Balancer.
Exit status 0: all calls ran, and rows moved.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
from layer_arms import run_balanced

from feplb import Balancer, BalancerConfig, LayerSpec
from feplb.device_swiglu import DeviceSwiGLU
from feplb.two_phase import run_experts_locally

NUM_RANKS, STEPS = 2, 2
HIDDEN, FFN = 64, 96
POLICIES = ("greedy", "split")
COUNTS = ([80, 65, 48, 33], [4, 0, 9, 3])  # uneven, and no multiples of a tile
DEADLINE_S = 100.0  # kernels are compiled meanwhile, and run many times slower


@dataclass(frozen=True)
class Called:
    """What one step of one policy did on this rank. off: of the largest output."""

    policy: str
    moves: int
    same_bits: bool
    off: float


def call(rank: int) -> list[Called]:
    """Every policy's steps; collective over the default group."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = ((2 * FFN, HIDDEN), (HIDDEN, FFN))
    counts, dtype = COUNTS[rank], torch.bfloat16
    spec = LayerSpec(len(counts), HIDDEN, dtype, shapes, max_rows=256)
    generator, compute, found = torch.Generator().manual_seed(rank), DeviceSwiGLU(), []

    def leaf(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator).mul_(float(shape[-1]) ** -0.5)
        return drawn.to(device, dtype).requires_grad_()

    weights = [leaf(len(counts), *shape) for shape in shapes]
    for policy in POLICIES:
        config = BalancerConfig(policy=policy, lane="ce", deadline_s=DEADLINE_S)
        with Balancer(config, dist.group.WORLD, [spec]) as balancer:
            for _ in range(STEPS):
                rows = leaf(sum(counts), HIDDEN)
                expected = run_experts_locally(rows.detach(), counts, weights, compute)
                out = run_balanced(balancer, rows, counts, weights, compute)
                out.backward(torch.ones_like(out))
                balancer.check()
                record = balancer.last_call(0)
                off = (out - expected).abs().max() / expected.abs().max()
                moves = 0 if record is None else len(record.moves)
                found.append(Called(policy, moves, torch.equal(out, expected), float(off)))
    return found


def check(called: list[Called]) -> None:
    """RuntimeError where rows did not move or came back wrong."""
    for each in called:
        is_right = each.same_bits if each.policy != "split" else each.off <= 2**-6
        if each.moves == 0 or not is_right:
            raise RuntimeError(f"expected moves and the outputs of no Balancer, found {each}")


def run_rank(rank: int, folder: str) -> None:
    """The body of a rank's process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    check(call(rank))
    dist.destroy_process_group()


def main() -> None:
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory(prefix="feplb-sanitized-") as folder:
        multiprocessing.spawn(run_rank, (folder,), nprocs=NUM_RANKS)  # type: ignore[attr-defined]
    print(f"{NUM_RANKS} ranks: {STEPS} calls each of {', '.join(POLICIES)}, outputs checked")


if __name__ == "__main__":
    main()
