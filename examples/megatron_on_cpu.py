"""Lets megatron-core 0.16.1 train without a GPU: gloo, no Transformer Engine, no CUDA.

For examples and tests; on a GPU nothing of this is needed. ``patch_megatron`` changes torch.cuda
and Megatron in this process: streams and events do nothing, "cuda" means the CPU, and what 0.16.1
takes for granted about CUDA tensors holds for CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn")


class _Event:
    """An event of a device that is always ready."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Stream:
    """A stream of a device that has finished before it is asked."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...


def patch_torch() -> None:
    """Let torch.cuda and device="cuda" mean the CPU."""
    stream = _Stream()
    for name, value in {
        "current_device": lambda: CPU,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Event,
    }.items():
        setattr(torch.cuda, name, value)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    of_tensor: Any = torch.Tensor.type

    def type_of(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers compare names such as "torch.cuda.FloatTensor".
        answer = of_tensor(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    torch.Tensor.type = type_of  # type: ignore[method-assign, assignment]


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def patch_megatron() -> None:
    """Patch torch and Megatron-Core in this process; once."""
    if issubclass(torch.cuda.Stream, _Stream):
        return
    patch_torch()
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # gloo takes split sizes as lists only; on CUDA they become numpy arrays here.
        return tensor.tolist() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    # Defined with Transformer Engine only, but read by the router's linear layer (0.16.1).
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *_, **__: None
    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    torch.compiler.set_stance("force_eager")  # Megatron compiles small functions at first use
