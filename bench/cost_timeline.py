"""One rank's side of bench/cost_check.py: real calls whose phases are timed from outside.

A proxy stands in for the core object of a Balancer, and a wrapper for its ExpertCompute; both note
perf_counter_ns before and after each call and pass everything on. The path is production's.

Of one call, in the order of two_phase.py (B: in backward only):

    agree     until wait_plan returns        not modelled
    kept_a    GEMMs until await_rows is asked
    arrival   waiting in it: what kept A did not hide of level 1
    received  GEMMs until post_returns
    wgrad     B: weight grads of received rows, until post_grads
    kept_b    GEMMs until await_returns is asked
    way_home  waiting in it: what kept B did not hide of level 2
    place     returned rows
    finish    until the call's copies are handed over   not modelled
    late      B: what autograd does until the prepare node, waiting for level 3, adding it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from feplb import ExpertCompute
from feplb.compute import Saved, Segment

AGREE, FINISH = "agree", "finish"
MODELLED = ("kept_a", "arrival", "received", "wgrad", "kept_b", "way_home", "place", "late")
PASSES = ("forward", "backward")
_WAITS = ("wait_plan", "await_rows", "await_returns", "finish", "await_grads")
_STEPS = (*_WAITS, "post_returns", "post_grads", "release_returns")

Phases = dict[str, int]  # phase: ns


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the core or of the compute.

    Args:
        cpu_ns: of the calling thread, in a call of the compute.
        rows, experts: that it computed.
    """

    name: str
    begin: int
    end: int
    cpu_ns: int = 0
    rows: int = 0
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Gemms:
    """What one function of the compute did in a sample, in CPU time: other work does not count."""

    cpu_ns: int = 0
    rows: int = 0
    experts: int = 0


class Recorder:
    """The steps of one sample, in the order in which they ended."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, noted."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            result = call(*args, **kwargs)
            self.steps.append(Step(name, begin, time.perf_counter_ns()))
            return result

        return noted


class TimedCore:
    """Stands in for a Domain's core; the steps that end a phase are noted."""

    def __init__(self, core: Any, recorder: Recorder) -> None:
        self._core = core
        for name in _STEPS:
            setattr(self, name, recorder.timed(name, getattr(core, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


class TimedCompute(ExpertCompute):
    """Another compute, whose calls are noted with the rows they computed."""

    def __init__(self, compute: ExpertCompute, recorder: Recorder) -> None:
        self._compute, self._recorder = compute, recorder

    def forward(
        self, rows: Any, row_data: Any, segments: Sequence[Segment], *rest: Any, **results: Any
    ) -> Saved:
        saved: Saved = self._run("forward", segments, rows, row_data, segments, *rest, **results)
        return saved

    def backward_rows(
        self, grad_out: Any, rows: Any, row_data: Any, segments: Sequence[Segment], *rest: Any,
        **results: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        carry: tuple[Any, ...] = self._run(
            "backward_rows", segments, grad_out, rows, row_data, segments, *rest, **results
        )
        return carry

    def backward_weights(
        self, grad_out: Any, rows: Any, row_data: Any, segments: Sequence[Segment], *rest: Any,
        **results: Any,
    ) -> None:  # fmt: skip
        self._run(
            "backward_weights", segments, grad_out, rows, row_data, segments, *rest, **results
        )

    def _run(self, name: str, segments: Sequence[Segment], *args: Any, **results: Any) -> Any:
        begin, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = getattr(self._compute, name)(*args, **results)
        end, cpu = time.perf_counter_ns(), time.thread_time_ns() - cpu
        sizes = [last - first for first, last, _ in segments if last > first]
        self._recorder.steps.append(Step(name, begin, end, cpu, sum(sizes), len(sizes)))
        return result


def phases_of(steps: Sequence[Step], start: int, end: int) -> tuple[Phases, Phases]:
    """Forward's and backward's phases of one sample.

    Args:
        steps: of one forward and its backward, in order.
        start, end: of the sample.
    """
    agreed = [i for i, step in enumerate(steps) if step.name == "wait_plan"]
    if len(agreed) != len(PASSES):
        raise ValueError(f"{len(agreed)} calls in a sample, expected a forward and a backward")
    forward, backward = steps[agreed[0] : agreed[1]], steps[agreed[1] :]
    of_forward = _of_pass(forward, start)
    of_backward = _of_pass(backward, _last(forward, "finish").end)
    of_backward["late"] = end - _last(backward, "finish").end
    return of_forward, of_backward


def _of_pass(steps: Sequence[Step], start: int) -> Phases:
    at = {step.name: step for step in steps if step.name in _STEPS}
    returned = at.get("post_grads", at["post_returns"])
    return {
        AGREE: at["wait_plan"].end - start,
        "kept_a": at["await_rows"].begin - at["wait_plan"].end,
        "arrival": at["await_rows"].end - at["await_rows"].begin,
        "received": at["post_returns"].begin - at["await_rows"].end,
        "wgrad": returned.begin - at["post_returns"].begin,
        "kept_b": at["await_returns"].begin - returned.begin,
        "way_home": at["await_returns"].end - at["await_returns"].begin,
        "place": at["release_returns"].begin - at["await_returns"].end,
        FINISH: at["finish"].end - at["release_returns"].begin,
        "late": 0,
    }


def waiting_ns(steps: Sequence[Step]) -> int:
    """How long this rank's thread waited for others."""
    return sum(step.end - step.begin for step in steps if step.name in _WAITS)


def _last(steps: Sequence[Step], name: str) -> Step:
    return next(step for step in reversed(steps) if step.name == name)


def gemms_of(steps: Sequence[Step]) -> dict[str, Gemms]:
    """Per function of the compute, what it did."""
    found: dict[str, Gemms] = {}
    for step in steps:
        if step.name not in _STEPS:
            so_far = found.get(step.name, Gemms())
            found[step.name] = Gemms(
                so_far.cpu_ns + step.cpu_ns,
                so_far.rows + step.rows,
                so_far.experts + step.experts,
            )
    return found
