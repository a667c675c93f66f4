"""AllToAllDispatcher between processes (gloo)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from feplb.dispatch import AllToAllDispatcher

Grads = dict[str, Tensor]

# The worked example of permute.py: tokens a b c on rank 0, d e on rank 1, 2 ranks x 2 experts.
EXAMPLE_IDX = [[[0, 2], [3, 0], [1, 2]], [[2, 0], [0, 1]]]
EXAMPLE_TOKENS = [[[1.0], [2.0], [3.0]], [[4.0], [5.0]]]


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def dispatch_example(rank: int, num_ranks: int) -> dict[str, Any]:
    """Dispatch, multiply by the global expert index plus one, combine with weights one."""
    seen: list[tuple[list[int], int]] = []
    num_collectives = 0
    all_to_all = dist.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_collectives
        num_collectives += 1
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = counting
    topk_idx = torch.tensor(EXAMPLE_IDX[rank])
    dispatcher = AllToAllDispatcher(world())
    rows, handle = dispatcher.dispatch(
        torch.tensor(EXAMPLE_TOKENS[rank]),
        topk_idx,
        4,
        on_counts=lambda counts: seen.append((counts, num_collectives)),
    )
    factors = torch.tensor([2 * rank + 1.0, 2 * rank + 2.0])
    factors = factors.repeat_interleave(torch.tensor(handle.counts))
    out = dispatcher.combine(rows * factors[:, None], torch.ones(topk_idx.shape), handle)
    return {"rows": rows.flatten().tolist(), "seen": seen, "out": out.flatten().tolist()}


def test_worked_example_on_two_ranks() -> None:
    first, second = run_ranks(dispatch_example, 2)
    assert first["rows"] == [1, 2, 4, 5, 3, 5]  # a b d e | c e
    assert second["rows"] == [1, 3, 4, 2]  # a c d | b
    assert first["out"] == [1 + 3, 8 + 2, 6 + 9]
    assert second["out"] == [12 + 4, 5 + 10]
    # The counts were known when one collective had run: their own, not yet the payload's.
    assert first["seen"] == [([4, 2], 1)]
    assert second["seen"] == [([3, 1], 1)]


def make_case(num_tokens: list[int], num_experts: int, top_k: int = 2) -> list[dict[str, Tensor]]:
    """Per rank: tokens, choices, weights and a gradient of the output; experts for all."""
    generator = torch.Generator().manual_seed(len(num_tokens))
    cases = []
    for count in num_tokens:
        topk_idx = torch.rand(count, num_experts, generator=generator).argsort(1)[:, :top_k]
        case = {name: torch.randn(count, 6, generator=generator) for name in ("tokens", "grad")}
        case["weights"] = torch.rand(count, top_k, generator=generator)
        cases.append({**{k: v.double() for k, v in case.items()}, "topk_idx": topk_idx})
    return cases


def make_experts(num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(num_experts, 6, 6, generator=generator).double()


def apply_experts(rows: Tensor, counts: tuple[int, ...], experts: Tensor) -> Tensor:
    parts = zip(rows.split(list(counts)), experts, strict=True)
    return torch.cat([(part @ expert).tanh() for part, expert in parts])


def dense_reference(case: dict[str, Tensor], experts: Tensor) -> Tensor:
    outputs = torch.einsum("th,ehd->ted", case["tokens"], experts).tanh()
    chosen = outputs.gather(1, case["topk_idx"][..., None].expand(-1, -1, outputs.shape[-1]))
    return (chosen * case["weights"][..., None]).sum(1)


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def run_case(rank: int, num_ranks: int, cases: list[dict[str, Tensor]], num_experts: int) -> Grads:
    case = cases[rank]
    tokens, weights = case["tokens"].requires_grad_(), case["weights"].requires_grad_()
    experts = make_experts(num_experts).chunk(num_ranks)[rank].clone().requires_grad_()
    dispatcher = AllToAllDispatcher(world())
    rows, handle = dispatcher.dispatch(tokens, case["topk_idx"], num_experts)
    out = dispatcher.combine(apply_experts(rows, handle.counts, experts), weights, handle)
    out.backward(case["grad"])
    inputs = {"tokens": tokens, "weights": weights, "experts": experts}
    return {"out": out.detach(), **{name: grad_of(tensor) for name, tensor in inputs.items()}}


def expected_of(cases: list[dict[str, Tensor]], num_experts: int) -> list[Grads]:
    experts = make_experts(num_experts).requires_grad_()
    outs = []
    for case in cases:
        tokens, weights = case["tokens"].requires_grad_(), case["weights"].requires_grad_()
        outs.append(dense_reference({**case, "tokens": tokens, "weights": weights}, experts))
    torch.autograd.backward(outs, [case["grad"] for case in cases])
    return [
        {
            "out": out.detach(),
            "tokens": grad_of(case["tokens"]),
            "weights": grad_of(case["weights"]),
            "experts": grad_of(experts).chunk(len(cases))[rank],
        }
        for rank, (case, out) in enumerate(zip(cases, outs, strict=True))
    ]


@pytest.mark.parametrize(
    "num_tokens",
    [[5, 9], [7, 3, 0, 12], [0, 0, 0, 4], [0, 0]],
    ids=["two", "one-empty", "one-full", "all-empty"],
)
def test_forward_and_gradients_equal_the_dense_reference(num_tokens: list[int]) -> None:
    cases = make_case(num_tokens, num_experts=8)
    plain = [{name: t.clone() for name, t in case.items()} for case in cases]
    seen = run_ranks(run_case, len(num_tokens), plain, 8)
    for got, expected in zip(seen, expected_of(cases, 8), strict=True):
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            # Same terms in another order: sums of at most 64 terms, four sums deep, in fp64.
            atol = 4 * 64 * torch.finfo(torch.float64).eps * 100
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=name)


def run_with_one_rank_frozen(rank: int, num_ranks: int) -> tuple[bool, bool]:
    """Rank 0's tokens need no gradient, rank 1's do, and no expert does."""
    case = make_case([3, 4], 4)[rank]
    tokens = case["tokens"].requires_grad_(rank == 1)
    dispatcher = AllToAllDispatcher(world())
    rows, handle = dispatcher.dispatch(tokens, case["topk_idx"], 4)
    out = dispatcher.combine(rows * 2, case["weights"], handle)
    out.sum().backward()
    expected = 2 * case["weights"].sum(1, keepdim=True).expand(-1, 6)
    return rows.requires_grad, tokens.grad is not None and torch.allclose(tokens.grad, expected)


def test_a_rank_without_gradients_still_takes_part_in_the_backward() -> None:
    assert run_ranks(run_with_one_rank_frozen, 2) == [(True, False), (True, True)]


def run_without_token_gradients(rank: int, num_ranks: int, grad_mode: bool) -> tuple[bool, bool]:
    case = make_case([3, 4], 4)[rank]
    dispatcher = AllToAllDispatcher(world())
    with torch.set_grad_enabled(grad_mode):
        rows, handle = dispatcher.dispatch(case["tokens"], case["topk_idx"], 4)
        out = dispatcher.combine(rows, case["weights"], handle)
    return rows.requires_grad, out.requires_grad


def test_rows_need_a_gradient_only_where_some_token_does() -> None:
    assert run_ranks(run_without_token_gradients, 2, True) == [(False, True)] * 2
    assert run_ranks(run_without_token_gradients, 2, False) == [(False, False)] * 2


def error_of_a_bad_call(rank: int, num_ranks: int, kind: str) -> str:
    case = make_case([3, 4], 4)[rank]
    if kind == "idx" and rank == 1:
        case["topk_idx"][2, 1] = 4
    with torch.set_grad_enabled(kind != "grad mode" or rank == 0):
        try:
            AllToAllDispatcher(world()).dispatch(case["tokens"], case["topk_idx"], 4)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("idx", "topk_idx of EP rank 1 has 1 entries outside [0, 4). Nothing was dispatched."),
        ("grad mode", "grad mode differs between the EP ranks ([True, False] by rank)."),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(kind: str, message: str) -> None:
    for error in run_ranks(error_of_a_bad_call, 2, kind):
        assert error.startswith(message)


def test_one_rank_needs_no_process_group() -> None:
    case = make_case([5], 4)[0]
    dispatcher = AllToAllDispatcher()
    counts: list[list[int]] = []
    rows, handle = dispatcher.dispatch(case["tokens"], case["topk_idx"], 4, on_counts=counts.append)
    experts = make_experts(4)
    out = dispatcher.combine(apply_experts(rows, handle.counts, experts), case["weights"], handle)
    torch.testing.assert_close(out, dense_reference(case, experts))
    assert counts == [torch.bincount(case["topk_idx"].flatten(), minlength=4).tolist()]


def run_subgroups(rank: int, num_ranks: int) -> tuple[int, int, str]:
    mine, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    other = dist.new_group([0, 1])
    dispatcher = AllToAllDispatcher(mine)
    try:
        AllToAllDispatcher(other)
    except ValueError as error:
        return dispatcher.ep_rank, dispatcher.ep_size, str(error)
    return dispatcher.ep_rank, dispatcher.ep_size, ""


def test_ranks_count_inside_the_group() -> None:
    results = run_ranks(run_subgroups, 4)
    assert [result[:2] for result in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert results[0][2] == ""
    assert results[3][2] == "rank 3 is not in the EP group it was given."


def test_shapes_that_do_not_fit_are_refused() -> None:
    dispatcher = AllToAllDispatcher()
    topk_idx = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tokens are \[2, 4\], expected \[3, hidden\]"):
        dispatcher.dispatch(torch.zeros(2, 4), topk_idx, 2)
    with pytest.raises(ValueError, match="num_experts is 0, expected a multiple"):
        dispatcher.dispatch(torch.zeros(3, 4), topk_idx, 0)
    _, handle = dispatcher.dispatch(torch.zeros(3, 4), topk_idx, 2)
    with pytest.raises(ValueError, match=r"rows are \[4, 4\], expected \[3, hidden\] as dispatch"):
        dispatcher.combine(torch.zeros(4, 4), torch.ones(3, 1), handle)
