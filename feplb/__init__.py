"""feplb: balances Mixture-of-Experts layers under expert parallelism, per micro-batch.

Importing needs no GPU and no compiler, and starts no thread.
"""

from .balancer import Balancer, CallRecord, Ticket
from .compute import ExpertCompute, SwiGLU
from .config import BalancerConfig, LayerSpec, TensorSpec
from .function_compute import as_compute
from .moe import MoEConfig, MoELayer

__version__ = "0.1.0"

__all__ = [
    "Balancer",
    "BalancerConfig",
    "CallRecord",
    "ExpertCompute",
    "LayerSpec",
    "MoEConfig",
    "MoELayer",
    "SwiGLU",
    "TensorSpec",
    "Ticket",
    "as_compute",
]
