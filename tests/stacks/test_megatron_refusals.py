"""What feplb refuses in Megatron-Core, each with a sentence; and specs of the layout after 0.16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron_runs import Run, Trainer, build, start_megatron, transformer_config
from ranks import run_ranks
from torch import nn

from feplb import BalancerConfig
from feplb.integrations.megatron import (
    FEPLBExperts,
    FEPLBGroupedExperts,
    FEPLBMoELayer,
    attach,
    enable,
)
from feplb.integrations.megatron_checks import check_version

CONFIG = BalancerConfig()


def layer_spec(experts: Any = SequentialMLP) -> ModuleSpec:
    """Of one MoE layer, as 0.16 has it."""
    submodules = MoESubmodules(
        experts=ModuleSpec(module=experts, submodules=MLPSubmodules()),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=MLPSubmodules()),
    )
    return ModuleSpec(module=MoELayer, submodules=submodules)


# ------------------------------------------------------------------------- settings, when built

# What the config has, and words of the error.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "etp": ({"expert_tensor_parallel_size": 2}, "Set expert_tensor_parallel_size=1"),
    "drop_and_pad": ({"moe_pad_expert_input_to_capacity": True}, "drop-and-pad"),
    "graph_of_moe": ({"cuda_graph_impl": "local", "cuda_graph_scope": ["moe"]}, "moe_router"),
    "graph_of_full_iteration": (
        {"cuda_graph_impl": "local", "cuda_graph_scope": ["full_iteration"]},
        "full_iteration",
    ),
    "graph_of_whole_layers": (
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": []},
        "CUDA graph capture",
    ),
    "newer_graph_of_moe": (
        {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn", "moe"]},
        "CUDA graph capture",
    ),
    "grouped_tensor": ({"moe_use_grouped_tensor": True}, "Set moe_use_grouped_tensor=False"),
    "static_counts": ({"moe_expert_rank_capacity_factor": 1.5}, "static ncclep, non-blocking"),
    "single_weight": ({"moe_single_grouped_weight": True}, "moe_single_grouped_weight"),
    "fp8_primary_weights": ({"fp8_param": True, "fp8": "hybrid"}, "fp8 primary weights"),
    "fp8": ({"fp8": "hybrid"}, "Set fp8=None"),
    "fp4": ({"fp4": "e2m1"}, "Set fp4=None"),
    "ep_overlap": ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel"),
    "delayed_wgrad": ({"delay_wgrad_compute": True}, "delay_wgrad_compute=False"),
    "te_activation": ({"use_te_activation_func": True}, "use_te_activation_func"),
    "interleaved_gate": ({"moe_mlp_glu_interleave_size": 32}, "gate rows"),
    "offloaded_activations": (
        {"fine_grained_activation_offloading": True, "offload_modules": ["moe_act"]},
        "offload_modules",
    ),
    "fused_gelu": (
        {"bias_activation_fusion": True, "activation_func": nn.functional.gelu},
        "bias_activation_fusion=False",
    ),
}
ALLOWED: dict[str, dict[str, Any]] = {
    "graph_of_attention": {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn"]},
    "graph_scope_without_graphs": {"cuda_graph_impl": "none", "cuda_graph_scope": ["moe"]},
    "blocking_hybridep": {"moe_flex_dispatcher_backend": "hybridep"},
}


def errors_when_built(rank: int, num_ranks: int) -> dict[str, str]:
    """Per setting the error of building a balanced MoE layer, empty where it was built."""
    errors = {}
    run = Run(ep=1)
    wanted = {name: setting for name, (setting, _) in SETTINGS.items()} | ALLOWED
    start_megatron(run)
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    spec = enable(get_moe_module_spec(use_te=False, num_experts=8), CONFIG)
    for name, setting in wanted.items():
        config = transformer_config(run)
        for field, value in setting.items():
            setattr(config, field, value)
        try:
            build_module(spec, config)
            errors[name] = ""
        except ValueError as error:
            errors[name] = str(error)
    return errors


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    return run_ranks(errors_when_built, 1)[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_construction_refuses(name: str, errors: dict[str, str]) -> None:
    assert SETTINGS[name][1] in errors[name]


@pytest.mark.parametrize("name", ALLOWED)
def test_construction_accepts(name: str, errors: dict[str, str]) -> None:
    assert errors[name] == ""


# ---------------------------------------------------------------------------------------- enable


class _OtherLayer(MoELayer):
    """A MoE layer of a team's own."""


def _of_other_layer() -> ModuleSpec:
    spec = layer_spec()
    spec.module = _OtherLayer
    return spec


