"""Decides which experts move: pure mathematics on counts, importable without torch or a GPU."""

from feplb.scheduler.plan import (
    Move,
    Plan,
    PlanLimits,
    load_imbalance,
    plan_violations,
    rank_loads,
    token_straggler,
    whole_expert_floor,
)
from feplb.scheduler.policies import POLICIES, make_plan

__all__ = [
    "POLICIES",
    "Move",
    "Plan",
    "PlanLimits",
    "load_imbalance",
    "make_plan",
    "plan_violations",
    "rank_loads",
    "token_straggler",
    "whole_expert_floor",
]
