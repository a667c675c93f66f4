"""A clock that stands still but where somebody waits, for benches that time what is made up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class VirtualTime:
    """Stands for the module ``time``; seconds."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return round(self.now * 1e9)

    def until(self, at: float) -> None:
        """Wait."""
        self.now = max(self.now, at)


@dataclass(frozen=True)
class Timed:
    """An event that passes at a time of the clock; seconds."""

    clock: VirtualTime
    at: float

    def query(self) -> bool:
        return self.clock.now >= self.at

    def synchronize(self) -> None:
        self.clock.until(self.at)

    def elapsed_time(self, last: Timed) -> float:
        return 1e3 * (last.at - self.at)
