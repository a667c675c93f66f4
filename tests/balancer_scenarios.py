"""What goes wrong, on all ranks at once: scenarios, each on a Balancer of its own, and how every
rank reacts. The test_balancer_* files about mistakes and failures share it.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from balancer_cases import NUM_RANKS, PLAIN, Arm, build, differences
from ranks import run_ranks

from feplb import LayerSpec


@dataclass(frozen=True)
class Scenario:
    """What goes wrong, on a Balancer of its own: ``act`` runs on every rank, and may raise."""

    act: Callable[[Arm], object]
    specs: tuple[LayerSpec, ...] = PLAIN
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reaction:
    """One scenario on one rank."""

    first: str  # what act returned, or "ValueError: ..."
    seconds: float
    after: str  # "same bits", or what the next call raised


def attempt(work: Callable[[], object]) -> str:
    """The text of what ``work`` returns, or of what it raises."""
    try:
        return str(work())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def call_and_check(arm: Arm) -> str:
    """A call as it should be, compared with the same experts without any Balancer."""
    local = Arm(arm.rank, arm.num_ranks, arm.specs, None)
    outs = []
    for each in (arm, local):
        rows, row_data = each.rows(grad=False)
        outs.append(each.run(rows, each.weights(grad=False), row_data=row_data).detach())
    arm.check()
    return "; ".join(differences({"out": outs[0]}, {"out": outs[1]})) or "same bits"


def _run_scenarios(
    rank: int, num_ranks: int, scenarios: Mapping[str, Scenario]
) -> dict[str, Reaction]:
    reactions = {}
    for name, scenario in scenarios.items():
        with build(scenario.specs, **{"deadline_s": 10, **scenario.config}) as balancer:
            arm = Arm(rank, num_ranks, scenario.specs, balancer)
            start = time.monotonic()
            first = attempt(functools.partial(scenario.act, arm))
            seconds = time.monotonic() - start
            after = attempt(functools.partial(call_and_check, arm))
            reactions[name] = Reaction(first, seconds, after)
        dist.barrier()
    return reactions


class Reactions:
    """How all ranks react to all scenarios of a file; one spawn."""

    def __init__(self, scenarios: Mapping[str, Scenario], num_ranks: int = NUM_RANKS) -> None:
        self.by_rank = run_ranks(_run_scenarios, num_ranks, scenarios, timeout_s=150)

    def first(self, name: str) -> list[str]:
        return [reactions[name].first for reactions in self.by_rank]

    def after(self, name: str) -> list[str]:
        return [reactions[name].after for reactions in self.by_rank]

    def seconds(self, name: str) -> list[float]:
        return [reactions[name].seconds for reactions in self.by_rank]

    def assert_refused(self, name: str, bad_rank: int, pattern: str) -> None:
        """The bad rank says what was wrong, its peers say who refused, and all can go on."""
        for rank, text in enumerate(self.first(name)):
            who = "ValueError: " if rank == bad_rank else rf"RuntimeError: .*by rank {bad_rank}: "
            assert re.match(rf"{who}.*{pattern}.*; the Balancer stays usable", text), (rank, text)
        for rank, text in enumerate(self.after(name)):
            assert text == "same bits", (rank, text)

    def assert_closed(self, name: str, *patterns: str) -> None:
        """Every rank raises the pattern (of its own, if there is one for each), then "closed"."""
        each = patterns if len(patterns) > 1 else patterns * len(self.by_rank)
        for rank, (text, pattern) in enumerate(zip(self.first(name), each, strict=True)):
            assert re.match(pattern, text, re.DOTALL), (rank, text)
        for rank, text in enumerate(self.after(name)):
            assert re.match("RuntimeError: .*closed", text, re.DOTALL), (rank, text)
