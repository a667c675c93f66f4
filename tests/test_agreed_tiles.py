"""One tile configuration for all ranks: the choice by hand; ranks that differ, and one that fails.

Kernels run in Triton's interpreter on tensors of the host, and a timer says what the test wants.
"""

from __future__ import annotations

import functools
import gc
import logging
import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from balancer_cases import (
    PLAIN,
    Arm,
    build,
    differences,
    grads,
    layer_spec,
    loss_of,
    resources_in_use,
)
from balancer_scenarios import attempt
from kernel_cases import INTERPRETED
from ranks import run_ranks
from triton import OutOfResources

from feplb import BalancerConfig, DeviceSwiGLU, agreed_tiles
from feplb.agreed_tiles import agree_on_tiles, fastest_for_all, measured_layer
from feplb.config import LayerSpec
from feplb.gpu_compute import TritonSwiGLU
from feplb.kernels.measure_tiles import measure_tiles
from feplb.kernels.tiles import HOPPER, SINGLE_PRECISION, TileConfig
from feplb.moe import MoEConfig, MoELayer
from feplb.peers import Peers

BF16 = torch.bfloat16
NUM_RANKS = 3
SMALL = tuple(TileConfig(16, size, 16, num_warps=4, num_stages=1) for size in (16, 32, 64))
NARROW = (layer_spec(3, 32, 16, BF16),)

# ---------------------------------------------------------------------------------------- by hand


def test_the_slowest_rank_decides() -> None:
    assert fastest_for_all([[3.0, 2.0, 1.0], [3.0, 2.5, 9.0]]) == (1, 2.5)


def test_ties_go_to_the_first() -> None:
    assert fastest_for_all([[3.0, 2.0, 1.0], [1.0, 3.0, 3.0]]) == (0, 3.0)


def test_what_does_not_fit_on_one_rank_is_left_out() -> None:
    assert fastest_for_all([[3.0, 2.0], [3.0, None]]) == (0, 3.0)
    with pytest.raises(RuntimeError, match="fits the GPUs of all ranks"):
        fastest_for_all([[3.0, None], [None, 1.0]])


def test_the_heaviest_swiglu_with_16_bit_rows_is_measured() -> None:
    narrow, wide, single = layer_spec(dtype=BF16), layer_spec(width=96, dtype=BF16), layer_spec()
    other = LayerSpec(2, 32, BF16, ((512, 32), (32, 512)))  # one projection in, and not two
    with_bias = LayerSpec(2, 32, BF16, ((512, 32), (32, 256), (32,)))
    assert measured_layer([single, narrow, other, wide, with_bias]) == wide
    assert measured_layer([single, other, with_bias]) is None


def test_without_a_gpu_nothing_is_measured() -> None:
    with mock.patch("feplb.agreed_tiles._milliseconds") as measured:
        tiles = agree_on_tiles(
            Peers(None), BalancerConfig(tiles="measure"), NARROW, torch.device("cpu")
        )
    assert tiles is None
    assert not measured.called


@pytest.mark.parametrize(
    ("config", "layers", "why"),
    [
        ({}, NARROW, r'tiles="default"'),
        ({"tiles": "measure"}, PLAIN, "no SwiGLU with 16-bit rows"),
    ],
)
def test_the_default_is_taken_where_asked_for_and_said(
    config: dict[str, Any], layers: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="feplb")
    device = torch.device("cuda")  # nothing is made there
    assert agree_on_tiles(Peers(None), BalancerConfig(**config), layers, device) is None
    assert f"the default tiles of each dtype ({why})" in caplog.text


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(ValueError, match="tiles='fastest', expected one of"):
        BalancerConfig(tiles="fastest")


# ------------------------------------------------------------------------------- what computes


def test_agreed_tiles_are_those_of_16_bit_rows_alone() -> None:
    compute = TritonSwiGLU(tiles=SMALL[0])
    seen = {dtype: compute._gemm_for(torch.empty(0, 8, dtype=dtype)) for dtype in
            (BF16, torch.float16, torch.float32)}  # fmt: skip
    assert [gemm.tiles for gemm in seen.values()] == [SMALL[0], SMALL[0], SINGLE_PRECISION]  # type: ignore[attr-defined]
    plain: Any = TritonSwiGLU()._gemm_for(torch.empty(0, 8, dtype=BF16))
    assert plain.tiles == HOPPER


@pytest.mark.parametrize("compute", [DeviceSwiGLU, TritonSwiGLU])
def test_a_gemm_and_tiles_are_one_too_many(compute: Any) -> None:
    with pytest.raises(ValueError, match="gemm brings tiles of its own"):
        compute(mock.Mock(), tiles=HOPPER)


def test_a_layer_computes_with_its_balancers_tiles() -> None:
    config = MoEConfig(hidden=16, ffn_hidden=16, num_experts=2, top_k=1)
    layer = MoELayer(config, mock.Mock(tiles=SMALL[1]))
    on_gpu: Any = mock.Mock(is_cuda=True, dtype=BF16)
    chosen: Any = layer.compute.choice(on_gpu)  # type: ignore[attr-defined]
    assert chosen._tiles == SMALL[1]
    assert MoELayer(config).compute.choice(on_gpu)._tiles is None  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------- real ranks

