"""Weight grads added beside the dispatch's backward: when that is launched, and who awaits it.

Their bits are compared in test_balancer_weight_grads.py, on a GPU in test_gpu.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from balancer_cases import PLAIN, Arm, build, experts, flat, loss_of
from ranks import run_ranks

from feplb import BalancerConfig, domain_calls
from feplb.config import check_queues, read_environment
from feplb.domain_calls import DomainCalls
from feplb.late_grads import LateGrads


class Dispatch(torch.autograd.Function):
    """Stands between the prepared weights and the experts, as the dispatch does."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, log: list[str]) -> torch.Tensor:
        ctx.log = log
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.log.append("dispatch")
        return grads[0], None


def order_of(arm: Arm) -> list[str]:
    """What happens in one backward, by name."""
    log: list[str] = []
    balancer = arm.balancer
    assert balancer is not None
    domain, real_add = balancer.domain, LateGrads.add_to
    real_beside, real_join = domain.beside, domain.join_beside

    @contextlib.contextmanager
    def beside() -> Iterator[None]:
        log.append("beside")
        with real_beside():
            yield
        log.append("end")

    def join() -> None:
        log.append("join")
        real_join()

    def add_to(self: LateGrads, *args: Any) -> None:
        log.append("add")
        real_add(self, *args)

    domain.beside, domain.join_beside = beside, join  # type: ignore[method-assign]
    LateGrads.add_to = add_to  # type: ignore[method-assign]
    weights = arm.weights()
    sinks = [torch.zeros_like(leaf) for leaf in flat(weights)]
    prepared = balancer.prepare_weights(weights, layer=0)
    rows = Dispatch.apply(arm.rows()[0], log)
    out = balancer.run_experts(rows, arm.counts(), prepared, experts(), layer=0, grad_sinks=sinks)
    loss_of(out).backward()
    LateGrads.add_to = real_add  # type: ignore[method-assign]
    arm.check()
    return log


def order_on_each_rank(rank: int, num_ranks: int, late_stream: bool) -> tuple[list[str], bool]:
    with build(policy="greedy", late_stream=late_stream) as balancer:
        log = order_of(Arm(rank, num_ranks, PLAIN, balancer))
        record = balancer.last_call(0)
        assert record is not None
        return log, bool((record.moves[:, 1] == rank).any())


@pytest.mark.parametrize(
    ("late_stream", "of_owners"),
    [
        (True, ["beside", "add", "end", "dispatch", "join"]),
        (False, ["dispatch", "add"]),
    ],
)
def test_adds_are_launched_before_the_dispatch_and_awaited_behind_it(
    late_stream: bool, of_owners: list[str]
) -> None:
    seen = run_ranks(order_on_each_rank, 4, late_stream)
    assert any(owns for _, owns in seen)
    for log, owns in seen:
        assert log == (of_owners if owns else ["dispatch"])


# --------------------------------------------------------------------------------------- streams


class PaperStream:
    """Writes down what it waits for."""

    def __init__(self, log: list[tuple[str, str]], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: PaperStream) -> None:
        self.log.append((self.name, other.name))


def test_the_side_stream_comes_after_the_compute_stream_and_is_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[tuple[str, str]] = []
    compute, made = PaperStream(log, "compute"), []
    current = [compute]

    def make(_: torch.device) -> PaperStream:
        made.append(PaperStream(log, "side"))
        return made[-1]

    @contextlib.contextmanager
    def enter(stream: PaperStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    fake = SimpleNamespace(Stream=make, current_stream=lambda _: current[-1], stream=enter)
    monkeypatch.setattr(domain_calls.torch, "cuda", fake)
    domain = object.__new__(DomainCalls)
    domain._device, domain._gpu, domain._side = torch.device("cuda", 0), 0, None
    domain.join_beside()
    assert log == []  # nothing was launched there
    for _ in range(2):
        with domain.beside():
            assert current[-1] is made[0]
        domain.join_beside()
    assert log == [("side", "compute"), ("compute", "side")] * 2
    assert len(made) == 1


def test_one_queue_for_all_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("CUDA_DEVICE_MAX_COPY_CONNECTIONS", "8")
    check_queues(read_environment(), BalancerConfig())
    with pytest.raises(ValueError, match="late_stream=True would hold up the dispatch"):
        check_queues(read_environment(), BalancerConfig(late_stream=True))
