"""The compute stream: PyTorch's default one, one that changes, one that is gone; and one that is
captured into a CUDA graph, which is refused before anything is sent.

Over the stand-in driver, with streams that really are behind, on both lanes that have streams.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import stand_in
from balancer_cases import (
    MIXED,
    TWO_LAYERS,
    Arm,
    Bits,
    Case,
    Outcomes,
    build,
    experts,
    grads,
    loss_of,
)
from balancer_scenarios import Reactions, Scenario, attempt
from conftest import put
from ranks import run_ranks
from stand_in import StandIn

BAD_RANK = 1
HELD_S = 0.1  # what must not happen is looked for so long
CAPTURED = "captured into a CUDA graph"


@pytest.fixture(scope="module", params=["ce", "cupy"])
def streamed_lane(request: pytest.FixtureRequest) -> Iterator[str]:
    """A lane whose default stream is behind, as a GPU's is."""
    with pytest.MonkeyPatch.context() as patch:
        settings = stand_in.environment(queued_default=1, jitter_us=200)
        put(patch, settings | {"FEPLB_LANE": request.param})
        yield request.param


# ------------------------------------------------------------------------------ streams in use


class Streams:
    """Compute streams of the driver, handed out one after the other."""

    def __init__(self) -> None:
        self._driver = StandIn().functions
        context = ctypes.c_void_p()
        self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        self._driver.cuCtxSetCurrent(context)
        self._alive: list[int] = []

    def make(self) -> int:
        made = ctypes.c_void_p()
        assert self._driver.cuStreamCreate(ctypes.byref(made), 1) == 0
        self._alive.append(made.value or 0)
        return self._alive[-1]

    def destroy(self) -> None:
        for stream in self._alive:
            assert self._driver.cuStreamDestroy(ctypes.c_void_p(stream)) == 0
        self._alive.clear()

    def wait(self, stream: int) -> None:
        assert self._driver.cuStreamSynchronize(ctypes.c_void_p(stream)) == 0


class StreamedCore:
    """The core, whose caller's kernels (they are the host's) run when their stream comes to them.

    Args:
        next_stream: the compute stream of the next call.
    """

    WAITS = ("await_rows", "await_returns", "await_grad_outbox", "await_grads", "finish")

    def __init__(self, core: Any, streams: Streams, next_stream: Callable[[], int]) -> None:
        self._core, self._streams, self._next = core, streams, next_stream
        self._stream = 0

    def bind_compute(self, _: int) -> None:
        self._stream = self._next()
        self._core.bind_compute(self._stream)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._core, name)
        return functools.partial(self._then_wait, method) if name in self.WAITS else method

    def _then_wait(self, method: Callable[..., None], *args: Any) -> None:
        method(*args)
        self._streams.wait(self._stream)


def train(arm: Arm) -> Bits:
    """Two micro-batches of every layer, forward and backward."""
    bits: Bits = {}
    for step in range(2):
        for layer in range(len(arm.specs)):
            rows, row_data = arm.rows(layer, step)
            weights = arm.weights(layer)
            out = arm.run(rows, weights, layer=layer, step=step, row_data=row_data)
            loss_of(out).backward()
            bits[f"step {step} layer {layer} out"] = out.detach()
            leaves = grads(rows=rows, row_data=list(row_data), weights=weights)
            bits |= {f"step {step} layer {layer} {name}": leaf for name, leaf in leaves.items()}
    arm.check()
    return bits


def train_on(arm: Arm, which: str) -> Bits:
    streams = Streams()
    domain = arm.door.domain
    in_turn = [0, streams.make()] if which == "default and another" else [0]

    def next_stream() -> int:
        if which == "gone when the next comes":
            streams.destroy()
            return streams.make()
        in_turn.reverse()
        return in_turn[0]

    domain._stream = lambda: 0  # type: ignore[method-assign]
    domain.core = StreamedCore(domain.core, streams, next_stream)
    bits = train(arm)
    arm.door.close()
    streams.destroy()
    return bits


CASES = {
    which: Case(
        functools.partial(train_on, which=which), MIXED, expected=train, expected_policy="local"
    )
    for which in ("default", "default and another", "gone when the next comes")
}


@pytest.fixture(scope="module")
def outcomes(streamed_lane: str) -> Outcomes:
    return Outcomes(CASES)


@pytest.mark.parametrize("which", CASES)
def test_any_compute_stream_has_the_same_bits(outcomes: Outcomes, which: str) -> None:
    outcomes.assert_same_bits(which)


# ----------------------------------------------------------------------- one behind the other


def is_behind(core: Any, let_go: Callable[[], object]) -> bool:
    """The core's streams have not run what they were given until ``let_go``, and then they have."""
    draining = threading.Thread(target=core.drain, daemon=True)
    draining.start()
    draining.join(HELD_S)
    was_held = draining.is_alive()
    let_go()
    draining.join(10)
    return was_held and not draining.is_alive()


