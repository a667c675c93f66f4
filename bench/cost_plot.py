"""The picture of bench/cost_check.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cost_samples import MODELS
from report import Row

mpl.use("Agg")

import matplotlib.pyplot as plt


def plot_scatter(file: Path, arms: Sequence[Row]) -> None:
    """Predicted layer time of every arm and routing against measured; the line is equal.

    Points: against the slowest rank's time. Crosses: against CPU time, which other work on the
    machine hardly changes.
    """
    figure, panels = plt.subplots(1, len(MODELS), figsize=(11, 5), sharex=True, sharey=True)
    for axes, model in zip(panels, MODELS, strict=True):
        for arm in dict.fromkeys(str(row["arm"]) for row in arms):
            mine: list[Any] = [row for row in arms if row["arm"] == arm]
            measured = [row["measured_ms"] for row in mine]
            predicted = [row[f"{model}_ms"] for row in mine]
            points = axes.scatter(measured, predicted, s=18, alpha=0.8, label=arm)
            core = [row["core_ms"] for row in mine]
            axes.scatter(core, predicted, s=18, marker="x", color=points.get_facecolor())
        both: Any = [
            row[name] for row in arms for name in ("measured_ms", "core_ms", f"{model}_ms")
        ]
        ends = [min(both) / 1.2, max(both) * 1.2]
        axes.plot(ends, ends, color="gray", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"constants: {model}")
        axes.set_xlabel("measured (x: CPU time), ms of forward and backward")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("predicted, ms")
    panels[0].legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)
