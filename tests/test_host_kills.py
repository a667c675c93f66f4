"""One of four ranks is killed or stopped at every level, forward and backward.

All others must raise, soon (a death) or at the deadline (a stop), and say who, where and in which
phase; and nothing of the domain may be left: no mapping, thread, fd or file in shared memory.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancer_cases import build, device, experts, threads_of_feplb
from ranks import run_ranks

from feplb import Balancer, LayerSpec

NUM_RANKS, NUM_LAYERS, NUM_LOCAL_EXPERTS, HIDDEN, FFN = 4, 2, 4, 16, 16
OWNER, HELPER = 0, 1  # ranks 0 and 2 own too much, ranks 1 and 3 help
NOTICE_S = 2.0  # design: a dead peer is noticed within this
STOP_DEADLINE_S = 1.5
LAYER, MICRO_BATCH = 1, 1  # where the victim falls
CALL = r"(, layer \d, micro-batch \d, (forward|backward)|, check\(\))?"
WHERE = rf"while [a-z' ]+ \(rank \d{CALL}\)"


@dataclass(frozen=True)
class Fall:
    """The victim falls before or after its core method ``point`` of the named pass."""

    victim: int
    during: str  # forward, backward or check
    point: str
    when: str
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        name = "owner" if self.victim == OWNER else "helper"
        return f"{name}-{self.during}-{self.when}-{self.point}"


PASSES = ("forward", "backward")
LEVELS = ["begin", "wait_plan", "post_rows", "await_rows", "post_returns", "await_returns"]
LEVELS += ["finish"]


def kills() -> list[Fall]:
    """Every level for an owner and a helper, and what only one of them passes through."""
    both = (OWNER, HELPER)
    falls = [Fall(v, p, "begin", "before") for v in both for p in (*PASSES, "check")]
    falls += [Fall(v, p, level, "after") for v in both for p in PASSES for level in LEVELS]
    falls += [Fall(OWNER, "backward", "await_grads", when) for when in ("before", "after")]
    falls += [Fall(HELPER, "backward", "post_grads", when) for when in ("before", "after")]
    falls += [Fall(HELPER, "backward", f"release_{what}", "after") for what in ("weights", "rows")]
    return falls


def stops() -> list[Fall]:
    """One per level and pass."""
    stop = signal.SIGSTOP
    points = ("begin", "post_rows")
    falls = [Fall(OWNER, p, point, "before", stop) for p in PASSES for point in points]
    falls += [Fall(HELPER, p, "post_returns", "before", stop) for p in PASSES]
    falls += [Fall(HELPER, "backward", "post_grads", "before", stop)]
    return [*falls, Fall(HELPER, "check", "begin", "before", stop)]


KILLS, STOPS = kills(), stops()


class FallingCore:
    """The victim's C++ core, which ends the process at one point."""

    def __init__(self, core: Any, fall: Fall, stamp: Path) -> None:
        self._core, self._fall, self._stamp = core, fall, stamp
        self.during = ""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._core, name)
        if name != self._fall.point or self.during != self._fall.during:
            return method

        def falls(*args: Any, **kwargs: Any) -> Any:
            if self._fall.when == "after":
                method(*args, **kwargs)
            self._stamp.write_text(str(time.monotonic()))
            os.kill(os.getpid(), self._fall.signal)
            raise AssertionError("still alive")

        return falls


