"""Training with EP=4 and greedy equals one unsharded process: losses, every gradient, ten steps.

Both sides compute the same sums in another order: a rank's GEMM sums over the tokens of all ranks
in one product where the unsharded process does too, but replicated gradients are summed per rank
first. A sum of n terms in any order is within n * eps of another order, relative to the sum of
magnitudes (Higham, Accuracy and Stability, eq. 4.4, both sides). Here n is at most the 4 * 48
tokens times the top_k of 2; a step chains fewer than 20 such sums (two layers, forward and
backward, the averaging), and ten steps of SGD with a small rate carry a deviation on without growth
worth counting. Hence TOLERANCE = 10 steps * 20 sums * 384 * eps(fp64), relative to the largest
magnitude. In fp64, so that no top-k choice hangs on a rounding error. Seen: 1e-15.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from feplb import Balancer, BalancerConfig, MoEConfig, MoELayer
from feplb.training import expert_state_dict, sync_gradients

NUM_RANKS, NUM_STEPS, NUM_TOKENS, HIDDEN = 4, 10, 48, 16
TOLERANCE = NUM_STEPS * 20 * (NUM_RANKS * NUM_TOKENS * 2) * torch.finfo(torch.float64).eps


class Model(nn.Module):
    """Two residual MoE layers."""

    def __init__(self, balancer: Balancer | None, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MoELayer(config_of(layer), balancer=balancer, group=group) for layer in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def config_of(layer: int) -> MoEConfig:
    return MoEConfig(
        hidden=HIDDEN, ffn_hidden=24, num_experts=16, top_k=2, dtype=torch.float64, layer=layer,
        num_shared_experts=layer, init_std=0.15,
    )  # fmt: skip


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens with a common direction, so that few experts get most of them."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    noise = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    lean = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
    return noise + lean, torch.roll(noise, 1, dims=1)


def train(balancer: Balancer | None, group: dist.ProcessGroup | None, ranks: list[int]) -> Any:
    model = Model(balancer, group).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    steps: list[tuple[float, dict[str, Tensor]]] = []
    num_moves = 0
    for step in range(NUM_STEPS):
        data = [batch(step, rank) for rank in ranks]
        x, y = (torch.cat(part) for part in zip(*data, strict=True))
        loss = (model(x) - y).square().mean()
        loss.backward()
        sync_gradients(model, group, group)
        if balancer is not None:
            balancer.check()
            num_moves += sum(len(balancer.last_call(i).moves) for i in range(2))  # type: ignore[union-attr]
        total = loss.detach().clone()
        if group is not None:
            dist.all_reduce(total, group=group)
            total /= NUM_RANKS
        steps.append((total.item(), gathered_grads(model, group)))
        optimizer.step()
        optimizer.zero_grad()
    return steps, num_moves


def gathered_grads(model: nn.Module, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Every gradient in logical expert order: a checkpoint of a model that holds them."""
    parameters = dict(model.named_parameters())
    held = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.data.copy_(p.grad)  # type: ignore[arg-type]
    grads = {name: tensor.clone() for name, tensor in expert_state_dict(model, group).items()}
    for name, p in parameters.items():
        p.data.copy_(held[name])
    return grads


def rank_program(rank: int, num_ranks: int) -> Any:
    del num_ranks
    group = dist.group.WORLD
    specs = [config_of(layer).layer_spec(NUM_RANKS, max_rows=400) for layer in range(2)]
    with Balancer(BalancerConfig(policy="greedy", deadline_s=30), group, specs) as balancer:
        return train(balancer, group, [rank])


def test_ep4_with_greedy_trains_as_one_unsharded_process_does() -> None:
    sharded, num_moves = run_ranks(rank_program, NUM_RANKS)[0]
    alone, _ = train(None, None, list(range(NUM_RANKS)))
    assert num_moves > 2 * NUM_STEPS
    for (loss, grads), (want_loss, want_grads) in zip(sharded, alone, strict=True):
        assert abs(loss - want_loss) <= TOLERANCE * abs(want_loss)
        assert grads.keys() == want_grads.keys()
        for name, want in want_grads.items():
            assert (grads[name] - want).abs().max() <= TOLERANCE * want.abs().max(), name
