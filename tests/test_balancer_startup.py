"""A Balancer that cannot be built: every rank raises and says why, nothing stays behind, and a
better one can be built in the same processes. All attempts run in one spawn of four ranks.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from balancer_cases import NUM_RANKS, PLAIN, Arm, build, layer_spec, resources_in_use
from balancer_scenarios import attempt, call_and_check
from ranks import run_ranks
from torch.distributed.distributed_c10d import _set_pg_timeout

from feplb import Balancer, BalancerConfig

ODD_RANK = 2


def differing_config(is_odd: bool) -> Balancer:
    return build(min_tokens=2 if is_odd else 1)


def differing_policy(is_odd: bool) -> Balancer:
    return build(policy="none" if is_odd else "greedy")


def differing_width(is_odd: bool) -> Balancer:
    return build((layer_spec(width=64 if is_odd else 48),))


def differing_dtype(is_odd: bool) -> Balancer:
    return build((layer_spec(dtype=torch.bfloat16 if is_odd else torch.float32),))


def differing_layers(is_odd: bool) -> Balancer:
    return build(PLAIN * (2 if is_odd else 1))


def differing_threads(is_odd: bool) -> Balancer:
    with mock.patch("torch.get_num_threads", return_value=2 if is_odd else 1):
        return build()


def differing_version(is_odd: bool) -> Balancer:
    with mock.patch("torch.__version__", "9.9.9" if is_odd else "2.0.0"):
        return build()


def build_with(**environment: str) -> Balancer:
    with mock.patch.dict(os.environ, environment):
        return build()


def off_on_one_rank(is_odd: bool) -> Balancer:
    return build_with(FEPLB_OFF="1" if is_odd else "0")


def shared_memory_for_nobody(is_odd: bool) -> Balancer:
    """Every rank asks for more than the file system holds."""
    fs = os.statvfs("/dev/shm")
    too_many_rows = fs.f_blocks * fs.f_frsize // PLAIN[0].row_bytes
    return build((layer_spec(max_rows=too_many_rows),))


def shared_memory_for_all_but_one(is_odd: bool) -> Balancer:
    return build_within(resource.RLIMIT_FSIZE, 4096 if is_odd else None)


def files_for_all_but_one(is_odd: bool) -> Balancer:
    """One rank may open one file more, and needs one for every peer."""
    lowest_free = os.dup(0)
    os.close(lowest_free)
    return build_within(resource.RLIMIT_NOFILE, lowest_free + 1 if is_odd else None)


def build_within(which: int, limit: int | None) -> Balancer:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (soft if limit is None else limit, hard))
    try:
        return build()
    finally:
        resource.setrlimit(which, (soft, hard))


ATTEMPTS: dict[str, Callable[[bool], Balancer]] = {
    "config": differing_config,
    "policy": differing_policy,
    "width": differing_width,
    "dtype": differing_dtype,
    "layers": differing_layers,
    "threads": differing_threads,
    "version": differing_version,
    "off on one rank": off_on_one_rank,
    "variable": lambda is_odd: build_with(FEPLB_POLICY="none"),
    "value": lambda is_odd: build_with(FEPLB_OFF="yes"),
    "lane": lambda is_odd: build_with(FEPLB_LANE="rdma"),
    "no layers": lambda is_odd: build(()),
    "shared memory": shared_memory_for_nobody,
    "shared memory on one rank": shared_memory_for_all_but_one,
    "files on one rank": files_for_all_but_one,
}


@dataclass(frozen=True)
class Attempt:
    """One attempt on one rank."""

    text: str
    before: dict[str, Any]
    after: dict[str, Any]
    next_one: str  # "same bits" where the next Balancer works


def attempt_all(rank: int, num_ranks: int) -> dict[str, Attempt]:
    build().close()  # what a process opens once and keeps (random numbers, say)
    gc.freeze()  # else each collection below visits all of torch
    attempts = {}
    for name, work in ATTEMPTS.items():
        gc.collect()  # of what came before; what comes now must not need it
        before = resources_in_use(num_threads=0)
        text = attempt(functools.partial(work, rank == ODD_RANK))
        dist.barrier()
        after = resources_in_use(num_threads=0)
        with build() as balancer:
            next_one = call_and_check(Arm(rank, num_ranks, PLAIN, balancer))
        attempts[name] = Attempt(text, before, after, next_one)
        dist.barrier()
    return attempts


@pytest.fixture(scope="module")
def attempts() -> list[dict[str, Attempt]]:
    return run_ranks(attempt_all, NUM_RANKS, timeout_s=120)


DIFFERENCES = {
    "config": "config: rank 0 has .*min_tokens=1.*, rank 2 has .*min_tokens=2",
    "policy": "config: rank 0 has .*policy='greedy'.*, rank 2 has .*policy='none'",
    "width": r"layers: rank 0 has .*\(96, 32\).*, rank 2 has .*\(128, 32\)",
    "dtype": "layers: rank 0 has .*float32.*, rank 2 has .*bfloat16",
    "layers": "layers: rank 0 has .*LayerSpec.*, rank 2 has .*LayerSpec.*LayerSpec",
    "threads": "torch threads: rank 0 has 1, rank 2 has 2",
    "version": r"torch version: rank 0 has 2\.0\.0, rank 2 has 9\.9\.9",
    "off on one rank": "config: rank 0 has .*'greedy'.*, rank 2 has .*'none'",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_between_ranks_is_named_on_every_rank(
    attempts: list[dict[str, Attempt]], name: str
) -> None:
    for of_rank in attempts:
        assert re.match(f"ValueError: ranks differ in {DIFFERENCES[name]}", of_rank[name].text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "variable",
            "unknown environment variable FEPLB_POLICY; feplb knows FEPLB_LOG, FEPLB_LANE",
        ),
        ("value", "FEPLB_OFF='yes', expected 0 or 1"),
        ("lane", "FEPLB_LANE='rdma', expected one of"),
        ("no layers", "Balancer: layers is empty, expected one LayerSpec per MoE layer"),
    ],
)
def test_mistake_of_all_ranks_is_named_on_every_rank(
    attempts: list[dict[str, Attempt]], name: str, message: str
) -> None:
    for of_rank in attempts:
        assert of_rank[name].text.startswith(f"ValueError: {message}")


RESERVING = r"reserving \d+ bytes of shared memory /feplb-\S+: .*; /dev/shm has \d+ bytes free"


def test_arena_larger_than_shared_memory_is_refused_with_both_sizes(
    attempts: list[dict[str, Attempt]],
) -> None:
    for of_rank in attempts:
        assert re.match(f"RuntimeError: {RESERVING}", of_rank["shared memory"].text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shared memory on one rank", RESERVING),
        ("files on one rank", "(pidfd_open|shm_open|eventfd).*Too many open files"),
    ],
)
def test_failure_of_one_rank_is_told_to_all(
    attempts: list[dict[str, Attempt]], name: str, message: str
) -> None:
    for rank, of_rank in enumerate(attempts):
        who = "" if rank == ODD_RANK else "rank 2 could not build its Balancer: "
        assert re.match(f"RuntimeError: {who}{message}", of_rank[name].text), of_rank[name].text


@pytest.mark.parametrize("name", ATTEMPTS)
def test_failed_construction_leaves_nothing_behind(
    attempts: list[dict[str, Attempt]], name: str
) -> None:
    for of_rank in attempts:
        assert of_rank[name].after == of_rank[name].before


@pytest.mark.parametrize("name", ATTEMPTS)
def test_next_balancer_works_after_a_failed_construction(
    attempts: list[dict[str, Attempt]], name: str
) -> None:
    assert [of_rank[name].next_one for of_rank in attempts] == ["same bits"] * NUM_RANKS


def build_with_a_mistake_on_one_rank(rank: int, num_ranks: int, mistake: str) -> str:
    if rank != ODD_RANK:
        return attempt(build)
    if mistake == "variable":
        return attempt(lambda: build_with(FEPLB_POLICY="none"))
    return attempt(lambda: Balancer(BalancerConfig(), dist.group.WORLD, layers=()))


@pytest.mark.parametrize("mistake", ["variable", "no layers"])
def test_mistake_of_one_rank_is_told_to_all(mistake: str) -> None:
    texts = run_ranks(build_with_a_mistake_on_one_rank, NUM_RANKS, mistake, timeout_s=10)
    message = "unknown environment variable FEPLB_POLICY" if mistake == "variable" else "layers is"
    for rank, text in enumerate(texts):
        kind = "ValueError" if rank == ODD_RANK else "RuntimeError: rank 2 could not build"
        assert re.match(f"{kind}.*{message}", text), text


ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("variables", "accepted"),
    [
        (ONE_QUEUE, False),
        (ONE_QUEUE | {"CUDA_DEVICE_MAX_COPY_CONNECTIONS": "1"}, False),
        (ONE_QUEUE | {"CUDA_DEVICE_MAX_COPY_CONNECTIONS": "8"}, True),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, True),
    ],
)
def test_one_queue_for_kernels_and_copies_is_refused_on_gpus(
    variables: dict[str, str], accepted: bool
) -> None:
    no_driver = pytest.raises(RuntimeError, match=r"/nowhere/libcuda\.so.*cannot open")
    refused = pytest.raises(ValueError, match="Set CUDA_DEVICE_MAX_COPY_CONNECTIONS=8 beside it")
    spec = [layer_spec()]
    with mock.patch.dict(os.environ, variables | {"FEPLB_LIBCUDA": "/nowhere/libcuda.so"}):
        Balancer(BalancerConfig(lane="host"), layers=spec).close()  # without a GPU nobody asks
        with no_driver:
            Balancer(BalancerConfig(lane="ce", allow_single_queue=True), layers=spec)
        with no_driver if accepted else refused:
            Balancer(BalancerConfig(lane="ce"), layers=spec)


def die_between_create_and_unlink(rank: int, num_ranks: int) -> tuple[str, list[str]]:
    """What the survivors of a start-up were told, and what was left in shared memory."""
    # Gloo tells the dead rank's neighbours at once, and the others when their patience ends.
    _set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
    if rank == ODD_RANK:
        with mock.patch("feplb.connect.hashlib.sha256", side_effect=lambda _: _die()):
            build()
    text = attempt(build)
    return text, resources_in_use()["in /dev/shm"]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_killed_during_start_up_leaves_no_shared_memory() -> None:
    told = run_ranks(die_between_create_and_unlink, NUM_RANKS, may_die=[ODD_RANK], timeout_s=30)
    for rank, found in enumerate(told):
        if rank != ODD_RANK:
            text, left = found
            assert text.startswith("RuntimeError")
            assert left == []