def left_over() -> list[str]:
    """What a closed Balancer must not leave in this process."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/feplb-" in line]
    return maps + threads_of_feplb(expected=0)


def one_step(balancer: Balancer, weights: list[list[torch.Tensor]], at: Any) -> None:
    """Two micro-batches forward and backward, then check()."""
    for micro_batch in range(2):
        at("forward", 0, micro_batch)
        counts = [24, 20, 16, 12] if balancer.rank % 2 == 0 else [4, 3, 2, 1]
        rows = torch.randn(sum(counts), HIDDEN).to(device()).requires_grad_()
        hidden = rows
        for layer in range(NUM_LAYERS):
            at("forward", layer, micro_batch)
            prepared = balancer.prepare_weights(weights[layer], layer=layer)
            hidden = balancer.run_experts(hidden, counts, prepared, experts(), layer=layer)
        at("backward", LAYER, micro_batch)
        hidden.square().sum().backward()
    at("check", LAYER, MICRO_BATCH)
    balancer.check()


def rank_program(
    rank: int, num_ranks: int, fall: Fall, stamp: str, config: dict[str, Any]
) -> dict[str, Any]:
    del num_ranks
    torch.set_num_threads(1)
    spec = LayerSpec(
        NUM_LOCAL_EXPERTS, HIDDEN, torch.float32, ((2 * FFN, HIDDEN), (HIDDEN, FFN)), max_rows=128
    )
    build((spec,), **config).close()  # a GPU's driver opens files of its own
    fds = len(os.listdir("/proc/self/fd"))
    pids: list[Any] = [None] * NUM_RANKS
    dist.all_gather_object(pids, os.getpid())
    deadline_s = 20.0 if fall.signal == signal.SIGKILL else STOP_DEADLINE_S
    balancer = build((spec,) * NUM_LAYERS, deadline_s=deadline_s, **config)
    torch.manual_seed(rank)
    shapes = [(2 * FFN, HIDDEN), (HIDDEN, FFN)]
    weights = [
        [torch.randn(NUM_LOCAL_EXPERTS, *shape).to(device()).requires_grad_() for shape in shapes]
        for _ in range(NUM_LAYERS)
    ]
    one_step(balancer, weights, lambda *_: None)
    assert len(balancer.last_call(LAYER).moves) >= 2  # type: ignore[union-attr]
    core = FallingCore(balancer.domain.core, fall, Path(stamp))
    if rank == fall.victim:
        balancer.domain.core = core

    def at(during: str, layer: int, micro_batch: int) -> None:
        core.during = during if (layer, micro_batch) == (LAYER, MICRO_BATCH) else ""

    error, raised = "", 0.0
    try:
        one_step(balancer, weights, at)
        balancer.check()  # a rank that was past the last meeting is told at the next
    except RuntimeError as caught:
        raised, error = time.monotonic(), str(caught)
        del caught
    balancer.close()
    with pytest.raises(RuntimeError, match="closed"):
        balancer.check()
    gc.collect()
    if rank == 3 and fall.signal == signal.SIGSTOP:
        time.sleep(0.5)  # let the others raise on their own, then end the victim
        os.kill(pids[fall.victim], signal.SIGKILL)
    return {
        "error": error,
        "raised": raised,
        "left_over": left_over(),
        "fds": len(os.listdir("/proc/self/fd")) - fds,
        "pids": pids,
    }


def survivors_of(fall: Fall, tmp_path: Path, **config: Any) -> tuple[float, list[dict[str, Any]]]:
    stamp = tmp_path / "fell_at"
    results = run_ranks(
        rank_program, NUM_RANKS, fall, str(stamp), config, timeout_s=60, may_die=[fall.victim]
    )
    assert results[fall.victim] is None, "the victim lived: the point was never reached"
    return float(stamp.read_text()), [result for result in results if result is not None]


def check_survivors(fall: Fall, survivors: list[dict[str, Any]]) -> None:
    assert len(survivors) == NUM_RANKS - 1
    for survivor in survivors:
        assert f"rank {fall.victim}" in survivor["error"], survivor["error"]
        assert re.search(WHERE, survivor["error"]), survivor["error"]
        assert "must not be used" in survivor["error"]
        assert survivor["left_over"] == []
        assert survivor["fds"] <= 0
    pid = survivors[0]["pids"][0]
    assert not list(Path("/dev/shm").glob(f"feplb-*-{pid}-*"))


@pytest.mark.parametrize("fall", KILLS, ids=str)
def test_a_killed_rank_is_named_within_two_seconds(fall: Fall, tmp_path: Path) -> None:
    fell, survivors = survivors_of(fall, tmp_path)
    check_survivors(fall, survivors)
    assert max(survivor["raised"] for survivor in survivors) - fell < NOTICE_S


@pytest.mark.parametrize("fall", STOPS, ids=str)
def test_a_stopped_rank_is_named_at_the_deadline(fall: Fall, tmp_path: Path) -> None:
    fell, survivors = survivors_of(fall, tmp_path)
    check_survivors(fall, survivors)
    first = min(survivor["raised"] for survivor in survivors) - fell
    assert first > 0.9 * STOP_DEADLINE_S
    assert max(survivor["raised"] for survivor in survivors) - fell < STOP_DEADLINE_S + NOTICE_S


def test_at_least_forty_kills() -> None:
    assert len(KILLS) >= 40
