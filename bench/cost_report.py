"""What bench/cost_check.py prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cost_figures import ARM_COLUMNS, CHOICE_COLUMNS, PHASE_COLUMNS
from cost_samples import CEILING, MODELS, STARTUP, Constants, Sample
from report import Report, Row, median, percentile


def print_lost(everything: Sequence[Sample], kept: Sequence[Sample]) -> None:
    """How much other work on the machine took from what was measured."""
    chosen = {id(sample) for sample in kept}
    dropped = [sample.lost_pct for sample in everything if id(sample) not in chosen]
    lost = [sample.lost_pct for sample in kept]
    print(
        f"lost to other work: {median(lost):.1f} % of the {len(kept)} samples kept (1 in 20 above "
        f"{percentile(lost, 95):.1f} %)"
        + (f", {median(dropped):.1f} % of the {len(dropped)} dropped" if dropped else "")
    )


def print_report(
    report: Report, constants: Constants, arms: Sequence[Row],
    phases: Sequence[Row], choices: Sequence[Row],
) -> None:  # fmt: skip
    """Constants, the three tables, and what they come to."""
    shown = constants.costs[STARTUP]
    print(
        f"start-up: lane {constants.lane_rates.out_gbps:.1f} GB/s out of a source, "
        f"{constants.lane_rates.in_gbps:.1f} GB/s into a destination, as measured; {shown}\n"
        f"fitted: {constants.gflops:.0f} GFLOP/s, none arm (forward, dgrad, wgrad: "
        + ", ".join(f"{rate:.0f}" for rate in constants.gflops_of.values())
        + f"); not used: the copy threads' {constants.copy_thread_gbps:.1f} GB/s of CPU time"
    )
    print("\nforward and backward, slowest rank: measured beside predicted")
    report.table(
        [{"configuration": "{rows_per_expert} {spread} {imbalance} {arm}".format(**row), **row}
         for row in arms],
        ("configuration", *ARM_COLUMNS[5:]),
    )  # fmt: skip
    print("\nphases of calls that moved something, medians")
    report.table(
        [{"phase of": "{rows_per_expert} {pass} {rank} {phase}".format(**row), **row}
         for row in phases],
        ("phase of", *PHASE_COLUMNS[5:]),
    )  # fmt: skip
    print("\nwhich plan")
    report.table(
        [{"routing": "{rows_per_expert} {spread} {imbalance} {seed}".format(**row), **row}
         for row in choices],
        ("routing", *CHOICE_COLUMNS[5:]),
    )  # fmt: skip
    print()
    for model in MODELS:
        print(f"{model}: {_summary(model, arms, choices)}")
    for name in ("auto_regret_pct", "auto_core_regret_pct"):
        autos: list[Any] = [row[name] for row in choices]
        if None not in autos:
            clock = "by CPU time" if "core" in name else "as measured"
            print(f"auto itself against the fastest fixed policy, {clock}: median "
                  f"{median(autos):+.1f} %, worst {max(autos):+.1f} %")  # fmt: skip


def _summary(model: str, arms: Sequence[Row], choices: Sequence[Row]) -> str:
    errors: Any = [row[f"{model}_err_pct"] for row in arms if row["arm"] != CEILING]
    cores: Any = [row[f"{model}_core_err_pct"] for row in arms if row["arm"] != CEILING]
    regrets: Any = [row[f"{model}_regret_pct"] for row in choices]
    core_regrets: Any = [row[f"{model}_core_regret_pct"] for row in choices]
    right = sum(row[f"{model}_choice"] == row["fastest"] for row in choices)
    known: Any = [
        row[f"{model}_rank_correlation"]
        for row in choices
        if row[f"{model}_rank_correlation"] is not None
    ]
    correlation = f"{median(known):.2f}" if known else "-"
    return (
        f"error median {median(errors):+.1f} %, worst {max(errors, key=abs):+.1f} % (against CPU "
        f"time {median(cores):+.1f} %, {max(cores, key=abs):+.1f} %); right plan {right} of "
        f"{len(choices)}, regret median {median(regrets):.1f} %, worst {max(regrets):.1f} % (in "
        f"CPU time {median(core_regrets):.1f} %, {max(core_regrets):.1f} %); rank correlation "
        f"{correlation}"
    )
