"""This rank's arena as tensors: where received rows, outputs, weights and grads lie.

Views only; a view is valid from the wait that makes its data arrive to the release that gives its
memory back, and two_phase.py keeps to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call import KIND_FORWARD, RoutedMove, first_rows
from .compute import Segment
from .config import LayerSpec, TensorSpec


@dataclass(frozen=True)
class ReceivedViews:
    """A helper's part of the arena for one call."""

    rows: list[Tensor]  # forward: rows, side data; backward: grad rows, rows, side data
    outbox: list[Tensor]  # forward: outputs; backward: grad rows, grads of side data
    segments: list[Segment]  # weight index = slot
    weights: list[list[Tensor]]  # [tensor][slot]
    grad_outbox: list[list[Tensor]]  # [tensor][slot]


@dataclass(frozen=True)
class _HalfViews:
    """One half of the row parts, at full capacity."""

    rows: list[Tensor]
    outbox: list[Tensor]
    returns: list[Tensor]


def _as_tensor(arena: Any, device: torch.device) -> Tensor:
    """The bytes of an arena, which the tensor keeps mapped; empty for a rank alone."""
    if device.type == "cuda":
        return torch.as_tensor(arena, device=device)
    memory = memoryview(arena)
    return torch.frombuffer(memory, dtype=torch.uint8) if memory else torch.empty(0)


class ArenaViews:
    """Tensors over the arena of ``core`` (the C++ Domain), made once per layer, kind and half.

    ``device`` says where it lies.
    """

    def __init__(self, core: Any, layers: Sequence[LayerSpec], device: torch.device) -> None:
        self._core = core
        self._layers = layers
        self._memory = _as_tensor(core.arena(), device)
        self._offsets = [core.layer_offsets(layer) for layer in range(len(layers))]
        self._halves: dict[tuple[int, int, int], _HalfViews] = {}

    def received(
        self, layer: int, kind: int, seq: int, moves: Sequence[RoutedMove]
    ) -> ReceivedViews:
        """Rows half, outbox half and slots of the moves this rank received (not empty)."""
        half = self._half(layer, kind, seq)
        num_rows = moves[-1].arena_row + moves[-1].num_rows
        tensors = range(len(self._layers[layer].weights))
        slots = [move.slot for move in moves]
        slot, grad = self._core.weight_slot, self._core.grad_outbox_slot
        return ReceivedViews(
            rows=[piece[:num_rows] for piece in half.rows],
            outbox=[piece[:num_rows] for piece in half.outbox],
            segments=[(m.arena_row, m.arena_row + m.num_rows, m.slot) for m in moves],
            weights=[[self._weight(slot, layer, s, t) for s in slots] for t in tensors],
            grad_outbox=[[self._weight(grad, layer, s, t) for s in slots] for t in tensors],
        )

    def place_returns(
        self, layer: int, kind: int, seq: int, moves: Sequence[RoutedMove],
        counts: Sequence[int], targets: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        """Copy what came home from the return half into its rows of ``targets``."""
        half = self._half(layer, kind, seq)
        first = first_rows(counts)
        for move in moves:
            start = first[move.expert_idx] + move.row_start
            for target, piece in zip(targets, half.returns, strict=True):
                if target is not None:
                    came = piece[move.arena_row : move.arena_row + move.num_rows]
                    target[start : start + move.num_rows].copy_(came)

    def grads(self, layer: int, move: RoutedMove, tensors: Sequence[int]) -> dict[int, Tensor]:
        """{tensor index: grad that the helper of a sent move pushed home}."""
        slot = self._core.grad_slot
        return {t: self._weight(slot, layer, move.slot, t) for t in tensors}

    def _weight(self, offset_of: Any, layer: int, slot: int, tensor: int) -> Tensor:
        return self._view(offset_of(layer, slot, tensor), self._layers[layer].weights[tensor])

    def _half(self, layer: int, kind: int, seq: int) -> _HalfViews:
        key = (layer, kind, seq & 1)
        if key not in self._halves:
            self._halves[key] = self._make_half(*key)
        return self._halves[key]

    def _make_half(self, layer: int, kind: int, half: int) -> _HalfViews:
        spec, offsets = self._layers[layer], self._offsets[layer]
        row = TensorSpec((spec.hidden,), spec.dtype)
        forward = kind == KIND_FORWARD
        name = "forward" if forward else "backward"
        in_rows = [row, *spec.row_data] if forward else [row, row, *spec.row_data]
        in_returns = [row] if forward else [row, *spec.row_data]

        def pieces(part: str, name: str, specs: list[TensorSpec]) -> list[Tensor]:
            base = offsets[part][half]
            return [
                self._view(base + at, TensorSpec((spec.max_rows, *want.shape), want.dtype))
                for at, want in zip(offsets[name], specs, strict=True)
            ]

        return _HalfViews(
            rows=pieces("rows_half", f"{name}_rows", in_rows),
            outbox=pieces("outbox_half", f"{name}_returns", in_returns),
            returns=pieces("returns_half", f"{name}_returns", in_returns),
        )

    def _view(self, offset: int, spec: TensorSpec) -> Tensor:
        return self._memory[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
