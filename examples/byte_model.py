"""A small transformer over bytes whose feed-forward layers are feplb.moe.MoELayer.

Used by train_moe_lm.py. Attention, norms and embeddings are on every rank; each rank holds its
share of every layer's experts.
Shapes: B = windows, T = bytes of a window, H = hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from byte_text import NUM_BYTE_VALUES
from torch import Tensor, nn

from feplb import Balancer, LayerSpec, MoEConfig, MoELayer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The size of the model; every layer is a MoE layer."""

    num_layers: int = 3
    hidden: int = 128
    num_heads: int = 4
    ffn_hidden: int = 192
    num_experts: int = 16
    top_k: int = 2
    context: int = 128
    bias_update_rate: float = 0.002
    seed: int = 0

    def moe(self, layer: int) -> MoEConfig:
        return MoEConfig(
            hidden=self.hidden,
            ffn_hidden=self.ffn_hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            router_bias_update_rate=self.bias_update_rate,
            layer=layer,
            seed=self.seed,
        )

    def layer_specs(self, num_ranks: int, rows_per_rank: int) -> list[LayerSpec]:
        """What the Balancer must know of the MoE layers.

        Args:
            rows_per_rank: mean rows of a rank in one call: its tokens x top_k. The arena gets room
                for twice that; what would not fit stays with its owner.
        """
        return [
            self.moe(layer).layer_spec(num_ranks, max_rows=2 * rows_per_rank)
            for layer in range(self.num_layers)
        ]


class ByteLM(nn.Module):
    """Bytes [B, T] -> logits of the next byte [B, T, 256].

    Args:
        config: the same on every rank.
        balancer: of the layers of config.layer_specs; never owned.
        group: the EP group; None means one rank.
    """

    def __init__(
        self, config: ModelConfig, balancer: Balancer, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        torch.manual_seed(config.seed)  # what all ranks hold starts equal
        self.bytes = nn.Embedding(NUM_BYTE_VALUES, config.hidden)
        self.positions = nn.Embedding(config.context, config.hidden)
        self.blocks = nn.ModuleList(
            Block(config, MoELayer(config.moe(layer), balancer, group))
            for layer in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden)
        self.logits = nn.Linear(config.hidden, NUM_BYTE_VALUES)

    def forward(self, window: Tensor) -> Tensor:
        x = self.bytes(window) + self.positions.weight[: window.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.logits(self.norm(x))
        return logits

    def update_router_biases(self, group: dist.ProcessGroup | None) -> None:
        """Once per step, after the optimizer: keeps the experts from starving. Collective."""
        for layer in self.moe_layers():
            layer.router.update_bias(group)

    def moe_layers(self) -> list[MoELayer]:
        return [module for module in self.modules() if isinstance(module, MoELayer)]


class Block(nn.Module):
    """Attention, then experts, each added to what came in."""

    def __init__(self, config: ModelConfig, experts: MoELayer) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.projection = nn.Linear(config.hidden, config.hidden, bias=False)
        self.experts_norm = nn.LayerNorm(config.hidden)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.attention_norm(x))
        out: Tensor = x + self.experts(self.experts_norm(x))
        return out

    def _attention(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out
