"""Triton's gathers and sums against torch's, and permute.py carried by them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from kernel_cases import EXAMPLES, INTERPRETED, on_each_device, same_bits
from properties import given, settings, st
from torch import Tensor

from feplb.dispatch import permute as permute_module
from feplb.dispatch.permute import group_by_expert, order_tokens, permute, reorder, unpermute
from feplb.dispatch.row_operations import RowOperations, TorchRowOperations, row_operations
from feplb.kernels import permute as kernels

TRITON: RowOperations = kernels
TORCH = TorchRowOperations()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
sizes = given(
    num_tokens=st.integers(0, 9),
    top_k=st.integers(1, 4),
    hidden=st.sampled_from([1, 3, 8, 40, 2056]),
    dtype=st.sampled_from(DTYPES),
)


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def row_of_pair(num_tokens: int, top_k: int, device: str) -> Tensor:
    """A permutation of the rows, [T, k]."""
    rows = torch.randperm(num_tokens * top_k, generator=torch.Generator().manual_seed(3))
    return rows.view(num_tokens, top_k).to(device)


def assert_rounded_alike(seen: Tensor, expected: Tensor) -> None:
    """The same bits; in bf16 the interpreter cuts off where torch rounds."""
    if INTERPRETED and expected.dtype == torch.bfloat16:
        assert seen.dtype == expected.dtype
        off = (seen.double() - expected.double()).abs()
        assert bool((off <= 2**-7 * expected.double().abs()).all())
    else:
        assert same_bits(seen, expected)


@on_each_device
@settings(max_examples=EXAMPLES, deadline=None)
@sizes
def test_gathered_rows_are_copies(
    device: str, num_tokens: int, top_k: int, hidden: int, dtype: torch.dtype
) -> None:
    tokens = draw(num_tokens, hidden, dtype=dtype, device=device)
    source = row_of_pair(num_tokens, top_k, device).view(-1)
    seen = TRITON.gather_rows(tokens, source, top_k)
    assert same_bits(seen, TORCH.gather_rows(tokens, source, top_k))


@on_each_device
@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=EXAMPLES, deadline=None)
@sizes
def test_sums_have_the_bits_of_torch(
    device: str, weighted: bool, num_tokens: int, top_k: int, hidden: int, dtype: torch.dtype
) -> None:
    rows = draw(num_tokens * top_k, hidden, dtype=dtype, device=device)
    weights = draw(num_tokens, top_k, dtype=torch.float32, device=device, seed=1)
    pairs = row_of_pair(num_tokens, top_k, device)
    args = rows, pairs, weights if weighted else None
    assert_rounded_alike(TRITON.sum_choices(*args), TORCH.sum_choices(*args))


@on_each_device
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
@settings(max_examples=EXAMPLES, deadline=None)
@sizes
def test_gradients_of_sums_are_those_of_torch(
    device: str,
    wanted: tuple[bool, bool],
    num_tokens: int,
    top_k: int,
    hidden: int,
    dtype: torch.dtype,
) -> None:
    grad = draw(num_tokens, hidden, dtype=dtype, device=device, seed=2)
    rows = draw(num_tokens * top_k, hidden, dtype=dtype, device=device)
    weights = draw(num_tokens, top_k, dtype=torch.float32, device=device, seed=1)
    args = grad, rows, weights, row_of_pair(num_tokens, top_k, device)
    results = [
        way.spread_grads(*args, rows_wanted=wanted[0], weights_wanted=wanted[1])
        for way in (TRITON, TORCH)
    ]
    (seen_rows, seen_weights), (rows_expected, weights_expected) = results
    assert (seen_rows is not None, seen_weights is not None) == wanted
    if seen_rows is not None and rows_expected is not None:
        assert_rounded_alike(seen_rows, rows_expected)
    if seen_weights is not None and weights_expected is not None:
        # The same fp32 products (fp64 for fp64 rows), added in another order.
        eps = 2**-52 if dtype == torch.float64 else 2**-23
        products = grad.double().abs() @ rows.double().abs().t()
        bound = hidden * eps * float(products.max()) if products.numel() else 0.0
        rounded = 2**-23 * weights_expected.double().abs()
        assert seen_weights.dtype == torch.float32
        off = (seen_weights.double() - weights_expected.double()).abs()
        assert bool((off <= bound + rounded).all())


@on_each_device
def test_choices_without_a_row_add_nothing(device: str) -> None:
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], device=device)
    pairs = torch.tensor([[-1, 2], [0, 1], [-3, -1]], device=device)
    weights = torch.tensor([[7.0, 0.5], [1.0, 2.0], [7.0, 7.0]], device=device)
    sums = TRITON.sum_choices(rows, pairs, weights)
    assert sums.tolist() == [[2.0, 20.0], [5.0, 50.0], [0.0, 0.0]]
    grad = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], device=device)
    grad_rows, grad_weights = TRITON.spread_grads(
        grad, rows, weights, pairs, rows_wanted=True, weights_wanted=True
    )
    assert grad_rows is not None
    assert grad_weights is not None
    assert grad_rows.tolist() == [[0.0, 1.0], [0.0, 2.0], [0.5, 0.0]]
    assert grad_weights.tolist() == [[0.0, 4.0], [10.0, 20.0], [0.0, 0.0]]


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_in_other_company_has_the_same_bits(device: str, dtype: torch.dtype) -> None:
    rows = draw(30, 40, dtype=dtype, device=device)
    weights = draw(10, 3, dtype=torch.float32, device=device, seed=1)
    pairs = row_of_pair(10, 3, device)
    together = TRITON.sum_choices(rows, pairs, weights)
    alone = TRITON.sum_choices(rows, pairs[4:5], weights[4:5])
    assert same_bits(alone, together[4:5])


@on_each_device
def test_rows_that_are_not_contiguous_are_read_right(device: str) -> None:
    tokens = draw(8, 4, dtype=torch.float32, device=device).t()
    pairs = row_of_pair(2, 2, device)
    assert torch.equal(TRITON.gather_rows(tokens, pairs[0]), tokens[pairs[0]])
    expected = TORCH.sum_choices(tokens, pairs, None)
    assert same_bits(TRITON.sum_choices(tokens, pairs, None), expected)


# ---- permute.py


def layer(tokens: Tensor, weights: Tensor, topk_idx: Tensor, counts: Tensor) -> Tensor:
    order = order_tokens(topk_idx, 4)
    groups = group_by_expert(counts, topk_idx.numel())
    rows = reorder(permute(tokens, order), groups)
    return unpermute(reorder(rows.sin(), groups.reversed()), weights, order)


@on_each_device
def test_permute_py_has_the_same_results_by_either_way(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topk_idx = torch.tensor([[0, 2], [3, 0], [1, 2]], device=device)
    counts = torch.tensor([[2, 1], [2, 1]], device=device)
    tokens = draw(3, 3, dtype=torch.float64, device=device).requires_grad_()
    weights = draw(3, 2, dtype=torch.float64, device=device, seed=1).requires_grad_()
    results, used = [], []
    for way in (TORCH, TRITON):
        monkeypatch.setattr(
            permute_module, "row_operations", lambda rows, w=way: used.append(w) or w
        )
        out = layer(tokens, weights, topk_idx, counts)
        grads = torch.autograd.grad(out, [tokens, weights], torch.ones_like(out).expand_as(out))
        results.append([out, *grads])
    assert TRITON in used
    for torch_result, triton_result in zip(*results, strict=True):
        torch.testing.assert_close(triton_result, torch_result, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda *leaves: layer(*leaves, topk_idx, counts), [tokens, weights]
    )


def test_a_gpu_gets_triton_and_the_cpu_torch() -> None:
    assert isinstance(row_operations(torch.zeros(1)), TorchRowOperations)
    on_gpu = cast(Any, SimpleNamespace(is_cuda=True))
    assert row_operations(on_gpu) is TRITON
