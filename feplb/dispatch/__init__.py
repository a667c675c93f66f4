"""Phase 1: rows between ranks, by the EP backend."""

from .all_to_all import AllToAllDispatcher, DispatchHandle

__all__ = ["AllToAllDispatcher", "DispatchHandle"]