TIMES = {  # milliseconds by rank, of SMALL; the last one does not fit on rank 2
    0: [5.0, 4.0, 1.0],
    1: [5.0, 4.5, 1.0],
    2: [1.0, 3.0, OutOfResources(400, 227, "shared memory")],
}


class Measuring:
    """Balancers of this rank measure as on a GPU, and the timer answers with ``answers``."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.works = 0

    def times(self, work: Any) -> list[float]:
        work()  # in the interpreter
        answer = self.answers[self.works]
        self.works += 1
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    def build(self, **config: Any) -> Any:
        timed = functools.partial(measure_tiles, times=self.times)
        with (
            mock.patch.object(agreed_tiles, "is_gpu", return_value=True),
            mock.patch.object(agreed_tiles, "CANDIDATES", SMALL),
            mock.patch.object(agreed_tiles, "_ROWS_PER_EXPERT", 3),
            mock.patch("feplb.kernels.measure_tiles.measure_tiles", timed),
        ):
            return build(NARROW, tiles="measure", **config)


def train(arm: Arm, compute: Any) -> dict[str, Any]:
    bits = {}
    for step in range(2):
        rows, weights = arm.rows(step=step)[0], arm.weights()
        out = arm.run(rows, weights, step=step, compute=compute)
        loss_of(out).backward()
        arm.check()
        found = {"out": out.detach(), **grads(rows=rows, weights=weights)}
        bits |= {f"step {step} {name}": tensor for name, tensor in found.items()}
    return bits


def agree(rank: int, num_ranks: int) -> dict[str, Any]:
    """What this rank computes with, and whether balanced bits are those of the owners alone."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("feplb").addHandler(handler)
    logging.getLogger("feplb").setLevel(logging.INFO)
    measuring = Measuring(TIMES[rank])
    with measuring.build() as balancer:
        compute = TritonSwiGLU(tiles=balancer.tiles)
        arm = Arm(rank, num_ranks, NARROW, balancer)
        seen = train(arm, compute)
    expected = train(Arm(rank, num_ranks, NARROW, None), compute)
    return {
        "tiles": balancer.tiles, "works": measuring.works, "moves": arm.num_moves,
        "differences": differences(seen, expected),
        "log": next(text for text in records if "grouped GEMM" in text),
    }  # fmt: skip


needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs TRITON_INTERPRET=1 before start"
)


@needs_interpreter
def test_ranks_that_measure_different_things_use_one_configuration() -> None:
    of_ranks = run_ranks(agree, NUM_RANKS, timeout_s=240)
    for rank, found in enumerate(of_ranks):
        assert found["tiles"] == SMALL[1]
        assert found["works"] == len(SMALL)
        assert found["moves"] > 0
        assert found["differences"] == []
        assert "agreed by ranks [0, 1, 2]: 4.500 ms on the slowest; here" in found["log"]
        last = "does not fit" if rank == 2 else "1.000 ms"
        assert found["log"].endswith(f"16x64x16 tiles, 4 warps, 1 stages: {last}")


def fail_to_measure(rank: int, num_ranks: int) -> tuple[str, list[str], bool]:
    """What building says where one rank cannot measure, how the next one differs, what is left."""
    build().close()  # what the first one makes for good
    answers: list[Any] = [1.0] * len(SMALL)
    if rank == 1:
        answers[1] = KeyError("no such register")  # as a compiler might
    gc.collect()
    before = resources_in_use()
    text = attempt(lambda: Measuring(answers).build())
    gc.collect()
    nothing_left = resources_in_use() == before
    with build() as balancer:
        arm = Arm(rank, num_ranks, PLAIN, balancer)
        wrong = differences(train(arm, None), train(Arm(rank, num_ranks, PLAIN, None), None))
    return text, wrong, nothing_left


@needs_interpreter
def test_a_rank_that_cannot_measure_is_named_on_all() -> None:
    of_ranks = run_ranks(fail_to_measure, NUM_RANKS, timeout_s=120)
    for rank, (text, wrong, nothing_left) in enumerate(of_ranks):
        told = "" if rank == 1 else "rank 1 could not build its Balancer: "
        why = r"failed on rank 1 \(cpu\): KeyError: 'no such register'"
        hint = r'Set tiles="default"'
        assert re.match(rf"RuntimeError: {told}measuring tiles .* {why}.*{hint}", text), text
        assert wrong == []
        assert nothing_left


def differ(rank: int, num_ranks: int) -> str:
    return attempt(lambda: build(tiles="measure" if rank else "default"))


def test_ranks_that_ask_for_different_things_are_told() -> None:
    for text in run_ranks(differ, 2):
        assert re.match(r"ValueError: ranks differ in config: .*tiles=.default", text), text


def on_one_rank(rank: int, num_ranks: int) -> Any:
    return agree_on_tiles(
        Peers(dist.group.WORLD), BalancerConfig(), (layer_spec(2, 512, 256, BF16),),
        torch.device("cuda", torch.cuda.current_device()),
    )  # fmt: skip


@pytest.mark.gpu
def test_ranks_on_a_gpu_agree() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEPLB_LANE", "ce")
        agreed = run_ranks(on_one_rank, 2, timeout_s=200)
    assert agreed[0] == agreed[1]
    assert agreed[0] in agreed_tiles.CANDIDATES
