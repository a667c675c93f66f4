"""DeepEPDispatcher on the stand-in for deep_ep, and on the real one where there are GPUs."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepep_cases import (
    HIDDEN,
    MOST_TOKENS,
    Kit,
    Runs,
    dense_reference,
    forget_deep_ep,
    make_arms,
    make_case,
    make_scales,
    named,
    refusal_of,
)
from torch import Tensor

from feplb.dispatch import AllToAllDispatcher, DeepEPDispatcher, deepep

NUM_EXPERTS = 8
# Tokens per rank: some ranks have none; nobody has any; only the last has some. Cut to the ranks.
NUM_TOKENS = ([7, 3, 0, 9], [0, 9, 5, 2], [0, 0, 0, 0], [0, 4, 0, 4])


def apply_scales(rows: Tensor, counts: tuple[int, ...], scales: Tensor) -> Tensor:
    repeats = torch.tensor(counts, device=rows.device)
    return rows * scales.repeat_interleave(repeats, dim=0).to(rows.dtype)


# ------------------------------------------------------------------------------ hand-computed

# The worked example of permute.py and deepep.py: tokens a b c | d e, 2 ranks x 2 experts.
EXAMPLE_IDX = [[[0, 2], [3, 0], [1, 2]], [[2, 0], [0, 1]]]
EXAMPLE_TOKENS = [[1.0, 2.0, 3.0], [4.0, 5.0]]
EXAMPLE_WEIGHTS = [[[1.0, 0.5], [0.5, 1.0], [1.0, 2.0]], [[1.0, 1.0], [0.25, 1.0]]]


def worked_example(kit: Kit) -> dict[str, Any]:
    """Expert e multiplies by e + 1."""
    if kit.num_ranks != 2:
        return {}
    tokens = torch.tensor(EXAMPLE_TOKENS[kit.rank])[:, None].expand(-1, HIDDEN).bfloat16()
    weights = torch.tensor(EXAMPLE_WEIGHTS[kit.rank], device=kit.device)
    dispatcher, seen = kit.dispatcher(), list[list[int]]()
    rows, handle = dispatcher.dispatch(
        tokens.to(kit.device), torch.tensor(EXAMPLE_IDX[kit.rank], device=kit.device), 4,
        topk_weights=weights, on_counts=seen.append,
    )  # fmt: skip
    scales = torch.tensor([2.0 * kit.rank + 1, 2.0 * kit.rank + 2], device=kit.device)[:, None]
    out = dispatcher.combine(apply_scales(rows, handle.counts, scales), weights, handle)
    return {"rows": rows[:, -1].tolist(), "counts": seen, "out": out[:, -1].tolist()}


def rows_against_all_to_all(kit: Kit) -> tuple[bool, bool, bool]:
    """(rows are those of AllToAllDispatcher, in its order; counts too; foreign weights are 0)."""
    case = make_case(NUM_TOKENS[0][: kit.num_ranks], rank=kit.rank, masked=False)
    tokens, idx = case.tokens.bfloat16().to(kit.device), case.topk_idx.to(kit.device)
    weights = case.topk_weights.to(kit.device)
    rows, handle = kit.dispatcher().dispatch(tokens, idx, NUM_EXPERTS, topk_weights=weights)
    expected, known = AllToAllDispatcher(kit.group).dispatch(tokens, idx, NUM_EXPERTS)
    foreign_weights = handle.recv_weights[handle.row_of_pair < 0]
    all_zero = not foreign_weights.any()
    return torch.equal(rows, expected), handle.counts == known.counts, all_zero


# ---------------------------------------------------------------- against all experts in one place


def run_case(kit: Kit, num_tokens: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    case = make_case(num_tokens, rank=kit.rank)
    tokens = case.tokens.to(kit.device, dtype).requires_grad_()
    weights = case.topk_weights.to(kit.device).requires_grad_()
    scales = make_scales().chunk(kit.num_ranks)[kit.rank].to(kit.device).clone().requires_grad_()
    dispatcher = kit.dispatcher()
    rows, handle = dispatcher.dispatch(
        tokens, case.topk_idx.to(kit.device), NUM_EXPERTS, topk_weights=weights
    )
    out = dispatcher.combine(apply_scales(rows, handle.counts, scales), weights, handle)
    out.backward(case.grad.to(kit.device, dtype))
    leaves = {"tokens": tokens, "weights": weights, "scales": scales}
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return {"out": out.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


def differences_from_dense(kit: Kit) -> list[str]:
    """Bits that differ from one process that has all experts: sums are exact in every dtype."""
    wrong = []
    for all_tokens in NUM_TOKENS:
        num_tokens = all_tokens[: kit.num_ranks]
        cases = [make_case(num_tokens, rank=rank) for rank in range(kit.num_ranks)]
        references = [dense_reference(case, make_scales()) for case in cases]
        expected = references[kit.rank]
        of_all = torch.stack([reference["scales"] for reference in references]).sum(0)
        expected["scales"] = of_all.chunk(kit.num_ranks)[kit.rank]
        for dtype in kit.dtypes:
            got = run_case(kit, num_tokens, dtype)
            wrong += [
                f"{name} with {num_tokens} tokens in {dtype}"
                for name, tensor in expected.items()
                if name not in got or not torch.equal(got[name].double().cpu(), tensor)
            ]
    return wrong


# ------------------------------------------------------------------------------- gradients, modes


def one_rank_frozen(kit: Kit) -> tuple[bool, bool]:
    """Rank 0's tokens and weights need no gradient, the others' do, and no expert does."""
    case = make_case([4] * kit.num_ranks, rank=kit.rank)
    tokens = case.tokens.bfloat16().to(kit.device).requires_grad_(kit.rank > 0)
    weights = case.topk_weights.to(kit.device).requires_grad_(kit.rank > 0)
    idx, dispatcher = case.topk_idx.to(kit.device), kit.dispatcher()
    rows, handle = dispatcher.dispatch(tokens, idx, NUM_EXPERTS, topk_weights=weights)
    dispatcher.combine(rows * 2, weights, handle).sum().backward()
    expected = 2 * (case.topk_weights * (case.topk_idx >= 0)).sum(1, keepdim=True)
    grad = tokens.grad
    right = grad is not None and bool((grad.cpu() == expected).all())
    return rows.requires_grad, right


def needs_grad_without_graph(kit: Kit) -> tuple[bool, bool]:
    case = make_case([4] * kit.num_ranks, rank=kit.rank)
    tokens = case.tokens.bfloat16().to(kit.device).requires_grad_()
    weights, idx = case.topk_weights.to(kit.device), case.topk_idx.to(kit.device)
    dispatcher = kit.dispatcher()
    with torch.no_grad():
        rows, handle = dispatcher.dispatch(tokens, idx, NUM_EXPERTS, topk_weights=weights)
        out = dispatcher.combine(rows, weights, handle)
    return rows.requires_grad, out.requires_grad


# ------------------------------------------------------------------- buffers, refusals, choices


def sharing(kit: Kit) -> dict[str, bool]:
    """Which dispatchers share which buffers, and when these are made."""
    dispatchers = [kit.dispatcher(), kit.dispatcher()]
    buffers: Any = dispatchers[0]._buffers
    found = {"shared": dispatchers[1]._buffers is buffers, "lazy": buffers._buffer is None}
    made = []
    for hidden in (256, 256, 512, 256):
        dispatchers[0].dispatch(
            torch.ones(2, hidden, device=kit.device).bfloat16(),
            torch.tensor([[0], [NUM_EXPERTS - 1]], device=kit.device),
            NUM_EXPERTS,
            topk_weights=torch.ones(2, 1, device=kit.device),
        )
        made.append(buffers._buffer)
    found |= {
        "kept": made[0] is made[1],
        "grown": made[1] is not made[2],
        "wide": made[2] is made[3],
    }
    alive = weakref.ref(buffers)
    del buffers
    dispatchers.clear()
    gc.collect()
    return {**found, "freed": alive() is None}


def refusals(kit: Kit) -> dict[str, str]:
    """The sentences of calls that must not reach DeepEP; none of them is collective."""
    dispatcher = kit.dispatcher()
    good: dict[str, Any] = {"tokens": torch.ones(2, HIDDEN, device=kit.device).bfloat16()}
    good["topk_idx"] = torch.tensor([[0, 1], [2, -1]], device=kit.device)
    good["topk_weights"] = torch.ones(2, 2, device=kit.device)
    wide = torch.zeros(2, 33, dtype=torch.int64, device=kit.device)
    many = torch.ones(MOST_TOKENS + 1, HIDDEN, device=kit.device).bfloat16()
    idx_of_many = torch.zeros(MOST_TOKENS + 1, 2, dtype=torch.int64, device=kit.device)
    idx_of_many[:, 1] = 1
    changes: dict[str, dict[str, Any]] = {
        "dtype": {"tokens": good["tokens"].double()},
        "hidden": {"tokens": good["tokens"][:, : HIDDEN - 4].contiguous()},
        "multiple": {"tokens": good["tokens"][:, :24].contiguous()},
        "length": {"tokens": good["tokens"][:1]},
        "idx": {"topk_idx": good["topk_idx"].int()},
        "weights": {"topk_weights": good["topk_weights"].double()},
        "range": {"topk_idx": good["topk_idx"] + 7},
        "double": {"topk_idx": torch.ones_like(good["topk_idx"])},
        "top_k": {"topk_idx": wide, "topk_weights": wide.float()},
        "experts": {"num_experts": NUM_EXPERTS + 1},
        "many": {"tokens": many, "topk_idx": idx_of_many, "topk_weights": idx_of_many.float()},
        "device": {"tokens": good["tokens"].to("meta")},
    }
    seen = {}
    for name, change in changes.items():
        if name == "many" and kit.arm.api == "v1":
            continue
        arguments = {"num_experts": NUM_EXPERTS, **good, **change}
        seen[name] = refusal_of(functools.partial(dispatcher.dispatch, **arguments))
    torch.use_deterministic_algorithms(True)
    call = functools.partial(dispatcher.dispatch, num_experts=NUM_EXPERTS, **good)
    seen["filling"] = refusal_of(call)
    torch.use_deterministic_algorithms(False)
    seen["width"] = refusal_of(lambda: dispatcher.check_layer(8192, torch.bfloat16, NUM_EXPERTS, 2))
    return seen


def refusals_of_a_combine(kit: Kit) -> list[str]:
    tokens = torch.ones(2, HIDDEN, device=kit.device).bfloat16()
    idx, weights = torch.tensor([[0, 1], [2, 3]]).to(kit.device), torch.ones(2, 2).to(kit.device)
    dispatcher = kit.dispatcher()
    rows, handle = dispatcher.dispatch(tokens, idx, NUM_EXPERTS, topk_weights=weights)
    return [
        refusal_of(lambda: dispatcher.combine(rows, weights.clone(), handle)),
        refusal_of(lambda: dispatcher.combine(torch.cat([rows, tokens]), weights, handle)),
        refusal_of(lambda: dispatcher.combine(rows.double(), weights, handle)),
    ]


def looks_at_choices(kit: Kit) -> list[int]:
    """How often the choices have been read by the host after a dispatch with and one without."""
    tokens = torch.ones(2, HIDDEN, device=kit.device).bfloat16()
    idx, weights = torch.tensor([[0, 1], [2, 3]]).to(kit.device), torch.ones(2, 2).to(kit.device)
    seen, check = list[int](), deepep._check_choices
    num_looks = 0

    def counting(*args: Any) -> None:
        nonlocal num_looks
        num_looks += 1
        check(*args)

    deepep._check_choices = counting  # type: ignore[assignment]
    for check_choices in (True, False):
        dispatcher = kit.dispatcher(check_choices=check_choices)
        dispatcher.dispatch(tokens, idx, NUM_EXPERTS, topk_weights=weights)
        seen.append(num_looks)
    deepep._check_choices = check
    return seen


def choices_of_api(kit: Kit) -> dict[str, str]:
    def built(**options: Any) -> str:
        made: list[Any] = []
        refusal = refusal_of(lambda: made.append(DeepEPDispatcher(kit.group, **options)))
        return type(made[0]._buffers).__name__ if made else refusal

    seen = {
        "auto": built(),
        "auto sized": built(num_max_tokens_per_rank=MOST_TOKENS),
        "v2": built(api="v2", num_max_tokens_per_rank=MOST_TOKENS),
        "v2 unsized": built(api="v2"),
        "v3": built(api="v3"),
    }
    hidden = forget_deep_ep()
    seen["missing"] = built()
    sys.modules.update(hidden)
    return seen


def a_group_of_three(kit: Kit) -> str:
    if kit.num_ranks < 4:
        return ""
    three = dist.new_group([0, 1, 2])
    return refusal_of(lambda: DeepEPDispatcher(three, api="v1"))


PROGRAMS = named(
    worked_example, rows_against_all_to_all, differences_from_dense, one_rank_frozen,
    needs_grad_without_graph, sharing, refusals, refusals_of_a_combine, looks_at_choices,
    choices_of_api, a_group_of_three,
)  # fmt: skip


@pytest.fixture(scope="module", params=make_arms())
def runs(request: pytest.FixtureRequest) -> Runs:
    return Runs(request.param, PROGRAMS)


def test_worked_example_on_two_ranks(runs: Runs) -> None:
    if runs.arm.num_ranks != 2:
        pytest.skip("an example of two ranks")
    first, second = runs.of(worked_example)
    assert first["rows"] == [1, 2, 4, 5, 3, 5]  # a b d e | c e
    assert second["rows"] == [1, 3, 4, 2]  # a c d | b
    assert (first["counts"], second["counts"]) == ([[4, 2]], [[3, 1]])
    assert first["out"] == [1 + 3 / 2, 8 / 2 + 2, 6 + 2 * 9]
    assert second["out"] == [12 + 4, 5 / 4 + 10]


def test_rows_are_those_of_all_to_all_in_its_order(runs: Runs) -> None:
    assert runs.of(rows_against_all_to_all) == [(True, True, True)] * runs.arm.num_ranks


def test_forward_and_gradients_equal_all_experts_in_one_place(runs: Runs) -> None:
    assert runs.of(differences_from_dense) == [[]] * runs.arm.num_ranks


def test_a_rank_without_gradients_still_takes_part_in_the_backward(runs: Runs) -> None:
    others = [(True, True)] * (runs.arm.num_ranks - 1)
    assert runs.of(one_rank_frozen) == [(True, False), *others]


def test_no_gradient_mode_leaves_nothing_behind(runs: Runs) -> None:
    assert runs.of(needs_grad_without_graph) == [(False, False)] * runs.arm.num_ranks


def test_a_group_has_one_buffer_made_when_needed_and_grown_for_wider_rows(runs: Runs) -> None:
    for found in runs.of(sharing):
        assert all(found.values()), found


SENTENCES = {
    "dtype": "tokens are torch.float64, expected torch.bfloat16",
    "hidden": "a token of hidden=252 torch.bfloat16 has 504 bytes, expected a multiple of 16",
    "multiple": "expected a multiple of",
    "length": "tokens are [1, 256], expected [2, hidden] as topk_idx",
    "idx": "topk_idx is [2, 2] torch.int32, expected [num_tokens, top_k] torch.int64",
    "weights": "topk_weights are [2, 2] torch.float64, expected [2, 2] torch.float32",
    "range": "topk_idx has 2 entries outside [-1, 8). Nothing was dispatched.",
    "double": "topk_idx has 2 tokens that choose an expert twice",
    "top_k": "top_k is 33, expected 32 at most",
    "experts": "num_experts is 9, expected a multiple of the EP group's",
    "many": "65 tokens are dispatched, expected num_max_tokens_per_rank=64 at most",
    "device": "tokens are on meta, expected",
    "width": "16352 at most for DeepEP V1 built for SM90",
    "filling": "torch.utils.deterministic.fill_uninitialized_memory = False",
}


def test_what_deepep_cannot_take_is_refused_with_a_sentence(runs: Runs) -> None:
    allowed = "many" if runs.arm.api == "v1" else "width"
    for seen in runs.of(refusals):
        assert seen.keys() | {"many"} == SENTENCES.keys()
        for name in SENTENCES.keys() - {allowed}:
            assert seen[name].startswith("ValueError: "), name
            assert SENTENCES[name] in seen[name]
        assert seen.get(allowed, "nothing") == "nothing"


def test_a_combine_takes_the_weights_and_rows_of_its_dispatch(runs: Runs) -> None:
    for weights, rows, dtype in runs.of(refusals_of_a_combine):
        assert "topk_weights are not the tensor that dispatch was given" in weights
        assert "hidden] as dispatched" in rows
        assert "rows are torch.float64, expected torch.bfloat16" in dtype


def test_choices_are_looked_at_unless_they_are_known_to_be_good(runs: Runs) -> None:
    assert runs.of(looks_at_choices) == [[1, 1]] * runs.arm.num_ranks


def test_products_of_rows_do_not_depend_on_how_many_there_are() -> None:
    rows = torch.randn(2 * deepep._ROWS_AT_ONCE + 3, 16, generator=torch.Generator().manual_seed(1))
    dots = deepep._dot_rows(rows.bfloat16(), rows.bfloat16())
    one_by_one = [deepep._dot_rows(row[None], row[None]) for row in rows.bfloat16()[-5:]]
    assert dots.shape == (len(rows),)
    assert torch.equal(dots[-5:], torch.cat(one_by_one))


def test_the_api_is_chosen_by_name_or_by_what_is_known(runs: Runs) -> None:
    has_v2 = runs.arm.api == "v2" or runs.arm.is_real
    for seen in runs.of(choices_of_api):
        assert seen["auto"] == "BufferV1"
        assert seen["auto sized"] == ("BufferV2" if has_v2 else "BufferV1")
        assert has_v2 or "RuntimeError: deep_ep has no ElasticBuffer (V2)." in seen["v2"]
        assert "num_max_tokens_per_rank is None, expected" in seen["v2 unsized"]
        assert "api is 'v3', expected one of auto, v1, v2." in seen["v3"]
        assert "RuntimeError: deep_ep cannot be imported (ModuleNotFoundError" in seen["missing"]


def test_a_group_size_without_kernels_is_refused(runs: Runs) -> None:
    for rank, seen in enumerate(runs.of(a_group_of_three)):
        if runs.arm.num_ranks == 4 and rank < 3:
            assert "the EP group has 3 ranks, for which DeepEP V1 has no kernels" in seen
