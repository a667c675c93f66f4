"""A wrong argument on one rank: that rank says what was wrong, the others say who refused, nothing
was sent, and the next call has the right bits. All mistakes are made in one spawn, by rank 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from balancer_cases import PROBS, Arm, layer_spec
from balancer_scenarios import Reactions, Scenario
from torch import Tensor

from feplb import SwiGLU

BAD_RANK, STEP = 1, 1
SPECS = (layer_spec(4, row_data=PROBS),)
# Counts of rank 1 in step 1, where it is the overloaded one: 142 rows.
COUNTS = [31, 36, 44, 31]

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Mistake:
    """What rank 1 hands in instead, and what it is told."""

    change: Callable[[Arguments], Arguments]
    message: str
    in_begin: bool = False


def transposed(rows: Tensor) -> Tensor:
    return rows.detach().t().contiguous().t()


def shifted(rows: Tensor) -> Tensor:
    """The same rows, four bytes after a multiple of 64."""
    room = torch.empty(rows.numel() + 1, dtype=rows.dtype)
    return room[1:].view(rows.shape).copy_(rows.detach())


def with_weight(args: Arguments, idx: int, weight: Any) -> Arguments:
    weights = list(args["weights"])
    weights[idx] = weight
    return {"weights": weights}


def freeze_one_expert(args: Arguments) -> Arguments:
    experts = [expert.detach().clone() for expert in args["weights"][0]]
    return with_weight(args, 0, [experts[0], *(e.requires_grad_() for e in experts[1:])])


def counts_of(*counts: Any) -> Callable[[Arguments], Arguments]:
    return lambda args: {"counts": list(counts)}


MISTAKES = {
    "counts below the rows": Mistake(
        counts_of(30, 36, 44, 31), "counts add up to 141, expected the 142 rows given"
    ),
    "counts above the rows": Mistake(
        counts_of(31, 36, 44, 32), "counts add up to 143, expected the 142 rows given"
    ),
    "negative count": Mistake(
        counts_of(31, 36, -44, 31), r"counts\[2\] is -44, expected 0 to 2\^31 - 1"
    ),
    "oversized count": Mistake(
        counts_of(1 << 31, 36, 44, 31), r"counts\[0\] is 2147483648, expected 0 to 2\^31 - 1"
    ),
    "three counts": Mistake(counts_of(31, 36, 44), "counts has 3 entries, expected 4"),
    "count that is no number": Mistake(counts_of("many", 36, 44, 31), "counts"),
    "fractional count": Mistake(counts_of(31.5, 36, 44, 31), r"counts\[0\] is 31.5"),
    "counts on another device": Mistake(
        lambda args: {"counts": torch.empty(4, dtype=torch.int64, device="meta")},
        "counts are on meta, expected host ints",
    ),
    "dtype of rows": Mistake(
        lambda args: {"rows": args["rows"].double()},
        "rows have dtype torch.float64, expected torch.float32",
    ),
    "width of rows": Mistake(
        lambda args: {"rows": args["rows"][:, :16].contiguous()},
        r"rows have shape \(142, 16\), expected \(142, 32\)",
    ),
    "dimensions of rows": Mistake(
        lambda args: {"rows": args["rows"].view(1, 142, 32)},
        r"rows have shape \(1, 142, 32\), expected \(142, 32\)",
    ),
    "device of rows": Mistake(
        lambda args: {"rows": args["rows"].to("meta")}, "rows are on meta, expected cpu"
    ),
    "rows not contiguous": Mistake(
        lambda args: {"rows": transposed(args["rows"])},
        r"rows are not contiguous \(stride \(1, 142\)\), expected row-major",
    ),
    "address of rows": Mistake(
        lambda args: {"rows": shifted(args["rows"])},
        "rows start 4 bytes after a multiple of 16",
    ),
    "no side data": Mistake(lambda args: {"row_data": ()}, "0 row_data tensors, expected 1"),
    "shape of side data": Mistake(
        lambda args: {"row_data": (args["row_data"][0][:-1],)},
        r"row_data\[0\] have shape \(141,\), expected \(142,\)",
    ),
    "dtype of side data": Mistake(
        lambda args: {"row_data": (args["row_data"][0].double(),)},
        r"row_data\[0\] have dtype torch.float64, expected torch.float32",
    ),
    "one weight tensor": Mistake(
        lambda args: {"weights": args["weights"][:1]}, "1 weight tensors per expert, expected 2"
    ),
    "three experts": Mistake(
        lambda args: with_weight(args, 0, args["weights"][0][:3]),
        r"weights\[0\] has 3 experts, expected 4",
    ),
    "three experts in a list": Mistake(
        lambda args: with_weight(args, 1, list(args["weights"][1][:3])),
        r"weights\[1\] has 3 experts, expected 4",
    ),
    "shape of weights": Mistake(
        lambda args: with_weight(args, 1, args["weights"][1].transpose(1, 2).contiguous()),
        r"weights\[1\] of an expert is \(48, 32\) torch.float32, expected \(32, 48\)",
    ),
    "dtype of weights": Mistake(
        lambda args: with_weight(args, 0, args["weights"][0].bfloat16()),
        r"weights\[0\] of an expert is \(96, 32\) torch.bfloat16, expected \(96, 32\) torch.float",
    ),
    "weights not contiguous": Mistake(
        lambda args: with_weight(args, 0, args["weights"][0].detach().mT.contiguous().mT),
        r"weights\[0\] of an expert has stride \(1, 96\) on cpu, expected contiguous on cpu",
    ),
    "one expert frozen": Mistake(
        freeze_one_expert, r"weights\[0\]: experts \[False, True, True, True\] need grad"
    ),
    "no weights": Mistake(lambda args: {"weights": None}, "weights"),
    "layer out of range": Mistake(
        lambda args: {"layer": 7}, r"layer=7 \(rank 1\), expected 0 to 0"
    ),
    "shape of grad_sinks": Mistake(
        lambda args: {"grad_sinks": [torch.zeros(4, 96, 16), torch.zeros(4, 32, 48)]},
        r"grad_sinks\[0\]",
    ),
    "number of grad_sinks": Mistake(
        lambda args: {"grad_sinks": [torch.zeros(4, 96, 32)]}, "1 grad_sinks"
    ),
    "negative count in begin": Mistake(
        counts_of(31, 36, -44, 31), r"counts\[2\] is -44, expected 0 to 2\^31 - 1", in_begin=True
    ),
    "three counts in begin": Mistake(
        counts_of(31, 36, 44), "counts has 3 entries, expected 4", in_begin=True
    ),
    "layer out of range in begin": Mistake(
        lambda args: {"layer": 7}, r"layer=7 \(rank 1\), expected 0 to 0", in_begin=True
    ),
}


def make_mistake(arm: Arm, name: str) -> str:
    """Rank 1 makes the mistake, the others call as they should."""
    mistake = MISTAKES[name]
    rows, row_data = arm.rows(step=STEP)
    args: Arguments = {
        "rows": rows, "counts": arm.counts(step=STEP), "weights": arm.weights(),
        "compute": SwiGLU(), "layer": 0, "row_data": row_data,
    }  # fmt: skip
    if arm.rank == BAD_RANK:
        assert args["counts"] == COUNTS
        args |= mistake.change(args)
    if mistake.in_begin:
        args["ticket"] = arm.door.begin(args["counts"], layer=args["layer"])
    arm.door.run_experts(**args)
    return "nothing raised"


@pytest.fixture(scope="module")
def reactions() -> Reactions:
    return Reactions(
        {name: Scenario(functools.partial(make_mistake, name=name), SPECS) for name in MISTAKES}
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_argument_is_named_on_every_rank_and_loses_nothing(
    reactions: Reactions, name: str
) -> None:
    reactions.assert_refused(name, BAD_RANK, MISTAKES[name].message)


def test_micro_batch_and_layer_are_in_the_message(reactions: Reactions) -> None:
    where = r"\(rank 1, layer 0, micro-batch 0\)"
    reactions.assert_refused("negative count", BAD_RANK, where)
