"""bench/submit_cost.py: which driver calls it counts, and its table, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import submit_cost
from submit_cost import NUM_EXPERTS, NUM_RANKS, Submission, calls_until_last_copy, rows_of

MOVER, OTHER = 1, 2


def submission(end_ns: int, symbol: str, thread: int = MOVER) -> Submission:
    return Submission(end_ns, thread, symbol.encode())


def test_calls_of_the_submitting_thread_between_hand_over_and_last_copy_count() -> None:
    log = [
        submission(90, "cuStreamWriteValue32"),  # before the hand-over
        submission(110, "cuEventRecord"),
        submission(120, "cuStreamWaitEvent"),
        submission(125, "cuEventRecord", OTHER),
        submission(130, "cuMemcpyBatchAsync"),
        submission(140, "cuStreamBatchMemOp"),
        submission(150, "cuMemcpyBatchAsync"),
        submission(160, "cuStreamBatchMemOp"),  # flags, after the last copy
        submission(900, "cuMemcpyBatchAsync"),  # of a later level
    ]
    assert calls_until_last_copy(log, posted_ns=100, accepted_ns=155) == 5
    assert calls_until_last_copy(log, posted_ns=100, accepted_ns=135) == 3


def test_table_has_medians_in_microseconds() -> None:
    samples = np.array([[3000, 2000, 1000, 3], [5000, 4000, 2000, 4], [7000, 6000, 9000, 3]])
    row = rows_of("refine", samples, with_calls=True)
    assert (row["calls"], row["driver_calls_most"]) == (3, 4)
    assert row["counts_to_copies_us_p50"] == 5.0
    assert row["plan_to_copies_us_p50"] == 4.0
    assert row["posted_to_copies_us_p50"] == 2.0
    assert rows_of("refine", samples, with_calls=False)["driver_calls_most"] is None


def test_a_policy_that_moves_nothing_has_no_figures() -> None:
    assert rows_of("auto", np.zeros((0, 4)), with_calls=True) == {"policy": "auto", "calls": 0}


def test_the_fullest_rank_is_first_in_every_call() -> None:
    inputs = submit_cost.inputs_with_fullest_first(5)
    assert len({counts.tobytes() for counts in inputs}) == 5
    for counts in inputs:
        assert counts.shape == (NUM_RANKS, NUM_EXPERTS // NUM_RANKS)
        assert counts.sum(axis=1).argmax() == 0
