"""Where the rows of a call's segments lie: tables made on the host, read by kernels.

A call's tensors come in two layouts. *Spread* ones are the caller's: [N, ...], a segment's rows at
its start, with holes between segments. *Packed* ones are ours: the rows of all segments without
the holes. Example, block_m = 4:

    segments (0, 6, 0) (9, 11, 2)        rows 6..8 are a hole

    part         spread  packed  rows  weight
    segment 0        0       0     6      0         tiles  0: rows 0..3   1: rows 4..5
    segment 1        9       6     2      2                2: rows 9..10

A tile of rows starts where its segment starts and never crosses its end; so a row's place in its
tile depends on its segment alone. Tables are int64, made in one piece per call and copied to the
device in one asynchronous copy from pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["BAND", "GradTable", "Part", "RowTable", "grad_table", "parts_of", "row_table"]

# Tiles of rows that share a column of the weights while it is in the L2 cache.
BAND = 8

# Columns of RowTable.tiles; then one address per tensor of an expert.
SPREAD, PACKED, NUM_ROWS, BAND_FIRST, BAND_SIZE, WEIGHTS = range(6)

# Columns of GradTable.targets; then one address per tensor of an expert. Columns of GradTable.parts
# are SPREAD, PACKED, NUM_ROWS.
FIRST_PART, NUM_PARTS, TARGETS = range(3)
PART_COLUMNS = 4

# Kernels load and store 16 bytes at once.
ALIGNMENT = 16

Table = npt.NDArray[np.int64]


class Part(NamedTuple):
    """The rows of one segment that has rows."""

    spread: int
    packed: int
    num_rows: int
    weight_idx: int


@dataclass(frozen=True, eq=False)
class RowTable:
    """Tiles of rows, for kernels whose results are rows. Lives as long as one call.

    Attributes:
        parts: the segments with rows, in their order.
        weights: weights[t][weight_idx], as given.
        tiles: [num_tiles, columns] int64 on the device of the rows.
        block_m: rows of a tile.
    """

    parts: tuple[Part, ...]
    weights: Sequence[Sequence[Tensor]]
    tiles: Tensor
    block_m: int


@dataclass(frozen=True, eq=False)
class GradTable:
    """Which rows add up to which weight gradient. Lives as long as one call.

    Attributes:
        members: per weight index that a segment names, its parts in their order (none: zeros).
        grad_weights: grad_weights[t][weight_idx], as given; None = not wanted.
        targets: [len(members), columns] int64 on the device of the rows.
        parts: [number of parts, PART_COLUMNS] int64 there, by weight index.
    """

    members: tuple[tuple[int, tuple[Part, ...]], ...]
    grad_weights: Sequence[Sequence[Tensor] | None]
    targets: Tensor
    parts: Tensor


def parts_of(segments: Iterable[tuple[int, int, int]]) -> Iterator[Part]:
    """The segments (row start, row end, weight index) that have rows."""
    packed = 0
    for start, end, weight_idx in segments:
        if end > start:
            yield Part(start, packed, end - start, weight_idx)
            packed += end - start


def row_table(
    segments: Sequence[tuple[int, int, int]],
    weights: Sequence[Sequence[Tensor]],
    block_m: int,
    device: torch.device,
) -> RowTable:
    """Cut the segments into tiles of at most ``block_m`` rows.

    Raises:
        ValueError: a weight is not contiguous or does not start at a multiple of 16 bytes.
    """
    parts = tuple(parts_of(segments))
    rows = np.array(parts, dtype=np.int64).reshape(len(parts), 4)
    tiles_of_part = -(-rows[:, 2] // block_m)
    part = np.repeat(np.arange(len(parts)), tiles_of_part)
    first = (np.cumsum(tiles_of_part) - tiles_of_part)[part]
    in_part = np.arange(len(part)) - first
    columns = [
        rows[part, 0] + in_part * block_m,
        rows[part, 1] + in_part * block_m,
        np.minimum(rows[part, 2] - in_part * block_m, block_m),
        first + in_part // BAND * BAND,
        np.minimum(tiles_of_part[part] - in_part // BAND * BAND, BAND),
    ]
    columns += [
        _addresses(f"weights[{t}]", [tensors[p.weight_idx] for p in parts])[part]
        for t, tensors in enumerate(weights)
    ]
    tiles = _table(len(part), columns)
    return RowTable(parts, weights, _on_device(tiles, device), block_m)


def grad_table(
    segments: Sequence[tuple[int, int, int]],
    grad_weights: Sequence[Sequence[Tensor] | None],
    device: torch.device,
) -> GradTable:
    """Group the segments by weight index.

    Raises:
        ValueError: a target is not contiguous or does not start at a multiple of 16 bytes.
    """
    by_weight: dict[int, list[Part]] = {weight_idx: [] for _, _, weight_idx in segments}
    for part in parts_of(segments):
        by_weight[part.weight_idx].append(part)
    members = tuple((weight_idx, tuple(parts)) for weight_idx, parts in by_weight.items())
    ordered = np.array([p for _, parts in members for p in parts], dtype=np.int64).reshape(-1, 4)
    num_parts = np.array([len(parts) for _, parts in members], dtype=np.int64)
    columns = [np.cumsum(num_parts) - num_parts, num_parts]
    columns += [
        np.zeros(len(members), dtype=np.int64)
        if tensors is None
        else _addresses(f"grad_weights[{t}]", [tensors[w] for w in by_weight])
        for t, tensors in enumerate(grad_weights)
    ]
    targets = _table(len(members), columns)
    parts_table = _table(len(ordered), [ordered[:, i] for i in range(3)])
    both = _on_device(np.concatenate([targets.reshape(-1), parts_table.reshape(-1)]), device)
    return GradTable(
        members,
        grad_weights,
        both[: targets.size].view(targets.shape),
        both[targets.size :].view(parts_table.shape),
    )


def _table(num_rows: int, columns: Sequence[npt.NDArray[np.int64]]) -> Table:
    """Columns side by side, padded to an even number: rows of tables stay 16-byte aligned."""
    table = np.zeros((num_rows, len(columns) + len(columns) % 2), dtype=np.int64)
    for i, column in enumerate(columns):
        table[:, i] = column
    return table


def _addresses(what: str, tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"{what}: a tensor {tuple(tensor.shape)} with strides {tensor.stride()} at address "
                f"{tensor.data_ptr():#x}, expected contiguous ones at multiples of "
                f"{ALIGNMENT} bytes."
            )
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)


def _on_device(table: Table, device: torch.device) -> Tensor:
    """Copied without waiting for the device; torch keeps the pinned memory until it is read."""
    host = torch.from_numpy(table)
    if device.type == "cpu" or not table.size:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
