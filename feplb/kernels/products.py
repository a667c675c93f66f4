"""The products over segments that an expert needs, whatever computes them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .segment_tables import GradTable, Part, RowTable

__all__ = ["GroupedGemm", "Operand"]


class Operand(NamedTuple):
    """Rows of a product, contiguous [*, width]: spread (with holes) or packed.

    See segment_tables.py for the two layouts.
    """

    rows: Tensor
    packed: bool = False

    def of(self, part: Part) -> Tensor:
        """The rows of one segment."""
        first = part.packed if self.packed else part.spread
        return self.rows[first : first + part.num_rows]


class GroupedGemm(Protocol):
    """Products over the segments of a table, results written in place, holes untouched.

    Stream: what is launched follows the current stream of the rows' device, and is followed by
    what is launched on it next. Nothing waits on the host.

    Attributes:
        block_m: rows per tile of the row tables it takes.
    """

    block_m: int

    def multiply_rows(
        self, source: Operand, out: Operand, table: RowTable, *, tensor: int, transposed: bool
    ) -> None:
        """out[part] = source[part] @ W, W = weights[tensor][weight index of part].

        Args:
            source: [*, K] in the dtype of the weights.
            out: [*, width], any floating dtype; rows outside the segments are not touched.
            tensor: which tensor of an expert. All of its weights have the same shape.
            transposed: W is [width, K] and its transpose is used; else W is [K, width].
        """
        ...

    def multiply_weights(
        self, left: Operand, right: Operand, table: GradTable, *, tensor: int
    ) -> None:
        """grad_weights[tensor][w] = sum over the parts of w of left[part]^T @ right[part].

        Overwrites the target of every weight index a segment names; zeros where it has no rows.

        Args:
            left, right: [*, A] and [*, B] in one dtype.
            tensor: which tensor of an expert; its targets are [A, B], all of one dtype.
        """
        ...
