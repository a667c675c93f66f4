"""feplb in Megatron-Core: ``enable`` a spec, ``attach`` a Balancer to the model built from it.

  spec = enable(spec, BalancerConfig())          # MoE layers in it become balanced ones
  model = GPTModel(config, spec, ...)
  balancer = attach(model, num_tokens=seq_length * micro_batch_size)
  ...  loss.backward(); balancer.check(); optimizer.step()

The MoE layer here is Megatron's; it only tells the experts (megatron_experts.py) when a dispatch
begins and when its counts are on the host. Written for megatron-core 0.16 (specs are ModuleSpecs)
and for the layout that follows (specs are functools.partial). Runs on the thread of the model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from feplb.balancer import Balancer, CallRecord
from feplb.config import BalancerConfig
from feplb.scheduler import load_imbalance

from .megatron_checks import check_config, check_version
from .megatron_experts import FEPLBExperts, FEPLBGroupedExperts

__all__ = ["FEPLBExperts", "FEPLBGroupedExperts", "FEPLBMoELayer", "attach", "enable", "moe_layers"]

_BALANCED: dict[Any, type] = {SequentialMLP: FEPLBExperts, TEGroupedMLP: FEPLBGroupedExperts}
# The arena has room for this many times a rank's mean rows; what would not fit stays where it is.
_ROOM = 2


class FEPLBMoELayer(MoELayer):
    """MoELayer that starts planning as soon as the counts are on the host.

    Args:
        balancer_config: what ``enable`` was given; ``attach`` builds the Balancer from it.
        newer: arguments that later versions of Megatron-Core pass on.
    Raises:
        ValueError: a setting that feplb does not work with, by name.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        balancer_config: BalancerConfig,
        **newer: Any,
    ) -> None:
        check_config(config)
        super().__init__(config, submodules, layer_number, pg_collection, **newer)
        self.balancer_config = balancer_config
        self._record_metric = _metric_recorder()
        if hasattr(self.token_dispatcher, "_maybe_dtoh_and_synchronize"):
            self._begin_at_synchronization()

    def _begin_at_synchronization(self) -> None:
        """alltoall: the counts are valid where the dispatcher waits for its copy to the host."""
        dispatcher = self.token_dispatcher
        synchronize = dispatcher._maybe_dtoh_and_synchronize

        def synchronize_and_begin(point: str, tokens_per_expert: Any = None) -> Any:
            counts = synchronize(point, tokens_per_expert)
            if point == dispatcher.cuda_sync_point:
                self.experts.begin(counts)
            return counts

        dispatcher._maybe_dtoh_and_synchronize = synchronize_and_begin

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> Any:
        """Megatron's dispatch, with the experts told before and after."""
        self.experts.prepare()
        dispatched = super().dispatch(hidden_states, probs)
        counts = self._counts_of_flex()
        if counts is not None:
            self.experts.begin(counts)
        return dispatched

    def _counts_of_flex(self) -> Any:
        """DeepEP: the host has the counts, the payload is in flight. None: not before the rows."""
        config = self.config
        if config.moe_token_dispatcher_type != "flex":
            return None
        if config.moe_flex_dispatcher_backend != "deepep":
            return None
        if config.moe_router_padding_for_quantization:  # counts grow when the rows are permuted
            return None
        return self.token_dispatcher._comm_manager.get_number_of_tokens_per_expert()

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> Any:
        """Megatron's, and the load of the call goes to Megatron's tracker."""
        result = super().routed_experts_compute(hidden_states, probs)
        if self.training and torch.is_grad_enabled():
            self._record_load()
        return result

    def _record_load(self) -> None:
        record = self.experts.balancer.last_call(self.experts.layer)
        if record is None:
            return
        num_layers = self.config.num_layers + (getattr(self.config, "mtp_num_layers", None) or 0)
        device = self.router.weight.device
        for name, value in load_metrics(record, self.balancer_config).items():
            tensor = torch.full((), value, dtype=torch.float32, device=device)
            self._record_metric(name, tensor, self.layer_number, num_layers)


def imbalances(record: CallRecord) -> tuple[float, float]:
    """max / mean of the ranks' rows, as routed and as computed; 1.0 where there are none."""
    return load_imbalance(record.loads_before), load_imbalance(record.loads_after)


