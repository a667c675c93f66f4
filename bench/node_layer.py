"""Does balancing one MoE layer pay over the GPUs of a node, or of two? Started by bench/node.sh.

Every rank that torchrun starts is in one EP group; feplb splits it into domains by host. The router
does its work, then hands out choices that load the ranks unevenly: some routings, drawn from the
seed, met in turn. Each arm runs the whole layer: router, dispatch, experts, combine.

Arms: none, a Balancer that moves nothing, is the baseline; the policy is feplb; ceiling, without a
Balancer, has each rank's expert sizes scaled so that every rank of the group has the same rows (a
policy moves rows inside a domain only, so with several domains even a perfect one stays below it).
First every routing runs once in every arm: output and gradients of the policy must have the bits of
none on every rank. Then rounds: each runs all arms on one routing, in random order. A sample is
forward and backward, from a barrier until the slowest rank is done.
recovered = (none - policy) / (none - ceiling), where that gain exceeds the spread of every arm
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from layer_arms import CEILING, NONE, SIGMA, Arm, ForcedRouter, scaled
from layer_check import results_of
from node_figures import Loads, Measured, Place, print_tables, report_rows
from report import Report, arguments
from torch import Tensor

from feplb import Balancer, BalancerConfig, MoEConfig, MoELayer
from feplb.scheduler import POLICIES
from feplb.scheduler.workloads import Rows, lognormal_loads

T = TypeVar("T")

TIMEOUT_S = 120  # of a collective: a rank that is gone or stuck ends the others
NUM_ROUTINGS = 4
CHECKED = ("output", "grad of tokens", "grad of w1", "grad of w2", "grad of the router")
NO_GPU_LANE = (
    "This bench runs the host lane only so far; --cpu runs it on this machine's CPUs, which shows "
    "that it runs and not how fast a GPU is. bench/layer_time.py runs the layer over the GPUs of "
    "one machine, bench/gpu.sh all benches of GPUs."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The layer, per-rank tokens, and how many rounds are timed; the same on every rank."""

    hidden: int = 512
    ffn_hidden: int = 1024
    num_experts: int = 64  # over all ranks
    top_k: int = 4
    tokens: int = 512  # of each rank
    steps: int = 30


