"""The promises of design.md section 9 over the ce lane: several ranks, each a process, on one GPU.

Tests marked gpu need one. Most run without one, too: over the stand-in driver, with tensors of
the host, fewer variants and fewer calls; they show that the programs are right. The files that take
the fixture ``lane`` (bits, autograd, failures and more) run on the GPU as well.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fenced_core
import gpu_programs
import pytest
import torch
from balancer_cases import MIXED, NUM_RANKS, PLAIN, Arm, Bits, Case, Outcomes, build, loss_of
from balancer_scenarios import Reactions, Scenario, attempt
from conftest import GPU, enter
from ranks import run_ranks
from test_balancer_bits import train
from test_balancer_weight_grads import sunk
from test_host_kills import (
    HELPER,
    NOTICE_S,
    OWNER,
    STOP_DEADLINE_S,
    Fall,
    check_survivors,
    survivors_of,
)

from feplb import SwiGLU
from feplb.config import ARENA_HANDLES, COPY_CALLS, FLAG_CALLS

GPU_CALLS, STAND_IN_CALLS = 1000, 40
GPU_LIVES, STAND_IN_LIVES = 10, 2
# What all ranks together may have less after ten lives: less than one arena's granule per rank.
UNNOTICED_BYTES = 8 << 20

steps = functools.partial(train, prepared=True, begun=True, stacked=True, num_steps=2)


def every_way() -> list[tuple[str, str, str]]:
    """Every way that copies, flags and arenas can go."""
    handles = [handle for handle in ARENA_HANDLES[1:] if handle != "fabric"]  # of several hosts
    return list(itertools.product(COPY_CALLS[1:], FLAG_CALLS[1:], handles))


def some_ways() -> list[tuple[str, str, str]]:
    """Each of them once."""
    return [("batch", "memops", "vmm"), ("peer", "write", "ipc"), ("plain", "copy", "vmm")]


def cases_of_ways(ways: list[tuple[str, str, str]]) -> dict[str, Case]:
    cases = {}
    for copy_call, flag_call, handle in ways:
        config = {"copy_call": copy_call, "flag_call": flag_call, "arena_handle": handle}
        for policy in ("greedy", "refine"):
            name = f"{policy}, {copy_call}, {flag_call}, {handle}"
            specs = MIXED if policy == "greedy" else PLAIN
            cases[name] = Case(steps, specs, seen_policy=policy, config=config)
    return cases


def with_torch_products(arm: Arm) -> Bits:
    """As ``train``, with the library's products in place of Triton's."""
    arm.run = functools.partial(arm.run, compute=SwiGLU())  # type: ignore[method-assign]
    return steps(arm)


SPLIT = functools.partial(gpu_programs.split_rows, with_weights=False)
SPLIT_ALL = functools.partial(gpu_programs.split_rows, with_weights=True)
SPLIT_ONCE = functools.partial(
    gpu_programs.split_rows, with_weights=False, num_steps=1, interpreted=True
)
STREAMS = ("side", "side", "default", "other side")
CASES = {
    "same seed": Case(steps, MIXED, expected_policy="greedy"),
    "none against no balancer": Case(steps, seen_policy="none", expected_policy="local"),
    "products of the library": Case(with_torch_products, MIXED),
    "split rows": Case(SPLIT, seen_policy="split"),
    "split again": Case(SPLIT_ALL, seen_policy="split", expected_policy="split"),
    "split rows in Triton": Case(SPLIT_ONCE, seen_policy="split"),
    "late stream": sunk(PLAIN, prepared=True, late_stream=True),
    "delays": Case(
        functools.partial(gpu_programs.train_with_delays, num_steps=6),
        MIXED,
        expected_policy="local",
    ),
    "streams": Case(
        functools.partial(gpu_programs.on_streams, names=STREAMS),
        expected=functools.partial(gpu_programs.on_streams, names=("default",) * 4),
    ),
}


@pytest.fixture(scope="module")
def ways(ce_lane: str) -> dict[str, Outcomes]:
    """By the name of the lane, so that one test can look at all ways that were tried."""
    chosen = every_way() if ce_lane == "gpu" else some_ways()
    return {ce_lane: Outcomes(cases_of_ways(chosen))}


@pytest.fixture(scope="module")
def bits(ce_lane: str) -> Outcomes:
    calls = GPU_CALLS if ce_lane == "gpu" else STAND_IN_CALLS
    often = functools.partial(gpu_programs.call_often, num_calls=calls)
    return Outcomes(
        {**CASES, "poison": Case(often, expected=gpu_programs.none_wrong, expected_policy="local")}
    )


def test_whole_experts_have_the_bits_of_none_whichever_way_they_go(
    ways: dict[str, Outcomes],
) -> None:
    for lane, outcomes in ways.items():
        names = list(outcomes.by_rank[0])
        assert len(names) == 2 * (18 if lane == "gpu" else 3)
        for name in names:
            outcomes.assert_same_bits(name)


def test_same_seed_gives_the_same_bits_again(bits: Outcomes) -> None:
    bits.assert_same_bits("same seed")


def test_none_has_the_bits_of_experts_without_any_balancer(bits: Outcomes) -> None:
    bits.assert_same_bits("none against no balancer", moved=False)


def test_whole_experts_have_the_bits_of_none_with_the_librarys_products(bits: Outcomes) -> None:
    bits.assert_same_bits("products of the library")


@pytest.mark.parametrize("case", ["split rows", "split rows in Triton"])
def test_split_has_the_outputs_and_row_grads_of_none(bits: Outcomes, case: str) -> None:
    bits.assert_same_bits(case)


def test_split_has_the_same_bits_run_after_run(bits: Outcomes) -> None:
    bits.assert_same_bits("split again")


def test_weight_grads_may_come_home_on_a_stream_of_their_own(bits: Outcomes) -> None:
    bits.assert_same_bits("late stream")


def test_the_caller_may_run_on_streams_of_its_own(bits: Outcomes) -> None:
    bits.assert_same_bits("streams")


def test_ranks_that_are_late_at_every_step_change_no_bit(bits: Outcomes) -> None:
    bits.assert_same_bits("delays")


def test_many_calls_from_one_poisoned_buffer(bits: Outcomes) -> None:
    bits.assert_same_bits("poison")


# ------------------------------------------------------------------------------ the deadlock rule

QUEUES = [pytest.param("8", marks=pytest.mark.gpu), pytest.param("1", marks=pytest.mark.gpu)]
STORMS = ("free", "load", "fill_the_queue")
LOCK_UP_S = 5.0  # the deadline where ranks do lock up


def storm_cases(storms: tuple[str, ...], config: dict[str, Any]) -> dict[str, Case]:
    return {
        storm: Case(
            functools.partial(gpu_programs.train_in_a_storm, storm=storm),
            expected_policy="local", config=config,
        )
        for storm in storms
    }  # fmt: skip


def with_queues(patch: pytest.MonkeyPatch, queues: str) -> dict[str, Any]:
    """So many hardware queues for all streams of a rank; and the config that accepts one."""
    patch.delenv("CUDA_DEVICE_MAX_COPY_CONNECTIONS", raising=False)
    patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    return {"allow_single_queue": queues == "1"}


@pytest.fixture(scope="module", params=QUEUES)
def stormy(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, "gpu")
        yield Outcomes(storm_cases(STORMS, with_queues(patch, request.param)))


@pytest.mark.parametrize("storm", STORMS)
def test_nothing_locks_up_in_a_storm_between_the_levels(stormy: Outcomes, storm: str) -> None:
    stormy.assert_same_bits(storm)


def test_the_storm_program_runs_on_the_stand_in() -> None:
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, "ce")
        # Kernels of a GPU that is not there can be neither loaded nor late.
        Outcomes(storm_cases(("free", "fill_the_queue"), {})).assert_same_bits("free")


def calls_ahead(config: dict[str, Any], fence: str = "") -> Reactions:
    act = functools.partial(gpu_programs.run_ahead, fence=fence)
    return Reactions({"ahead": Scenario(act, config=config)})


def all_ran(reactions: Reactions) -> bool:
    storms = f"{len(gpu_programs.STORM_POINTS)} storms"
    return {*reactions.first("ahead")} == {storms} and {*reactions.after("ahead")} == {"same bits"}


@pytest.mark.gpu
@pytest.mark.parametrize("fence", ["", "handshake"])
def test_a_storm_locks_up_without_the_handshake(
    fence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one queue, on a core that is built with switches for its fences."""
    enter(monkeypatch, "gpu")
    monkeypatch.setenv("STAND_IN_CORE", str(fenced_core.library()))
    config = {**with_queues(monkeypatch, "1"), "deadline_s": LOCK_UP_S}
    reactions = calls_ahead(config, fence)
    if fence:
        reactions.assert_closed("ahead", r"RuntimeError: .*\(deadline_s\)")
    else:
        assert all_ran(reactions), (reactions.first("ahead"), reactions.after("ahead"))


