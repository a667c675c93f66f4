"""Rivals' policies beside ours, re-made from their rules: counts in, Outcome out.

    for name, policy in BASELINES.items():
        outcome = policy(counts, BaselineInput(previous=previous, by_source=by_source))

Every policy is deterministic, ties going to the lowest index. Each module names its source and the
variant chosen. Only the functions' own parameters differ: functools.partial gives other variants.
"""

from __future__ import annotations

from functools import partial

from feplb.scheduler.baselines.duplication import mindspeed_mm
from feplb.scheduler.baselines.exact import moonep
from feplb.scheduler.baselines.history import eplb_oracle, eplb_previous
from feplb.scheduler.baselines.linear_program import lplb
from feplb.scheduler.baselines.outcome import (
    Baseline,
    BaselineInput,
    LayerCost,
    Outcome,
    WeightCopy,
    outcome_violations,
)
from feplb.scheduler.baselines.quotas import ultraep
from feplb.scheduler.baselines.shadowing import fastermoe
from feplb.scheduler.baselines.spilling import llep
from feplb.scheduler.baselines.yardsticks import force_balanced, lpt, none

BASELINES: dict[str, Baseline] = {
    "none": none,
    "force_balanced": force_balanced,
    "lpt": lpt,
    "fastermoe": fastermoe,
    "eplb_previous": eplb_previous,
    "eplb_oracle": eplb_oracle,
    "lplb": lplb,
    "llep_1.0": partial(llep, alpha=1.0),
    "llep_1.1": partial(llep, alpha=1.1),
    "ultraep": ultraep,
    "moonep": moonep,
    "mindspeed_mm": mindspeed_mm,
}

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineInput",
    "LayerCost",
    "Outcome",
    "WeightCopy",
    "eplb_oracle",
    "eplb_previous",
    "fastermoe",
    "force_balanced",
    "llep",
    "lplb",
    "lpt",
    "mindspeed_mm",
    "moonep",
    "none",
    "outcome_violations",
    "ultraep",
]