def release_in_a_held_stream(rank: int, num_ranks: int) -> bool:
    """A release lies in one stream behind what holds it, when the next stream comes."""
    with build() as balancer:
        core, streams, driver = balancer.domain.core, Streams(), StandIn().functions
        flag = ctypes.c_uint64()
        assert driver.cuMemAlloc(ctypes.byref(flag), ctypes.c_size_t(64)) == 0
        word = ctypes.c_uint32.from_address(flag.value)
        held = streams.make()
        core.bind_compute(held)
        driver.cuStreamWaitValue32(ctypes.c_void_p(held), flag, ctypes.c_uint32(1), 0)
        core.release_grads(1)
        core.bind_compute(streams.make())
        found = is_behind(core, lambda: setattr(word, "value", 1))
        core.bind_compute(0)
    streams.destroy()
    return found


def wait_in_a_stream(rank: int, num_ranks: int) -> bool:
    """A wait lies in one stream, and nothing behind it, when the next stream comes."""
    with build() as balancer:
        core, streams = balancer.domain.core, Streams()
        core.bind_compute(streams.make())
        core.await_grads(1, [0])  # nobody will ever send them
        core.bind_compute(streams.make())
        core.release_grads(1)
        return is_behind(core, lambda: core.fail("told to"))


@pytest.mark.parametrize("program", [release_in_a_held_stream, wait_in_a_stream])
def test_the_next_stream_comes_behind_the_one_before(
    streamed_lane: str, program: Callable[[int, int], bool]
) -> None:
    assert run_ranks(program, 1) == [True]


# ------------------------------------------------------------------------------------- capture


def capture(arm: Arm, everywhere: bool = False) -> None:
    """From here on the streams of one rank, or of all, say that they are captured."""
    assert "FEPLB_LIBCUDA" in os.environ
    arm.door.domain._stream = lambda: 0  # type: ignore[method-assign]
    StandIn().say_capturing(1 if everywhere or arm.rank == BAD_RANK else 0)


def run_captured(arm: Arm, everywhere: bool = False, **options: Any) -> None:
    rows, weights = arm.rows()[0], arm.weights()
    loss_of(arm.run(rows, weights)).backward()
    capture(arm, everywhere)
    try:
        arm.run(rows, weights, **options)
    finally:
        StandIn().say_capturing(0)


def backward_captured(arm: Arm) -> str:
    """The next backward, of another layer, is none the worse for it."""
    outs = [arm.run(arm.rows(layer)[0], arm.weights(layer), layer=layer) for layer in range(2)]
    capture(arm)
    said = attempt(loss_of(outs[1]).backward)
    StandIn().say_capturing(0)
    loss_of(outs[0]).backward()
    arm.check()
    return said


def captured_after_begin(arm: Arm) -> None:
    rows, weights = arm.rows()[0], arm.weights()
    ticket = arm.door.begin(arm.counts(), layer=0)
    capture(arm)
    try:
        arm.door.run_experts(rows, arm.counts(), weights, experts(), layer=0, ticket=ticket)
        arm.check()  # a rank that neither sends nor receives hears of it here
    finally:
        StandIn().say_capturing(0)


SCENARIOS = {
    "run_experts": Scenario(run_captured),
    "begin": Scenario(functools.partial(run_captured, begun=True)),
    "backward": Scenario(backward_captured, TWO_LAYERS),
    "everywhere": Scenario(functools.partial(run_captured, everywhere=True)),
    "after begin": Scenario(captured_after_begin),
}


@pytest.fixture(scope="module")
def reactions(streamed_lane: str) -> Reactions:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STAND_IN_QUEUED_DEFAULT")  # the host's experts run at once
        return Reactions(SCENARIOS)


@pytest.mark.parametrize("name", ["run_experts", "begin"])
def test_a_captured_call_is_refused_before_it_is_sent(reactions: Reactions, name: str) -> None:
    micro_batch = r"\(rank 1, layer 0, micro-batch 1\)"
    reactions.assert_refused(name, BAD_RANK, f"{CAPTURED}.*{micro_batch}.*Nothing was sent")


def test_a_captured_backward_is_refused_before_it_is_sent(reactions: Reactions) -> None:
    for rank, text in enumerate(reactions.first("backward")):
        who = "ValueError: feplb" if rank == BAD_RANK else "RuntimeError: layer 1 "
        assert text.startswith(who), (rank, text)
        assert CAPTURED in text
        assert "; the Balancer stays usable" in text
    assert set(reactions.after("backward")) == {"same bits"}


def test_a_capture_on_all_ranks_is_each_ranks_own_error(reactions: Reactions) -> None:
    for rank, text in enumerate(reactions.first("everywhere")):
        assert text.startswith("ValueError: "), text
        assert CAPTURED in text
        assert f"(rank {rank}, layer 0" in text
    assert set(reactions.after("everywhere")) == {"same bits"}


def test_a_capture_that_begins_after_the_counts_ends_the_call_everywhere(
    reactions: Reactions,
) -> None:
    reactions.assert_closed("after begin", f"RuntimeError: .*{CAPTURED}")