def test_the_program_that_runs_ahead_runs_on_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compute stream is never behind: a wait enqueued too early cannot lock it up."""
    enter(monkeypatch, "ce")
    assert all_ran(calls_ahead({}))


# -------------------------------------------------------------------------------------- failures

FALLS = (
    Fall(OWNER, "forward", "wait_plan", "after"),  # helpers wait for its rows
    Fall(HELPER, "forward", "await_rows", "after"),  # owners wait for what it computes
    Fall(HELPER, "backward", "release_rows", "after"),  # owners wait for its weight grads
)


@pytest.mark.gpu
@pytest.mark.parametrize("queues", ["8", "1"])
@pytest.mark.parametrize("fall", FALLS, ids=str)
def test_a_killed_rank_is_named_within_two_seconds_while_waits_lie_in_streams(
    fall: Fall, queues: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, "gpu")
    config = with_queues(monkeypatch, queues)
    fell, survivors = survivors_of(fall, tmp_path, **config)
    check_survivors(fall, survivors)
    assert max(survivor["raised"] for survivor in survivors) - fell < NOTICE_S


@pytest.mark.gpu
@pytest.mark.parametrize("queues", ["8", "1"])
def test_a_stopped_rank_is_named_at_the_deadline_while_waits_lie_in_streams(
    queues: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, "gpu")
    config = with_queues(monkeypatch, queues)
    fall = Fall(HELPER, "forward", "post_returns", "before", signal.SIGSTOP)
    fell, survivors = survivors_of(fall, tmp_path, **config)
    check_survivors(fall, survivors)
    raised = [survivor["raised"] - fell for survivor in survivors]
    assert min(raised) > 0.9 * STOP_DEADLINE_S
    assert max(raised) < STOP_DEADLINE_S + NOTICE_S


def test_a_killed_rank_is_named_on_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, "ce")
    _, survivors = survivors_of(FALLS[1], tmp_path)
    check_survivors(FALLS[1], survivors)


def capture_a_call(arm: Arm) -> str:
    """What a call inside a CUDA graph says."""
    rows, weights = arm.rows(grad=False)[0], arm.weights(grad=False)
    torch.cuda.synchronize()
    said: list[str] = []
    # A capture that was broken off says so when it ends.
    broken_off = contextlib.suppress(RuntimeError)
    with broken_off, torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        said.append(attempt(lambda: arm.run(rows, weights, prepared=False)))
    return "".join(said)


@pytest.mark.gpu
def test_a_call_inside_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, "gpu")
    reactions = Reactions({"graph": Scenario(capture_a_call)})
    for text in reactions.first("graph"):
        assert text.startswith("ValueError: ")
        assert "captured into a CUDA graph" in text
        assert "; the Balancer stays usable" in text
    assert set(reactions.after("graph")) == {"same bits"}


# ------------------------------------------------------------------------------------- the memory


def test_nothing_is_left_of_closed_balancers(ce_lane: str) -> None:
    lives = GPU_LIVES if ce_lane == "gpu" else STAND_IN_LIVES
    for before, after in run_ranks(gpu_programs.live_often, NUM_RANKS, lives, timeout_s=120):
        assert after.files == before.files
        assert after.threads == before.threads == []
        assert after.of_the_driver == before.of_the_driver
        assert after.free_bytes > before.free_bytes - UNNOTICED_BYTES


def expandable_steps(arm: Arm) -> Bits:
    found = steps(arm)
    segments = torch.cuda.memory_snapshot()
    assert segments
    assert all(segment["is_expandable"] for segment in segments if segment["total_size"])
    return found


@pytest.mark.gpu
def test_expandable_segments_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, "gpu")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    Outcomes({"steps": Case(expandable_steps, MIXED)}).assert_same_bits("steps")


@pytest.mark.parametrize("lane", [GPU])
def test_tensors_live_on_the_gpu(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, lane)
    assert run_ranks(places, 2) == [{"cuda"}] * 2


def places(rank: int, num_ranks: int) -> set[str]:
    """Where all that a call touches lives."""
    with build() as balancer:
        arm = Arm(rank, num_ranks, PLAIN, balancer)
        rows, weights = arm.rows()[0], arm.weights()
        out = arm.run(rows, weights)
        loss_of(out).backward()
        arm.check()
        tensors = [out, rows.grad, balancer.domain.views._memory, *(w.grad for w in weights)]
        return {str(tensor.device.type) for tensor in tensors if tensor is not None}
