"""Trains a byte-level MoE language model with expert parallelism, balanced by feplb.

  torchrun --nproc-per-node 4 examples/train_moe_lm.py --policy greedy
  python examples/train_moe_lm.py            one process that holds all experts

demo.py runs it twice with one seed, with policy none and greedy, and once with --kill-rank. All
ranks are on one machine (gloo, shared memory); each has its own micro-batch and its share of every
layer's experts. What feplb needs of a training loop: the Balancer around it, the model's MoELayers,
and check() between backward and the optimizer.

Leaves routing.json beside its record: the rows of every expert in every step, which bench/ and
`feplb simulate` replay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from byte_model import ByteLM, ModelConfig
from byte_text import Windows, read_bytes, standard_library
from torch import nn
from tqdm import tqdm

from feplb import Balancer, BalancerConfig, SwiGLU
from feplb.scheduler.traces import Trace, write_trace
from feplb.training import clip_grad_norm, expert_state_dict, sync_gradients

DEADLINE_S = 30.0  # of every wait; also how long a dead rank could stay unnoticed without notice


@dataclass(kw_only=True)
class RunRecord:
    """What a run leaves for reports; by step, and within a step by MoE layer."""

    policy: str
    memory: str = ""
    loss: list[float] = field(default_factory=list)  # mean of all ranks, nats per byte
    seconds: float = 0.0  # of all steps
    parameters_sha256: str = ""
    loads_before: list[list[list[int]]] = field(default_factory=list)  # rows per rank, as routed
    loads_after: list[list[list[int]]] = field(default_factory=list)  # rows per rank, as computed
    hottest_expert: list[list[int]] = field(default_factory=list)  # rows of the busiest expert
    num_moves: list[list[int]] = field(default_factory=list)
    rows_moved: list[list[int]] = field(default_factory=list)
    plan_us: list[list[float]] = field(default_factory=list)  # on rank 0
    lane: dict[str, int] = field(default_factory=dict)  # Balancer.lane_stats, sum over ranks

    def add_step(self, balancer: Balancer) -> None:
        """Record the latest forward call of every layer."""
        calls = [balancer.last_call(layer) for layer in range(len(balancer.layers))]
        made = [call for call in calls if call is not None]
        self.loads_before.append([call.loads_before.tolist() for call in made])
        self.loads_after.append([call.loads_after.tolist() for call in made])
        self.hottest_expert.append([int(call.counts.max()) for call in made])
        self.num_moves.append([len(call.moves) for call in made])
        self.rows_moved.append([call.num_rows_moved for call in made])
        self.plan_us.append([call.plan_us for call in made])


class DyingExperts(SwiGLU):
    """Experts that kill their process where a GEMM would run, and write down when."""

    def __init__(self, told: Path) -> None:
        super().__init__()
        self._told = told

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        self._told.write_text(repr(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a process outlived SIGKILL")


class Trainer:
    """One rank's model, data and optimizer.

    Args:
        args: of the command line, the same on every rank.
        config: of the model.
        balancer: of config's layers.
        group: all ranks; None means one rank.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: ModelConfig,
        balancer: Balancer,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.args = args
        self.balancer = balancer
        self.group = group
        self.rank = balancer.rank
        self.model = ByteLM(config, balancer, group)
        self.windows = Windows(
            read_bytes(args.text),
            num_windows=args.windows,
            length=config.context,
            seed=args.seed * balancer.num_ranks + self.rank,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        self.record = RunRecord(policy=args.policy, memory=str(balancer.memory))
        self.counts: list[list[list[int]]] = []  # by step, layer and expert, of all ranks

    def train(self) -> RunRecord:
        """All steps; the record is complete on rank 0."""
        record, losses = self.record, []
        is_quiet = self.rank != 0 or self.args.kill_rank is not None
        name = f"policy {self.args.policy:6}"
        start = time.monotonic()
        with tqdm(total=self.args.steps, desc=name, unit="step", disable=is_quiet) as progress:
            for step in range(self.args.steps):
                losses.append(self.step(step))
                record.add_step(self.balancer)
                calls = map(self.balancer.last_call, range(len(self.balancer.layers)))
                self.counts.append([call.counts.ravel().tolist() for call in calls if call])
                progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                progress.update()
        record.seconds = time.monotonic() - start
        ranks = self._gather((losses, self._hash(), self.balancer.lane_stats()))
        record.loss = [
            sum(by_rank) / len(ranks) for by_rank in zip(*(r[0] for r in ranks), strict=True)
        ]
        hashes = {rank[1] for rank in ranks}
        if len(hashes) > 1:
            raise RuntimeError(f"the ranks ended with different parameters: {sorted(hashes)}")
        record.parameters_sha256 = hashes.pop()
        record.lane = {name: sum(rank[2][name] for rank in ranks) for name in ranks[0][2]}
        return record

    def step(self, step: int) -> float:
        """One training step; returns this rank's loss."""
        if (self.rank, step) == (self.args.kill_rank, self.args.kill_step):
            self.model.moe_layers()[-1].compute = DyingExperts(self.args.out / "killed_at")
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = self.args.lr * min(1.0, (step + 1) / self.args.warmup)
        window, following = self.windows.draw()
        logits = self.model(window)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.balancer.check()  # nothing that went wrong on any rank gets past here
        sync_gradients(self.model, self.group, self.group)
        clip_grad_norm(self.model, 1.0, self.group)
        self.optimizer.step()
        self.model.update_router_biases(self.group)
        return loss.item()

    def _hash(self) -> str:
        """SHA-256 over all parameters, all ranks' experts in logical order."""
        digest = hashlib.sha256()
        for name, tensor in sorted(expert_state_dict(self.model, self.group).items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.balancer.num_ranks
        dist.all_gather_object(values, value, group=self.group)
        return values


def report_death(balancer: Balancer, error: RuntimeError, out: Path) -> None:
    """Write down when and how this rank learned of it. gloo may notice first, but names nobody."""
    if "peer rank" not in str(error):
        try:
            balancer.check()
        except RuntimeError as named:
            error = named
    story = {"named_at": time.monotonic(), "error": str(error)}
    (out / f"survivor{balancer.rank}.json").write_text(json.dumps(story))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="greedy", help="of feplb: none or greedy")
    parser.add_argument("--text", type=Path, default=standard_library(), help="a file or folder")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for <policy>.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--windows", type=int, default=4, help="of 128 bytes, per rank and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--kill-rank", type=int, help="the rank that dies, to show what follows")
    parser.add_argument("--kill-step", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    group = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    num_ranks = 1 if group is None else dist.get_world_size(group)
    config = ModelConfig(seed=args.seed)
    rows_per_rank = args.windows * config.context * config.top_k
    balancer_config = BalancerConfig(policy=args.policy, num_slots=4, deadline_s=DEADLINE_S)
    specs = config.layer_specs(num_ranks, rows_per_rank)
    with Balancer(balancer_config, group, specs) as balancer:
        trainer = Trainer(args, config, balancer, group)
        try:
            record = trainer.train()
        except RuntimeError as error:
            if args.kill_rank is None:
                raise
            report_death(balancer, error, args.out)
            return
        if balancer.rank == 0:
            routing = Trace(name="demo", recorded=np.array(trainer.counts), top_k=config.top_k)
            write_trace(args.out / "routing.json", routing)
            (args.out / f"{args.policy}.json").write_text(json.dumps(asdict(record)))
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
