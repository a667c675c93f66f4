"""Rates of machines, and what a layer's rows, experts and copies cost on them, for the cost model.

A preset's rates come from data sheets and from the figures this project was fitted to; none of them
is a measurement of feplb. Where a lane has measured its own rates, those go in instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from feplb.scheduler.cost_model import UnitCosts, picoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of one GPU (or of one rank's cores) and its links.

    Args:
        gemm_tflops: what the experts' GEMMs reach, 10^12 operations per second.
        hbm_gbps: memory bandwidth, 10^9 bytes per second.
        lane_gbps: of one source's engine, for all its destinations together, and into one
            destination.
        dispatch_gbps: of the EP dispatch, per rank; its backward is the window in which late weight
            grads come home.
        tile_rows: rows of a GEMM's tile; 1 leaves tiles out.
        start_us: from the plan to the first byte on its way.
        copy_us: of each copy, whatever its size.
        source: where the rates come from.
    """

    gemm_tflops: float
    hbm_gbps: float
    lane_gbps: float
    dispatch_gbps: float
    tile_rows: int = 1
    start_us: float = 0.0
    copy_us: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            least = 0 if field.name.endswith("_us") else 1e-6
            if not least <= value < 1e9:
                raise ValueError(f"Machine.{field.name}={value}, expected at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """A gated expert: gate, up and down projection, each hidden x ffn_hidden.

    Args:
        element_bytes: of rows and weights.
        grad_bytes: of an element of the weight grads as they travel.
    """

    hidden: int
    ffn_hidden: int
    element_bytes: int = 2
    grad_bytes: int = 4

    @property
    def flops_per_row(self) -> int:
        """Of the forward; dgrad and wgrad take as many each."""
        return 6 * self.hidden * self.ffn_hidden

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.element_bytes

    @property
    def num_parameters(self) -> int:
        return 3 * self.hidden * self.ffn_hidden


GLM5 = ExpertShape(hidden=6144, ffn_hidden=2048)  # the paper's model

_FIT = (
    "6,000 rows/ms of GLM-5's experts forward, and 84 % of a link's rate through one copy engine, "
    "are what feplb's model was fitted with; other GPUs scaled from the H100 by their data sheets' "
    "dense bf16 rate and NVLink bandwidth"
)

MACHINES = {
    "h100": Machine(
        gemm_tflops=453, hbm_gbps=3350, lane_gbps=380, dispatch_gbps=300, tile_rows=128,
        start_us=20, copy_us=2, source=f"H100 SXM5: 989 TFLOPS, 3.35 TB/s, NVLink 450 GB/s; {_FIT}",
    ),
    "h200": Machine(
        gemm_tflops=453, hbm_gbps=4800, lane_gbps=380, dispatch_gbps=300, tile_rows=128,
        start_us=20, copy_us=2, source=f"H200 SXM: 989 TFLOPS, 4.8 TB/s, NVLink 450 GB/s; {_FIT}",
    ),
    "h800": Machine(
        gemm_tflops=453, hbm_gbps=3350, lane_gbps=169, dispatch_gbps=130, tile_rows=128,
        start_us=20, copy_us=2, source=f"H800 SXM: 989 TFLOPS, 3.35 TB/s, NVLink 200 GB/s; {_FIT}",
    ),
    "b200": Machine(
        gemm_tflops=1030, hbm_gbps=8000, lane_gbps=760, dispatch_gbps=600, tile_rows=128,
        start_us=20, copy_us=2, source=f"B200: 2,250 TFLOPS, 8 TB/s, NVLink 900 GB/s; {_FIT}",
    ),
}  # fmt: skip


def preset_of(gpu_name: str) -> str | None:
    """The name in ``MACHINES`` that a GPU's, as the driver has it, contains: "NVIDIA H200" -> h200.

    None: there is no preset.
    """
    return next((name for name in MACHINES if name in gpu_name.lower()), None)


def unit_costs(machine: Machine, expert: ExpertShape, *, rows_per_rank: float = 0) -> UnitCosts:
    """What the cost model needs.

    Args:
        rows_per_rank: mean rows of a rank; times a row's bytes over dispatch_gbps it is the window
            of the dispatch's backward.
    """

    weight_bytes = expert.num_parameters * expert.element_bytes
    grad_bytes = expert.num_parameters * expert.grad_bytes
    row = picoseconds(expert.flops_per_row, machine.gemm_tflops * 1e3)
    copy_row = picoseconds(expert.row_bytes, machine.lane_gbps)
    return UnitCosts(
        tile_rows=machine.tile_rows,
        row_forward=row,
        row_dgrad=row,
        row_wgrad=row,
        weight_read=picoseconds(weight_bytes, machine.hbm_gbps),
        row_push=copy_row,
        row_push_backward=2 * copy_row,
        weight_push=picoseconds(weight_bytes, machine.lane_gbps),
        row_return=copy_row,
        row_return_backward=copy_row,
        grad_push=picoseconds(grad_bytes, machine.lane_gbps),
        row_place=picoseconds(2 * expert.row_bytes, machine.hbm_gbps),
        grad_add=picoseconds(3 * grad_bytes, machine.hbm_gbps),
        late_window=picoseconds(rows_per_rank * expert.row_bytes, machine.dispatch_gbps),
        start=round(machine.start_us * 1e6),
        copy=round(machine.copy_us * 1e6),
    )
