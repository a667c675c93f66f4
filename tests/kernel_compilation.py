"""Compiles the kernels for a GPU that need not be there, and prints what came out, as JSON.

    kernel_compilation.py CAPABILITY layer|products|candidates

Run by test_kernel_compilation.py, in a process of its own: Triton must not be in interpreter mode.
The launches of a real call are recorded instead of carried out, on CPU tensors, and then compiled
as the launcher would for those arguments. Shapes are GLM-5's: hidden 6144, width 2048.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from feplb.dispatch.permute import order_tokens
from feplb.gpu_compute import TritonSwiGLU
from feplb.kernels import grouped_gemm, permute, swiglu
from feplb.kernels.grouped_gemm import TritonGemm
from feplb.kernels.products import Operand
from feplb.kernels.segment_tables import grad_table, row_table
from feplb.kernels.tiles import CANDIDATES

HIDDEN, WIDTH = 6144, 2048
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}


@dataclass
class Recorder:
    """Stands for a kernel: notes what each launch would compile."""

    kernel: Any
    launches: dict[str, tuple[ASTSource, dict[str, Any]]] = field(default_factory=dict)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip((p.name for p in self.kernel.params), args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = values.pop(parameter.name)
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
        assert not values, f"{self.kernel.__name__} has no parameter {sorted(values)}"
        key = f"{signature} {constants} {aligned} {options}"
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)
        self.launches.setdefault(key, (source, options))


def record() -> list[Recorder]:
    """Put a recorder in the place of every kernel."""
    recorders = []
    for module in (grouped_gemm, swiglu, permute):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                recorders.append(Recorder(value))
                setattr(module, name, recorders[-1])
    return recorders


def run_layer(compute: TritonSwiGLU, counts: list[int]) -> None:
    """Forward and backward of a layer whose experts have so many rows; with probabilities."""
    num_rows = sum(counts)
    rows = torch.empty(num_rows, HIDDEN, dtype=torch.bfloat16)
    probs = torch.empty(num_rows)
    weights = [rows.new_empty(1, 2 * WIDTH, HIDDEN), rows.new_empty(1, HIDDEN, WIDTH)]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    segments = [(start, start + n, 0) for start, n in zip(starts, counts, strict=True)]
    saved = compute.forward(rows, [probs], segments, weights, out=rows, save=True)
    carry = compute.backward_rows(
        rows, rows, [probs], segments, weights, saved, grad_rows=rows, grad_row_data=[probs]
    )
    compute.backward_weights(rows, rows, [probs], segments, saved, carry, grad_weights=weights)


def run_products(gemm: TritonGemm) -> None:
    """The widest products: up, its dgrad and its wgrad."""
    rows = Operand(torch.empty(318, HIDDEN, dtype=torch.bfloat16))
    h = Operand(torch.empty(318, 2 * WIDTH, dtype=torch.bfloat16), packed=True)
    weights = [torch.empty(1, 2 * WIDTH, HIDDEN, dtype=torch.bfloat16)]
    segments = [(0, 300, 0), (300, 318, 0)]
    table = row_table(segments, weights, gemm.block_m, torch.device("cpu"))
    gemm.multiply_rows(rows, h, table, tensor=0, transposed=True)
    gemm.multiply_rows(h, rows, table, tensor=0, transposed=False)
    gemm.multiply_weights(h, rows, grad_table(segments, weights, torch.device("cpu")), tensor=0)


def run_permute(num_tokens: int, top_k: int) -> None:
    rows = torch.empty(num_tokens * top_k, HIDDEN, dtype=torch.bfloat16)
    tokens, weights = rows[:num_tokens], torch.empty(num_tokens, top_k)
    order = order_tokens(torch.zeros(num_tokens, top_k, dtype=torch.int64), 1)
    permute.gather_rows(tokens, order.pair_of_row, top_k)
    permute.sum_choices(rows, order.row_of_pair, weights)
    permute.spread_grads(
        tokens, rows, weights, order.row_of_pair, rows_wanted=True, weights_wanted=True
    )


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Per thread: registers, and bytes of stack, which is where registers are spilled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def compiled(recorder: Recorder, capability: int) -> list[dict[str, Any]]:
    rows = []
    for source, options in recorder.launches.values():
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = kernel.asm["ptx"]
        registers, stack_bytes = registers_and_stack(kernel.asm["cubin"])
        rows.append(
            {
                "kernel": recorder.kernel.__name__,
                "shared_bytes": kernel.metadata.shared,
                "registers": registers,
                "stack_bytes": stack_bytes,
                "tensor_core": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
                "async_copies_16_bytes": len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)),
                "async_copies_smaller": len(re.findall(r"cp\.async\.ca\.shared\.global", ptx)),
                "loads_16_bytes": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
                "stores_16_bytes": len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)),
                "fused": len(re.findall(r"\bfma\.rn\.f32", ptx)),
            }
        )
    return rows


def main() -> None:
    capability, which = int(sys.argv[1]), sys.argv[2]
    recorders = record()
    if which == "products":
        run_products(TritonGemm())
    elif which == "candidates":
        for tiles in CANDIDATES:
            run_products(TritonGemm(tiles))
    else:
        compute = TritonSwiGLU()
        compute.warm_up(
            HIDDEN, WIDTH, dtype=torch.bfloat16, device=torch.device("cpu"),
            probs_dtype=torch.float32,
        )  # fmt: skip
        before = sum(len(r.launches) for r in recorders)
        for counts in ([300, 1, 17], [16], [48, 0, 128, 7]):
            run_layer(compute, counts)
        after = sum(len(r.launches) for r in recorders)
        print(json.dumps({"compiled_after_warm_up": after - before}))
        for num_tokens in (1, 16, 37):
            run_permute(num_tokens, 8)
    for recorder in recorders:
        for row in compiled(recorder, capability):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
