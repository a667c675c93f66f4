"""Phase 1: rows between ranks, by the EP backend."""

from .all_to_all import AllToAllDispatcher, DispatchHandle
from .deepep import DeepEPDispatcher, DeepEPHandle

__all__ = ["AllToAllDispatcher", "DeepEPDispatcher", "DeepEPHandle", "DispatchHandle"]
