"""compute.py: gradients against plain autograd, and the bits that make moving an expert invisible.

"Owner" computes experts 0..2 of a micro-batch in one call; "helper" computes one of them from
copies at other addresses. What must not be read or written is poisoned with NaN.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from properties import given, settings, st
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from feplb import as_compute
from feplb.compute import ExpertCompute, Saved, Segment, SwiGLU

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def swiglu(rows: Tensor, row_data: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    gate, up = linear(rows, weights[0]).chunk(2, dim=-1)
    act = silu(gate) * up
    if row_data:
        act = (act * row_data[0].view(-1, 1)).to(rows.dtype)
    return linear(act, weights[1])


COMPUTES = {"SwiGLU": SwiGLU(), "as_compute": as_compute(swiglu)}


def nan_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full_like(t, float("nan")) for t in tensors]


def place(tensor: Tensor, address: int) -> Tensor:
    """A contiguous copy whose address is ``address`` modulo 4096, with NaN around it."""
    size = tensor.element_size()
    arena = torch.full((tensor.numel() + 2 * 4096 // size,), float("nan"), dtype=tensor.dtype)
    first = ((address - arena.data_ptr()) % 4096) // size
    copy = arena[first : first + tensor.numel()].view(tensor.shape)
    assert copy.numel() == 0 or copy.data_ptr() % 4096 == address
    return copy.copy_(tensor)


@dataclass
class Case:
    """Inputs of one call, and buffers for its results, all NaN before it runs."""

    rows: Tensor
    row_data: tuple[Tensor, ...]
    segments: list[Segment]
    weights: list[Tensor]
    grad_out: Tensor
    out: Tensor = field(init=False)
    grad_rows: Tensor = field(init=False)
    grad_row_data: list[Tensor] = field(init=False)
    grad_weights: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.out, self.grad_rows = nan_like([self.grad_out, self.rows])
        self.grad_row_data, self.grad_weights = nan_like(self.row_data), nan_like(self.weights)

    def forward(self, compute: ExpertCompute, *, save: bool = True) -> Saved:
        return compute.forward(
            self.rows, self.row_data, self.segments, self.weights, out=self.out, save=save
        )

    def backward(self, compute: ExpertCompute, saved: Saved) -> None:
        carry = compute.backward_rows(
            self.grad_out,
            self.rows,
            self.row_data,
            self.segments,
            self.weights,
            saved,
            grad_rows=self.grad_rows,
            grad_row_data=self.grad_row_data,
        )
        compute.backward_weights(
            self.grad_out,
            self.rows,
            self.row_data,
            self.segments,
            saved,
            carry,
            grad_weights=self.grad_weights,
        )

    def run(self, compute: ExpertCompute) -> Case:
        self.backward(compute, self.forward(compute))
        return self

    def results(self) -> list[Tensor]:
        return [self.out, self.grad_rows, *self.grad_row_data, *self.grad_weights]

    def inputs(self) -> list[Tensor]:
        return [self.rows, *self.row_data, *self.weights, self.grad_out]

    def copied(self) -> Case:
        """The same call with every input somewhere else."""
        clone = [t.clone() for t in self.row_data]
        return replace(
            self,
            rows=self.rows.clone(),
            row_data=tuple(clone),
            weights=[w.clone() for w in self.weights],
            grad_out=self.grad_out.clone(),
        )

    def destroy_inputs(self) -> None:
        for tensor in self.inputs():
            tensor.fill_(float("nan"))


def make_case(
    segments: list[Segment] | None = None,
    *,
    hidden: int = 12,
    width: int = 20,
    num_rows: int = 9,
    num_experts: int = 3,
    dtype: torch.dtype = torch.float64,
    probs: bool = True,
    seed: int = 0,
) -> Case:
    """Rows in no segment are NaN: to read a hole is to fail."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    segments = [(0, 4, 0), (6, 9, 2)] if segments is None else segments
    case = Case(
        rows=draw(num_rows, hidden),
        row_data=(draw(num_rows).abs(),) if probs else (),
        segments=segments,
        weights=[
            draw(num_experts, 2 * width, hidden) / hidden**0.5,
            draw(num_experts, hidden, width) / width**0.5,
        ],
        grad_out=draw(num_rows, hidden),
    )
    for tensor in (case.rows, *case.row_data, case.grad_out):
        tensor[holes(case)] = float("nan")
    return case


