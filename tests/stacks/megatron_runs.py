"""Trains a small Megatron-Core GPT on real text, with feplb, with its policy none, or without it.

A Run says how; ``train`` runs it on one rank and returns everything that must be equal: losses,
gradient norms, and the bits of every parameter. Used inside ranks' processes (tests/ranks.py).
"""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from byte_text import NUM_BYTE_VALUES, Windows, read_bytes, standard_library
from megatron_on_cpu import patch_megatron
from torch import Tensor, nn

from feplb import BalancerConfig

HIDDEN, FFN, EXPERTS, TOP_K = 32, 48, 8, 2
LENGTH, WINDOWS = 16, 4  # bytes of a window, windows of a micro-batch
NUM_TOKENS = LENGTH * WINDOWS
DEADLINE_S = 30.0  # never reached where all is well; the ranks share two cores


@dataclass(frozen=True, kw_only=True)
class Run:
    """How to train. ``policy`` None means without feplb.

    ``settings`` go to TransformerConfig, ``ddp`` to DistributedDataParallelConfig.
    """

    policy: str | None = "greedy"
    steps: int = 3
    micro_batches: int = 2
    pp: int = 1
    vpp: int | None = None
    ep: int = 4
    num_layers: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    is_grouped: bool = False  # experts in TEGroupedMLP, on a stand-in for TE's linear layer
    after_build: Callable[[list[nn.Module]], None] | None = None
    save_to: str | None = None
    load_from: str | None = None

    @property
    def topology(self) -> tuple[int, int | None, int]:
        """What one set of ranks cannot change between runs."""
        return self.pp, self.vpp, self.ep


@dataclass
class Outcome:
    """What a rank saw."""

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, Tensor]
    moved: float = 0.0  # share of all rows
    before: float = 1.0  # mean of max/mean over calls
    after: float = 1.0

    def differences(self, other: Outcome) -> list[str]:
        """One sentence per thing that is not equal, bit by bit."""
        found = []
        for name in ("losses", "grad_norms"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name}: {getattr(self, name)}, expected {getattr(other, name)}")
        if self.parameters.keys() != other.parameters.keys():
            found.append(f"parameters: {sorted(self.parameters.keys() ^ other.parameters.keys())}")
        for name in self.parameters.keys() & other.parameters.keys():
            seen, expected = self.parameters[name], other.parameters[name]
            if not torch.equal(seen.view(torch.uint8), expected.view(torch.uint8)):
                worst = (seen.double() - expected.double()).abs().max().item()
                found.append(f"{name}: differs by at most {worst:.3e}")
        return found


def transformer_config(run: Run) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": run.num_layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": run.ep,
        "pipeline_model_parallel_size": run.pp,
        "virtual_pipeline_model_parallel_size": run.vpp,
        "pipeline_dtype": torch.float32,
        # Two interleaved stages are each other's next and previous: not in one batch.
        "overlap_p2p_comm": run.vpp is not None,
        "batch_p2p_comm": run.vpp is None,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**{**settings, **run.settings})


