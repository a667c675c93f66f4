"""The picture of demo.py: rows of every rank over the steps, before and after balancing."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from demo_report import balances
from train_moe_lm import RunRecord

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442")
SMOOTH_SHARE = 40  # a line is the mean over 1/40 of the steps


def draw_loads(record: RunRecord, file: Path) -> None:
    """One row of panels per MoE layer: left as routed, right as computed; 1200 x 800 pixels."""
    before, after = np.asarray(record.loads_before), np.asarray(record.loads_after)
    mean = before.mean(axis=2, keepdims=True)
    floor = np.maximum(1.0, np.asarray(record.hottest_expert) / mean[..., 0])
    layers = balances(record)
    figure, axes = plt.subplots(
        len(layers), 2, figsize=(12, 8), dpi=100, sharex=True, sharey="row", squeeze=False
    )
    for layer, balance in enumerate(layers):
        left, right = axes[layer]
        draw_ranks(left, before[:, layer] / mean[:, layer])
        draw_ranks(right, after[:, layer] / mean[:, layer])
        draw_floor(right, floor[:, layer])
        left.set_title(f"MoE layer {layer}, as routed: max/mean {balance.before:.2f}", fontsize=11)
        right.set_title(
            f"MoE layer {layer}, as computed: max/mean {balance.after:.2f} "
            f"(whole-expert floor {balance.floor:.2f})",
            fontsize=11,
        )
        left.set_ylabel("rows of a rank\n(mean rank = 1)")
    for panel in axes[-1]:
        panel.set_xlabel("training step")
    worst_before = max(balance.before for balance in layers)
    worst_after = max(balance.after for balance in layers)
    figure.suptitle(
        f"feplb evens out the ranks' rows: max/mean of the worst layer falls from "
        f"{worst_before:.2f} to {worst_after:.2f}",
        fontsize=14,
    )
    lines, names = axes[0][1].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncols=8, title=about_lines(len(before)))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file)
    plt.close(figure)


def draw_ranks(panel: Axes, loads: npt.NDArray[np.float64]) -> None:
    """loads [steps, ranks], 1.0 = the mean: thin as they are, thick as a moving mean."""
    steps = np.arange(len(loads))
    panel.axhline(1.0, color="0.6", linewidth=0.8)
    for rank in range(loads.shape[1]):
        color = COLORS[rank % len(COLORS)]
        panel.plot(steps, loads[:, rank], color=color, linewidth=0.6, alpha=0.35)
        panel.plot(steps, smooth(loads[:, rank]), color=color, linewidth=1.8, label=f"rank {rank}")
    panel.set_ylim(bottom=0)
    panel.margins(x=0.01)


def draw_floor(panel: Axes, floor: npt.NDArray[np.float64]) -> None:
    panel.plot(
        np.arange(len(floor)),
        smooth(floor),
        color="black",
        linewidth=1.2,
        linestyle=(0, (4, 2)),
        label="floor: the hottest expert alone",
    )


def window(num_steps: int) -> int:
    return max(1, num_steps // SMOOTH_SHARE)


def about_lines(num_steps: int) -> str:
    return f"thin: every step; thick and dashed: mean of {window(num_steps)} steps"


def smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Moving mean, of fewer values at both ends."""
    kernel = np.ones(window(len(values)))
    sums = np.convolve(values, kernel, mode="same")
    smoothed: npt.NDArray[np.float64] = sums / np.convolve(
        np.ones(len(values)), kernel, mode="same"
    )
    return smoothed
