"""Megatron-Core's expert MLP as an ExpertCompute: its arithmetic, on segments of rows.

Called by two_phase.py. GEMMs are written out, so that dgrad and wgrad are separate steps; what lies
between them (bias, activation, router probability) runs the expressions of Megatron's own MLP,
under a graph that lives only inside one backward call. Keeps fc1's output per row and nothing else:
the activation is computed again in backward, as Megatron's "moe_act" recompute does.

n rows of a segment, H hidden, F width inside the expert, G = 2F for gated units, else F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu, weighted_bias_quick_geglu_impl
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from torch import Tensor
from torch.nn import functional

from feplb.compute import (
    ExpertCompute,
    GradWeights,
    Saved,
    Segment,
    Weights,
    _mm,
    spans,
    sum_into_weights,
)

# (fc1's output [n, G], fc1's bias [G] or None, probabilities [n]) -> [n, F] in the dtype of fc1.
Activation = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def activation_of(config: Any) -> Activation:
    """What Megatron's MLP runs between fc1 and fc2 under this TransformerConfig.

    Raises:
        ValueError: a fused activation that Megatron has no weighted kernel for.
    """
    if not config.bias_activation_fusion:
        return _plain_activation(config)
    store = config.activation_func_fp8_input_store
    if config.gated_linear_unit and config.activation_func is functional.silu:
        return lambda h, bias, probs: weighted_bias_swiglu_impl(h, bias, probs.unsqueeze(-1), store)
    if config.gated_linear_unit and config.activation_func is quick_gelu:
        offset, clamp = config.glu_linear_offset, config.activation_func_clamp_value
        return lambda h, bias, probs: weighted_bias_quick_geglu_impl(
            h, bias, probs.unsqueeze(-1), store, offset, clamp
        )
    raise ValueError(
        f"bias_activation_fusion with {config.activation_func} (gated: "
        f"{config.gated_linear_unit}), expected gated silu or gated quick_gelu: Megatron-Core has "
        "no weighted kernel for others. Set bias_activation_fusion=False."
    )


def _plain_activation(config: Any) -> Activation:
    function, is_gated = config.activation_func, config.gated_linear_unit
    clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset

    def activation(h: Tensor, bias: Tensor | None, probs: Tensor) -> Tensor:
        if bias is not None:
            h = h + bias
        if is_gated:
            gate, linear = h.chunk(2, dim=-1)
            if clamp is not None:
                gate, linear = gate.clamp(max=clamp), linear.clamp(min=-clamp, max=clamp)
            act = function(gate) * (linear + offset)
        else:
            act = function(h)
        weighted: Tensor = (act * probs.unsqueeze(-1)).to(act.dtype)
        return weighted

    return activation


class MegatronExpert(ExpertCompute):
    """y = act(x w1^T + b1) * p w2^T + b2 * p, as Megatron's SequentialMLP and TEGroupedMLP.

    Weights of an expert: w1 [G, H], then b1 [G] with biases, w2 [H, F], then b2 [H] with biases.
    Row data: the router probability p [n], in its own dtype.
    """

    def __init__(self, activation: Activation, *, has_bias: bool) -> None:
        self._activation = activation
        self._fc2 = 2 if has_bias else 1  # where w2 stands among an expert's tensors
        self._has_bias = has_bias

    @torch.no_grad()
    def forward(
        self,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        weights: Weights,
        *,
        out: Tensor,
        save: bool,
    ) -> Saved:
        """Compute the output rows of every segment; see ExpertCompute."""
        h = self._fc1_buffer(rows, segments, weights, is_packed=save)
        for span, packed, weight_idx in spans(segments):
            w1, b1, w2, b2 = self._expert(weights, weight_idx)
            probs = row_data[0][span]
            h_e = h[packed] if save else h[: span.stop - span.start]
            _mm(rows[span], w1.t(), h_e)
            _mm(self._activation(h_e, b1, probs), w2.t(), out[span])
            if b2 is not None:
                out[span].add_(b2.unsqueeze(0) * probs.unsqueeze(-1))
        return Saved((h,)) if save else Saved(())

    @torch.no_grad()
    def backward_rows(
        self,
        grad_out: Tensor,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        weights: Weights,
        saved: Saved,
        *,
        grad_rows: Tensor,
        grad_row_data: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of rows and probabilities.

        The carry is, per segment: grad of h [n, G], activation [n, F], and the biases' gradients.
        """
        h, carry = saved.tensors[0], []
        for span, packed, weight_idx in spans(segments):
            w1, b1, w2, b2 = self._expert(weights, weight_idx)
            grad_act = rows.new_empty(span.stop - span.start, w2.shape[1])
            _mm(grad_out[span], w2, grad_act)
            inputs = (h[packed], row_data[0][span], b1, b2)
            act, grads = self._activation_grads(inputs, grad_act, grad_out[span])
            grad_h, grad_probs, *grad_biases = grads
            _mm(grad_h, w1, grad_rows[span])
            if grad_row_data[0] is not None:
                grad_row_data[0][span].copy_(grad_probs)
            carry += [grad_h, act, *grad_biases]
        return tuple(carry)

    def _activation_grads(
        self,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        grad_act: Tensor,
        grad_out: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The activation, and the gradients of h, probabilities and biases."""
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        h, probs, b1, b2 = leaves
        assert h is not None
        assert probs is not None
        with torch.enable_grad():
            outputs, grads = [self._activation(h, b1, probs)], [grad_act]
            if b2 is not None:
                outputs.append(b2.unsqueeze(0) * probs.unsqueeze(-1))
                grads.append(grad_out.to(outputs[-1].dtype))
            wanted = [leaf for leaf in leaves if leaf is not None]
            found = torch.autograd.grad(outputs, wanted, grads)
        return outputs[0].detach(), (found[0].contiguous(), *found[1:])

    @torch.no_grad()
    def backward_weights(
        self,
        grad_out: Tensor,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        saved: Saved,
        carry: tuple[Tensor, ...],
        *,
        grad_weights: GradWeights,
    ) -> None:
        """Write dw1 = dh^T x, dw2 = dy^T act, and the biases' gradients; see ExpertCompute."""
        row_spans = [span for span, _, _ in spans(segments)]
        width = 4 if self._has_bias else 2
        grads_h, acts = carry[0::width], carry[1::width]
        w1 = [(grad.t(), rows[span]) for grad, span in zip(grads_h, row_spans, strict=True)]
        w2 = [(grad_out[span].t(), act) for span, act in zip(row_spans, acts, strict=True)]
        for at, operands in ((0, w1), (self._fc2, w2)):
            targets = grad_weights[at]
            if targets is not None:
                sum_into_weights(segments, targets, operands, lambda ab, out: _mm(*ab, out))
        for at, first in ((1, 2), (3, 3)) if self._has_bias else ():
            targets = grad_weights[at]
            if targets is not None:
                sum_into_weights(
                    segments, targets, carry[first::width], lambda grad, out: out.copy_(grad)
                )

    def _expert(
        self, weights: Weights, weight_idx: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w1, b1, w2, b2 of one expert."""
        tensors = [tensor[weight_idx] for tensor in weights]
        if self._has_bias:
            return tensors[0], tensors[1], tensors[2], tensors[3]
        return tensors[0], None, tensors[1], None

    def _fc1_buffer(
        self, rows: Tensor, segments: Sequence[Segment], weights: Weights, *, is_packed: bool
    ) -> Tensor:
        """Room for fc1's output: of all segments where it is kept, else of the largest."""
        filled = list(spans(segments))
        if not filled:
            return rows.new_empty(0, 0)
        sizes = [span.stop - span.start for span, _, _ in filled]
        width = weights[0][filled[0][2]].shape[0]
        return rows.new_empty(sum(sizes) if is_packed else max(sizes), width)
