"""A Megatron-Core GPT trains to the same bits with feplb, with its policy none, and without it.

Every case is a way to run Megatron. A set of four gloo ranks runs some of them, each three times;
the tests look at what came back. The text is Python's standard library.
"""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron_runs import Run, train
from ranks import run_ranks
from torch import nn

LONG, SHORT = 20, 2  # steps: where a line of docs/megatron.md rests on it, and elsewhere
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
OVERLAP = {"overlap_grad_reduce": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def _freeze_experts(chunks: list[nn.Module]) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "local_experts" in name:
                parameter.requires_grad_(False)


def _freeze_some(chunks: list[nn.Module]) -> None:
    """fc1 of the first expert of every rank, and all of fc2."""
    for name, parameter in chunks[0].named_parameters():
        if "local_experts.0.linear_fc1" in name or "linear_fc2" in name:
            parameter.requires_grad_(False)


def _share_experts(chunks: list[nn.Module]) -> None:
    layers: Any = chunks[0].decoder.layers
    layers[1].mlp.experts = layers[0].mlp.experts


def _prepare_fusion() -> None:
    """APEX's kernel exists for CUDA only: here it is the same product, added to main_grad."""
    from megatron.core.tensor_parallel import layers

    class Kernels:
        @staticmethod
        def wgrad_gemm_accum_fp32(
            rows: torch.Tensor, grad_out: torch.Tensor, main_grad: torch.Tensor
        ) -> None:
            main_grad.add_(grad_out.t().matmul(rows))

    layers.fused_weight_gradient_mlp_cuda = Kernels
    layers._grad_accum_fusion_available = True


def _prepare_flex() -> None:
    """Megatron looks for deep_ep when it is imported, which the ranks' server has done."""
    import deepep_stand_in

    deepep_stand_in.install(dtypes=(torch.bfloat16, torch.float32))
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    importlib.reload(fused_a2a)
    for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))


FLEX = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}

CASES: dict[str, dict[str, Any]] = {
    "alltoall": {"steps": LONG},
    "allgather": {"settings": {"moe_token_dispatcher_type": "allgather"}},
    "flex_deepep": {"steps": LONG, "settings": FLEX},
    "flex_deepep_recompute": {"settings": {**FLEX, **RECOMPUTE}},
    "moe_recompute": {"steps": LONG, "settings": RECOMPUTE},
    "full_recompute": {
        "settings": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    },
    "overlapped_grad_reduce": {"steps": LONG, "ddp": OVERLAP},
    "overlapped_grad_reduce_recompute": {"ddp": OVERLAP, "settings": RECOMPUTE},
    "distributed_optimizer": {"steps": LONG, "ep": 2, "ddp": {**OVERLAP, **DISTRIBUTED}},
    "overlapped_param_gather": {
        "steps": LONG,
        "ep": 2,
        "ddp": {**OVERLAP, **DISTRIBUTED, "overlap_param_gather": True},
    },
    "pp2": {"steps": LONG, "ep": 2, "pp": 2},
    "interleaved_pp2": {"ep": 2, "pp": 2, "vpp": 2, "num_layers": 4, "micro_batches": 4},
    "interleaved_pp2_overlap": {
        "ep": 2,
        "pp": 2,
        "vpp": 2,
        "num_layers": 4,
        "micro_batches": 4,
        "ddp": OVERLAP,
    },
    "shared_experts": {"settings": {"moe_shared_expert_intermediate_size": 32}},
    "shared_expert_overlap": {
        "settings": {
            "moe_shared_expert_intermediate_size": 32,
            "moe_shared_expert_overlap": True,
        }
    },
    "gradient_accumulation_fusion": {
        "settings": {"gradient_accumulation_fusion": True},
        "ddp": OVERLAP,
    },
    "biases_and_gelu": {
        "settings": {
            "add_bias_linear": True,
            "gated_linear_unit": False,
            "activation_func": nn.functional.gelu,
        }
    },
    "biases_and_clamped_swiglu": {
        "settings": {
            "add_bias_linear": True,
            "activation_func_clamp_value": 0.5,
            "glu_linear_offset": 1.0,
        }
    },
    "fused_swiglu": {"settings": {"bias_activation_fusion": True}},
    "probs_on_input": {
        "settings": {
            "moe_router_topk": 1,
            "moe_router_pre_softmax": True,
            "moe_apply_probs_on_input": True,
        }
    },
    "te_grouped_experts": {"is_grouped": True, "ddp": OVERLAP},
    "one_expert_per_rank": {"settings": {"num_moe_experts": 4}},
    "other_expert_width": {"settings": {"moe_ffn_hidden_size": 40}},
    "bf16": {"settings": BF16, "ddp": {"grad_reduce_in_fp32": True}},
    "frozen_experts": {"after_build": _freeze_experts},
    "partly_frozen_experts": {
        "after_build": _freeze_some,
        "settings": {"gradient_accumulation_fusion": True},
    },
    "experts_shared_between_layers": {"after_build": _share_experts},
}
PREPARE: dict[str, Callable[[], None]] = {
    "gradient_accumulation_fusion": _prepare_fusion,
    "partly_frozen_experts": _prepare_fusion,
    "flex_deepep": _prepare_flex,
    "flex_deepep_recompute": _prepare_flex,
}
# With one expert on a rank it cannot get emptier by giving whole experts away.
NOTHING_TO_MOVE = {"one_expert_per_rank"}
NOT_RUN = "an earlier case failed, and this one was not run"
HAS_DEEPEP = importlib.util.find_spec("deepep_stand_in") is not None


def run_cases(rank: int, num_ranks: int, names: list[str]) -> dict[str, Any]:
    """Per case the outcomes by policy, or a traceback."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            PREPARE.get(name, lambda: None)()
            run = {"steps": SHORT, **CASES[name]}
            results[name] = {p: train(Run(policy=p, **run)) for p in (None, "none", "greedy")}
        except Exception:
            results[name] = traceback.format_exc()
            break  # the ranks no longer agree where they are
    return results


class Outcomes:
    """Runs the selected cases, those of one topology in one set of ranks, when asked for one."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._found: dict[str, list[Any]] = {}

    def of(self, name: str) -> list[Any]:
        """Per rank what ``run_cases`` has for this case."""
        if name not in self._found:
            names = [other for other in self._names if _topology(other) == _topology(name)]
            ranks = run_ranks(run_cases, 4, names, timeout_s=60.0 + 25.0 * len(names))
            for other in names:
                self._found[other] = [by_case.get(other, NOT_RUN) for by_case in ranks]
        return self._found[name]


def _topology(name: str) -> tuple[int, int | None, int]:
    return Run(**CASES[name]).topology


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    items = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    wanted = {callspec.params.get("name") for callspec in items}
    return Outcomes([n for n in CASES if n in wanted and (HAS_DEEPEP or "flex" not in n)])


@pytest.mark.parametrize("name", CASES)
def test_training_has_the_same_bits(name: str, outcomes: Outcomes) -> None:
    if "flex" in name and not HAS_DEEPEP:
        pytest.skip("no CPU stand-in for deep_ep")
    for rank, by_policy in enumerate(outcomes.of(name)):
        assert not isinstance(by_policy, str), by_policy
        greedy, none, without = (by_policy[policy] for policy in ("greedy", "none", None))
        assert greedy.differences(none) == [], f"greedy and none, rank {rank}"
        assert none.differences(without) == [], f"none and Megatron alone, rank {rank}"
        if name not in NOTHING_TO_MOVE:
            assert greedy.moved >= 0.05
            assert greedy.after < greedy.before