def load_metrics(record: CallRecord, config: BalancerConfig) -> dict[str, float]:
    """max / mean of the ranks' rows in one call, by metric name; 1.0 where there are no rows.

    Returns:
        ``load_imbalance``: as routed; ``load_imbalance_after``: as computed;
        ``load_imbalance_floor``: below which no plan of whole experts can get; and where the config
        has a target_imbalance, ``load_imbalance_target``.
    """
    before, after = imbalances(record)
    metrics = {
        "load_imbalance": before,
        "load_imbalance_after": after,
        "load_imbalance_floor": record.whole_expert_floor,
    }
    if config.target_imbalance is not None:
        metrics["load_imbalance_target"] = config.target_imbalance
    return metrics


def _metric_recorder() -> Callable[..., None]:
    """Megatron's tracker of per-layer metrics: the object of later versions, else the function."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        recorder: Callable[..., None] = save_to_aux_losses_tracker
        return recorder

    def record(name: str, value: Tensor, layer_number: int, num_layers: int) -> None:
        get_moe_metrics_tracker().record(name, value, layer_number, num_layers)

    return record


# ----------------------------------------------------------------------------------------- enable


def enable(spec: Any, config: BalancerConfig) -> Any:
    """A copy of a Megatron spec whose MoE layers are balanced.

    Args:
        spec: of a MoE layer, a transformer layer, a block, or anything that holds such specs; not
            changed.
        config: how to balance; the same on every rank.
    Returns:
        The same structure, with FEPLBMoELayer for MoELayer and FEPLBExperts (or
        FEPLBGroupedExperts) for its experts.
    Raises:
        ValueError: no MoE layer in it (but on a pipeline stage there may be none), feplb in it
            already, experts or a MoE layer of a class that feplb does not know, an unsupported
            version of Megatron-Core.
    """
    check_version()
    walk = _Walk(config)
    enabled = walk.visit(spec)
    if walk.num_layers == 0 and not _is_pipelined():
        raise ValueError(
            f"enable: no MoE layer in {type(spec).__name__}, so there is nothing to balance. Give "
            "a spec made with num_experts, or leave feplb out."
        )
    return enabled


def _is_pipelined() -> bool:
    """A stage of a pipeline may have dense layers only."""
    if not parallel_state.model_parallel_is_initialized():
        return False
    return bool(parallel_state.get_pipeline_model_parallel_world_size() > 1)


class _Walk:
    """Copies a tree of specs, replacing the MoE layers in it."""

    def __init__(self, config: BalancerConfig) -> None:
        self.config = config
        self.num_layers = 0
        self._copies: dict[int, tuple[Any, Any]] = {}  # id -> (original, kept alive; its copy)

    def visit(self, node: Any) -> Any:
        if not _is_tree(node):
            return node
        if id(node) not in self._copies:
            self._copies[id(node)] = (node, self._copy(node))
        return self._copies[id(node)][1]

    def _copy(self, node: Any) -> Any:
        if isinstance(node, (list, tuple)):
            return type(node)(self.visit(entry) for entry in node)
        if _is_class(_built_by(node), MoELayer):
            self.num_layers += 1
            return self._moe_layer(node)
        if isinstance(node, functools.partial):
            keywords = {name: self.visit(value) for name, value in node.keywords.items()}
            return functools.partial(node.func, *node.args, **keywords)
        twin = copy.copy(node)
        for field in dataclasses.fields(node):
            setattr(twin, field.name, self.visit(getattr(node, field.name)))
        return twin

    def _moe_layer(self, node: Any) -> Any:
        layer = _built_by(node)
        if layer is FEPLBMoELayer:
            raise ValueError("enable: feplb is enabled in this spec already. Enable it once.")
        if layer is not MoELayer:
            raise ValueError(
                f"enable: the MoE layer is a {layer.__name__}, expected Megatron's MoELayer. "
                "feplb would drop what that class does."
            )
        if isinstance(node, functools.partial):
            submodules = _with_experts(node.keywords["submodules"])
            keywords = {**node.keywords, "submodules": submodules, "balancer_config": self.config}
            return functools.partial(FEPLBMoELayer, *node.args, **keywords)
        twin = copy.copy(node)
        twin.module = FEPLBMoELayer
        twin.submodules = _with_experts(node.submodules)
        twin.params = {**node.params, "balancer_config": self.config}
        return twin


def _is_tree(node: Any) -> bool:
    """Can there be a spec inside?"""
    if isinstance(node, (list, tuple, functools.partial)):
        return True
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _built_by(node: Any) -> Any:
    """The class a spec builds."""
    if isinstance(node, ModuleSpec):
        return node.module
    return node.func if isinstance(node, functools.partial) else node


def _is_class(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _with_experts(submodules: Any) -> Any:
    """MoESubmodules with balanced experts."""
    twin = copy.copy(submodules)
    experts = submodules.experts
    balanced = _BALANCED.get(_built_by(experts))
    if balanced is None:
        name = getattr(_built_by(experts), "__name__", repr(experts))
        raise ValueError(
            f"enable: the experts are a {name}, expected SequentialMLP or TEGroupedMLP. Set "
            "moe_grouped_gemm=False, or moe_use_legacy_grouped_gemm=False with Transformer Engine."
        )
    if isinstance(experts, functools.partial):
        twin.experts = functools.partial(balanced, *experts.args, **experts.keywords)
    elif isinstance(experts, ModuleSpec):
        twin.experts = copy.copy(experts)
        twin.experts.module = balanced
    else:
        twin.experts = balanced
    return twin


# ----------------------------------------------------------------------------------------- attach


def moe_layers(model: nn.Module | Sequence[nn.Module]) -> list[FEPLBMoELayer]:
    """The balanced MoE layers of a model, or of all model chunks of this rank, in order."""
    chunks: Sequence[nn.Module] = [model] if isinstance(model, nn.Module) else model
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, FEPLBMoELayer)]


def attach(model: nn.Module | Sequence[nn.Module], *, num_tokens: int) -> Balancer | None:
    """Build one Balancer for all MoE layers on this rank and give it to them.

    Collective over the EP group, once, after the model is built; before or after it is wrapped in
    DistributedDataParallel. Close the Balancer when training ends.

    Args:
        model: the model, or all model chunks of this rank where the pipeline is interleaved.
        num_tokens: tokens that one rank's MoE layer sees in a micro-batch (sequence length x
            micro-batch size / ranks that share a sequence). Sizes the memory feplb reserves; larger
            micro-batches run too, and what does not fit is not moved.
    Returns:
        The Balancer; None on a pipeline stage without MoE layers.
    Raises:
        ValueError: no balanced layer in a model without a pipeline, a Balancer attached already,
            layers that differ in their EP group or BalancerConfig, experts that feplb cannot move,
            on GPUs CUDA_DEVICE_MAX_CONNECTIONS=1 without its setting for copies.
    """
    layers = moe_layers(model)
    if not layers:
        if _is_pipelined():
            return None
        raise ValueError(
            "attach: no balanced MoE layer in the model. Build it from the spec that enable() "
            "returned."
        )
    _check_layers(layers, model)
    experts = list(_unique_experts(layers))
    config = layers[0].config
    max_rows = _ROOM * num_tokens * config.moe_router_topk
    specs = [module.layer_spec(max_rows) for module in experts]
    # The experts' GEMMs are Megatron's: there are no tiles to measure.
    balancer_config = dataclasses.replace(layers[0].balancer_config, tiles="default")
    balancer = Balancer(balancer_config, layers[0].ep_group, specs)
    for index, module in enumerate(experts):
        module.balancer, module.layer = balancer, index
    return balancer


def _unique_experts(layers: Sequence[FEPLBMoELayer]) -> Iterator[Any]:
    """Experts in the order of the layers; those that layers share, once."""
    seen: set[int] = set()
    for layer in layers:
        if id(layer.experts) not in seen:
            seen.add(id(layer.experts))
            yield layer.experts


def _check_layers(layers: Sequence[FEPLBMoELayer], model: Any) -> None:
    for layer in layers:
        attached = layer.experts.balancer
        if attached is not None and not attached.closed:
            raise ValueError(
                f"attach: MoE layer {layer.layer_number} has a Balancer already. Call attach once, "
                "with all model chunks of the rank; close() the old one to attach another."
            )
        if layer.balancer_config != layers[0].balancer_config:
            raise ValueError(
                f"attach: MoE layer {layer.layer_number} was enabled with "
                f"{layer.balancer_config}, expected {layers[0].balancer_config} as in the first."
            )
        if layer.ep_group is not layers[0].ep_group:
            raise ValueError(
                f"attach: MoE layer {layer.layer_number} has another EP group than the first, "
                "expected one EP group for all layers of a rank."
            )
    _check_groups(layers[0], model)


def _check_groups(layer: FEPLBMoELayer, model: Any) -> None:
    """Megatron-Core 0.16 gives a MoE layer it does not know the default process groups."""
    for module in [model] if isinstance(model, nn.Module) else model:
        for part in module.modules():
            groups = getattr(part, "pg_collection", None)
            ep_group = getattr(groups, "ep", None)
            if ep_group is not None and ep_group is not layer.ep_group:
                raise ValueError(
                    "attach: the model was built with a pg_collection of its own, but its MoE "
                    "layers have the default EP group: megatron-core 0.16 hands groups to its own "
                    "MoELayer only. Initialize parallel_state with these groups instead."
                )
