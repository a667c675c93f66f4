"""TritonSwiGLU keeps the contract of ExpertCompute: results, holes, bits, memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from kernel_cases import (
    DTYPES,
    EXAMPLES,
    INTERPRETED,
    MOST_ROWS,
    on_each_device,
    same_bits,
    segment_lists,
    tiles_for,
)
from properties import given, settings, st
from test_compute import Case, absolute, make_case, plain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from feplb import gpu_compute
from feplb.compute import ExpertCompute, Segment, SwiGLU
from feplb.device_swiglu import DeviceSwiGLU
from feplb.gpu_compute import TritonSwiGLU
from feplb.kernels.grouped_gemm import TritonGemm
from feplb.kernels.products import GroupedGemm, Operand
from feplb.kernels.segment_tables import GradTable, RowTable
from feplb.kernels.stream_gemm import StreamGemm
from feplb.two_phase import run_experts_locally

HIDDEN, WIDTH = (24, 40) if INTERPRETED else (256, 128)
SEGMENTS: list[Segment] = [(0, 20, 0), (23, 24, 2), (24, 24, 1), (30, 57, 1)]
ways = pytest.mark.parametrize("way", ["triton", "streams"])


def compute_of(dtype: torch.dtype, way: str = "triton") -> TritonSwiGLU:
    tiles = tiles_for(dtype)
    return TritonSwiGLU(TritonGemm(tiles) if way == "triton" else StreamGemm(2, tiles.block_m))


def on_device(device: str, segments: list[Segment] | None = None, **kwargs: Any) -> Case:
    segments = SEGMENTS if segments is None else segments
    num_rows = max((end for _, end, _ in segments), default=0) + 2
    case = make_case(segments, **{"hidden": HIDDEN, "width": WIDTH, "num_rows": num_rows, **kwargs})
    return replace(
        case,
        rows=case.rows.to(device),
        row_data=tuple(data.to(device) for data in case.row_data),
        weights=[weight.to(device) for weight in case.weights],
        grad_out=case.grad_out.to(device),
    )


def assert_same_bits(seen: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert same_bits(a, b), f"result {i}"


# ---- results


@on_each_device
@ways
@pytest.mark.parametrize("probs", [False, True])
def test_fp32_results_are_those_of_plain_autograd(device: str, way: str, probs: bool) -> None:
    case = on_device(device, dtype=torch.float32, probs=probs).run(compute_of(torch.float32, way))
    # As in test_compute.py: the lengths of three dot products and eight operations.
    lengths = HIDDEN + 2 * WIDTH + len(case.rows) + 8
    bounds = plain(absolute(case))
    for seen, expected, bound in zip(case.results(), plain(case), bounds, strict=True):
        tolerance = lengths * 2**-23 * 8 * float(bound.max())
        assert float((seen.nan_to_num() - expected).abs().max()) <= tolerance


@on_each_device
@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_results_are_within_four_roundings(
    device: str, way: str, dtype: torch.dtype
) -> None:
    case = on_device(device, dtype=dtype).run(compute_of(dtype, way))
    wide = [t.double() for t in case.inputs()]
    exact = plain(Case(wide[0], (wide[1],), case.segments, wide[2:4], wide[4]))
    for seen, expected in zip(case.results(), exact, strict=True):
        off = float((seen.double().nan_to_num() - expected).abs().max())
        assert off <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())


@on_each_device
@pytest.mark.parametrize("shape", [(59,), (59, 1)])
def test_probabilities_may_be_fp32_beside_bf16_rows(device: str, shape: tuple[int, ...]) -> None:
    case = on_device(device, dtype=torch.bfloat16)
    case = replace(case, row_data=(case.row_data[0].float().view(shape),))
    case.run(compute_of(torch.bfloat16))
    (seen,) = case.grad_row_data
    assert (seen.shape, seen.dtype) == (shape, torch.float32)
    wide = [t.double() for t in case.inputs()]
    exact = plain(Case(wide[0], (wide[1],), case.segments, wide[2:4], wide[4]))[2]
    off = float((seen.double().nan_to_num() - exact).abs().max())
    assert off <= 4 * 2**-7 * float(exact.abs().max())


@on_each_device
def test_weight_gradients_may_be_wider_than_the_rows(device: str) -> None:
    narrow = on_device(device, dtype=torch.float16).run(compute_of(torch.float16))
    wide = on_device(device, dtype=torch.float16)
    wide.grad_weights = [grad.float() for grad in wide.grad_weights]
    wide.run(compute_of(torch.float16))
    for seen, expected in zip(wide.grad_weights, narrow.grad_weights, strict=True):
        assert_same_bits([seen.half()], [expected])
        assert not torch.equal(seen, expected.float())


@on_each_device
def test_a_layer_trains_through_autograd(device: str) -> None:
    counts, dtype = [5, 0, 17], torch.float32
    case = on_device(device, [(0, 5, 0), (5, 22, 2)], dtype=dtype, probs=False)
    rows = case.rows[:22].clone().requires_grad_()
    weights = [weight.clone().requires_grad_() for weight in case.weights]
    out = run_experts_locally(rows, counts, weights, compute_of(dtype))
    grads = torch.autograd.grad(out, [rows, *weights], case.grad_out[:22].nan_to_num())
    for seen, expected in zip([out, *grads], plain(case), strict=True):
        torch.testing.assert_close(seen, expected[: len(seen)], rtol=1e-4, atol=1e-4)


# ---- segments


@on_each_device
@ways
def test_holes_and_unnamed_experts_are_neither_read_nor_written(device: str, way: str) -> None:
    case = on_device(device, [(0, 4, 0), (6, 9, 2)], dtype=torch.float32)
    for weight in case.weights:
        weight[1] = float("nan")
    case.run(compute_of(torch.float32, way))
    for result in (case.out, case.grad_rows, *case.grad_row_data):
        assert result[4:6].isnan().all()
        assert result[9:].isnan().all()
        assert not result[:4].isnan().any()
        assert not result[6:9].isnan().any()
    for result in case.grad_weights:
        assert [bool(result[i].isnan().all()) for i in range(3)] == [False, True, False]
        assert not result[[0, 2]].isnan().any()


@on_each_device
@ways
def test_empty_segments_give_zero_weight_gradients(device: str, way: str) -> None:
    compute = compute_of(torch.float32, way)
    segments = [(0, 0, 0), (0, 4, 1), (4, 4, 1), (4, 4, 2), (4, 9, 2)]
    case = on_device(device, segments, dtype=torch.float32).run(compute)
    without = on_device(device, [(0, 4, 1), (4, 9, 2)], dtype=torch.float32).run(compute)
    for seen, expected in zip(case.grad_weights, without.grad_weights, strict=True):
        assert_same_bits([seen[0]], [torch.zeros_like(seen[0])])
        assert_same_bits([seen[1:]], [expected[1:]])
    assert_same_bits([case.out], [without.out])


@on_each_device
@ways
@pytest.mark.parametrize("segments", [[], [(0, 0, 1)]])
def test_no_rows_at_all(device: str, way: str, segments: list[Segment]) -> None:
    case = on_device(device, segments, dtype=torch.float32, num_rows=0)
    case.run(compute_of(torch.float32, way))
    for grad in case.grad_weights:
        assert bool((grad[1] == 0).all()) == bool(segments)


@on_each_device
def test_unwanted_gradients_are_left_out(device: str) -> None:
    compute = compute_of(torch.float32)
    full, case = (on_device(device, dtype=torch.float32) for _ in range(2))
    full.run(compute)
    saved = case.forward(compute)
    args = case.grad_out, case.rows, case.row_data, case.segments
    carry = compute.backward_rows(
        *args, case.weights, saved, grad_rows=case.grad_rows, grad_row_data=[None]
    )
    compute.backward_weights(*args, saved, carry, grad_weights=[None, case.grad_weights[1]])
    assert_same_bits([case.grad_rows, case.grad_weights[1]], [full.grad_rows, full.grad_weights[1]])
    assert case.grad_weights[0].isnan().all()
    assert case.grad_row_data[0].isnan().all()


@on_each_device
def test_one_tensor_per_expert_does_as_well_as_a_stack(device: str) -> None:
    compute = compute_of(torch.float32)
    stacked, listed = (on_device(device, dtype=torch.float32) for _ in range(2))
    stacked.run(compute)
    weights = [[tensor.clone() for tensor in stack] for stack in listed.weights]
    listed.weights = cast(list[Tensor], weights)
    listed.grad_weights = cast(list[Tensor], [[torch.empty_like(t) for t in s] for s in weights])
    listed.run(compute)
    assert_same_bits([listed.out, listed.grad_rows], [stacked.out, stacked.grad_rows])
    for grads, expected in zip(listed.grad_weights, stacked.grad_weights, strict=True):
        assert_same_bits(list(grads), list(expected))


# ---- bits


@on_each_device
@settings(max_examples=max(5, EXAMPLES // 3), deadline=None)
@given(segments=segment_lists(), dtype=st.sampled_from(DTYPES), shift=st.integers(0, 20))
def test_an_expert_has_the_same_bits_wherever_it_is_computed(
    device: str, segments: list[Segment], dtype: torch.dtype, shift: int
) -> None:
    compute = compute_of(dtype)
    segments = list({idx: (start, end, idx) for start, end, idx in segments}.values())
    owner = on_device(device, segments, dtype=dtype).run(compute)
    for start, end, idx in segments:
        moved = (shift, shift + end - start, 0)
        helper = on_device(device, [moved], dtype=dtype, num_experts=1)
        helper.rows[moved[0] : moved[1]] = owner.rows[start:end]
        helper.row_data[0][moved[0] : moved[1]] = owner.row_data[0][start:end]
        helper.grad_out[moved[0] : moved[1]] = owner.grad_out[start:end]
        helper.weights = [weight[idx : idx + 1].clone() for weight in owner.weights]
        helper.run(compute)
        assert_same_bits(
            [r[moved[0] : moved[1]] for r in (helper.out, helper.grad_rows, *helper.grad_row_data)],
            [r[start:end] for r in (owner.out, owner.grad_rows, *owner.grad_row_data)],
        )
        assert_same_bits(helper.grad_weights, [grad[idx : idx + 1] for grad in owner.grad_weights])


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [1, 16, MOST_ROWS - 14])
def test_rows_of_a_split_expert_have_the_same_bits(
    device: str, dtype: torch.dtype, cut: int
) -> None:
    compute = compute_of(dtype)
    whole = on_device(device, [(0, MOST_ROWS, 0)], dtype=dtype, num_experts=1).run(compute)
    halves = [(0, cut, 0), (cut, MOST_ROWS, 0)]
    cuts = on_device(device, halves, dtype=dtype, num_experts=1).run(compute)
    assert_same_bits(
        [cuts.out[:MOST_ROWS], cuts.grad_rows[:MOST_ROWS], cuts.grad_row_data[0][:MOST_ROWS]],
        [whole.out[:MOST_ROWS], whole.grad_rows[:MOST_ROWS], whole.grad_row_data[0][:MOST_ROWS]],
    )


@on_each_device
def test_backward_may_run_again(device: str) -> None:
    compute = compute_of(torch.bfloat16)
    case = on_device(device, dtype=torch.bfloat16)
    saved = case.forward(compute)
    case.backward(compute, saved)
    first = [result.clone() for result in case.results()]
    case.backward(compute, saved)
    assert_same_bits(
        [result.nan_to_num() for result in case.results()], [r.nan_to_num() for r in first]
    )


# ---- memory


@on_each_device
def test_nothing_of_a_call_is_kept(device: str) -> None:
    compute = compute_of(torch.float32)
    case = on_device(device, dtype=torch.float32)
    saved = case.forward(compute)
    storages = {t.untyped_storage().data_ptr() for t in saved.tensors}
    assert [tuple(t.shape) for t in saved.tensors] == [(48, 2 * WIDTH)]
    assert not storages & {t.untyped_storage().data_ptr() for t in (*case.inputs(), case.out)}
    assert case.forward(compute, save=False).tensors == ()
    case.backward(compute, saved)
    inputs = [weakref.ref(tensor) for tensor in case.inputs()]
    del case, saved
    gc.collect()
    assert [ref() for ref in inputs] == [None] * len(inputs)


class Allocations(TorchDispatchMode):
    """Notes every tensor made, among the launches noted by others."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("empty", "zeros", "pin_memory", "_to_copy", "clone")):
            self.log.append("allocation")
        return func(*args, **(kwargs or {}))


