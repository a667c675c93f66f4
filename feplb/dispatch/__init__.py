"""Phase 1: rows between ranks, by the EP backend."""

from feplb.dispatch.all_to_all import AllToAllDispatcher, DispatchHandle

__all__ = ["AllToAllDispatcher", "DispatchHandle"]
