"""feplb: balances Mixture-of-Experts layers under expert parallelism, per micro-batch.

Importing needs no GPU and no compiler, and starts no thread. A name is loaded when it is first
used, so that ``feplb doctor`` can say what is wrong where torch or the core cannot be loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .balancer import Balancer, CallRecord, Ticket
    from .compute import ExpertCompute, SwiGLU
    from .config import BalancerConfig, LayerSpec, TensorSpec
    from .device_swiglu import DeviceSwiGLU
    from .function_compute import as_compute
    from .moe import MoEConfig, MoELayer

__version__ = "0.1.0"

__all__ = [
    "Balancer",
    "BalancerConfig",
    "CallRecord",
    "DeviceSwiGLU",
    "ExpertCompute",
    "LayerSpec",
    "MoEConfig",
    "MoELayer",
    "SwiGLU",
    "TensorSpec",
    "Ticket",
    "as_compute",
]

_ROOMS = {
    "balancer": ("Balancer", "CallRecord", "Ticket"),
    "compute": ("ExpertCompute", "SwiGLU"),
    "device_swiglu": ("DeviceSwiGLU",),
    "config": ("BalancerConfig", "LayerSpec", "TensorSpec"),
    "function_compute": ("as_compute",),
    "moe": ("MoEConfig", "MoELayer"),
}


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