class LoggingGemm(GroupedGemm):
    block_m = 16

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def multiply_rows(
        self, source: Operand, out: Operand, table: RowTable, *, tensor: int, transposed: bool
    ) -> None:
        self.log.append("launch")

    def multiply_weights(
        self, left: Operand, right: Operand, table: GradTable, *, tensor: int
    ) -> None:
        self.log.append("launch")


def test_everything_is_allocated_before_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    for name in ("swiglu_forward", "swiglu_backward"):
        monkeypatch.setattr(gpu_compute, name, lambda *args: log.append("launch"))
    compute, case = TritonSwiGLU(LoggingGemm(log)), on_device("cpu", dtype=torch.float32)
    with Allocations(log):
        saved = case.forward(compute)
        log.append("next")
        case.backward(compute, saved)
    # backward_weights allocates nothing on the CPU but tables, before its launches.
    forward, backward = (part.split() for part in " ".join(log).split("next"))
    assert forward == ["allocation"] * 2 + ["launch"] * 3
    assert backward == ["allocation"] * 2 + ["launch"] * 5


# ---- refusals


@on_each_device
def test_saved_tensors_of_another_call_are_refused(device: str) -> None:
    compute, case = compute_of(torch.float32), on_device(device, dtype=torch.float32)
    saved = case.forward(compute)
    case.segments = case.segments[:1]
    with pytest.raises(RuntimeError, match=r"saved activations are \(48, .*, expected \(20, "):
        case.backward(compute, saved)