QUICK = Sizes(hidden=64, ffn_hidden=128, num_experts=32, top_k=2, tokens=64, steps=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Rows [R, E_local] of every expert, and the choices [R, T, k] of all tokens that give them."""

    counts: Rows
    choices: Rows

    @classmethod
    def of(cls, counts: Rows, top_k: int, seed: int) -> Routing:
        """Tokens in random order over the ranks, no expert twice in a token.

        Raises:
            ValueError: an expert has more rows than there are tokens.
        """
        num_tokens = int(counts.sum()) // top_k
        if counts.max() > num_tokens:
            raise ValueError(f"an expert has {counts.max()} rows, expected {num_tokens} at most")
        # Sorted by expert and cut into top_k columns: no expert fills more than one column.
        experts = np.repeat(np.arange(counts.size), counts.reshape(-1))
        by_token = experts.reshape(top_k, num_tokens).T
        mixed = np.random.default_rng(seed).permutation(by_token)
        return cls(counts=counts, choices=mixed.reshape(len(counts), -1, top_k))


def routings(num_ranks: int, sizes: Sizes, imbalance: float, seed: int) -> list[Routing]:
    """Skewed ones: max / mean of the ranks' rows is `imbalance` in each.

    Raises:
        ValueError: the sizes do not divide by each other, or cannot be routed.
    """
    total = num_ranks * sizes.tokens * sizes.top_k
    if num_ranks < 2 or sizes.num_experts % num_ranks or total % sizes.num_experts:
        raise ValueError(
            f"{num_ranks} ranks, num_experts={sizes.num_experts}, {total} rows; expected 2 ranks "
            "or more, experts that divide by the ranks, and rows (ranks x tokens x top_k) that "
            "divide by the experts"
        )
    return [
        Routing.of(
            lognormal_loads(
                num_ranks, sizes.num_experts // num_ranks, sigma=SIGMA, imbalance=imbalance,
                rows_per_expert=total // sizes.num_experts, seed=each,
            ),
            sizes.top_k, each,
        )
        for each in range(seed, seed + NUM_ROUTINGS)
    ]  # fmt: skip


def level(routing: Routing, seed: int) -> Routing:
    """The ceiling's: every rank has the mean, its experts in the same proportions."""
    mean = int(routing.counts.sum()) // len(routing.counts)
    counts = np.stack([scaled(sizes, mean) for sizes in routing.counts])
    return Routing.of(counts, routing.choices.shape[2], seed)


# -------------------------------------------------------------------------------------- one rank


def choose_device(options: argparse.Namespace) -> torch.device:
    """Where tensors live; SystemExit on a machine with GPUs, unless it was told to leave them."""
    if torch.cuda.is_available() and not options.cpu:
        raise SystemExit(NO_GPU_LANE)
    return torch.device("cpu")


def dispatcher_for(device: torch.device) -> str:
    """DeepEP where it can run."""
    has_deep_ep = device.type == "cuda" and importlib.util.find_spec("deep_ep") is not None
    return "deepep" if has_deep_ep else "all_to_all"


def config_of(options: argparse.Namespace, sizes: Sizes, dispatcher: str) -> MoEConfig:
    """The layer; in what DeepEP carries, where it is DeepEP."""
    return MoEConfig(
        hidden=sizes.hidden, ffn_hidden=sizes.ffn_hidden, num_experts=sizes.num_experts,
        top_k=sizes.top_k, seed=options.seed,
        dtype=torch.bfloat16 if dispatcher == "deepep" else torch.float32,
    )  # fmt: skip


class NodeLayer:
    """One rank's layer, tokens and Balancers. Collective; close it in the end."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
        group = dist.group.WORLD
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.policy: str = options.policy
        self.skewed = routings(self.num_ranks, sizes, options.imbalance, options.seed)
        self.even = [level(routing, options.seed) for routing in self.skewed]
        torch.manual_seed(options.seed)  # the router's weights: equal on every rank
        self.dispatcher = dispatcher_for(device)
        config = config_of(options, sizes, self.dispatcher)
        self.moe = MoELayer(config, None, group, dispatcher=self.dispatcher)
        self.router = ForcedRouter(sizes.hidden, sizes.num_experts, sizes.top_k)
        self.moe.router = self.router
        own = torch.Generator().manual_seed(options.seed * self.num_ranks + self.rank)
        shape = sizes.tokens, sizes.hidden
        self.tokens = torch.randn(shape, generator=own).requires_grad_()
        self.grad = torch.randn(shape, generator=own)
        most = max(int(routing.counts.sum(axis=1).max()) for routing in self.skewed)
        spec = config.layer_spec(self.num_ranks, max_rows=most)
        self._open = ExitStack()
        self.balancers = {
            policy: self._open.enter_context(
                Balancer(BalancerConfig(policy=policy, deadline_s=TIMEOUT_S / 2), group, [spec])
            )
            for policy in (NONE, self.policy)
        }
        if self.balancers[self.policy].policy == NONE:
            raise SystemExit("FEPLB_OFF=1 turns every policy into none: nothing to compare")

    def close(self) -> None:
        self._open.close()

    def routing(self, name: str, idx: int) -> Routing:
        """What this arm's tokens choose."""
        return (self.even if name == CEILING else self.skewed)[idx]

    def arm(self, name: str, idx: int) -> Arm:
        """An arm on the idx-th routing."""
        choices = torch.from_numpy(self.routing(name, idx).choices[self.rank])
        balancer = self.balancers.get(name)
        return Arm(
            forward=partial(self._forward, balancer, choices),
            grad_out=self.grad,
            leaves=(self.tokens, self.moe.w1, self.moe.w2, self.router.weight),
            balancer=balancer,
        )

    def _forward(self, balancer: Balancer | None, choices: Tensor) -> Tensor:
        self.moe.balancer, self.router.choices = balancer, choices
        out: Tensor = self.moe(self.tokens)
        return out

    def end_step(self) -> None:
        """Raise what went wrong on any rank; collective."""
        for balancer in self.balancers.values():
            balancer.check()


def loads_of(balancer: Balancer) -> Loads:
    """Of the latest forward."""
    call = balancer.last_call(0)
    if call is None:
        raise RuntimeError("the policy has run no call")
    sizes = call.moves[:, 4] - call.moves[:, 3]
    return Loads(
        before=int(call.loads_before[balancer.rank]),
        after=int(call.loads_after[balancer.rank]),
        moved=int(sizes[call.moves[:, 1] == balancer.rank].sum()),
    )


def check(layer: NodeLayer) -> list[Loads]:
    """Run every arm on every routing; this rank's loads under the policy, by routing. Collective.

    Raises:
        RuntimeError: on every rank, if on any one an arm got other rows than it should, or the
            policy's bits are not those of none.
    """
    wrong, loads = [], []
    for idx in range(NUM_ROUTINGS):
        results = {}
        for name in (NONE, layer.policy, CEILING):
            results[name] = results_of(layer.arm(name, idx))
            expected = layer.routing(name, idx).counts[layer.rank].tolist()
            if layer.moe.last_counts != expected:
                wrong.append(f"{name}: {layer.moe.last_counts} rows, expected {expected}")
        named = zip(CHECKED, results[layer.policy], results[NONE], strict=True)
        wrong += [
            f"routing {idx}: {what} of {layer.policy} has not the bits of {NONE}"
            for what, seen, truth in named
            if not torch.equal(seen.view(torch.uint8), truth.view(torch.uint8))
        ]
        loads.append(loads_of(layer.balancers[layer.policy]))
        layer.end_step()
    found = [f"rank {r}: {text}" for r, texts in enumerate(everywhere(wrong)) for text in texts]
    if found:
        raise RuntimeError("\n".join([*found, "Nothing was timed."]))
    return loads


def time_rounds(layer: NodeLayer, steps: Iterable[int]) -> dict[str, list[int]]:
    """Ns of the slowest rank, by arm and round; the same answer on every rank. Collective."""
    order, names = random.Random(0), (NONE, layer.policy, CEILING)
    mine: dict[str, list[int]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # collecting between rounds then looks at their own objects only
    gc.disable()
    for step in steps:
        for name in order.sample(names, len(names)):
            mine[name].append(time_arm(layer.arm(name, step % NUM_ROUTINGS)))
        layer.end_step()
        gc.collect()
    gc.enable()
    slowest = torch.tensor([mine[name] for name in names])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(names, slowest.tolist(), strict=True))


def time_arm(arm: Arm) -> int:
    """One sample of this rank, in ns."""
    for leaf in arm.leaves:
        leaf.grad = None
    dist.barrier()
    start = time.perf_counter_ns()
    arm.forward().backward(arm.grad_out)
    return time.perf_counter_ns() - start


def everywhere(value: T) -> list[T]:
    """``value`` of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# -------------------------------------------------------------------------------------- the run


def run(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    """The whole bench on this rank; the first one prints."""
    layer = NodeLayer(options, sizes, device)
    leads = layer.rank == 0
    places = everywhere(Place.of(layer.balancers[options.policy]))
    loads = everywhere(check(layer))
    if leads:
        report = Report(bench="node_layer", lane="host")
        report.header(ranks=layer.num_ranks, domains=len({p.domain for p in places}),
                      dispatcher=layer.dispatcher, threads=torch.get_num_threads())  # fmt: skip
        print(*(f"{f.name}={getattr(sizes, f.name)}" for f in fields(sizes)),
              f"seed={options.seed}")  # fmt: skip
        print("check: output and gradients have the same bits on every rank", flush=True)
    ns = time_rounds(layer, progress(sizes.steps, shown=leads and not options.quick))
    layer.close()
    if leads:
        measured = Measured(policy=options.policy, places=places, loads=loads, ns=ns)
        rows = report_rows(measured)
        print_tables(report, measured, rows)
        report.write(options.json, rows)


def progress(steps: int, *, shown: bool) -> Iterable[int]:
    """The numbers of the rounds, with a bar on stderr; tqdm's own thread is off."""
    if not shown:
        return range(steps)
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    bar: Iterable[int] = tqdm(range(steps), unit="round", mininterval=1.0)
    return bar


def parsed() -> tuple[argparse.Namespace, Sizes]:
    """What was asked for; a size that was not named is the default's, or --quick's."""
    parser = arguments(str(__doc__).splitlines()[0])
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, metavar="N")
    policies = [policy for policy in POLICIES if policy != NONE]
    parser.add_argument("--policy", default="greedy", choices=policies)
    parser.add_argument("--imbalance", type=float, default=1.5, help="max / mean of ranks' rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="leave the GPUs of this machine alone")
    parser.add_argument(
        "--check-only", type=int, metavar="RANKS",
        help="start nothing; say what speaks against this with RANKS ranks on this machine",
    )  # fmt: skip
    options = parser.parse_args()
    named = {f.name: getattr(options, f.name) for f in fields(Sizes)}
    if wrong := [name for name, value in named.items() if value is not None and value < 1]:
        parser.error(f"expected 1 or more: {', '.join(wrong)}")
    default = QUICK if options.quick else Sizes()
    return options, replace(default, **{k: v for k, v in named.items() if v is not None})


def refuse(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    """SystemExit with one sentence where so many ranks cannot run this."""
    try:
        routings(options.check_only, sizes, options.imbalance, options.seed)
        config = config_of(options, sizes, dispatcher_for(device))
        config.layer_spec(options.check_only, max_rows=0)
    except ValueError as error:
        raise SystemExit(f"node_layer.py: {error}") from None


def main() -> None:
    options, sizes = parsed()
    device = choose_device(options)
    if options.check_only is not None:
        refuse(options, sizes, device)
        return
    if not dist.is_torchelastic_launched():
        raise SystemExit("node_layer.py runs under torchrun: start it with bench/node.sh")
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    run(options, sizes, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
