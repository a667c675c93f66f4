"""What the Megatron integration refuses, by name and with what to change.

Called when a spec is enabled, when a MoE layer is built and when a Balancer is attached; never
during training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import __version__ as megatron_version

# Tested with the first; the newer layout is what NVIDIA/Megatron-LM has as 0.20.
OLDEST, NEWEST = (0, 16), (0, 20)


def check_version(version: str = megatron_version) -> None:
    """Refuse a Megatron-Core whose experts have another contract.

    Raises:
        ValueError: a version outside the range that is known.
    """
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers <= NEWEST:
        raise ValueError(
            f"megatron-core {version}, expected 0.{OLDEST[1]} to 0.{NEWEST[1]} (tested: 0.16.1). "
            "feplb was not turned on. Install one of those, or a feplb that knows this one."
        )


def _graph_modules(config: Any) -> set[str]:
    """Names of what is captured; empty where nothing is. "full" is the empty list in Megatron."""
    if getattr(config, "cuda_graph_impl", "none") == "none":
        return set()
    scope = getattr(config, "cuda_graph_modules", getattr(config, "cuda_graph_scope", None)) or []
    entries = [scope] if isinstance(scope, str) else list(scope)
    names = {getattr(entry, "name", str(entry)) for entry in entries}
    return names or {"full"}


def _captures_experts(config: Any) -> bool:
    return bool(_graph_modules(config) & {"full", "full_iteration", "moe"})


def _is_set(name: str, allowed: tuple[Any, ...] = (None, False)) -> Callable[[Any], bool]:
    return lambda config: getattr(config, name, allowed[0]) not in allowed


def _offloads_experts(config: Any) -> bool:
    modules = set(getattr(config, "offload_modules", None) or [])
    on = getattr(config, "fine_grained_activation_offloading", False)
    return bool(on and modules & {"expert_fc1", "moe_act"})


# (does the config have it, its name, why not, what to change)
_REFUSED: tuple[tuple[Callable[[Any], bool], str, str, str], ...] = (
    (
        _is_set("expert_tensor_parallel_size", (None, 1)),
        "expert_tensor_parallel_size > 1",
        "an expert that is cut into shards cannot move as one",
        "Set expert_tensor_parallel_size=1 and raise expert_model_parallel_size.",
    ),
    (
        _is_set("moe_pad_expert_input_to_capacity"),
        "moe_pad_expert_input_to_capacity",
        "with drop-and-pad every expert has the same rows and nothing can be balanced",
        "Set moe_pad_expert_input_to_capacity=False.",
    ),
    (
        _captures_experts,
        "CUDA graph capture of moe, full or full_iteration",
        "feplb decides on the host in every micro-batch, which a graph cannot hold",
        "Capture attn, moe_router and moe_preprocess only.",
    ),
    (
        _is_set("moe_use_grouped_tensor"),
        "moe_use_grouped_tensor",
        "its counts exist on the device only",
        "Set moe_use_grouped_tensor=False.",
    ),
    (
        _is_set("moe_expert_rank_capacity_factor"),
        "moe_expert_rank_capacity_factor (static ncclep, non-blocking hybridep)",
        "its counts exist on the device only",
        "Set moe_expert_rank_capacity_factor=None.",
    ),
    (
        _is_set("moe_single_grouped_weight"),
        "moe_single_grouped_weight",
        "an expert's weights are then not a tensor of their own",
        "Set moe_single_grouped_weight=False.",
    ),
    (
        _is_set("fp8_param"),
        "fp8_param (fp8 primary weights)",
        "feplb moves and computes with weights in the dtype of the rows",
        "Set fp8_param=False, and fp8=None.",
    ),
    (
        _is_set("fp4_param"),
        "fp4_param (fp4 primary weights)",
        "feplb moves and computes with weights in the dtype of the rows",
        "Set fp4_param=False, and fp4=None.",
    ),
    (
        _is_set("fp8"),
        "fp8",
        "feplb would compute the experts in the dtype of the rows instead",
        "Set fp8=None.",
    ),
    (
        _is_set("fp4"),
        "fp4",
        "feplb would compute the experts in the dtype of the rows instead",
        "Set fp4=None.",
    ),
    (
        _is_set("overlap_moe_expert_parallel_comm"),
        "overlap_moe_expert_parallel_comm",
        "it runs another micro-batch between a layer's counts and its experts",
        "Set overlap_moe_expert_parallel_comm=False.",
    ),
    (
        _is_set("delay_wgrad_compute"),
        "delay_wgrad_compute",
        "feplb computes weight gradients with the rest of backward",
        "Set delay_wgrad_compute=False.",
    ),
    (
        _is_set("overlap_dispatch_backward_with_experts_wgrad"),
        "overlap_dispatch_backward_with_experts_wgrad",
        "feplb computes weight gradients with the rest of backward",
        "Set overlap_dispatch_backward_with_experts_wgrad=False.",
    ),
    (
        _is_set("use_te_activation_func"),
        "use_te_activation_func",
        "helpers run the activation of the config, not a module of the expert",
        "Set use_te_activation_func=False.",
    ),
    (
        _is_set("use_transformer_engine_op_fuser"),
        "use_transformer_engine_op_fuser",
        "the fused operation owns the experts' weights",
        "Set use_transformer_engine_op_fuser=False.",
    ),
    (
        _is_set("moe_mlp_glu_interleave_size"),
        "moe_mlp_glu_interleave_size",
        "feplb expects all gate rows of fc1 first, then all linear rows",
        "Set moe_mlp_glu_interleave_size=None.",
    ),
    (
        _is_set("moe_ncclep_zero_copy"),
        "moe_ncclep_zero_copy",
        "feplb returns its own output buffer",
        "Set moe_ncclep_zero_copy=False.",
    ),
    (
        _offloads_experts,
        "offload_modules with expert_fc1 or moe_act",
        "the experts' activations are feplb's and would silently not be offloaded",
        "Leave expert_fc1 and moe_act out of offload_modules.",
    ),
)


def check_config(config: Any) -> None:
    """Refuse a TransformerConfig that feplb cannot balance.

    Raises:
        ValueError: the first setting that does not fit (name, reason, what to change).
    """
    for is_on, name, reason, change in _REFUSED:
        if is_on(config):
            raise ValueError(f"feplb does not work with {name}: {reason}. {change}")