def test_weights_of_the_wrong_shape_are_refused() -> None:
    case = on_device("cpu", dtype=torch.float32)
    case.weights[1] = case.weights[1][:, :, :20].contiguous()
    with pytest.raises(ValueError, match=r"SwiGLU weights \(weight index 0\)"):
        case.forward(compute_of(torch.float32))


def test_a_width_that_is_no_multiple_of_16_bytes_is_refused() -> None:
    case = on_device("cpu", dtype=torch.float32, hidden=10)
    with pytest.raises(ValueError, match=r"rows of 10 torch.float32"):
        case.forward(compute_of(torch.float32))


# ---- the choice


def test_the_cpu_gets_swiglu_and_a_gpu_triton() -> None:
    compute = DeviceSwiGLU()
    on_gpu = lambda dtype: cast(Tensor, SimpleNamespace(is_cuda=True, dtype=dtype))  # noqa: E731
    assert type(compute.choice(torch.zeros(1))) is SwiGLU
    assert type(compute.choice(on_gpu(torch.float64))) is SwiGLU
    assert type(compute.choice(on_gpu(torch.bfloat16))) is TritonSwiGLU
    assert compute.choice(on_gpu(torch.float16)) is compute.choice(on_gpu(torch.bfloat16))


def test_the_choice_computes_what_it_chose() -> None:
    computes: list[ExpertCompute] = [DeviceSwiGLU(), SwiGLU()]
    seen, expected = (on_device("cpu", dtype=torch.float32).run(each) for each in computes)
    assert_same_bits(seen.results(), expected.results())


def test_triton_is_imported_only_for_a_gpu() -> None:
    code = (
        "import sys, feplb, feplb.kernels, feplb.device_swiglu, feplb.dispatch.permute\n"
        "assert 'triton' not in sys.modules and 'feplb.gpu_compute' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
