"""Chooses the experts of every token: scores, top-k, and weights for the combine.

First step of MoELayer's forward; holds no auxiliary loss. With a bias update rate it keeps the
experts evenly used the aux-loss-free way: a bias, moved a fixed step after every training step,
takes part in the selection and never in the weights.
Shapes: T = tokens, H = hidden, E = num_experts, k = top_k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

SCORINGS = ("softmax", "sigmoid")


class TopKRouter(nn.Module):
    """Scores every token against every expert and picks the top_k best.

    Computes in fp32 (fp64 for fp64 tokens), whatever the tokens' dtype and autocast say. Equal
    scores go to the lowest expert index, so equal inputs give equal choices everywhere.

    Args:
        hidden: H.
        num_experts: E, over all EP ranks.
        top_k: experts per token, 1 to E.
        scoring: "softmax" over all experts, or "sigmoid" per expert.
        normalize_topk: make the top_k weights of a token sum to one.
        bias_update_rate: step of the selection bias; 0 means no bias (and no such buffer).
    Raises:
        ValueError: unknown scoring, top_k outside [1, num_experts], negative rate.
    Source: the bias is that of arXiv 2408.15664 (used by DeepSeek-V3).
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        normalize_topk: bool = True,
        bias_update_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if scoring not in SCORINGS:
            raise ValueError(f"scoring is {scoring!r}, expected one of {', '.join(SCORINGS)}.")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, expected 1 to num_experts={num_experts}.")
        if bias_update_rate < 0:
            raise ValueError(f"bias_update_rate is {bias_update_rate}, expected 0 or more.")
        self.num_experts = num_experts
        self.top_k = top_k
        self.scoring = scoring
        self.normalize_topk = normalize_topk
        self.bias_update_rate = bias_update_rate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32))
        bias = torch.zeros(num_experts, dtype=torch.float32) if bias_update_rate else None
        self.register_buffer("expert_bias", bias)
        # No buffer: DistributedDataParallel would overwrite it with rank 0's before each forward.
        self._routed_counts: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Draw the weight from N(0, std) on the CPU, zero the bias and what was counted."""
        draw = torch.randn(self.weight.shape, generator=generator, device="cpu")
        self.weight.copy_(draw * std)
        if self.expert_bias is not None:
            self.expert_bias.zero_()
        self._routed_counts = None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens [T, H].

        Returns:
            topk_idx [T, k] int64, global expert indices, best first; and topk_weights [T, k] fp32
            (fp64 for fp64 tokens), with gradients to the tokens and the router's weight.
        """
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = nn.functional.linear(tokens.to(dtype), self.weight.to(dtype))
            scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
            topk_idx = self._select(scores.detach())
            topk_weights = scores.gather(1, topk_idx)
            if self.normalize_topk:
                tiny = torch.finfo(dtype).tiny  # sigmoid scores may all underflow to zero
                topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True).clamp_min(tiny)
        # Of a reentrant checkpoint's two passes only one is in grad mode. Other checkpoints count
        # every token twice, which the bias does not see: it compares with the mean.
        if self.training and torch.is_grad_enabled():
            self._count(topk_idx)
        return topk_idx, topk_weights

    def _select(self, scores: Tensor) -> Tensor:
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        # topk leaves the order of equal scores open, a stable sort does not.
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        return order[:, : self.top_k].contiguous()

    @torch.no_grad()
    def _count(self, topk_idx: Tensor) -> None:
        if self.expert_bias is None:
            return
        choices = topk_idx.reshape(-1)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=choices.device)
        counts.scatter_add_(0, choices, torch.ones_like(choices))
        if self._routed_counts is not None:
            counts += self._routed_counts
        self._routed_counts = counts

    @torch.no_grad()
    def update_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """Move the bias one step: down for experts used more than the mean, up for those used less.

        Collective over `group`. Call it once per training step, after the optimizer; it takes what
        training forwards counted since the last call. Does nothing without a bias.

        Args:
            group: all ranks that see different tokens (data and EP ranks together), so that all of
                them keep the same bias; None means this rank alone.
        """
        if self.expert_bias is None:
            return
        counts = self._routed_counts
        if counts is None:
            counts = torch.zeros_like(self.expert_bias, dtype=torch.int64)
        if group is not None:
            dist.all_reduce(counts, group=group)
        # Compared as integers, multiplied by E instead of divided: exact, so all ranks agree.
        excess = counts * self.num_experts - counts.sum()
        self.expert_bias -= self.bias_update_rate * excess.sign()
        self._routed_counts = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """Keep the bias in fp32 under .bfloat16() and the like: its steps would be lost."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.expert_bias = before.to(after.device)
        return self