def holes(case: Case) -> Tensor:
    is_hole = torch.ones(case.rows.shape[0], dtype=torch.bool)
    for start, end, _ in case.segments:
        is_hole[start:end] = False
    return is_hole


def plain(case: Case) -> list[Tensor]:
    """out and all gradients of ``case`` by ordinary autograd, zero in holes and unnamed experts."""
    rows, *rest = [t.detach().clone().requires_grad_() for t in case.inputs()[:-1]]
    row_data, weights = rest[: len(case.row_data)], rest[len(case.row_data) :]
    out = torch.zeros_like(case.out)
    for start, end, idx in case.segments:
        data = [d[start:end] for d in row_data]
        out[start:end] = swiglu(rows[start:end], data, [w[idx] for w in weights])
    grads = torch.autograd.grad(out, [rows, *rest], case.grad_out.nan_to_num(), allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def assert_same_bits(seen: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(seen) == len(expected)
    for i, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert a.shape == b.shape, f"result {i}"
        assert a.dtype == b.dtype, f"result {i}"
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        same = a.contiguous().view(as_int) == b.contiguous().view(as_int)
        assert same.all(), f"result {i}: {int((~same).sum())} of {same.numel()} differ"


# ---- gradients


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
@pytest.mark.parametrize("probs", [False, True])
def test_results_equal_plain_autograd_within_rounding(compute: ExpertCompute, probs: bool) -> None:
    segments = [(0, 4, 0), (6, 90, 2), (93, 94, 1), (94, 101, 0)]
    case = make_case(segments, num_rows=101, probs=probs).run(compute)
    # Every result is a chain of at most three dot products, no longer than H, 2F and n, and eight
    # elementwise operations. Rounding moves each by its length times eps, times the result on
    # absolute values; silu's condition number is below 1 + |g|, and |g| < 7 here.
    lengths = 12 + 40 + 101 + 8
    bounds = plain(absolute(case))
    for seen, expected, bound in zip(case.results(), plain(case), bounds, strict=True):
        tolerance = lengths * 2**-52 * 8 * float(bound.max())
        assert float((seen.nan_to_num() - expected).abs().max()) <= tolerance


def absolute(case: Case) -> Case:
    rows, *data = [t.abs() for t in (case.rows, *case.row_data)]
    weights = [w.abs() for w in case.weights]
    return Case(rows, tuple(data), case.segments, weights, case.grad_out.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_autograd(dtype: torch.dtype) -> None:
    case = make_case([(0, 64, 0)], num_rows=64, num_experts=1, dtype=dtype).run(SwiGLU())
    wide = [t.double() for t in case.inputs()]
    exact = plain(Case(wide[0], (wide[1],), case.segments, wide[2:4], wide[4]))
    for seen, same_dtype, reference in zip(case.results(), plain(case), exact, strict=True):
        theirs = float((same_dtype.double() - reference).abs().max())
        assert float((seen.double() - reference).abs().max()) <= 2 * theirs


def test_gradients_pass_gradcheck_when_used_as_an_autograd_function() -> None:
    case = make_case(num_rows=9)
    for tensor in (case.rows, *case.row_data):
        tensor[holes(case)] = 0.5
    inputs = [t.requires_grad_() for t in case.inputs()[:-1]]
    assert torch.autograd.gradcheck(lambda *t: Experts.apply(SwiGLU(), case, *t), inputs)


@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_probabilities_may_be_fp32_beside_bf16_rows(shape: tuple[int, ...]) -> None:
    case = make_case(dtype=torch.bfloat16)
    probs = case.row_data[0].float().view(shape)
    case = replace(case, row_data=(probs,)).run(SwiGLU())
    (seen,) = case.grad_row_data
    expected = plain(case)[2]
    assert seen.shape == shape
    assert seen.dtype == torch.float32
    # fp32 sums of the same bf16 products; only the order of F = 20 additions may differ.
    bound = 20 * 2**-23 * float(expected.abs().max()) * 20
    assert float((seen.nan_to_num() - expected).abs().max()) <= bound


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_unwanted_gradients_are_left_out(compute: ExpertCompute) -> None:
    full, case = make_case().run(compute), make_case()
    saved = case.forward(compute)
    args = case.grad_out, case.rows, case.row_data, case.segments
    carry = compute.backward_rows(
        *args, case.weights, saved, grad_rows=case.grad_rows, grad_row_data=[None]
    )
    compute.backward_weights(*args, saved, carry, grad_weights=[None, case.grad_weights[1]])
    assert_same_bits([case.grad_rows], [full.grad_rows])
    assert_same_bits(case.grad_weights[1:], full.grad_weights[1:])
    assert case.grad_weights[0].isnan().all()


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_grad_weights_may_be_wider_than_the_rows(compute: ExpertCompute) -> None:
    narrow = make_case(dtype=torch.bfloat16, probs=False).run(compute)
    case = make_case(dtype=torch.bfloat16, probs=False)
    case.grad_weights = [w.float() for w in case.grad_weights]
    case.run(compute)
    assert_same_bits(case.grad_weights, [w.float() for w in narrow.grad_weights])


# ---- segments


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_holes_and_unnamed_experts_are_neither_read_nor_written(compute: ExpertCompute) -> None:
    case = make_case([(0, 4, 0), (6, 9, 2)])
    for weight in case.weights:
        weight[1] = float("nan")
    case.run(compute)
    for result in (case.out, case.grad_rows, *case.grad_row_data):
        assert result[4:6].isnan().all()
        assert not result[:4].isnan().any()
        assert not result[6:].isnan().any()
    for result in case.grad_weights:
        assert [bool(result[i].isnan().all()) for i in range(3)] == [False, True, False]
        assert not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_segments_of_one_expert_are_summed_in_their_order(compute: ExpertCompute) -> None:
    segments = [(6, 9, 1), (0, 4, 1), (4, 5, 1)]
    together = make_case(segments, dtype=torch.float32).run(compute)
    alone = [make_case(segments, dtype=torch.float32) for _ in segments]
    for case, segment in zip(alone, segments, strict=True):
        case.segments = [segment]
        case.run(compute)
    for t in range(2):
        first, second, third = (case.grad_weights[t][1] for case in alone)
        assert_same_bits([together.grad_weights[t][1]], [(first + second) + third])


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_empty_segments_give_zero_weight_grads_and_add_nothing(compute: ExpertCompute) -> None:
    case = make_case([(0, 0, 0), (0, 4, 1), (4, 4, 1), (4, 4, 2), (4, 9, 2)]).run(compute)
    without = make_case([(0, 4, 1), (4, 9, 2)]).run(compute)
    for seen, expected in zip(case.grad_weights, without.grad_weights, strict=True):
        assert_same_bits([seen[0]], [torch.zeros_like(seen[0])])
        assert_same_bits([seen[1:]], [expected[1:]])
    assert_same_bits([case.out], [without.out])


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
@pytest.mark.parametrize("segments", [[], [(0, 0, 1)]])
def test_no_rows_at_all(compute: ExpertCompute, segments: list[Segment]) -> None:
    case = make_case(segments, num_rows=0).run(compute)
    assert case.out.shape == (0, 12)
    for grad in case.grad_weights:
        assert bool((grad[1] == 0).all()) == bool(segments)


# ---- bits


@dataclass(frozen=True)
class Layout:
    """Shapes of a call, and where its tensors start, modulo 4096."""

    dtype: torch.dtype
    counts: list[int]
    hidden: int
    width: int
    first_row: int
    addresses: list[int]

    def case(self, seed: int) -> Case:
        starts = [self.first_row + sum(self.counts[:i]) for i in range(len(self.counts))]
        segments = [(s, s + n, i) for i, (s, n) in enumerate(zip(starts, self.counts, strict=True))]
        return make_case(
            segments,
            hidden=self.hidden,
            width=self.width,
            num_rows=self.first_row + sum(self.counts),
            num_experts=len(self.counts),
            dtype=self.dtype,
            seed=seed,
        )


COUNTS = st.one_of(st.integers(0, 9), st.integers(0, 300))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    dtype = draw(st.sampled_from(DTYPES))
    quantum = 16 // dtype.itemsize
    return Layout(
        dtype=dtype,
        counts=draw(st.lists(COUNTS, min_size=1, max_size=4)),
        hidden=quantum * draw(st.integers(1, 20)),
        width=quantum * draw(st.integers(1, 20)),
        first_row=draw(st.integers(0, 9)),
        addresses=[16 * a for a in draw(st.lists(st.integers(0, 255), min_size=5, max_size=5))],
    )


def helper_of(owner: Case, segment: Segment, layout: Layout) -> Case:
    """One expert of ``owner``, alone in buffers at other addresses; weights in slots of their own.

    Probabilities start at a multiple of their own size only, as they do in the owner's buffer.
    """
    start, end, idx = segment
    move = lambda t, i: place(t, layout.addresses[i])  # noqa: E731
    case = Case(
        rows=move(owner.rows[start:end], 0),
        row_data=tuple(move(t[start:end], 1) for t in owner.row_data),
        segments=[(0, end - start, 0)],
        weights=[move(w[idx : idx + 1], 2) for w in owner.weights],
        grad_out=move(owner.grad_out[start:end], 3),
    )
    case.out, case.grad_rows = move(case.out, 4), move(case.grad_rows, 2)
    case.grad_weights = [move(g, 1) for g in case.grad_weights]
    return case


def assert_helpers_reproduce_the_owner(compute: ExpertCompute, layout: Layout, seed: int) -> None:
    owner = layout.case(seed).run(compute)
    for start, end, idx in owner.segments:
        helper = helper_of(owner, (start, end, idx), layout).run(compute)
        rows = [owner.out, owner.grad_rows, *owner.grad_row_data]
        expected = [r[start:end] for r in rows] + [g[idx : idx + 1] for g in owner.grad_weights]
        assert_same_bits(helper.results(), expected)


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
@settings(max_examples=60, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 9))
def test_an_expert_has_the_same_bits_wherever_it_is_computed(
    compute: ExpertCompute, layout: Layout, seed: int
) -> None:
    assert_helpers_reproduce_the_owner(compute, layout, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [*range(1, 10), 31, 32, 33, 255, 300])
def test_odd_sizes_have_the_same_bits_wherever_they_are_computed(
    dtype: torch.dtype, num_rows: int
) -> None:
    # F = 20 and H = 12: rows of 16-byte multiples that are no multiple of a vector register.
    quantum = 16 // dtype.itemsize
    for first_row, address in [(0, 16), (1, 32), (3, 48), (5, 4080)]:
        layout = Layout(dtype, [3, num_rows, 1], 3 * quantum, 5 * quantum, first_row, [address] * 5)
        assert_helpers_reproduce_the_owner(SwiGLU(), layout, seed=first_row)


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_one_row_has_the_same_bits_with_two_threads(compute: ExpertCompute) -> None:
    # MKL shares the columns of a one-row product among threads by the address of the result.
    torch.set_num_threads(2)
    rng = random.Random(0)
    for seed in range(20):
        hidden, width = 4 * rng.randint(8, 60), 4 * rng.randint(8, 60)
        addresses = [16 * rng.randint(0, 255) for _ in range(5)]
        layout = Layout(torch.float32, [1, 1, 2], hidden, width, 0, addresses)
        assert_helpers_reproduce_the_owner(compute, layout, seed)


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_save_the_output_has_the_same_bits(compute: ExpertCompute, mode: type) -> None:
    trained, evaluated = make_case(dtype=torch.float32), make_case(dtype=torch.float32)
    trained.forward(compute)
    with mode():
        assert evaluated.forward(compute, save=False) == Saved(())
    assert_same_bits([evaluated.out], [trained.out])


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_weights_may_be_a_list_of_tensors(compute: ExpertCompute) -> None:
    stacked, listed = make_case().run(compute), make_case()
    listed.weights = [list(w.clone()) for w in listed.weights]  # type: ignore[misc]
    assert_same_bits(listed.run(compute).results(), stacked.results())


# ---- memory is overwritten between forward and backward


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_backward_reads_what_was_pushed_again_and_nothing_older(compute: ExpertCompute) -> None:
    expected, case = make_case().run(compute), make_case()
    pushed_again = case.copied()
    saved = case.forward(compute)
    case.destroy_inputs()
    pushed_again.out = case.out
    pushed_again.backward(compute, saved)
    assert_same_bits(pushed_again.results(), expected.results())


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_wgrad_does_not_read_the_weights(compute: ExpertCompute) -> None:
    expected, case = make_case().run(compute), make_case()
    saved = case.forward(compute)
    args = case.grad_out, case.rows, case.row_data, case.segments
    carry = compute.backward_rows(
        *args, case.weights, saved, grad_rows=case.grad_rows, grad_row_data=case.grad_row_data
    )
    for weight in case.weights:
        weight.fill_(float("nan"))
    compute.backward_weights(*args, saved, carry, grad_weights=case.grad_weights)
    assert_same_bits(case.results(), expected.results())


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_the_tensors_of_a_recompute_serve_the_first_state(compute: ExpertCompute) -> None:
    expected, case = make_case().run(compute), make_case()
    again = case.copied()
    first = case.forward(compute)
    for tensor in (*first.tensors, *case.inputs()):
        tensor.fill_(float("nan"))
    recomputed = again.forward(compute)
    again.backward(compute, Saved(recomputed.tensors, first.state))
    assert_same_bits(again.results(), expected.results())


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_backward_may_run_twice(compute: ExpertCompute) -> None:
    case = make_case()
    saved = case.forward(compute)
    case.backward(compute, saved)
    once = [t.clone() for t in case.results()]
    case.backward(compute, saved)
    assert_same_bits(case.results(), once)


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_saved_tensors_share_no_memory_with_inputs_and_skip_holes(compute: ExpertCompute) -> None:
    case = make_case([(0, 4, 0), (6, 9, 2)])
    saved = case.forward(compute)
    theirs = {t.untyped_storage().data_ptr() for t in (*case.inputs(), case.out)}
    assert saved.tensors
    for tensor in saved.tensors:
        assert tensor.untyped_storage().data_ptr() not in theirs
        assert tensor.grad_fn is None
        assert tensor.untyped_storage().nbytes() <= 7 * 2 * 20 * 8  # 7 rows of [2F] fp64


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_saved_keeps_no_input_alive(compute: ExpertCompute) -> None:
    case = make_case()
    arrays = [np.array(t.numpy()) for t in case.inputs()]  # a torch storage owns its array
    alive = [weakref.ref(a) for a in arrays]
    rows, probs, w1, w2, _ = (torch.from_numpy(a) for a in arrays)
    saved = compute.forward(rows, (probs,), case.segments, [w1, w2], out=case.out, save=True)
    del rows, probs, w1, w2, arrays, _
    assert [ref() for ref in alive] == [None] * 5
    assert saved.tensors


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_state_alone_keeps_no_saved_tensor_alive(compute: ExpertCompute) -> None:
    saved = make_case().forward(compute)
    state = saved.state
    alive = [weakref.ref(t.untyped_storage()) for t in saved.tensors]
    del saved
    assert [ref() for ref in alive] == [None] * len(alive)
    assert (state is None) == isinstance(compute, SwiGLU)


# ---- inside autograd, as two_phase.py uses it


class Experts(torch.autograd.Function):
    """A run_experts without moves: tensors through save_for_backward, state on the context."""

    @staticmethod
    def forward(ctx, compute, case, *inputs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN205
        rows, *rest = inputs
        num_data = len(case.row_data)
        out = torch.zeros_like(rows)
        saved = compute.forward(
            rows, rest[:num_data], case.segments, rest[num_data:], out=out, save=True
        )
        ctx.save_for_backward(*inputs, *saved.tensors)
        ctx.compute, ctx.case, ctx.state, ctx.num_inputs = compute, case, saved.state, len(inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        tensors = ctx.saved_tensors
        (rows, *rest), saved = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
        case = Case(
            rows,
            tuple(rest[: len(ctx.case.row_data)]),
            ctx.case.segments,
            list(rest[len(ctx.case.row_data) :]),
            grad_out.contiguous(),
        )
        for buffer in case.results():
            buffer.zero_()
        case.backward(ctx.compute, Saved(saved, ctx.state))
        return None, None, case.grad_rows, *case.grad_row_data, *case.grad_weights


def offloaded(fn, *args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN201
    with torch.autograd.graph.save_on_cpu():
        return fn(*args)


WRAPPERS = {
    "plain": lambda fn, *args: fn(*args),
    "checkpoint": lambda fn, *args: checkpoint(fn, *args, use_reentrant=False),
    "reentrant": lambda fn, *args: checkpoint(fn, *args, use_reentrant=True),
    "offload": offloaded,
}


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_works_inside_an_autograd_function(compute: ExpertCompute, wrap) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    case = make_case([(0, 4, 0), (4, 9, 2)], dtype=torch.float32)
    inputs = [t.clone().requires_grad_() for t in case.inputs()[:-1]]
    # sin() makes rows that exist only inside the checkpoint.
    out = wrap(lambda rows, *t: Experts.apply(compute, case, rows.sin(), *t), *inputs)
    out.backward(case.grad_out)
    case.rows = inputs[0].detach().sin()
    case.run(compute)
    cos = inputs[0].detach().cos()
    for grad in case.grad_weights:
        grad[1] = 0
    expected = [case.grad_rows * cos, *case.grad_row_data, *case.grad_weights]
    assert_same_bits([t.grad for t in inputs], expected)


def test_swiglu_ignores_autocast_and_as_compute_follows_it() -> None:
    case = make_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = make_case(dtype=torch.float32).run(SwiGLU())
        with pytest.raises(ValueError, match=r"fn returned \(4, 12\) torch.bfloat16, expected"):
            case.forward(as_compute(swiglu))
    assert_same_bits(under_autocast.results(), case.run(SwiGLU()).results())


# ---- functions for as_compute

# Each takes rows [n, H], no or one row_data [n], weights w1 [2F, H] and w2 [H, F].
FUNCTIONS = {
    "saves_its_output": lambda x, d, w: torch.sigmoid(x @ w[1] @ w[1].t()).exp(),
    "returns_its_input": lambda x, d, w: x,
    "returns_a_view_of_its_input": lambda x, d, w: x.flip(0).view_as(x),
    "in_place_on_an_intermediate": lambda x, d, w: (x @ w[1]).mul_(2).add_(1).relu_() @ w[1].t(),
    "in_place_after_an_op_that_saved_its_input": lambda x, d, w: silu(x * 2).mul_(d[0][:, None]),
    "saves_views_of_inputs": lambda x, d, w: x[:, 1:].prod(1, keepdim=True) * x * w[1].t()[3],
    "saves_an_expanded_input": lambda x, d, w: x * d[0].view(-1, 1).expand(-1, 12) * d[0].sum(),
    "saves_a_part_of_a_weight": lambda x, d, w: (x @ w[0][5:17].t()) * w[1].select(1, 2),
    "ignores_weights_and_data": lambda x, d, w: x.square(),
    "ignores_rows": lambda x, d, w: (w[1].sum(1) * d[0].view(-1, 1)).tanh(),
    "depends_on_nothing": lambda x, d, w: torch.ones(x.shape, dtype=x.dtype),
    "detaches": lambda x, d, w: (x @ w[1] @ w[1].t()).detach(),
    "uses_an_input_twice": lambda x, d, w: x * x * w[1].sum() + x @ w[1] @ w[1].t(),
    "saves_numbers_and_indices": lambda x, d, w: x.sort(dim=1).values * 3.5 + x.amax(1)[:, None],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_compute_gives_the_bits_of_plain_autograd(name: str) -> None:
    fn, case = FUNCTIONS[name], make_case([(0, 9, 1)], dtype=torch.float32)
    given_to_fn = [case.rows, *case.row_data, *(w[1] for w in case.weights)]
    rows, data, *weights = [t.clone().requires_grad_() for t in given_to_fn]
    out = fn(rows, (data,), tuple(weights))
    leaves = [rows, data, *weights]
    expected = [torch.zeros_like(t) for t in leaves]
    if out.requires_grad:
        grads = torch.autograd.grad(out, leaves, case.grad_out, allow_unused=True)
        expected = [e if g is None else g.clone() for e, g in zip(expected, grads, strict=True)]
    again = case.copied()
    saved = case.forward(as_compute(fn))
    case.destroy_inputs()
    again.backward(as_compute(fn), saved)
    seen = [again.grad_rows, *again.grad_row_data, *(g[1] for g in again.grad_weights)]
    assert_same_bits([case.out, *seen], [out.detach(), *expected])


def test_integer_row_data_reaches_fn_and_gets_zero_gradients() -> None:
    case = make_case([(0, 9, 0)], probs=False)
    case.row_data, case.grad_row_data = (torch.arange(9) % 5,), [torch.full((9,), -1)]
    case.run(as_compute(lambda x, d, w: x * w[0][d[0], 0][:, None]))
    picked = case.weights[0][0, torch.arange(9) % 5, 0]
    expected = [case.rows * picked[:, None], case.grad_out * picked[:, None]]
    assert_same_bits([case.out, case.grad_rows], expected)
    assert case.grad_row_data[0].tolist() == [0] * 9


def test_inputs_in_one_arena_are_told_apart() -> None:
    case = make_case([(0, 4, 0), (4, 9, 0)], num_experts=1)
    expected = make_case([(0, 4, 0), (4, 9, 0)], num_experts=1).run(as_compute(swiglu))
    arena = torch.empty(sum(t.numel() for t in case.inputs()), dtype=torch.float64)
    parts = arena.split([t.numel() for t in case.inputs()])
    moved = [p.view(t.shape).copy_(t) for p, t in zip(parts, case.inputs(), strict=True)]
    in_arena = Case(moved[0], (moved[1],), case.segments, moved[2:4], moved[4])
    saved = in_arena.forward(as_compute(swiglu))
    arena.fill_(float("nan"))
    case.out = in_arena.out
    case.backward(as_compute(swiglu), saved)
    assert_same_bits(case.results(), expected.results())


# ---- errors


def exp_in_place(x: Tensor, d: Sequence[Tensor], w: Sequence[Tensor]) -> Tensor:
    y = (x @ w[1]).exp()  # exp saves y for its backward
    return y.mul_(2) @ w[1].t()


WRONG_FUNCTIONS = {
    "input": (lambda x, d, w: x.mul_(2), "fn changed an input in place"),
    "view_of_input": (lambda x, d, w: x + w[0][0].add_(1), "fn changed an input in place"),
    "intermediate": (exp_in_place, "fn changed an intermediate that its own backward needs"),
    "shape": (lambda x, d, w: x @ w[1], r"returned \(3, 20\) torch.float64, expected \(3, 12\) t"),
    "dtype": (lambda x, d, w: x.float(), r"\(3, 12\) torch.float32, expected .* torch.float64"),
    "type": (lambda x, d, w: (x, x), r"fn returned tuple, expected \(3, 12\) torch.float64"),
}


@pytest.mark.parametrize(("fn", "message"), WRONG_FUNCTIONS.values(), ids=WRONG_FUNCTIONS.keys())
def test_a_wrong_function_is_refused_by_name_of_its_segment(fn, message: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    case = make_case([(0, 0, 0), (6, 9, 2)])
    where = r"as_compute\(fn\) \(segment 0, rows 6 to 8, weight index 2\): "
    with pytest.raises(ValueError, match=where + ".*" + message):
        case.forward(as_compute(fn))


def test_changing_an_input_is_refused_without_save_too() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="fn changed an input in place"):
        make_case().forward(as_compute(lambda x, d, w: x.mul_(2)), save=False)


def test_a_recompute_that_saved_another_number_of_tensors_is_refused() -> None:
    compute, case = as_compute(swiglu), make_case()
    saved = case.forward(compute)
    with pytest.raises(RuntimeError, match="number of saved tensors is 9, expected 10 as"):
        case.backward(compute, Saved(saved.tensors[:-1], saved.state))


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES.keys())
def test_other_segments_than_in_forward_are_refused(compute: ExpertCompute) -> None:
    case = make_case([(0, 4, 0), (6, 9, 2)])
    saved = case.forward(compute)
    case.segments = [(0, 4, 0), (6, 8, 2)]
    with pytest.raises(RuntimeError, match=r"expected (\(6, 40\)|\[\(0, 4, 0\), \(6, 9, 2\)\])"):
        case.backward(compute, saved)


def test_another_stride_than_in_forward_is_refused() -> None:
    compute, case = as_compute(swiglu), make_case()
    saved = case.forward(compute)
    case.weights = [w.mT.contiguous().mT for w in case.weights]
    with pytest.raises(RuntimeError, match="input strides are"):
        case.backward(compute, saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_data": (torch.ones(9),) * 2}, r"\(9,\) torch.float32, \(9,\) torch.float32, exp"),
        ({"row_data": (torch.ones(9, dtype=torch.int64),)}, r"row_data: \(9,\) torch.int64, expe"),
        ({"row_data": (torch.ones(9, 2),)}, r"row_data: \(9, 2\) torch.float32, expected nothing"),
        ({"weights": [torch.ones(3, 40, 12)] * 2}, r"index 0\): w1 \(40, 12\) .* = \(12, 12\)"),
        ({"weights": [torch.ones(3, 40, 12)]}, "1 tensors per expert, expected w1 and w2"),
        ({"rows": torch.ones(9, 12)}, r"\[H, F\] = \(12, 20\) in torch.float32"),
    ],
)
def test_swiglu_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    case = make_case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        case.forward(SwiGLU())
