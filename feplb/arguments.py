"""What ``run_experts`` and ``begin`` are given, checked before anything is published.

Every check raises ValueError with what was seen and what was expected; the balancer adds where.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from .call import WeightLayout
from .config import LayerSpec

_MOST_ROWS = 2**31 - 1  # of one expert: counts travel as int32
_ALIGNMENT = 16  # bytes; below it the bits of small GEMMs change


def checked_counts(counts: Sequence[int] | Tensor, num_local_experts: int) -> list[int]:
    """``counts`` as host ints, one per local expert."""
    if isinstance(counts, Tensor):
        if counts.device.type != "cpu":
            raise ValueError(f"counts are on {counts.device}, expected host ints")
        counts = counts.tolist()
    try:
        checked = list(map(index, counts))
    except TypeError as error:
        wrong = next(e for e, count in enumerate(counts) if not hasattr(count, "__index__"))
        raise ValueError(f"counts[{wrong}] is {counts[wrong]!r}, expected an int") from error
    if len(checked) != num_local_experts:
        raise ValueError(f"counts has {len(checked)} entries, expected {num_local_experts}")
    if min(checked) < 0 or max(checked) > _MOST_ROWS:
        expert = next(e for e, count in enumerate(checked) if not 0 <= count <= _MOST_ROWS)
        raise ValueError(f"counts[{expert}] is {checked[expert]}, expected 0 to 2^31 - 1")
    return checked


def check_rows(
    rows: Tensor, row_data: Sequence[Tensor], counts: Sequence[int], spec: LayerSpec,
    device: torch.device,
) -> None:  # fmt: skip
    """Rows and their side data against the counts and the spec."""
    if rows.dim() == 2 and rows.shape[0] != sum(counts):
        raise ValueError(f"counts add up to {sum(counts)}, expected the {rows.shape[0]} rows given")
    _check_tensor("rows", rows, (sum(counts), spec.hidden), spec.dtype, device)
    if rows.data_ptr() % _ALIGNMENT:
        raise ValueError(
            f"rows start {rows.data_ptr() % _ALIGNMENT} bytes after a multiple of {_ALIGNMENT}, "
            "expected an aligned tensor. Clone them."
        )
    if len(row_data) != len(spec.row_data):
        raise ValueError(f"{len(row_data)} row_data tensors, expected {len(spec.row_data)}")
    for i, (data, want) in enumerate(zip(row_data, spec.row_data, strict=True)):
        _check_tensor(f"row_data[{i}]", data, (sum(counts), *want.shape), want.dtype, device)


def _lanes_of(device: torch.device) -> str:
    return "the host lane" if device.type == "cpu" else "a lane of GPUs"


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} are on {tensor.device}, expected {device} for {_lanes_of(device)}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{name} have dtype {tensor.dtype}, expected {dtype} as in the LayerSpec")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} are not contiguous (stride {tensor.stride()}), expected row-major. Call "
            ".contiguous() on them: feplb adds no hidden copy."
        )


def _check_lengths(
    name: str, what: str, tensors: Sequence[Sequence[Any] | Tensor], spec: LayerSpec
) -> None:
    """One entry per tensor of an expert, each with one per local expert."""
    if len(tensors) != len(spec.weights):
        raise ValueError(f"{len(tensors)} {what}, expected {len(spec.weights)}")
    for t, experts in enumerate(tensors):
        if len(experts) != spec.num_local_experts:
            raise ValueError(
                f"{name}[{t}] has {len(experts)} experts, expected {spec.num_local_experts}"
            )


def check_weights(
    layout: WeightLayout, flat: Sequence[Tensor], spec: LayerSpec, device: torch.device
) -> None:
    """Weights against the spec; all experts of a tensor take gradients, or none."""
    views = layout.per_tensor(flat)
    _check_lengths("weights", "weight tensors per expert", views, spec)
    for t, (view, want) in enumerate(zip(views, spec.weights, strict=True)):
        for expert in [view[0]] if isinstance(view, Tensor) else view:
            if tuple(expert.shape) != want.shape or expert.dtype != want.dtype:
                raise ValueError(
                    f"weights[{t}] of an expert is {tuple(expert.shape)} {expert.dtype}, expected "
                    f"{want.shape} {want.dtype} as in the LayerSpec"
                )
            if not expert.is_contiguous() or expert.device != device:
                raise ValueError(
                    f"weights[{t}] of an expert has stride {expert.stride()} on {expert.device}, "
                    f"expected contiguous on {device}"
                )
    for t, needs in enumerate(layout.per_tensor([weight.requires_grad for weight in flat])):
        if not isinstance(needs, bool) and any(needs) and not all(needs):
            raise ValueError(f"weights[{t}]: experts {needs} need grad; freeze all or none")


def check_sinks(sinks: Sequence[Sequence[Tensor]] | None, spec: LayerSpec) -> None:
    """grad_sinks[tensor][expert] against the spec; their dtype is the user's."""
    if sinks is None:
        return
    _check_lengths("grad_sinks", "grad_sinks", sinks, spec)
    for t, (sink, want) in enumerate(zip(sinks, spec.weights, strict=True)):
        if tuple(sink[0].shape) != want.shape:
            raise ValueError(
                f"grad_sinks[{t}] of an expert is {tuple(sink[0].shape)}, expected {want.shape}"
            )