def start_megatron(run: Run) -> None:
    """Megatron's process groups for a run; a process keeps those of its first one.

    Every gloo group is a few threads, and Megatron makes some forty: they are not made twice.
    """
    patch_megatron()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        sizes = (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        assert sizes == run.topology, f"these ranks have {sizes}; run {run.topology} in others"
        return
    parallel_state.initialize_model_parallel(
        1,
        run.pp,
        run.vpp,
        expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=1,
    )


def build(run: Run, config: Any) -> list[nn.Module]:
    """This rank's model chunks, with weights that depend on their names only."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    if run.is_grouped:
        spec.submodules.mlp.submodules.experts = grouped_experts()
    if run.policy is not None:
        from feplb.integrations.megatron import enable

        spec = enable(spec, BalancerConfig(policy=run.policy, num_slots=2, deadline_s=DEADLINE_S))
    chunks: list[nn.Module] = []
    for stage in range(run.vpp or 1):
        vp_stage = None if run.vpp is None else stage
        model = GPTModel(
            config,
            spec,
            NUM_BYTE_VALUES,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        draw_weights(model, chunk=stage)
        chunks.append(model)
    return chunks


class GroupedLinear(nn.Module):
    """Has the attributes of Transformer Engine's grouped linear layer: weight0, weight1, ..."""

    def __init__(
        self, num_gemms: int, width_in: int, width_out: int, *, config: Any, **_: Any
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(width_out, width_in, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
            self.register_parameter(f"weight{i}", weight)

    def forward(self, rows: Tensor, splits: list[int]) -> tuple[Tensor, None]:
        parts = torch.split(rows, splits)
        outs = [p.matmul(getattr(self, f"weight{i}").t()) for i, p in enumerate(parts)]
        return torch.cat(outs), None


def grouped_experts() -> Any:
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    linears = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
    return ModuleSpec(module=TEGroupedMLP, submodules=linears)


def draw_weights(model: nn.Module, chunk: int) -> None:
    """Experts by their global index, so that they do not depend on how they are spread."""
    from megatron.core import parallel_state

    ep_rank = parallel_state.get_expert_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = 0 if getattr(parameter, "allreduce", True) else ep_rank + 1
            seed = zlib.crc32(f"{pp_rank} {chunk} {place} {name}".encode())
            generator = torch.Generator().manual_seed(seed)
            if "layernorm" not in name:
                width = parameter.shape[-1]
                scale = 1.0 if "router" in name else 1 / width**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def train(run: Run) -> Outcome:
    """One run on this rank."""
    start_megatron(run)
    config = transformer_config(run)
    return Trainer(run, config, build(run, config)).train()


class Trainer:
    """Megatron's own loop in small: its schedule, its DDP, its optimizer."""

    def __init__(self, run: Run, config: Any, chunks: list[nn.Module]) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads

        self.run, self.config = run, config
        if run.after_build is not None:
            run.after_build(chunks)
        ddp_config = DistributedDataParallelConfig(**{"bucket_size": 3000, **run.ddp})
        self._wrap(chunks, ddp_config)
        self.balancer: Any = None
        if run.policy is not None:
            from feplb.integrations.megatron import attach

            self.balancer = attach(self.models, num_tokens=NUM_TOKENS)
        self._set_optimizer(ddp_config)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self._set_overlap(ddp_config)
        self.windows = Windows(
            read_bytes(standard_library(), max_bytes=1 << 18),
            num_windows=WINDOWS,
            length=LENGTH,
            seed=parallel_state.get_data_parallel_rank(),
        )
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.loads: list[tuple[float, float]] = []
        self.rows = [0, 0]  # all, moved

    def _wrap(self, chunks: list[nn.Module], ddp_config: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.transformer.module import Float16Module

        if self.config.bf16:
            chunks = [Float16Module(self.config, chunk) for chunk in chunks]
        self.models = [
            DistributedDataParallel(self.config, ddp_config, chunk, disable_bucketing=at > 0)
            for at, chunk in enumerate(chunks)
        ]

    def _set_optimizer(self, ddp_config: Any) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                clip_grad=1.0,
                bf16=self.config.bf16,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=ddp_config.use_distributed_optimizer,
                overlap_param_gather=ddp_config.overlap_param_gather,
            ),
            self.models,
        )

    def _set_overlap(self, ddp_config: Any) -> None:
        """As Megatron's training loop does it."""
        is_single = len(self.models) == 1
        if ddp_config.overlap_grad_reduce:
            no_syncs = [model.no_sync for model in self.models]
            self.config.no_sync_func = no_syncs[0] if is_single else no_syncs
            if not is_single:
                self.config.grad_sync_func = [model.start_grad_sync for model in self.models]
        if ddp_config.overlap_param_gather and not is_single:
            self.config.param_sync_func = [model.start_param_sync for model in self.models]

    def train(self) -> Outcome:
        if self.run.load_from is not None:
            self.load(self.run.load_from)
        for _ in range(self.run.steps):
            self.step()
        if self.run.save_to is not None:
            self.save(self.run.save_to)
        outcome = Outcome(self.losses, self.grad_norms, self.parameters())
        if self.balancer is not None:
            outcome.moved = self.rows[1] / max(1, self.rows[0])
            outcome.before = sum(load[0] for load in self.loads) / len(self.loads)
            outcome.after = sum(load[1] for load in self.loads) / len(self.loads)
            self.balancer.close()
        return outcome

    def parameters(self) -> dict[str, Tensor]:
        if self.run.ddp.get("overlap_param_gather"):  # else they are of the step before
            for model in self.models:
                model.disable_forward_pre_hook()
        return {
            f"{at}.{name}": parameter.detach().clone().contiguous()
            for at, model in enumerate(self.models)
            for name, parameter in model.module.named_parameters()
        }

    def step(self) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [self.windows.draw() for _ in range(self.run.micro_batches)]
        iterators = [iter(batches) for _ in self.models]
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models if len(self.models) > 1 else self.models[0],
            num_microbatches=self.run.micro_batches,
            seq_length=LENGTH,
            micro_batch_size=WINDOWS,
            forward_only=False,
        )
        if self.balancer is not None:
            self.balancer.check()
            self._record_calls()
        _, grad_norm, _ = self.optimizer.step()
        self.grad_norms.append(float(grad_norm))
        self.losses.extend(float(loss["loss"]) for loss in losses)

    def _record_calls(self) -> None:
        from feplb.integrations.megatron import imbalances

        for layer in range(len(self.balancer.layers)):
            record = self.balancer.last_call(layer)
            self.loads.append(imbalances(record))
            self.rows[0] += int(record.counts.sum())
            self.rows[1] += record.num_rows_moved

    def sharded_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for at, model in enumerate(self.models):
            state[f"model{at}"] = model.module.sharded_state_dict()
        loading = self.run.load_from is not None
        state["optimizer"] = self.optimizer.sharded_state_dict(state["model0"], is_loading=loading)
        return state

    def save(self, folder: str) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        filesystem_async._process_memory = lambda: 0  # else it asks for psutil, for its log
        # Megatron writes from processes of its own, which a daemon (a rank here) may not start.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        dist_checkpointing.save(self.sharded_state(), folder)

    def load(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self.sharded_state(), folder)
        for at, model in enumerate(self.models):
            model.module.load_state_dict(state[f"model{at}"])
        self.optimizer.load_state_dict(state["optimizer"])


def forward_step(data_iterator: Iterator[Any], model: nn.Module) -> tuple[Tensor, Any]:
    """What Megatron's schedules call: the model's output, and its loss function."""
    window, following = next(data_iterator)
    positions = torch.arange(LENGTH).expand_as(window)
    output = model(window, positions, None, labels=following)

    def loss_func(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule scales loss in place

    return output, loss_func
