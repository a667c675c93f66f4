"""MoELayer: a Mixture-of-Experts layer for custom models, expert parallel and balanced by feplb.

forward: route -> dispatch to the experts' ranks -> run the experts -> combine -> add the shared
expert. With a balancer the counts go to it before the payload moves, and it runs the experts;
without one the same compute runs on the owner alone, so that its results are the reference.
Runs on the caller's thread and current stream.
Shapes: T = tokens, H = hidden, F = ffn_hidden, E = num_experts, N = rows received by this rank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .compute import ExpertCompute
from .config import LayerSpec
from .device_swiglu import DeviceSwiGLU
from .dispatch import AllToAllDispatcher, DeepEPDispatcher
from .router import TopKRouter
from .training import mark_expert_parameters
from .two_phase import run_experts_locally

__all__ = ["MoEConfig", "MoELayer"]

# Seeds: 2**16 per layer, the first two for what every rank has, the others by global expert index.
_SEEDS_PER_LAYER = 2**16
_ROUTER_SEED, _SHARED_SEED, _FIRST_EXPERT_SEED = 0, 1, 2
_MAX_EXPERTS = _SEEDS_PER_LAYER - _FIRST_EXPERT_SEED
_SEED_STEP = 0x9E3779B1  # odd, so that every seed below 2**32 gives other numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """What a MoELayer is; the same on every rank.

    Args:
        hidden: H.
        ffn_hidden: F, width inside one expert.
        num_experts: E, over all EP ranks.
        top_k: experts per token. No capacity: no token is ever dropped.
        scoring: "softmax" or "sigmoid", see TopKRouter.
        normalize_topk: make the top_k weights of a token sum to one.
        num_shared_experts: experts that see every token, computed as one of their joint width.
        shared_ffn_hidden: that joint width; None means num_shared_experts * ffn_hidden.
        router_bias_update_rate: step of TopKRouter.update_bias; 0 means no bias.
        dtype: of the expert weights, and what experts compute in, under autocast too.
        init_std: of the normal distribution all weights are drawn from.
        layer: index of this layer, the same as in the Balancer's list of LayerSpecs.
        seed: of the initial weights, with the layer and each expert's global index: they do not
            depend on the EP degree.
    Raises:
        ValueError: a field outside its range (the message has name and value).
    """

    hidden: int
    ffn_hidden: int
    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalize_topk: bool = True
    num_shared_experts: int = 0
    shared_ffn_hidden: int | None = None
    router_bias_update_rate: float = 0.0
    dtype: torch.dtype = torch.float32
    init_std: float = 0.02
    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn_hidden", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        for name in ("num_shared_experts", "init_std", "layer", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if self.num_experts > _MAX_EXPERTS:
            raise ValueError(f"num_experts is {self.num_experts}, expected {_MAX_EXPERTS} at most.")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, expected at most num_experts={self.num_experts}."
            )
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype is {self.dtype}, expected a floating dtype.")
        if self.shared_ffn_hidden is not None and not self.num_shared_experts:
            raise ValueError("shared_ffn_hidden is given, but num_shared_experts is 0.")
        if self.shared_ffn_hidden is not None and self.shared_ffn_hidden < 1:
            raise ValueError(f"shared_ffn_hidden is {self.shared_ffn_hidden}, expected 1 or more.")

    def layer_spec(self, ep_size: int, max_rows: int) -> LayerSpec:
        """This layer as a Balancer's ``layers`` lists it.

        Args:
            ep_size: ranks of the EP group.
            max_rows: most rows that may move into, or out of, one rank in one call.
        """
        return LayerSpec(
            num_local_experts=self.num_experts // ep_size,
            hidden=self.hidden,
            dtype=self.dtype,
            weights=_swiglu_shapes(self.hidden, self.ffn_hidden),
            max_rows=max_rows,
        )


class ExpertBalancer(Protocol):
    """What MoELayer asks of a balancer; feplb.Balancer is one."""

    def prepare_weights(self, weights: Sequence[Tensor], *, layer: int) -> Sequence[Any]: ...

    def begin(self, counts: list[int], *, layer: int) -> Any: ...

    def run_experts(
        self,
        rows: Tensor,
        counts: list[int],
        weights: Sequence[Any],
        compute: ExpertCompute,
        *,
        layer: int,
        ticket: Any,
    ) -> Tensor: ...


class Dispatcher(Protocol):
    """What MoELayer asks of a dispatcher: AllToAllDispatcher's interface, or DeepEPDispatcher's."""

    group: dist.ProcessGroup | None
    ep_rank: int
    ep_size: int

    @property
    def dispatch(self) -> Callable[..., tuple[Tensor, Any]]: ...

    @property
    def combine(self) -> Callable[..., Tensor]: ...


class MoELayer(nn.Module):
    """A drop-in feed-forward module: x [..., H] -> [..., H].

    Parameters: router.weight; w1 [E_local, 2F, H] (gate rows, then up rows) and w2 [E_local, H, F]
    of this rank's experts; shared.w1 and shared.w2 where there are shared experts. All but w1 and
    w2 are equal on all ranks; see feplb.training for their gradients and for checkpoints.

    Args:
        config: the same on every rank.
        balancer: a feplb.Balancer whose `layers` has this layer at index `layer`; None runs every
            expert on its owner. Shared by all layers and by copies of the module, never owned.
            The experts compute with its ``tiles`` on GPUs.
        group: the EP group; None means all experts are on this rank.
        layer: overrides config.layer.
        dispatcher: "all_to_all" (torch.distributed), "deepep" (DeepEP V1; config.dtype must be
            bfloat16), or a dispatcher of your own over `group`, such as a DeepEPDispatcher for V2.
    Attributes:
        compute: what an expert computes; another may take its place, the same on every rank.
        last_counts: rows that each local expert received in the latest forward.
    Raises:
        ValueError: num_experts is not a multiple of the EP group's size; an unknown dispatcher; a
            layer that DeepEP cannot carry.
    """

    def __init__(
        self,
        config: MoEConfig,
        balancer: ExpertBalancer | None = None,
        group: dist.ProcessGroup | None = None,
        *,
        layer: int | None = None,
        dispatcher: str | Dispatcher = "all_to_all",
    ) -> None:
        super().__init__()
        self.config = config if layer is None else dataclasses.replace(config, layer=layer)
        self.balancer = balancer
        self.dispatcher = _make_dispatcher(config, group, dispatcher)
        if config.num_experts % self.dispatcher.ep_size:
            raise ValueError(
                f"num_experts is {config.num_experts}, expected a multiple of the EP group's "
                f"{self.dispatcher.ep_size} ranks."
            )
        self.num_local_experts = config.num_experts // self.dispatcher.ep_size
        self.last_counts: list[int] = [0] * self.num_local_experts
        # A balancer of the caller's own may have measured none.
        self.compute: ExpertCompute = DeviceSwiGLU(tiles=getattr(balancer, "tiles", None))
        self.router = TopKRouter(
            config.hidden,
            config.num_experts,
            config.top_k,
            scoring=config.scoring,
            normalize_topk=config.normalize_topk,
            bias_update_rate=config.router_bias_update_rate,
        )
        shapes = _swiglu_shapes(config.hidden, config.ffn_hidden)
        self.w1, self.w2 = (
            nn.Parameter(torch.empty(self.num_local_experts, *shape, dtype=config.dtype))
            for shape in shapes
        )
        self.shared = _SharedExpert(config) if config.num_shared_experts else None
        mark_expert_parameters(self, "w1", "w2")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, each expert's by its global index: the same at any EP degree."""
        first = self.dispatcher.ep_rank * self.num_local_experts
        for expert_idx in range(self.num_local_experts):
            generator = self._generator(_FIRST_EXPERT_SEED + first + expert_idx)
            _draw([self.w1[expert_idx], self.w2[expert_idx]], self.config.init_std, generator)
        self.router.reset_parameters(self.config.init_std, self._generator(_ROUTER_SEED))
        if self.shared is not None:
            weights = [self.shared.w1, self.shared.w2]
            _draw(weights, self.config.init_std, self._generator(_SHARED_SEED))

    def forward(self, x: Tensor) -> Tensor:
        """Route, run and combine. Collective over the EP group, in forward and in backward.

        Args:
            x: [..., H] floating; the number of tokens may be zero and differ between ranks.
        Returns:
            [..., H] in x's dtype.
        Raises:
            ValueError: x has another last dimension.
        """
        if x.dim() < 1 or x.shape[-1] != self.config.hidden:
            expected = f"[..., {self.config.hidden}]"
            raise ValueError(
                f"input (layer {self.config.layer}) is {list(x.shape)}, expected {expected}."
            )
        tokens = x.reshape(-1, self.config.hidden)
        with torch.autocast(x.device.type, enabled=False):
            topk_idx, topk_weights = self.router(tokens)
            tokens = tokens.to(self.w1.dtype)
            out = self._run_routed_experts(tokens, topk_idx, topk_weights)
            if self.shared is not None:
                out = out + self.shared(tokens)
        return out.to(x.dtype).view(x.shape)

    def _run_routed_experts(self, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        weights: Sequence[Any] = (self.w1, self.w2)
        ticket: Any = None
        balancer, layer = self.balancer, self.config.layer
        if balancer is not None:
            # Directly before the dispatch: then autograd runs its backward after the dispatch's.
            weights = balancer.prepare_weights(weights, layer=layer)

        def begin(counts: list[int]) -> None:
            nonlocal ticket
            self.last_counts = counts
            if balancer is not None:
                ticket = balancer.begin(counts, layer=layer)

        dispatch = self.dispatcher.dispatch
        if isinstance(self.dispatcher, DeepEPDispatcher):  # sends the weights with the tokens
            dispatch = functools.partial(dispatch, topk_weights=topk_weights)
        rows, handle = dispatch(tokens, topk_idx, self.config.num_experts, on_counts=begin)
        counts = list(handle.counts)
        if balancer is None:
            out = run_experts_locally(rows, counts, weights, self.compute)
        else:
            out = balancer.run_experts(
                rows, counts, weights, self.compute, layer=layer, ticket=ticket
            )
        return self.dispatcher.combine(out, topk_weights, handle)

    def _generator(self, offset: int) -> torch.Generator:
        # The CPU generator takes 32 bits of a seed.
        layer_seed = self.config.seed * _SEED_STEP + self.config.layer * _SEEDS_PER_LAYER
        return torch.Generator(device="cpu").manual_seed((layer_seed + offset) % 2**32)

    def extra_repr(self) -> str:
        return f"{self.config}, ep_size={self.dispatcher.ep_size}"


class _SharedExpert(nn.Module):
    """SwiGLU over all tokens, on every rank; ordinary autograd."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        width = config.shared_ffn_hidden or config.num_shared_experts * config.ffn_hidden
        self.w1, self.w2 = (
            nn.Parameter(torch.empty(*shape, dtype=config.dtype))
            for shape in _swiglu_shapes(config.hidden, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        gate, up = nn.functional.linear(tokens, self.w1).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.w2)


def _make_dispatcher(
    config: MoEConfig, group: dist.ProcessGroup | None, dispatcher: str | Dispatcher
) -> Dispatcher:
    if dispatcher == "deepep":
        dispatcher = DeepEPDispatcher(group, check_choices=False)  # the router's are distinct
    elif dispatcher == "all_to_all":
        dispatcher = AllToAllDispatcher(group)
    if isinstance(dispatcher, str):
        raise ValueError(f"dispatcher is {dispatcher!r}, expected all_to_all or deepep.")
    if dispatcher.group is not group:
        raise ValueError(
            "the dispatcher is over another EP group than `group`. Give both the same."
        )
    if isinstance(dispatcher, DeepEPDispatcher):
        dispatcher.check_layer(config.hidden, config.dtype, config.num_experts, config.top_k)
    return dispatcher


def _swiglu_shapes(hidden: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (2 * width, hidden), (hidden, width)


def _draw(targets: Sequence[Tensor], std: float, generator: torch.Generator) -> None:
    """Draw on the CPU and in fp32, so that device and dtype do not change the numbers."""
    for target in targets:
        draw = torch.randn(target.shape, generator=generator, device="cpu", dtype=torch.float32)
        target.copy_(draw.mul_(std))
