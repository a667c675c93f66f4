"""The tables of bench/straggler.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from report import Cell, Report, Row

from feplb.scheduler.simulate import Arm

# Token stragglers of arXiv 2604.19654, rows: before, left by its FasterMoE, left by FEPLB.
PAPER = {2: (2278, 1014, 1107), 4: (4649, 2471, 1697), 8: (6666, 4036, 2021)}


def print_balance(report: Report, rows: Sequence[Mapping[str, Cell]], arms: Sequence[Arm]) -> None:
    """Loads, copies and plan times of one workload at one EP degree, every policy side by side."""
    report.table([_balance_row(row, arm) for row, arm in zip(rows, arms, strict=True)])


def _balance_row(row: Mapping[str, Cell], arm: Arm) -> Row:
    us = row["plan_us_p50"]
    return {
        "policy": arm.label,
        "left_rows": row["straggler_after"],
        "removed_%": row["removed_pct"],
        "modelled_recovered_%": row["layer_ceiling_recovered_pct"],
        "worst_5 %": row["layer_ceiling_recovered_pct_worst5"],
        "max/mean_p50": _three(row["max_over_mean_p50"]),
        "max/mean_p95": _three(row["max_over_mean_p95"]),
        "max/mean_p99": _three(row["max_over_mean_p99"]),
        "copies_a rank": row["copies_per_rank"],
        "most_of one_owner": row["copies_per_owner_max"],
        "modelled_layer_ms": row["layer_ms"],
        "modelled_slower_than none": row["slower_than_none"],
        "modelled_engine_busy %": row["engine_busy_pct"],
        "weights_MiB_a rank": row["copied_mib_per_rank"],
        "rows_moved_%": row["moved_rows_pct"],
        "rows_move_twice": "yes" if row["rows_move_twice"] else "no",
        "gap_to_optimum_%": _three(row["gap_to_optimum_pct"]),
        "plan_us_p50": us if arm.is_ours or not isinstance(us, float) else f"{us:.0f} Python",
    }


def _three(value: Cell) -> Cell:
    return f"{value:.3f}" if isinstance(value, float) else value


def print_paper(report: Report, rows: Sequence[Mapping[str, Cell]]) -> None:
    """The paper's token stragglers beside ours, where the workload is its own."""
    mine = [row for row in rows if row["workload"] == "calibrated" and row["ep"] in PAPER]
    named = {"fastermoe": 1, "greedy": 2}
    table: list[Row] = []
    for row in mine:
        paper = PAPER[int(str(row["ep"]))]
        if row["policy"] in named:
            left = paper[named[str(row["policy"])]]
            table.append(
                {
                    "policy": "FEPLB (greedy)" if row["policy"] == "greedy" else "FasterMoE",
                    "EP": row["ep"],
                    "before_rows": row["straggler_before"],
                    "before_(paper)": paper[0],
                    "left_rows": row["straggler_after"],
                    "left_(paper)": left,
                    "removed_%": row["removed_pct"],
                    "removed_(paper) %": 100 * (1 - left / paper[0]),
                }
            )
    if table:
        print("\ntoken straggler (rows, mean), the paper's own figures in the next column")
        report.table(table)


LEGEND = """
left, removed: token straggler (max - mean of the rank loads over the whole EP group), of the mean
before. recovered: modelled forward and backward of the experts, 100 = un-balanced work spread
evenly. MiB: weights of one forward; a backward copies them again and sends grads home. rows moved:
computed by another rank than the owner; "rows move twice: no" reroutes them before the dispatch,
and its rows cost nothing in the model. engine: busiest copy engine, of the modelled time. gap: to
the least possible max, of the mean. Python: wall time of our re-make, not of the original."""
