"""How fast is the grouped GEMM of one rank's experts, against one large GEMM of the library?

Products of GLM-5's experts (hidden 6144, width 2048, bf16), 16 experts with the same number of
rows each. One row of the table is one product:

    one gemm     torch.mm (cuBLAS) of as many rows with one weight: the yardstick
    streams N    torch.mm per expert, in turn on N side streams
    triton       the grouped GEMM, one launch, with the tiles that measured fastest here

Times are device times: events around the work, launched behind a sleeping kernel, so that the
host's launches are not in them. Tables of a call are made on the host; what that takes is the last
table. Results are checked before anything is timed. Without a GPU nothing is measured. Kernels that
memory bounds have a bench of their own, permute.py.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from expert_operands import Layer, Size, Times, tables_of
from gpu_timing import gpu_facts, has_gpu, main_of
from report import Report, Row, iqr, median
from torch import Tensor

from feplb.kernels.products import GroupedGemm, Operand
from feplb.kernels.segment_tables import GradTable, RowTable, row_table
from feplb.kernels.stream_gemm import StreamGemm
from feplb.kernels.tiles import TileConfig

STREAMS = (2, 3, 4)


@dataclass(frozen=True)
class Product:
    """One of the six. tensor: which weight; result: rows, or the gradient of that weight."""

    name: str
    tensor: int
    transposed: bool = False
    weight_grad: bool = False

    def operands(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Source and out; or left and right of a weight gradient."""
        narrow = layer.h if self.tensor == 0 else layer.act
        if self.weight_grad:
            return (narrow, layer.rows) if self.tensor == 0 else (layer.rows, narrow)
        forward = self.transposed == (self.tensor == 0)
        return (layer.rows, narrow) if forward else (narrow, layer.rows)

    def run(self, gemm: GroupedGemm, layer: Layer, tables: tuple[RowTable, GradTable]) -> None:
        first, second = map(Operand, self.operands(layer))
        if self.weight_grad:
            gemm.multiply_weights(first, second, tables[1], tensor=self.tensor)
        else:
            out = Operand(torch.empty_like(second.rows))
            gemm.multiply_rows(
                first, out, tables[0], tensor=self.tensor, transposed=self.transposed
            )

    def flops(self, layer: Layer) -> int:
        return 2 * len(layer.rows) * layer.weights[self.tensor][0].numel()


# x w1^T and a w2^T; dy w2 and dh w1; dh^T x and dy^T a.
PRODUCTS = (
    Product("up", 0, transposed=True),
    Product("down", 1, transposed=True),
    Product("down dgrad", 1),
    Product("up dgrad", 0),
    Product("up wgrad", 0, weight_grad=True),
    Product("down wgrad", 1, weight_grad=True),
)


def check_products(gemm: GroupedGemm, layer: Layer) -> None:
    """Every product of the first and the last expert against fp32.

    Raises:
        RuntimeError: a result is further off than rounding explains.
    """
    tables = tables_of(layer, gemm.block_m)
    for product in PRODUCTS:
        first, second = product.operands(layer)
        out = torch.empty_like(second)
        if product.weight_grad:
            product.run(gemm, layer, tables)
        else:
            gemm.multiply_rows(
                Operand(first), Operand(out), tables[0],
                tensor=product.tensor, transposed=product.transposed,
            )  # fmt: skip
        for start, end, idx in (layer.segments[0], layer.segments[-1]):
            if product.weight_grad:
                seen = layer.grads[product.tensor][idx]
                expected = first[start:end].float().t() @ second[start:end].float()
            else:
                weight = layer.weights[product.tensor][idx].float()
                seen = out[start:end]
                expected = first[start:end].float() @ (weight.t() if product.transposed else weight)
            off = float((seen.float() - expected).abs().max() / expected.abs().max())
            if not off <= 2 * torch.finfo(layer.rows.dtype).eps:
                raise RuntimeError(f"{product.name}, expert {idx}: off by {off:.2e} of the largest")


