"""How fast are the kernels of one rank's experts, against the best this GPU does elsewhere?

Products of GLM-5's experts (hidden 6144, width 2048, bf16), 16 experts with the same number of
rows each. One row of the table is one product:

    one gemm     torch.mm (cuBLAS) of as many rows with one weight: the yardstick
    streams N    torch.mm per expert, in turn on N side streams
    triton       the grouped GEMM, one launch, with the tiles that measured fastest here

Then SwiGLU, permute and unpermute, by the bytes they must move at least, against a copy of 1 GiB
from device to device; both count bytes read and bytes written.

Times are device times: events around the work, launched behind a sleeping kernel, so that the
host's launches are not in them. Tables of a call are made on the host; what that takes is the last
table. Results are checked before anything is timed. Without a GPU nothing is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from report import Report, Row, arguments, iqr, median
from torch import Tensor

from feplb.dispatch.row_operations import RowOperations, TorchRowOperations, row_operations
from feplb.kernels.products import GroupedGemm, Operand
from feplb.kernels.segment_tables import GradTable, RowTable, grad_table, row_table
from feplb.kernels.stream_gemm import StreamGemm
from feplb.kernels.tiles import TileConfig

Times = Callable[[Callable[[], object]], list[float]]
Segments = list[tuple[int, int, int]]

STREAMS = (2, 3, 4)
TOP_K = 8
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Size:
    """hidden, width: of an expert. num_tokens: of the memory-bound kernels."""

    hidden: int = 6144
    width: int = 2048
    num_experts: int = 16
    rows_per_expert: tuple[int, ...] = (64, 128, 256, 512, 1024)
    num_tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


@dataclass(frozen=True)
class Layer:
    """Operands of the products of one layer; every expert has the same number of rows."""

    rows: Tensor
    h: Tensor
    act: Tensor
    weights: list[list[Tensor]]
    grads: list[list[Tensor]]
    segments: Segments

    @staticmethod
    def draw(size: Size, rows_per_expert: int) -> Layer:
        generator = torch.Generator(size.device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=size.device)
            return drawn.to(size.dtype)

        shapes = (2 * size.width, size.hidden), (size.hidden, size.width)
        weights = [randn(size.num_experts, *shape) / shape[1] ** 0.5 for shape in shapes]
        total = size.num_experts * rows_per_expert
        return Layer(
            rows=randn(total, size.hidden),
            h=randn(total, 2 * size.width),
            act=randn(total, size.width),
            weights=[list(weight) for weight in weights],
            grads=[list(torch.empty_like(weight)) for weight in weights],
            segments=[
                (i * rows_per_expert, (i + 1) * rows_per_expert, i) for i in range(size.num_experts)
            ],
        )


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


def tables_of(layer: Layer, block_m: int) -> tuple[RowTable, GradTable]:
    device = layer.rows.device
    return (
        row_table(layer.segments, layer.weights, block_m, device),
        grad_table(layer.segments, layer.grads, device),
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


def measure(report: Report, quick: bool) -> list[Row]:
    import triton

    from feplb.kernels.grouped_gemm import TritonGemm
    from feplb.kernels.measure_tiles import device_times, measure_tiles

    size = Size(rows_per_expert=(64, 256)) if quick else Size()
    repeats = 5 if quick else 30
    report.header(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        hidden=size.hidden,
        width=size.width,
        experts=size.num_experts,
        dtype=str(size.dtype),
    )

    def times(work: Callable[[], object]) -> list[float]:
        return device_times(work, repeats)

    tried = measure_tiles(
        size.hidden, size.width, dtype=size.dtype, device=torch.device(size.device), times=times
    )
    best: TileConfig = tried[0].tiles
    tiles: list[Row] = [{**asdict(each.tiles), "layer_ms_p50": each.milliseconds} for each in tried]
    gemms: dict[str, GroupedGemm] = {f"streams {n}": StreamGemm(n) for n in STREAMS}
    gemms["triton"] = TritonGemm(best)
    products, memory = product_rows(size, gemms, times), memory_rows(size, times)
    table = [table_row(size, 10 * repeats)]
    for rows in (tiles, products, memory, table):
        report.table(rows)
    return [*tiles, *products, *memory, *table]


def main() -> None:
    parser = arguments(__doc__.split("\n", 1)[0])
    args = parser.parse_args()
    report = Report(bench="grouped_gemm", lane="none")
    if torch.cuda.is_available():
        rows = measure(report, args.quick)
    else:
        report.header()
        print("No CUDA device here: nothing was measured.")
        rows = []
    report.write(args.json, rows)


if __name__ == "__main__":
    main()