BAD_SPECS: dict[str, tuple[Callable[[], Any], str]] = {
    "no_moe_layer": (lambda: ModuleSpec(module=nn.Linear), "no MoE layer in ModuleSpec"),
    "enabled_twice": (lambda: enable(layer_spec(), CONFIG), "Enable it once"),
    "legacy_experts": (lambda: layer_spec(GroupedMLP), "experts are a GroupedMLP"),
    "another_moe_layer": (_of_other_layer, "MoE layer is a _OtherLayer"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_enable_refuses(name: str) -> None:
    make, words = BAD_SPECS[name]
    with pytest.raises(ValueError, match=words):
        enable(make(), CONFIG)


@pytest.mark.parametrize("version", ["0.15.3", "0.21.0", "1.0"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(ValueError, match=rf"megatron-core {version}, expected 0.16 to 0.20"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.16.1", "0.20.0rc1", "0.18.2+abc"])
def test_known_versions_are_accepted(version: str) -> None:
    check_version(version)


def test_enable_leaves_the_spec_it_is_given_alone() -> None:
    spec = layer_spec()
    enabled = enable(spec, CONFIG)
    assert (spec.module, spec.submodules.experts.module) == (MoELayer, SequentialMLP)
    assert (enabled.module, enabled.submodules.experts.module) == (FEPLBMoELayer, FEPLBExperts)
    assert enabled.submodules.shared_experts is not None
    assert spec.params == {}


def test_enable_finds_moe_layers_in_blocks_beside_dense_ones() -> None:
    dense = ModuleSpec(module=nn.Identity)
    moe = ModuleSpec(module=nn.Identity, submodules=[layer_spec(TEGroupedMLP)])
    block = enable(TransformerBlockSubmodules(layer_specs=[dense, moe, moe]), CONFIG)
    assert block.layer_specs[0].module is nn.Identity
    assert block.layer_specs[1] is block.layer_specs[2]
    experts = block.layer_specs[1].submodules[0].submodules.experts
    assert experts.module is FEPLBGroupedExperts


def test_enable_knows_the_layout_of_later_versions() -> None:
    # Megatron-LM 0.20: partial(MoELayer, submodules=MoESubmodules(experts=partial(...)))
    experts = functools.partial(SequentialMLP, submodules=MLPSubmodules())
    spec = functools.partial(MoELayer, submodules=MoESubmodules(experts=experts))
    enabled = enable(spec, CONFIG)
    assert enabled.func is FEPLBMoELayer
    assert enabled.keywords["balancer_config"] is CONFIG
    assert enabled.keywords["submodules"].experts.func is FEPLBExperts
    assert enabled.keywords["submodules"].experts.keywords == experts.keywords
    assert spec.keywords["submodules"].experts is experts
    with pytest.raises(ValueError, match="Enable it once"):
        enable(enabled, CONFIG)


# ---------------------------------------------------------------------------------------- attach


def errors_of_attach(rank: int, num_ranks: int) -> dict[str, str]:
    """Per misuse the error it raised."""
    run = Run(ep=2)
    found: dict[str, str] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            found[name] = ""
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)

    start_megatron(run)
    config = transformer_config(run)
    note("no_layer", lambda: attach(nn.Linear(2, 2), num_tokens=8))
    model: Any = build(run, config)[0]
    layer = model.decoder.layers[0].mlp
    note("not_attached", lambda: layer(torch.randn(4, 1, config.hidden_size)))
    layer.experts.adapter = nn.Linear(4, 4)
    note("adapter", lambda: attach(model, num_tokens=8))
    del layer.experts.adapter
    balancer = attach(model, num_tokens=8)
    assert balancer is not None
    note("twice", lambda: attach(model, num_tokens=8))
    balancer.close()
    note("after_close", lambda: layer(torch.randn(4, 1, config.hidden_size)))
    note("again", lambda: attach(model, num_tokens=8).close())  # type: ignore[union-attr]
    unequal: Any = build(run, config)[0]
    unequal.decoder.layers[1].mlp.balancer_config = BalancerConfig(num_slots=1)
    note("unequal", lambda: attach(unequal, num_tokens=8))
    return found


def test_attach_refuses_with_a_sentence() -> None:
    words = {
        "no_layer": "no balanced MoE layer",
        "not_attached": "Call feplb.integrations.megatron.attach",
        "adapter": "adapter.weight that is neither weight nor bias",
        "twice": "has a Balancer already",
        "after_close": "closed",
        "unequal": "was enabled with",
    }
    for found in run_ranks(errors_of_attach, 2):
        assert found.pop("again") == ""
        assert {name: text for name, text in found.items() if words[name] not in text} == {}


def layers_of_different_shape(rank: int, num_ranks: int) -> tuple[list[int], float]:
    """A step of a model whose second layer has wider experts; their widths, and rows moved."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    run = Run(steps=1)
    start_megatron(run)
    config, wide = transformer_config(run), transformer_config(run)
    wide.moe_ffn_hidden_size = 64
    chunks = build(run, config)
    spec = enable(get_gpt_layer_local_spec(num_experts=8), CONFIG).submodules.mlp
    layers: Any = chunks[0].decoder.layers  # type: ignore[union-attr]
    layers[1].mlp = build_module(spec, wide)
    layers[1].mlp.set_layer_number(2)
    layers[1].mlp.balancer_config = layers[0].mlp.balancer_config
    trainer = Trainer(run, config, chunks)
    widths = [spec.weights[1].shape[1] for spec in trainer.balancer.layers]
    return widths, trainer.train().moved


def test_layers_of_different_shape_train() -> None:
    for widths, moved in run_ranks(layers_of_different_shape, 4):
        assert widths == [48, 64]
        assert moved > 0
