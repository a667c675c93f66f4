"""The configuration of the grouped GEMM that all ranks use: measured at start-up, then agreed.

Every rank times every candidate on a layer of its own GPU; all take the one whose slowest rank is
the fastest, ties to the first in the list. It computes all 16-bit rows, kept and received, of all
layers and group sizes, for as long as the Balancer lives: nothing is tuned while a step runs.
Collective, and before the first call: nothing waits in a stream yet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .config import BalancerConfig, LayerSpec
from .kernels.tiles import CANDIDATES, TileConfig
from .peers import Peers

__all__ = ["agree_on_tiles", "fastest_for_all", "measured_layer"]

logger = logging.getLogger(__name__)

# Enough rows to fill a large GPU twice over; weights and their gradients of a GLM-5 expert are 151
# MB, so that all of it is 0.4 GB.
_EXPERTS, _ROWS_PER_EXPERT = 2, 1024


def agree_on_tiles(
    peers: Peers, config: BalancerConfig, layers: Sequence[LayerSpec], device: torch.device
) -> TileConfig | None:
    """Measure, unless the config says otherwise, and agree; the answer is the same on every rank.

    Returns:
        What DeviceSwiGLU takes as ``tiles``. None: use the default tiles, because the rows are not
        on a GPU, the config asks for them, or no layer is a SwiGLU with rows of 16 bits.
    Raises:
        RuntimeError: a rank could not measure (named, on all ranks), or no candidate fits them all.
    Thread/stream: collective over the group, blocks: on each GPU it compiles those of 36 kernels
        that are not in Triton's cache, and runs each for milliseconds on the current stream. Takes
        memory for 2 experts and 2048 rows of the layer measured, and gives it back.
    """
    if not is_gpu(device):
        return None
    layer = measured_layer(layers)
    if config.tiles == "default" or layer is None:
        why = 'tiles="default"' if config.tiles == "default" else "no SwiGLU with 16-bit rows"
        logger.info("grouped GEMM: the default tiles of each dtype (%s)", why)
        return None
    said = peers.together(lambda: _milliseconds(layer, device, peers.global_ranks[peers.rank]))
    best, slowest_ms = fastest_for_all(said)
    logger.info(
        "grouped GEMM: %s, agreed by ranks %s: %.3f ms on the slowest; here %s",
        CANDIDATES[best], peers.global_ranks, slowest_ms, _listed(said[peers.rank]),
    )  # fmt: skip
    return CANDIDATES[best]


def is_gpu(device: torch.device) -> bool:
    """Do kernels of this device have times worth measuring?"""
    return device.type == "cuda"


def measured_layer(layers: Sequence[LayerSpec]) -> LayerSpec | None:
    """The layer to measure with: of the SwiGLUs with 16-bit rows the one with most work per row."""
    fitting = [layer for layer in layers if _is_swiglu(layer) and layer.dtype.itemsize == 2]
    return max(fitting, key=lambda layer: layer.flops_per_row, default=None)


def _is_swiglu(layer: LayerSpec) -> bool:
    if len(layer.weights) != 2 or len(layer.weights[1].shape) != 2:
        return False
    hidden, width = layer.weights[1].shape
    shapes = [(spec.shape, spec.dtype) for spec in layer.weights]
    expected = [((2 * width, layer.hidden), layer.dtype), ((hidden, width), layer.dtype)]
    return hidden == layer.hidden and shapes == expected


def fastest_for_all(milliseconds: Sequence[Sequence[float | None]]) -> tuple[int, float]:
    """The candidate whose slowest rank is the fastest, and its time there.

    Example: rank 0 needs [3.0, 2.0, 1.0], rank 1 [3.0, 4.0, None] -> (0, 3.0).

    Args:
        milliseconds: [num_ranks][num_candidates]; None where it does not fit.
    Raises:
        RuntimeError: there is none that fits on every rank.
    """
    worst = [
        (max(times), candidate)
        for candidate, times in enumerate(zip(*milliseconds, strict=True))
        if None not in times
    ]
    if not worst:
        raise RuntimeError(
            "no tile configuration of the grouped GEMM fits the GPUs of all ranks. Set "
            'tiles="default" in the BalancerConfig and hand run_experts another compute.'
        )
    slowest_ms, best = min(worst)
    return best, slowest_ms


def _milliseconds(layer: LayerSpec, device: torch.device, global_rank: int) -> list[float | None]:
    """What each candidate takes on this rank; None where it does not fit."""
    from .kernels.measure_tiles import measure_tiles

    problem, measured = "", {}
    try:
        found = measure_tiles(
            layer.hidden, layer.weights[1].shape[1], dtype=layer.dtype, device=device,
            rows_per_expert=_ROWS_PER_EXPERT, num_experts=_EXPERTS, candidates=CANDIDATES,
        )  # fmt: skip
        measured = {each.tiles: each.milliseconds for each in found}
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise classes of their own
        problem = f"{type(error).__name__}: {error}"
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    # Outside of the handler: its traceback would keep the tensors.
    if problem:
        raise RuntimeError(
            f"measuring tiles of the grouped GEMM failed on rank {global_rank} ({device}): "
            f'{problem}. Set tiles="default" in the BalancerConfig to do without.'
        )
    return [measured.get(tiles) for tiles in CANDIDATES]


def _listed(milliseconds: Sequence[float | None]) -> str:
    times = ("does not fit" if ms is None else f"{ms:.3f} ms" for ms in milliseconds)
    return ", ".join(f"{tiles}: {time}" for tiles, time in zip(CANDIDATES, times, strict=True))
