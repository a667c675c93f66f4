"""The named workloads that benches and simulations loop over: WORKLOADS and make_counts().

Everything comes from (name, seed, step, layer) and the sizes alone; the micro-batch before a step
is step - 1. max / mean is meant over ranks, MaxVio over experts: (max - mean) / mean of the
experts' loads (arXiv 2408.15664, eq. 4).

calibrated             workloads.calibrated(): the loads of arXiv 2604.19654
W0_balanced            round robin: every expert the same
W1_hot_expert_set      3 of 4 tokens select from the hot experts [0, max(top_k, num_experts / 4))
W2_hot_rank            the same law, drawn anew: the hot experts are the first ranks' as it is
W3_spread_hot_experts  as W1, with every other expert hot: half of them, spread over all ranks
W4_source_ragged       from all experts, but rank r has tokens in proportion to r + 1
W5_zero_expert_rank    the first half of the experts, and the ranks they live on, get nothing
W6_rotating_hotspot    as W1, the hot experts move on every 3 steps
W7_burst               from all experts; in every 4th step half of the tokens from the hot ones
maxvio_0.2, _1, _4     lognormal popularity, sigma such that MaxVio is 0.2, 1, 4; fresh each step
zipf_1.5, _2, _3       Zipf popularity, exponent such that max / mean is that; fresh each step
domain_mix             each rank's sequences from random domains of a trace of domains
replay                 the steps of a trace in turn, from the start again after the last

W0 to W7 follow routing_for_step() of benchmarks/moe/token_imbalance in NVIDIA/Megatron-LM#7488, at
f5c50249: the same laws, other random numbers. A token selects top_k different experts, equally
likely, and the tokens of all ranks select alike. Its text says more of two of them than its code
does: W2 is W1 there, and W4 has equal sources; the raggedness here is ours.
The MaxVio axis is that of vllm-project/vllm#57598; Zipf loads with a wanted max / mean of the ranks
are UltraEP's (tests/test_solving.py), which keeps rank 0 the hottest; here the ranks change places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from feplb.scheduler.shares import (
    Rows,
    Weights,
    apportion,
    capped,
    clipped_shares,
    random_stream,
    spread,
    with_imbalance,
)
from feplb.scheduler.traces import Trace
from feplb.scheduler.workloads import calibrated_by_source

# Sequences in a rank's micro-batch of domain_mix, each of one domain: a few long ones are usual.
MIX_SEQUENCES = 4


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One micro-batch of one layer to draw; see make_counts()."""

    name: str
    ep_size: int
    seed: int
    step: int
    layer: int
    num_experts: int
    num_tokens: int
    top_k: int
    trace: Trace | None

    def stream(self) -> np.random.RandomState:
        return random_stream(self.name, self.seed, self.layer, self.step)

    @property
    def hot_width(self) -> int:
        """Hot experts of W1, W2, W6 and W7."""
        return max(self.top_k, self.num_experts // 4)

    def scaled(self, popularity: Weights | Rows) -> Rows:
        """Every rank's tokens select with this popularity, exactly: [ep_size, num_experts]."""
        most = self.ep_size * self.num_tokens
        return spread(capped(apportion(popularity, most * self.top_k), most), self.ep_size)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A named workload.

    Args:
        by_source: selections that the tokens of each rank make, [ep_size, num_experts].
        needs_trace: make_counts() wants a trace for it.
    """

    by_source: Callable[[Draw], Rows]
    needs_trace: bool = False


def make_counts(
    name: str,
    ep_size: int,
    *,
    seed: int,
    step: int,
    layer: int = 0,
    num_experts: int | None = None,
    num_tokens: int = 4096,
    top_k: int | None = None,
    trace: Trace | None = None,
) -> Rows:
    """Counts [ep_size, num_experts / ep_size] by owner of one micro-batch of a named workload.

    They sum to ep_size * num_tokens * top_k, and no expert has more than ep_size * num_tokens.

    Args:
        name: one of WORKLOADS.
        ep_size: ranks; must divide num_experts.
        seed, step, layer: 0 or more; alone decide the counts, together with name and sizes.
        num_experts, top_k: 128 and 8 if left out, or the trace's.
        num_tokens: tokens per rank (their mean, in W4).
        trace: for the workloads that replay one; its layers are the layers.
    Raises:
        ValueError: no such name, a wrong size, or a workload that these sizes cannot have, such
            as maxvio_4 with 8 experts and top_k=2.
    """
    by_source = make_by_source(
        name,
        ep_size,
        seed=seed,
        step=step,
        layer=layer,
        num_experts=num_experts,
        num_tokens=num_tokens,
        top_k=top_k,
        trace=trace,
    )
    counts: Rows = by_source.sum(axis=0).reshape(ep_size, -1)
    return counts


def make_by_source(
    name: str,
    ep_size: int,
    *,
    seed: int,
    step: int,
    layer: int = 0,
    num_experts: int | None = None,
    num_tokens: int = 4096,
    top_k: int | None = None,
    trace: Trace | None = None,
) -> Rows:
    """As make_counts(), by source rank and not yet summed: [ep_size, num_experts]."""
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r}, expected one of {', '.join(WORKLOADS)}")
    if WORKLOADS[name].needs_trace != (trace is not None):
        wanted = "a trace" if trace is None else "no trace"
        raise ValueError(f"{name}: trace={trace and trace.name}, expected {wanted}")
    usual = (128, 8) if trace is None else (trace.num_experts, trace.top_k)
    draw = Draw(
        name=name,
        ep_size=ep_size,
        seed=seed,
        step=step,
        layer=layer,
        num_experts=usual[0] if num_experts is None else num_experts,
        num_tokens=num_tokens,
        top_k=usual[1] if top_k is None else top_k,
        trace=trace,
    )
    _check(draw)
    return WORKLOADS[name].by_source(draw)


def _check(draw: Draw) -> None:
    for field in ("seed", "step", "layer"):
        if getattr(draw, field) < 0:
            raise ValueError(f"{draw.name}: {field}={getattr(draw, field)}, expected 0 or more")
    if draw.num_tokens < 1:
        raise ValueError(f"{draw.name}: num_tokens={draw.num_tokens}, expected 1 or more")
    if draw.ep_size < 1 or draw.num_experts < 1 or draw.num_experts % draw.ep_size:
        raise ValueError(
            f"{draw.name}: ep_size={draw.ep_size}, expected a divisor of num_experts="
            f"{draw.num_experts}"
        )
    if not 1 <= draw.top_k <= draw.num_experts:
        raise ValueError(
            f"{draw.name}: top_k={draw.top_k}, expected 1 to num_experts={draw.num_experts}"
        )
    if draw.trace is not None:
        seen = draw.num_experts, draw.top_k
        if seen != (draw.trace.num_experts, draw.trace.top_k):
            raise ValueError(
                f"{draw.name}: num_experts, top_k = {seen}, expected "
                f"{(draw.trace.num_experts, draw.trace.top_k)} of {draw.trace.name}; leave them out"
            )


def _calibrated(draw: Draw) -> Rows:
    rows = calibrated_by_source(
        draw.ep_size,
        seed=draw.seed,
        step=draw.step,
        layer=draw.layer,
        num_experts=draw.num_experts,
        num_tokens=draw.num_tokens,
        top_k=draw.top_k,
    )
    return np.stack([capped(row, draw.num_tokens) for row in rows])


# ------------------------------------------------------------------------- Megatron's W0 to W7


def _choices(stream: np.random.RandomState, num_tokens: int, pool: Rows, top_k: int) -> Rows:
    """Each token's top_k different experts of the pool, equally likely: [num_tokens, top_k]."""
    keys = stream.random_sample((num_tokens, pool.size))
    return pool[np.argpartition(keys, top_k - 1, axis=1)[:, :top_k]]


def _balanced(draw: Draw) -> Rows:
    selections = np.arange(draw.num_tokens * draw.top_k)
    row = np.bincount(selections % draw.num_experts, minlength=draw.num_experts)
    return np.tile(row.astype(np.int64), (draw.ep_size, 1))


def _ragged(draw: Draw) -> Rows:
    tokens = apportion(np.arange(1.0, draw.ep_size + 1), draw.ep_size * draw.num_tokens)
    pool = np.arange(draw.num_experts)
    chosen = _choices(draw.stream(), int(tokens.max()), pool, draw.top_k)
    return np.stack(
        [np.bincount(chosen[:n].ravel(), minlength=draw.num_experts) for n in tokens.tolist()]
    ).astype(np.int64)


def _hot(pool_of: Callable[[Draw], tuple[Rows, int]]) -> Workload:
    """Of a function that says the hot experts, and how many tokens of each rank select from them.

    The other tokens select from all experts.
    """

    def by_source(draw: Draw) -> Rows:
        pool, num_hot = pool_of(draw)
        if num_hot and pool.size < draw.top_k:
            raise ValueError(
                f"{draw.name}: top_k={draw.top_k}, expected at most the {pool.size} of "
                f"{draw.num_experts} experts that tokens select from"
            )
        stream, everyone = draw.stream(), np.arange(draw.num_experts)
        chosen = [_choices(stream, draw.num_tokens - num_hot, everyone, draw.top_k)]
        if num_hot:
            chosen.append(_choices(stream, num_hot, pool, draw.top_k))
        row = np.bincount(np.concatenate(chosen).ravel(), minlength=draw.num_experts)
        return np.tile(row.astype(np.int64), (draw.ep_size, 1))

    return Workload(by_source=by_source)


def _three_in_four(draw: Draw) -> int:
    return draw.num_tokens - (draw.num_tokens + 3) // 4  # all but tokens 0, 4, 8, ...


def _first(draw: Draw) -> tuple[Rows, int]:
    return np.arange(draw.hot_width), _three_in_four(draw)


def _every_other(draw: Draw) -> tuple[Rows, int]:
    width = max(draw.top_k, draw.num_experts // 2)
    pool = np.unique(2 * np.arange(width) % draw.num_experts)
    everyone = np.arange(draw.num_experts)
    return pool if pool.size >= draw.top_k else everyone, _three_in_four(draw)


def _upper_half(draw: Draw) -> tuple[Rows, int]:
    return np.arange(draw.num_experts // 2, draw.num_experts), draw.num_tokens


def _rotating(draw: Draw) -> tuple[Rows, int]:
    first = draw.step // 3 * draw.hot_width
    return (first + np.arange(draw.hot_width)) % draw.num_experts, _three_in_four(draw)


def _burst(draw: Draw) -> tuple[Rows, int]:
    num_hot = (draw.num_tokens + 1) // 2 if draw.step % 4 == 3 else 0
    return np.arange(draw.hot_width), num_hot


# --------------------------------------------------------------------------- wanted imbalance


def _maxvio(wanted: float) -> Workload:
    """Popularity exp(sigma * normal), sigma such that MaxVio over the experts is `wanted`."""

    def by_source(draw: Draw) -> Rows:
        most = draw.num_experts / draw.top_k - 1
        if wanted > most:
            raise ValueError(
                f"{draw.name}: {draw.num_experts} experts at top_k={draw.top_k} reach MaxVio "
                f"{most:g} at most, as a token selects an expert once; take more experts"
            )
        normal = draw.stream().standard_normal(draw.num_experts)
        return draw.scaled(with_imbalance(np.exp(normal), 1 + wanted))

    return Workload(by_source=by_source)


def _zipf(wanted: float) -> Workload:
    """Popularity place ** -p, p such that max / mean of the ranks is `wanted`.

    The experts of the hottest rank have the first places, and so on; which rank is how hot, and
    which expert of a rank, is drawn.
    """

    def by_source(draw: Draw) -> Rows:
        place = np.arange(1.0, draw.num_experts + 1)

        def shares(power: float) -> Weights:  # [ep_size, num_local_experts], the hottest first
            flat = clipped_shares(place[None] ** -power, 1 / draw.top_k)
            return flat.reshape(draw.ep_size, -1)

        low, high = 0.0, 8.0
        for _ in range(60):
            middle = (low + high) / 2
            is_below = shares(middle)[0].sum() * draw.ep_size < wanted
            low, high = (middle, high) if is_below else (low, middle)
        reached = shares(high)[0].sum() * draw.ep_size
        if reached < wanted * (1 - 1e-6):
            raise ValueError(
                f"{draw.name}: {draw.ep_size} ranks reach max / mean {reached:.3f} at most; "
                "take more ranks, or more experts per rank"
            )
        stream = draw.stream()
        by_rank = shares(high)[stream.permutation(draw.ep_size)]
        return draw.scaled(np.concatenate([stream.permutation(of_rank) for of_rank in by_rank]))

    return Workload(by_source=by_source)


# ------------------------------------------------------------------------------------ of traces


def _domain_mix(draw: Draw) -> Rows:
    """Each rank has MIX_SEQUENCES sequences, each of one domain; its counts are multinomial."""
    assert draw.trace is not None
    domains = range(draw.trace.num_steps)
    shares = np.stack([draw.trace.popularity(domain, draw.layer) for domain in domains])
    stream = draw.stream()
    mixes = stream.randint(len(shares), size=(draw.ep_size, MIX_SEQUENCES))
    selections = draw.num_tokens * draw.top_k
    rows = [stream.multinomial(selections, shares[mix].mean(axis=0)) for mix in mixes]
    return np.stack([capped(row, draw.num_tokens) for row in rows])


def _replay(draw: Draw) -> Rows:
    assert draw.trace is not None
    return draw.scaled(draw.trace.selections(draw.step % draw.trace.num_steps, draw.layer))


WORKLOADS: dict[str, Workload] = {
    "calibrated": Workload(by_source=_calibrated),
    "W0_balanced": Workload(by_source=_balanced),
    "W1_hot_expert_set": _hot(_first),
    "W2_hot_rank": _hot(_first),
    "W3_spread_hot_experts": _hot(_every_other),
    "W4_source_ragged": Workload(by_source=_ragged),
    "W5_zero_expert_rank": _hot(_upper_half),
    "W6_rotating_hotspot": _hot(_rotating),
    "W7_burst": _hot(_burst),
    **{f"maxvio_{wanted:g}": _maxvio(wanted) for wanted in (0.2, 1.0, 4.0)},
    **{f"zipf_{wanted:g}": _zipf(wanted) for wanted in (1.5, 2.0, 3.0)},
    "domain_mix": Workload(by_source=_domain_mix, needs_trace=True),
    "replay": Workload(by_source=_replay, needs_trace=True),
}
