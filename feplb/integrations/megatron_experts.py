"""Megatron-Core's experts, run by a Balancer; parameters, names and checkpoints stay Megatron's.

FEPLBExperts is a SequentialMLP and FEPLBGroupedExperts a TEGroupedMLP with another ``forward``. The
MoE layer around them (megatron.py) calls ``prepare`` before the dispatch and ``begin`` when the
counts are on the host; without it they work too, only later. Runs on the thread of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import Tensor, nn

from feplb.config import LayerSpec, TensorSpec

from .megatron_checks import check_config
from .megatron_compute import MegatronExpert, activation_of

if TYPE_CHECKING:
    from feplb.balancer import Balancer, Ticket

ExpertTensors = list[list[Tensor]]  # [tensor of an expert][expert]


class _Balanced:
    """What both kinds of experts share; stands before Megatron's class in the bases."""

    config: Any
    num_local_experts: int

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        check_config(config)
        newer = {} if name is None else {"name": name}
        super().__init__(  # type: ignore[call-arg]
            num_local_experts, config, submodules, pg_collection=pg_collection, **newer
        )
        if pg_collection is not None and pg_collection.expt_tp.size() > 1:
            raise ValueError(
                f"feplb does not work with expert tensor parallelism (the expt_tp group has "
                f"{pg_collection.expt_tp.size()} ranks): an expert that is cut into shards cannot "
                "move as one. Set expert_tensor_parallel_size=1."
            )
        self.balancer: Balancer | None = None
        self.layer = 0  # index in the Balancer's layers
        self._compute = MegatronExpert(activation_of(config), has_bias=config.add_bias_linear)
        self._prepared: list[Any] | None = None
        self._ticket: Ticket | None = None

    def expert_tensors(self) -> ExpertTensors:
        """fc1's weights, (its biases,) fc2's weights (, its biases), each per local expert."""
        names = ("weight", "bias") if self.config.add_bias_linear else ("weight",)
        return [
            self._tensors(linear, name) for linear in ("linear_fc1", "linear_fc2") for name in names
        ]

    def _tensors(self, linear: str, name: str) -> list[Tensor]:
        raise NotImplementedError

    def layer_spec(self, max_rows: int) -> LayerSpec:
        """These experts as a Balancer's ``layers`` lists them.

        Raises:
            ValueError: parameters that are not an expert's weights or biases (adapters, say), or
                weights that only exist while Megatron-FSDP gathers them.
        """
        tensors = self.expert_tensors()
        known = {id(tensor) for experts in tensors for tensor in experts}
        assert isinstance(self, nn.Module)
        for name, parameter in self.named_parameters():
            if id(parameter) not in known:
                raise ValueError(
                    f"the experts have a parameter {name} that is neither weight nor bias of an "
                    "expert: helpers would not compute with it. Enable feplb without it."
                )
            if hasattr(parameter, "__fsdp_param__"):
                raise ValueError(
                    f"{name} is sharded by Megatron-FSDP, which feplb does not know yet. Use "
                    "DistributedDataParallel with the distributed optimizer."
                )
        fc1 = tensors[0][0]
        probs = TensorSpec((), self._probs_dtype(fc1.dtype))
        shapes = tuple(tuple(experts[0].shape) for experts in tensors)
        return LayerSpec(
            self.num_local_experts, fc1.shape[1], fc1.dtype, shapes, (probs,), max_rows
        )

    def _probs_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the router probabilities as the dispatcher hands them over."""
        if self.config.moe_router_dtype == "fp64":
            return torch.float64
        if self.config.moe_router_dtype == "fp32":
            return torch.float32
        return torch.float32 if self.config.moe_token_dispatcher_type == "flex" else dtype

    # ------------------------------------------------------------------- before the dispatch ends

    def prepare(self) -> None:
        """Directly before the dispatch: weight grads may come home late."""
        self._prepared = None
        if torch.is_grad_enabled():
            self._prepared = self._attached().prepare_weights(
                self.expert_tensors(), layer=self.layer
            )

    def begin(self, counts: Tensor | Sequence[int]) -> None:
        """The counts are on the host, the rows still on their way."""
        self._ticket = self._attached().begin(counts, layer=self.layer)

    def _attached(self) -> Balancer:
        if self.balancer is None:
            raise RuntimeError(
                "feplb is enabled in this model's spec but not attached. Call "
                "feplb.integrations.megatron.attach(model, num_tokens=...) after building it."
            )
        return self.balancer

    # ---------------------------------------------------------------------------------- experts

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor | Sequence[int],
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Run the local experts, balanced; Megatron's contract.

        Args:
            permuted_local_hidden_states: [N, H], sorted by local expert.
            tokens_per_expert: [E] rows per local expert.
            permuted_probs: [N], multiplied onto the activation.
        Returns:
            ([N, H], None): a bias is already added.
        """
        balancer = self._attached()
        rows, probs = self._probs_on_rows(permuted_local_hidden_states, permuted_probs)
        if isinstance(tokens_per_expert, Tensor):
            tokens_per_expert = tokens_per_expert.tolist()
        run_parameter_hooks(self)  # from here on the weights are those of this step
        prepared, self._prepared = self._prepared, None
        ticket, self._ticket = self._ticket, None
        out = balancer.run_experts(
            rows.contiguous(),
            tokens_per_expert,
            self.expert_tensors() if prepared is None else prepared,
            self._compute,
            layer=self.layer,
            row_data=(probs.contiguous(),),
            ticket=ticket,
            grad_sinks=self._grad_sinks(),
        )
        return out, None

    def _probs_on_rows(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.moe_apply_probs_on_input:
            return rows, probs
        if self.config.moe_router_topk != 1:
            raise ValueError(
                f"moe_apply_probs_on_input with moe_router_topk={self.config.moe_router_topk}, "
                "expected 1."
            )
        return (probs.unsqueeze(-1) * rows).to(rows.dtype), torch.ones_like(probs)

    def _grad_sinks(self) -> list[list[Tensor]] | None:
        """Megatron's ``main_grad`` per tensor and expert, where its fusion is on."""
        if not (self.config.gradient_accumulation_fusion and torch.is_grad_enabled()):
            return None
        tensors: list[list[Any]] = [list(experts) for experts in self.expert_tensors()]
        weights = [weight for experts in tensors for weight in experts]
        if not all(hasattr(weight, "main_grad") for weight in weights):
            return None  # no DDP, or frozen ones among them: autograd hands the grads over
        for weight in weights:
            weight.grad_added_to_main_grad = True  # DDP's hook then leaves main_grad as it is
        return [[weight.main_grad for weight in experts] for experts in tensors]

    def backward_dw(self) -> None:
        """Nothing is delayed: backward has computed the weight gradients already."""


def run_parameter_hooks(experts: Any) -> None:
    """What would have run in front of each linear layer of the experts, had it been called.

    Megatron's DDP waits in such a hook until a module's parameters have been gathered; the linear
    layers here are never called, so their hooks are.
    """
    for module in experts.modules():
        if module is experts or not module._parameters:
            continue
        for key, hook in module._forward_pre_hooks.items():
            if key in module._forward_pre_hooks_with_kwargs:
                hook(module, (), {})
            else:
                hook(module, ())


class FEPLBExperts(_Balanced, SequentialMLP):
    """SequentialMLP whose experts a Balancer runs."""

    def _tensors(self, linear: str, name: str) -> list[Tensor]:
        return [getattr(getattr(expert, linear), name) for expert in self.local_experts]


class FEPLBGroupedExperts(_Balanced, TEGroupedMLP):
    """TEGroupedMLP whose experts a Balancer runs; Transformer Engine keeps the weights only."""

    def _tensors(self, linear: str, name: str) -> list[Tensor]:
        module = getattr(self, linear)
        return [getattr(module, f"{name}{i}") for i in range(self.num_local_experts)]
