"""Trains a small Megatron-Core GPT on real text: without feplb, with policy none, and with greedy.

  torchrun --nproc-per-node 4 examples/megatron_gpt.py

Expert parallel over all ranks, a byte is a token, the text is Python's standard library. The three
runs start alike and must end alike, to the last bit. feplb's part are the lines marked (feplb).
Here Megatron runs on the CPU, patched by megatron_on_cpu.py; on GPUs that line is not needed.
"""

from __future__ import annotations

import argparse
import hashlib
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from byte_text import NUM_BYTE_VALUES, Windows, read_bytes, standard_library
from megatron_on_cpu import patch_megatron
from torch import Tensor, nn

from feplb import BalancerConfig

LENGTH, WINDOWS, MICRO_BATCHES = 64, 4, 2
NUM_TOKENS = LENGTH * WINDOWS
POLICIES = ("off", "none", "greedy")


@dataclass
class Result:
    """Of one run, on this rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    loads: list[tuple[float, float]] = field(default_factory=list)  # max/mean before, after
    rows: list[tuple[int, int]] = field(default_factory=list)  # of a call: all, moved
    parameters: str = ""  # SHA-256

    @property
    def moved(self) -> float:
        """Share of all rows that another rank computed."""
        return sum(moved for _, moved in self.rows) / sum(rows for rows, _ in self.rows)


def transformer_config() -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=96,
        num_moe_experts=4 * dist.get_world_size(),
        moe_ffn_hidden_size=96,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
    )


def build_model(config: Any, policy: str) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    if policy != "off":
        from feplb.integrations.megatron import enable  # (feplb)

        spec = enable(spec, BalancerConfig(policy=policy, num_slots=4))  # (feplb)
    model: nn.Module = GPTModel(
        config, spec, NUM_BYTE_VALUES, LENGTH, position_embedding_type="rope"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name:  # experts start differently on every rank
                place = 0 if getattr(parameter, "allreduce", True) else dist.get_rank() + 1
                generator = torch.Generator().manual_seed(zlib.crc32(f"{place} {name}".encode()))
                scale = 0.3 if "router" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: nn.Module) -> tuple[Tensor, Any]:
    """As Megatron's schedules call it."""
    window, following = next(batches)
    losses = model(window, torch.arange(LENGTH).expand_as(window), None, labels=following)

    def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return losses, mean


def train(policy: str, steps: int) -> Result:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config, result = transformer_config(), Result()
    model, optimizer = wrap(config, build_model(config, policy))
    balancer = None
    if policy != "off":
        from feplb.integrations.megatron import attach  # (feplb)

        balancer = attach(model, num_tokens=NUM_TOKENS)  # (feplb)
    text = read_bytes(standard_library())
    windows = Windows(text, num_windows=WINDOWS, length=LENGTH, seed=dist.get_rank())
    for _ in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([windows.draw() for _ in range(MICRO_BATCHES)]),
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=WINDOWS,
            forward_only=False,
        )
        if balancer is not None:
            balancer.check()  # (feplb)
            record_loads(balancer, result)
        result.grad_norms.append(optimizer.step()[1])
        result.losses.append(sum(float(loss["loss"]) for loss in losses) / MICRO_BATCHES)
    if balancer is not None:
        balancer.close()  # (feplb)
    result.parameters = hash_of(model)
    return result


def wrap(config: Any, model: nn.Module) -> tuple[Any, Any]:
    """Megatron's DDP around the model, and its optimizer."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    config.finalize_model_grads_func = finalize_model_grads
    settings = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0)
    return wrapped, get_megatron_optimizer(settings, [wrapped])


def hash_of(model: nn.Module) -> str:
    """SHA-256 over this rank's parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def record_loads(balancer: Any, result: Result) -> None:
    """What the latest call of every layer decided."""
    from feplb.integrations.megatron import imbalances

    for layer in range(len(balancer.layers)):
        call = balancer.last_call(layer)
        result.loads.append(imbalances(call))
        moved = call.num_rows_moved
        result.rows.append((int(call.counts.sum()), moved))


def report(policy: str, result: Result) -> None:
    line = f"{policy:7} loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}"
    if result.loads:
        before, after = (sum(load) / len(load) for load in zip(*result.loads, strict=True))
        line += f"   max/mean before {before:.2f}, after {after:.2f}, {result.moved:.1%} moved"
    print(f"{line}   parameters {result.parameters[:16]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    patch_megatron()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=dist.get_world_size(), expert_tensor_parallel_size=1
    )
    results = {policy: train(policy, steps) for policy in POLICIES}
    if dist.get_rank() == 0:
        for policy, result in results.items():
            report(policy, result)
    facts = [(r.losses, r.grad_norms, r.parameters) for r in results.values()]
    is_equal = torch.tensor(int(all(fact == facts[0] for fact in facts)))
    dist.all_reduce(is_equal, op=dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        print("bit-identical on all ranks" if is_equal else "NOT bit-identical")
    dist.destroy_process_group()
    raise SystemExit(0 if is_equal else 1)


if __name__ == "__main__":
    main()
