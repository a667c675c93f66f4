"""The pictures of bench/straggler.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from report import Cell
from straggler_pareto import Point

mpl.use("Agg")

import matplotlib.pyplot as plt


def plot_removed(folder: Path, title: str, rows: Sequence[Mapping[str, Cell]]) -> Path:
    """Bars: percent of the token straggler removed by each policy."""
    shown = [row for row in rows if isinstance(row["removed_pct"], float)]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(shown) + 1.5))
    labels = [str(row["label"]) for row in shown]
    axes.barh(labels, [float(str(row["removed_pct"])) for row in shown], color="tab:blue")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of the token straggler removed")
    axes.set_title(title)
    return _saved(figure, folder, f"removed {title}")


def plot_pareto(folder: Path, title: str, points: Sequence[Point]) -> Path:
    """Lines: max / mean reached against weight copies, one line per policy."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for arm in dict.fromkeys(point.arm for point in points):
        mine = sorted((p.copies, p.max_over_mean) for p in points if p.arm == arm)
        style = "-o" if arm.startswith(("refine", "split")) else "--s"
        axes.plot(*zip(*mine, strict=True), style, label=arm)
    axes.set_xlabel("weight copies per micro-batch, whole EP group (mean)")
    axes.set_ylabel("max / mean of the rank loads (mean)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return _saved(figure, folder, f"pareto {title}")


def _saved(figure: Figure, folder: Path, title: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = "_".join("".join(c if c.isalnum() or c == "." else " " for c in title).split())
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path
