"""bench/layer_emulated.py by hand, and whole, small, on the CPU with a clock that is made up."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import layer_emulated as bench
from emulation import Copies, RankWork, rank_work, recovered_pct, rows_in_kept_b

from feplb import SwiGLU
from feplb.scheduler.cost_model import UnitCosts, predict
from feplb.scheduler.machines import ExpertShape, Machine
from feplb.scheduler.plan import Move, Plan

MS = 10**9  # picoseconds
COUNTS = np.array([[6], [2]])
PLAN = Plan.from_moves([Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=4, row_end=6)])
# The worked example of cost_model.py, in milliseconds: 10 to compute a row, 1 to copy it, 5 for
# weights.
COSTS = UnitCosts(
    row_forward=10 * MS, row_dgrad=10 * MS, row_wgrad=10 * MS, row_push=MS,
    row_push_backward=2 * MS, weight_push=5 * MS, row_return=MS, row_return_backward=MS,
    grad_push=7 * MS, grad_add=3 * MS, late_window=4 * MS,
)  # fmt: skip
EXPERT = ExpertShape(hidden=16, ffn_hidden=16)
# A row takes 0.1 ms to compute and half that to come back.
SLOW = Machine(
    gemm_tflops=EXPERT.flops_per_row / 1e8, hbm_gbps=1, lane_gbps=2 * EXPERT.row_bytes / 1e5,
    dispatch_gbps=1,
)  # fmt: skip


def test_work_of_owner_and_helper() -> None:
    owner = rank_work(PLAN, COUNTS, 0, SLOW, EXPERT)
    helper = rank_work(PLAN, COUNTS, 1, SLOW, EXPERT)
    # Two rows come back in 0.1 ms, which two rows of kept work cover: all of the one expert.
    assert owner == RankWork(
        (), (), ((0, 4, 0),), returned=((4, 6),),
        pushed_bytes=2 * 32 + 2 * 768, pushed_backward_bytes=4 * 32 + 2 * 768,
        returned_bytes=2 * 32, grad_bytes=4 * 768,
    )  # fmt: skip
    assert helper.received == ((0, 2, 0),)
    assert helper.kept_b == ((0, 2, 0),)
    assert (helper.num_rows, helper.num_received) == (2, 2)
    assert owner.num_rows == 6


def test_a_rank_that_moves_nothing_keeps_all_in_a() -> None:
    work = rank_work(Plan(), COUNTS, 0, SLOW, EXPERT)
    assert work == RankWork(((0, 6, 0),), (), ())
    assert rows_in_kept_b(Plan(), 0, SLOW, EXPERT) == 0


def test_parts_of_one_expert_share_a_slot() -> None:
    moves = [
        Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=start, row_end=start + 1)
        for start in (3, 5)
    ]
    received = rank_work(Plan.from_moves(moves), COUNTS, 1, SLOW, EXPERT).received
    assert received == ((0, 1, 0), (1, 2, 0))


def test_arrivals_are_the_cost_models() -> None:
    copies = Copies(COUNTS, PLAN, COSTS, backward=False)
    assert copies.pushed() == [0.0, 7.0]
    # The helper has computed at 38, as in the model's worked example.
    assert copies.returned([0.0, 38.0]) == [40.0, 0.0]


def test_late_grads_by_hand_and_as_the_model_has_them() -> None:
    copies = Copies(COUNTS, PLAN, COSTS, backward=True)
    assert copies.pushed() == [0.0, 9.0]
    # Helper: its own two rows are 40 ms, of which 2 are kept B; received dgrad 20, wgrad 20.
    home = copies.returned([0.0, 58.0])
    assert home == [60.0, 0.0]
    # Grads leave at 78 and arrive at 85, a millisecond after the window, are added by 88.
    ends = copies.with_late_grads([80.0, 80.0], [0.0, 78.0], 3.0)
    assert ends == [84.0, 80.0]
    modelled = predict(COUNTS, PLAN, COSTS).backward
    assert modelled.by_rank[0] == 84 * MS


def late_ends(
    plan: Plan, ends: list[float], ready: list[float], window_ms: int, add_ms: float = 3.0
) -> list[float]:
    """Of ranks whose grads find every engine idle."""
    costs = dataclasses.replace(COSTS, late_window=window_ms * MS)
    counts = np.full((len(ends), 2), 6)
    return Copies(counts, plan, costs, backward=True).with_late_grads(ends, ready, add_ms)


def test_the_window_hides_the_arrival_but_not_the_adds() -> None:
    # There at 85, while the dispatch's backward runs from 80 until 100; added from 100 on.
    assert late_ends(PLAN, [80.0, 80.0], [0.0, 78.0], 20) == [83.0, 80.0]
    # Without a window they are added when they are there.
    assert late_ends(PLAN, [80.0, 80.0], [0.0, 78.0], 0) == [88.0, 80.0]


def test_adds_wait_for_the_dispatch_of_the_slowest_rank() -> None:
    # Rank 1 is done at 90, so nobody is through with the dispatch's backward before 110.
    assert late_ends(PLAN, [80.0, 90.0], [0.0, 78.0], 20) == [93.0, 90.0]


def test_an_owner_adds_once_the_last_grads_are_there() -> None:
    plan = Plan.from_moves(
        [
            Move(expert_idx=idx, owner_rank=0, dst_rank=dst, row_start=4, row_end=6)
            for idx, dst in ((0, 1), (1, 2))
        ]
    )
    # There at 27 and 85; the dispatch's backward ends at 84. Two adds.
    assert late_ends(plan, [80.0, 40.0, 80.0], [0.0, 20.0, 78.0], 4) == [87.0, 40.0, 80.0]


def test_ranks_that_move_nothing_add_nothing() -> None:
    assert late_ends(Plan(), [80.0, 40.0], [0.0, 0.0], 4) == [80.0, 40.0]


def test_share_of_the_way_to_the_ceiling() -> None:
    assert recovered_pct(10.0, 7.0, 6.0) == 75.0
    assert recovered_pct(10.0, 10.0, 10.0) is None


def test_bytes_beside_are_all_copied_inside_the_buffer() -> None:
    for wanted in (1, bench.MOST_PIECE, 3 * bench.BESIDE_BYTES + 5):
        pieces = bench.beside_pieces(wanted)
        assert sum(size for _, size in pieces) == wanted
        assert all(at + size <= bench.BESIDE_BYTES for at, size in pieces)


@dataclass
class RowClock:
    """A GPU that takes 1 ms per row and pass, and nothing for anything else."""

    now: float = 0.0
    arrives: list[float] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    copied: int = 0

    def begin(self, arrives_ms: list[float]) -> None:
        self.now, self.arrives, self.marks = 0.0, arrives_ms, []

    def wait(self, flag: int) -> None:
        self.now = max(self.now, self.arrives[flag])

    def mark(self) -> None:
        self.marks.append(self.now)

    def copy_beside(self, num_bytes: int) -> None:
        self.copied += num_bytes

    def read(self) -> list[float]:
        return self.marks


class Counting(SwiGLU):
    """Experts that take a millisecond of the clock per row, in each of the three functions."""

    def __init__(self, clock: RowClock) -> None:
        self._clock = clock

    def _took(self, segments: object) -> None:
        self._clock.now += sum(end - start for start, end, _ in segments)  # type: ignore[attr-defined]

    def forward(self, rows, row_data, segments, weights, *, out, save):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        self._took(segments)
        return super().forward(rows, row_data, segments, weights, out=out, save=save)

    def backward_rows(self, grad_out, rows, row_data, segments, *rest, **named):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, ANN002, ANN003
        self._took(segments)
        return super().backward_rows(grad_out, rows, row_data, segments, *rest, **named)

    def backward_weights(self, grad_out, rows, row_data, segments, *rest, **named):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, ANN002, ANN003
        self._took(segments)
        super().backward_weights(grad_out, rows, row_data, segments, *rest, **named)


SMALL = bench.Size(
    expert=EXPERT, num_experts=16, num_tokens=64, ep=4, steps=2, repeats=1, dtype=torch.float32,
    device="cpu",
)  # fmt: skip
FAST = Machine(gemm_tflops=1e3, hbm_gbps=1e6, lane_gbps=1e6, dispatch_gbps=1e6)


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, list[bench.LayerMs]], RowClock]:
    clock = RowClock()
    return bench.measure(SMALL, Counting(clock), clock, FAST), clock


def test_layer_is_the_slowest_rank_where_copies_cost_nothing(
    found: tuple[dict[str, list[bench.LayerMs]], RowClock],
) -> None:
    layers, clock = found
    for step in range(SMALL.steps):
        counts = bench.calibrated(
            4, seed=SMALL.seed, step=step, layer=step, num_experts=16, num_tokens=64
        )
        loads = counts.sum(axis=1)
        assert layers["none"][step].forward == loads.max()
        assert layers["none"][step].backward == 2 * loads.max()
        assert layers[bench.CEILING][step].both == 3 * -(-int(loads.sum()) // 4)
        refined = layers["refine 1R"][step]
        assert layers[bench.CEILING][step].both <= refined.both < layers["none"][step].both
    assert clock.copied > 0


def test_every_figure_is_called_emulated(
    found: tuple[dict[str, list[bench.LayerMs]], RowClock],
) -> None:
    rows = bench.table_rows(found[0], beside=True)
    at = {row["policy"]: row for row in rows}
    assert at["none"]["emulated_both_recovered_pct"] == 0
    assert at[bench.CEILING]["emulated_both_recovered_pct"] == 100
    assert 0 < float(str(at["refine 1R"]["emulated_both_recovered_pct"])) <= 100
    figures = set(rows[0]) - {"policy", "emulated", "copies_beside"}
    assert all(name.startswith("emulated_") for name in figures)
    assert all(row["emulated"] is True for row in rows)


def test_late_arrivals_hold_the_rank_up() -> None:
    clock = RowClock()
    buffers = bench.RankBuffers(SMALL, 8, 8)
    runner = bench.RankRunner(Counting(clock), buffers, clock)
    work = RankWork(((0, 2, 0),), ((0, 3, 0),), ((2, 4, 1),), returned=((4, 6),))
    assert runner.forward(work, [0.0, 0.0]) == [5.0, 7.0]
    assert runner.forward(work, [10.0, 0.0]) == [13.0, 15.0]
    assert runner.forward(work, [10.0, 20.0]) == [13.0, 20.0]
    assert runner.backward(work, [0.0, 0.0]) == [7.0, 10.0, 14.0]


def test_returned_rows_are_placed_where_they_belong() -> None:
    clock = RowClock()
    buffers = bench.RankBuffers(SMALL, 8, 8)
    buffers.returns[:2] = 7.0
    runner = bench.RankRunner(SwiGLU(), buffers, clock)
    runner.forward(RankWork((), (), (), returned=((4, 5), (6, 7))), [0.0, 0.0])
    assert (buffers.own.out[[4, 6]] == 7.0).all()


def test_wrong_experts_are_not_timed() -> None:
    class Wrong(SwiGLU):
        forward: Callable[..., object] = lambda self, *args, out, save: out.fill_(1.0)  # type: ignore[assignment]

    bench.check_compute(SMALL, SwiGLU())
    with pytest.raises(RuntimeError, match="Nothing was timed"):
        bench.check_compute(SMALL, Wrong())


def test_without_a_gpu_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--quick"]) == 0
    assert "nothing was measured" in capsys.readouterr().out