def one_gemm(product: Product, layer: Layer) -> Callable[[], object]:
    """The same number of rows and operations in one call of the library."""
    first, second = product.operands(layer)
    weight = layer.weights[product.tensor][0]
    if product.weight_grad:
        target = torch.empty_like(weight)
        return lambda: torch.mm(first.t(), second, out=target)
    out = torch.empty_like(second)
    return lambda: torch.mm(first, weight.t() if product.transposed else weight, out=out)


def product_row(
    product: Product, rows_per_expert: int, flops: int, times: dict[str, list[float]]
) -> Row:
    """times: milliseconds per arm, "one gemm" among them."""
    yardstick = median(times["one gemm"])
    row: dict[str, str | int | float | bool | None] = {
        "product": product.name,
        "rows_per_expert": rows_per_expert,
        "one_gemm_tflops": flops / yardstick / 1e9,
    }
    for arm, samples in times.items():
        name = arm.replace(" ", "_")
        row[f"{name}_ms_p50"] = median(samples)
        row[f"{name}_ms_iqr"] = iqr(samples)
        if arm != "one gemm":
            row[f"{name}_rate_pct"] = 100 * yardstick / median(samples)
    return row


def product_rows(size: Size, gemms: dict[str, GroupedGemm], times: Times) -> list[Row]:
    rows = []
    for rows_per_expert in size.rows_per_expert:
        layer = Layer.draw(size, rows_per_expert)
        for gemm in gemms.values():
            check_products(gemm, layer)
        tables = {arm: tables_of(layer, gemm.block_m) for arm, gemm in gemms.items()}
        for product in PRODUCTS:
            samples = {"one gemm": times(one_gemm(product, layer))}
            for arm, gemm in gemms.items():
                samples[arm] = times(partial(product.run, gemm, layer, tables[arm]))
            rows.append(product_row(product, rows_per_expert, product.flops(layer), samples))
    return rows


def table_row(size: Size, repeats: int) -> Row:
    """Host time of one RowTable, its copy submitted; the device is not waited for inside."""
    layer = Layer.draw(size, size.rows_per_expert[0])
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        row_table(layer.segments, layer.weights, 128, layer.rows.device)
        samples.append((time.perf_counter() - begin) * 1e6)
    return {
        "table": "rows",
        "experts": size.num_experts,
        "host_us_p50": median(samples),
        "host_us_iqr": iqr(samples),
    }


def run(options: Namespace, report: Report) -> list[Row]:
    import triton

    from feplb.kernels.grouped_gemm import TritonGemm
    from feplb.kernels.measure_tiles import device_times, measure_tiles

    size = Size(rows_per_expert=(64, 256)) if options.quick else Size()
    repeats = 5 if options.quick else 30
    report.header(
        **gpu_facts(), triton=triton.__version__, hidden=size.hidden, width=size.width,
        experts=size.num_experts, dtype=str(size.dtype),
    )  # fmt: skip

    def times(work: Callable[[], object]) -> list[float]:
        return device_times(work, repeats)

    tried = measure_tiles(
        size.hidden, size.width, dtype=size.dtype, device=torch.device(size.device), times=times
    )
    best: TileConfig = tried[0].tiles
    tiles: list[Row] = [{**asdict(each.tiles), "layer_ms_p50": each.milliseconds} for each in tried]
    gemms: dict[str, GroupedGemm] = {f"streams {n}": StreamGemm(n) for n in STREAMS}
    gemms["triton"] = TritonGemm(best)
    products = product_rows(size, gemms, times)
    table = [table_row(size, 10 * repeats)]
    for rows in (tiles, products, table):
        report.table(rows)
    return [*tiles, *products, *table]


def main(given: Sequence[str] | None = None) -> int:
    report = Report(bench="grouped_gemm", lane="none")
    return main_of(__doc__, given, report, has_gpu=has_gpu(), run=run)


if __name__ == "__main__":
    sys.exit(main())
