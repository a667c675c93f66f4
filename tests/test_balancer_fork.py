"""A process forked after its Balancer was built (a DataLoader worker): it may not call, and its end
takes nothing from its parent. Two ranks, each with children of its own.
"""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from balancer_cases import PLAIN, Arm, Bits, build, differences, grads, loss_of, resources_in_use
from ranks import run_ranks

from feplb import Balancer, SwiGLU

NUM_MAPPINGS = 40  # of each size the domain has, so that some lie where the parent has its arenas


def in_child(work: Callable[[], str]) -> str:
    """Run ``work`` in a forked child and return its text, or how the child ended."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return text if status == 0 else f"child ended with status {status} after {text!r}"


def train_once(arm: Arm) -> Bits:
    weights, (rows, _) = arm.weights(), arm.rows()
    out = arm.run(rows, weights)
    loss_of(out).backward()
    arm.check()
    return {"out": out.detach(), **grads(rows=rows, weights=weights)}


def call_in_child(arm: Arm, name: str) -> str:
    rows, _ = arm.rows()
    weights, counts, balancer = arm.weights(), arm.counts(), arm.door
    before_fork = loss_of(arm.run(rows, weights))
    calls: dict[str, Callable[[], Any]] = {
        "begin": lambda: balancer.begin(counts, layer=0),
        "run_experts": lambda: balancer.run_experts(rows, counts, weights, SwiGLU(), layer=0),
        "backward": before_fork.backward,
        "check": balancer.check,
    }
    text = in_child(lambda: str(calls[name]()))
    before_fork.backward()
    balancer.check()
    return text


def call_begun_in_child(arm: Arm, with_ticket: bool) -> str:
    """The parent began a call; the child wants to run it."""
    rows, _ = arm.rows()
    weights, counts, balancer = arm.weights(), arm.counts(), arm.door

    def run(ticket: Any) -> str:
        return str(balancer.run_experts(rows, counts, weights, SwiGLU(), layer=0, ticket=ticket))

    ticket = balancer.begin(counts, layer=0)
    text = in_child(lambda: run(ticket if with_ticket else None))
    run(ticket)
    return text


def forget_in_child(holder: list[Balancer]) -> str:
    """Drop the last reference, as the child's own exit would; its own memory must survive that."""
    arena_bytes, board_bytes = holder[0].memory.arena_bytes, holder[0].memory.board_bytes
    mappings = [
        mmap.mmap(-1, size) for size in (arena_bytes, board_bytes) for _ in range(NUM_MAPPINGS)
    ]
    for mapping in mappings:
        mapping.write(b"x" * len(mapping))
    balancer = weakref.ref(holder[0])
    holder.clear()
    gc.collect()
    if balancer() is not None:
        return "the Balancer is still alive"
    whole = all(mapping[:] == b"x" * len(mapping) for mapping in mappings)
    return "memory intact" if whole else "memory overwritten"


def close_in_child(holder: list[Balancer]) -> str:
    holder[0].close()
    return "closed"


@dataclass(frozen=True)
class Seen:
    """What one rank found."""

    texts: dict[str, str]
    before: dict[str, Any]
    after: dict[str, Any]
    differences: list[str]


def fork_in_rank(rank: int, num_ranks: int) -> Seen:
    expected = train_once(Arm(rank, num_ranks, PLAIN, None))
    holder = [build()]
    train_once(Arm(rank, num_ranks, PLAIN, holder[0]))
    before = resources_in_use()
    texts = {
        name: call_in_child(Arm(rank, num_ranks, PLAIN, holder[0]), name)
        for name in ("begin", "run_experts", "backward", "check")
    }
    for with_ticket in (True, False):
        arm = Arm(rank, num_ranks, PLAIN, holder[0])
        texts[f"ticket {with_ticket}"] = call_begun_in_child(arm, with_ticket)
    del arm
    texts["close"] = in_child(lambda: close_in_child(holder))
    texts["forget"] = in_child(lambda: forget_in_child(holder))
    after = resources_in_use()
    seen = train_once(Arm(rank, num_ranks, PLAIN, holder[0]))
    holder[0].close()
    return Seen(texts, before, after, differences(seen, expected))


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    return run_ranks(fork_in_rank, 2)


@pytest.mark.parametrize(
    "call", ["begin", "run_experts", "backward", "check", "ticket True", "ticket False"]
)
def test_call_in_a_forked_child_is_refused(seen: list[Seen], call: str) -> None:
    for rank, of_rank in enumerate(seen):
        assert of_rank.texts[call].startswith(
            "RuntimeError: feplb was called in a process forked after its Balancer was built"
        )
        assert f"rank {rank}, pid " in of_rank.texts[call]


def test_close_in_a_forked_child_ends_nothing(seen: list[Seen]) -> None:
    assert [of_rank.texts["close"] for of_rank in seen] == ["closed"] * 2


def test_end_of_a_forked_child_unmaps_nothing_of_its_own(seen: list[Seen]) -> None:
    assert [of_rank.texts["forget"] for of_rank in seen] == ["memory intact"] * 2


def test_parent_holds_the_same_after_its_children_have_ended(seen: list[Seen]) -> None:
    assert [of_rank.after for of_rank in seen] == [of_rank.before for of_rank in seen]


def test_parent_goes_on_with_the_same_bits(seen: list[Seen]) -> None:
    assert [of_rank.differences for of_rank in seen] == [[], []]


LOADER_SCRIPT = """
import os, sys
import torch
from feplb import Balancer, BalancerConfig, LayerSpec, SwiGLU

spec = LayerSpec(2, 16, torch.float32, ((16, 16), (16, 8)), max_rows=64)
balancer = Balancer(BalancerConfig(), layers=[spec])

class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.balancer = balancer
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.full((3, 16), float(index))

def run(rows):
    weights = [torch.ones(2, 16, 16), torch.ones(2, 16, 8)]
    return balancer.run_experts(rows, [1, 2], weights, SwiGLU(), layer=0)

loader = torch.utils.data.DataLoader(
    Rows(), batch_size=None, num_workers=1, multiprocessing_context="fork"
)
for rows in loader:
    run(rows)
pid = os.fork()
if pid == 0:
    sys.exit(0)  # the whole way out of an interpreter that holds a Balancer
assert os.waitpid(pid, 0)[1] == 0
run(torch.zeros(3, 16))
print("went on")
"""


def test_data_loader_workers_leave_through_a_whole_interpreter_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADER_SCRIPT],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.split("\n")[0], done.returncode) == ("went on", 0), done.stderr
