"""A domain over several hosts: no shared board, flags in GPU memory, fabric handles, sockets.

Ranks are processes over the stand-in driver; which "host" a rank is on is what it is told to see as
its kernel. Tensors are this machine's, arenas and flags are the stand-in's GPU memory, and all else
between ranks goes through sockets. tests/cpp/test_relay.cpp has the relay by itself.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from balancer_cases import PLAIN, TWO_LAYERS, Arm, build, differences, resources_in_use
from balancer_scenarios import attempt, call_and_check
from ranks import run_ranks
from stand_in import StandIn
from test_ce_lane import Heard, train

from feplb import mesh, peers
from feplb.config import read_environment
from feplb.lanes import check_fabric
from feplb.observe.nvlink import Fabric, Gpu

NUM_RANKS, PER_HOST = 4, 2
NOTICE_S = 2.0
SHORT_S = 1.5
EXIT_OF_THE_STUCK = 70

pytestmark = pytest.mark.usefixtures("fabric_machine")


@pytest.fixture(scope="module")
def fabric_machine(stand_in_machine: None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_HAS_FABRIC", "1")
        patch.setenv("FEPLB_DOMAIN", "rack")
        yield


def go_to_host(rank: int, per_host: int = PER_HOST) -> None:
    """From here on this process sees itself on the host that its rank is on."""
    peers._kernel = lambda: f"kernel {rank // per_host}"  # type: ignore[assignment]


# ------------------------------------------------------------------------------------ same bits

CALLS = (
    {"copy_call": "batch", "flag_call": "memops"},
    {"copy_call": "plain", "flag_call": "write"},
    {"copy_call": "batch", "flag_call": "copy"},
)


def train_over_hosts(rank: int, num_ranks: int) -> list[tuple[list[str], int, int, str]]:
    """Per way of calling: what differs from no Balancer, moves, bytes to the other host; the log."""
    expected = train(Arm(rank, num_ranks, TWO_LAYERS, None))
    go_to_host(rank)
    heard = Heard()
    logger = logging.getLogger("feplb")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    found = []
    for way in CALLS:
        with build(TWO_LAYERS, **way) as balancer:
            arm = Arm(rank, num_ranks, TWO_LAYERS, balancer)
            wrong = differences(train(arm), expected)
            to_others = 0
            for layer in range(2):
                record = balancer.last_call(layer)
                assert record is not None
                to_others += sum(
                    int(move[1]) // PER_HOST != int(move[2]) // PER_HOST for move in record.moves
                )
        found.append((wrong, arm.num_moves, to_others, heard.texts[-1]))
    return found


@pytest.fixture(scope="module")
def trained(fabric_machine: None) -> list[list[tuple[list[str], int, int, str]]]:
    return run_ranks(train_over_hosts, NUM_RANKS, timeout_s=120)


@pytest.mark.parametrize("way", range(len(CALLS)))
def test_a_domain_over_hosts_has_the_bits_of_no_balancer(
    trained: list[list[tuple[list[str], int, int, str]]], way: int
) -> None:
    for of_rank in trained:
        wrong, num_moves, to_others, logged = of_rank[way]
        assert wrong == []
        assert num_moves > 0
        assert to_others > 0
        assert "flags in GPU memory, fabric arena" in logged
        assert "domain of ranks (0, 1, 2, 3)" in logged
