"""CallRecord: what a finished call says about itself."""

from __future__ import annotations

import numpy as np

from feplb.balancer import CallRecord


def test_a_call_record_knows_loads_and_rows_moved() -> None:
    counts = np.array([[10, 6], [2, 0], [3, 0]], dtype=np.int32)
    moves = np.array([[0, 0, 1, 0, 4], [0, 0, 2, 4, 7]], dtype=np.int32)  # expert 0 of rank 0
    record = CallRecord(counts, moves, plan_us=1.0)
    assert record.loads_before.tolist() == [16, 2, 3]
    assert record.loads_after.tolist() == [9, 6, 6]
    assert record.num_rows_moved == 7


def test_a_call_without_moves_leaves_loads_alone() -> None:
    record = CallRecord(np.array([[1, 2]], dtype=np.int32), np.zeros((0, 5), np.int32), plan_us=0)
    assert record.loads_after.tolist() == record.loads_before.tolist() == [3]
    assert record.num_rows_moved == 0
