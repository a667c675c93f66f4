"""How fast a lane carries bytes, by direction: measured before it is proven. Collective.

Out of a source: every rank pushes to its neighbour, so that each sends to one and takes in from
one. Into a destination: all others push to it at once, as the owners of a plan's only helper do;
each rank in its turn. The cost model charges copies to their source by the first rate and to their
destination by the second. Each is the slowest rank's, so that all ranks of a domain plan alike.

The host lane has one rate. There a source's thread copies, and a destination has no link that it
could take in by: how many sources get a core at once is the machine's affair, and what a start-up
saw of it would be its other work (4 ranks on 2 busy cores: 1 to 5 GB/s into one, 9 to 12 out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .costs import LaneRates
from .peers import DomainRanks, Peers

__all__ = ["measure_rates", "rate_alone", "rate_together"]

# How often a source pushes. Where it pushes alone the fastest time counts, and on a busy machine it
# takes many to be left in peace; with all at once the rate of the whole counts.
_TIMES_ALONE, _TIMES_TOGETHER = 24, 2
# More sources than these push less each, so that a turn takes no longer.
_MOST_AT_FULL_SIZE = 7


def measure_rates(
    peers: Peers, domain: DomainRanks, core: Any, num_bytes: int, *, has_links: bool
) -> LaneRates:
    """Rates of the lane, as every rank of the domain agrees on them; 0 where a rank is alone.

    Two ranks have one rate: what one sends is all that the other takes in. In a domain over several
    hosts, which have no common clock, all sources are taken to begin at the same time.

    Args:
        core: the C++ Domain, built and not yet proven. What its arenas hold is overwritten.
        num_bytes: of one copy; as many per rank must fit into every arena.
        has_links: a destination takes in by a link of its own; the same on all ranks.
    Raises:
        RuntimeError: a copy failed, on this rank or on another (named).
    Thread/stream: collective over the group, blocks. On 8 GPUs of 400 GB/s all send 6.4 GB, and
        each takes in 3.8 GB in its turn: a tenth of a second, at 64 MiB.
    """
    rank, num_ranks = domain.rank, domain.num_ranks

    def push(dst: int, size: int, times: int, *, takes_part: bool) -> list[list[int]]:
        """The clocks of those ranks of the domain that take part; collective."""
        said = peers.together(
            lambda: core.push_times(dst, size, times) if takes_part and size else []
        )
        clocks = [said[rank] for rank in domain.group_ranks if said[rank]]
        if domain.over_hosts:
            clocks = [[at - clock[0] for at in clock] for clock in clocks]
        return clocks

    out = push((rank + 1) % num_ranks, num_bytes, _TIMES_ALONE, takes_part=num_ranks > 1)
    step_bytes = core.copies_at_a_time * num_bytes
    out_gbps = min((rate_alone(clock, step_bytes) for clock in out), default=0.0)
    if not has_links:
        return LaneRates(out_gbps, out_gbps)
    size = num_bytes * _MOST_AT_FULL_SIZE // max(_MOST_AT_FULL_SIZE, num_ranks - 1) // 64 * 64
    into = [
        push(turn, size, _TIMES_TOGETHER, takes_part=rank != turn < num_ranks and num_ranks > 2)
        for turn in range(max(peers.gather(num_ranks)))
    ]
    step_bytes = core.copies_at_a_time * size
    rates_in = [rate_together(clocks, step_bytes) for clocks in into if clocks]
    return LaneRates(out_gbps, min(rates_in, default=out_gbps))


def rate_alone(clock: Sequence[int], step_bytes: int) -> float:
    """10^9 bytes per second of the fastest step: other work only ever slows a copy.

    Args:
        clock: when a source began, and when each of its steps had arrived, nanoseconds.
        step_bytes: what it pushed in each.
    """
    return step_bytes / float(np.diff(clock).min())


def rate_together(clocks: Sequence[Sequence[int]], step_bytes: int) -> float:
    """10^9 bytes per second that one destination takes in while all sources push.

    Example, steps of 10 bytes: one source from 0 to 20 ns in two steps, one from 10 to 30 ns in
    one. From 10 to 20 ns both push, one 10 bytes and the other 5: 1.5 * 10^9 bytes per second.

    Args:
        clocks: of each source, as ``rate_alone`` has them; ranks of one host share a clock.
    """
    first, last = max(clock[0] for clock in clocks), min(clock[-1] for clock in clocks)
    if last <= first:  # too few cores for all of them: they took turns, and all of it counts
        first, last = min(clock[0] for clock in clocks), max(clock[-1] for clock in clocks)
    steps = sum(
        float(np.diff(np.interp([first, last], clock, np.arange(len(clock)))).sum())
        for clock in clocks
    )
    return steps * step_bytes / (last - first)
