"""How close to the speed of memory are permute, unpermute and fused SwiGLU?

One rank of GLM-5 (hidden 6144, width 2048, bf16): 4,096 tokens, top-8, 16 experts with the same
number of rows. A kernel's rate counts the bytes it must read and write at least; the yardstick is
a copy of 1 GiB from device to device, bytes read and written. To show: 85 % of it and more.

Times are device times: events around the work, launched behind a sleeping kernel, so that the
host's launches are not in them. Results are checked before anything is timed. Without a GPU nothing
is measured.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from expert_operands import Layer, Size, Times, tables_of
from gpu_timing import gpu_facts, has_gpu, main_of
from report import Report, Row, iqr, median
from torch import Tensor

from feplb.dispatch.row_operations import RowOperations, TorchRowOperations, row_operations

TOP_K = 8
COPY_BYTES = 1 << 30
TO_SHOW_PCT = 85.0


def memory_work(size: Size) -> dict[str, tuple[Callable[[], object], int]]:
    """Per memory-bound kernel: how to run it, and the fewest bytes it must read and write."""
    from feplb.kernels.swiglu import swiglu_backward, swiglu_forward

    num_rows, item = size.num_tokens * TOP_K, torch.empty((), dtype=size.dtype).element_size()
    layer = Layer.draw(size, num_rows // size.num_experts)
    table, _ = tables_of(layer, 128)
    probs = torch.rand(num_rows, device=size.device)
    act, grad_h, grad_probs = layer.act.clone(), torch.empty_like(layer.h), torch.empty_like(probs)
    pairs = torch.randperm(num_rows, device=size.device).view(size.num_tokens, TOP_K)
    source = torch.empty_like(pairs.view(-1)).scatter_(
        0, pairs.view(-1), torch.arange(num_rows, device=size.device)
    )
    weights = torch.rand(size.num_tokens, TOP_K, device=size.device)
    operations: RowOperations = row_operations(layer.rows)
    tokens = layer.rows[: size.num_tokens].clone()
    narrow, wide = num_rows * size.width * item, num_rows * size.hidden * item
    once = size.num_tokens * size.hidden * item
    return {
        "swiglu forward": (lambda: swiglu_forward(layer.h, probs, act, table), 3 * narrow),
        "swiglu backward": (
            lambda: swiglu_backward(layer.h, probs, act, grad_h, grad_probs, table),
            6 * narrow,
        ),
        "permute": (lambda: operations.gather_rows(tokens, source, TOP_K), once + wide),
        "unpermute": (lambda: operations.sum_choices(layer.rows, pairs, weights), wide + once),
        "unpermute backward": (
            lambda: operations.spread_grads(
                tokens, layer.rows, weights, pairs, rows_wanted=True, weights_wanted=True
            ),
            once + 2 * wide,
        ),
    }


def check_memory_work(size: Size) -> None:
    """Every memory-bound kernel against torch, at the size given.

    Raises:
        RuntimeError: a result is further off than rounding explains.
    """
    layer = Layer.draw(size, size.num_tokens * TOP_K // size.num_experts)
    pairs = torch.arange(size.num_tokens * TOP_K, device=size.device).flip(0).view(-1, TOP_K)
    weights = torch.rand(size.num_tokens, TOP_K, device=size.device)
    tokens = layer.rows[: size.num_tokens].clone()
    results = swiglu_results(layer)
    ways = row_operations(layer.rows), TorchRowOperations()
    for name, run in {
        "permute": lambda way: [way.gather_rows(layer.rows, pairs.view(-1))],
        "unpermute": lambda way: [way.sum_choices(layer.rows, pairs, weights)],
        "unpermute backward": lambda way: way.spread_grads(
            tokens, layer.rows, weights, pairs, rows_wanted=True, weights_wanted=True
        ),
    }.items():
        results[name] = list(zip(*map(run, ways), strict=True))
    for name, compared in results.items():
        for seen, expected in compared:
            off = (seen.float() - expected.float()).abs().max() / expected.float().abs().max()
            if not float(off) <= torch.finfo(size.dtype).eps:
                raise RuntimeError(f"{name}: off by {float(off):.2e} of the largest")


def swiglu_results(layer: Layer) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By kernel, its results and those of fp32 autograd."""
    from feplb.kernels.swiglu import swiglu_backward, swiglu_forward

    table, _ = tables_of(layer, 128)
    act, grad_h = torch.empty_like(layer.act), torch.empty_like(layer.h)
    swiglu_forward(layer.h, None, act, table)
    again = layer.act.clone()
    swiglu_backward(layer.h, None, again, grad_h, None, table)
    wide = layer.h.float().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    (wide_grad,) = torch.autograd.grad(expected, wide, layer.act.float())
    return {
        "swiglu forward": [(act, expected.detach())],
        "swiglu backward": [(again, expected.detach()), (grad_h, wide_grad)],
    }


def memory_row(name: str, num_bytes: int, samples: Sequence[float], copy_gbps: float) -> Row:
    rate = num_bytes / median(samples) / 1e6
    return {
        "kernel": name,
        "mib": num_bytes / 2**20,
        "ms_p50": median(samples),
        "ms_iqr": iqr(samples),
        "gbps": rate,
        "copy_gbps": copy_gbps,
        "rate_pct": 100 * rate / copy_gbps,
        "to_show_pct": TO_SHOW_PCT,
        "shown": 100 * rate / copy_gbps >= TO_SHOW_PCT,
    }


def copy_rate(device: str, times: Times) -> float:
    """GB/s of a large copy on the device, bytes read and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median(times(lambda: target.copy_(source))) / 1e6


def memory_rows(size: Size, times: Times) -> list[Row]:
    check_memory_work(size)
    copy_gbps = copy_rate(size.device, times)
    return [
        memory_row(name, num_bytes, times(work), copy_gbps)
        for name, (work, num_bytes) in memory_work(size).items()
    ]


def finding(rows: Sequence[Row]) -> str:
    """The figure to show, and which kernels show it."""
    below = [f"{row['kernel']} {row['rate_pct']:.1f} %" for row in rows if not row["shown"]]
    what = f"to show: {TO_SHOW_PCT:.0f} % of a large device copy and more; "
    return what + (f"below it: {', '.join(below)}" if below else "all kernels show it")


def run(options: Namespace, report: Report) -> list[Row]:
    import triton

    from feplb.kernels.measure_tiles import device_times

    size, repeats = Size(), 5 if options.quick else 30
    report.header(
        **gpu_facts(), triton=triton.__version__, hidden=size.hidden, width=size.width,
        tokens=size.num_tokens, top_k=TOP_K, experts=size.num_experts, dtype=str(size.dtype),
        samples=repeats,
    )  # fmt: skip
    rows = memory_rows(size, lambda work: device_times(work, repeats))
    report.table(rows)
    print(f"\n{finding(rows)}")
    return rows


def main(given: Sequence[str] | None = None) -> int:
    report = Report(bench="permute", lane="none")
    return main_of(__doc__, given, report, has_gpu=has_gpu(), run=run)


if __name__ == "__main__":
    sys.exit(main())
