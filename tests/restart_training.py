"""What torchrun runs for test_restart.py: a small MoE training that goes on from its checkpoint.

  torchrun ... restart_training.py FOLDER [--kill-rank RANK]

Each rank leaves in FOLDER, by life (torchrun's restart count) and rank: its losses, its checkpoints
and what it saw of the job, when it had started (started-LIFE-RANK.json) and when it had finished
(ended-LIFE-RANK.json). A rank that ends by itself, well or not, leaves left-LIFE-RANK; the one that
is killed leaves fell.json. Data is a function of rank and step.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

import feplb

NUM_RANKS, NUM_LAYERS = 4, 2
NUM_STEPS, CHECKPOINT_EVERY, KILL_STEP = 11, 3, 7  # the step after the second checkpoint is lost
TOKENS = 96
CONFIG = feplb.MoEConfig(hidden=32, ffn_hidden=48, num_experts=16, top_k=2, init_std=0.2)
MEAN, SKEW = 0.5, 0.1  # together they draw tokens to rank 0's experts
DEADLINE_S = 60.0  # of any wait; never reached


# --------------------------------------------------------------- what can be seen of a job


def processes_of(job: str) -> list[int]:
    """Every process that was started as a rank of this job, or by one that was."""
    mark = f"TORCHELASTIC_RUN_ID={job}".encode()
    return [pid for pid, text in _read_all("environ") if mark in text.split(b"\0")]


def mapped_names(job: str) -> list[str]:
    """The job's shared memory in the maps of any process: a mapping outlives its name."""
    paths = (line.split()[5] for _, text in _read_all("maps") for line in _with_path(text))
    return sorted({Path(path).name for path in paths if path.startswith(f"/dev/shm/feplb-{job}-")})


def names_in_shared_memory(job: str) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"feplb-{job}-*"))


def birth_of(pid: int) -> str:
    """When the process began, empty where there is none: a pid may be given out again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rsplit(")", 1)[1].split()[19]


def _read_all(kind: str) -> Iterator[tuple[int, bytes]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), (folder / kind).read_bytes()
        except OSError:  # another user's, or gone in the meantime
            continue


def _with_path(maps: bytes) -> Iterator[str]:
    lines = maps.decode(errors="replace").splitlines()
    return (line for line in lines if len(line.split()) > 5)


# ------------------------------------------------------------------------------ the training


class Model(nn.Module):
    """Two MoE layers and a dense head, the same at every start."""

    def __init__(self, balancer: feplb.Balancer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = [
            feplb.MoELayer(CONFIG, balancer, dist.group.WORLD, layer=layer)
            for layer in range(NUM_LAYERS)
        ]
        self.layers = nn.ModuleList(self.moe)
        self.head = nn.Linear(CONFIG.hidden, CONFIG.hidden)
        with torch.no_grad():
            for layer in self.moe:
                layer.router.weight[: CONFIG.num_experts // NUM_RANKS] += SKEW

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x)
        return out


class DyingExperts(feplb.SwiGLU):
    """Experts that kill their process where a GEMM would run, and write down in which call."""

    def __init__(self, balancer: feplb.Balancer, file: Path) -> None:
        super().__init__()
        self._balancer, self._file = balancer, file

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        call = self._balancer.last_call(NUM_LAYERS - 1)
        assert call is not None
        helpers = [dst_rank for _, _, dst_rank, _, _ in call.moves.tolist()]
        self._file.write_text(json.dumps({"pid": os.getpid(), "helpers": helpers}))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a process outlived SIGKILL")


class Life:
    """One rank between two starts of the job."""

    def __init__(self, folder: Path, balancer: feplb.Balancer) -> None:
        self.folder, self.balancer, self.rank = folder, balancer, balancer.rank
        self.job = os.environ["TORCHELASTIC_RUN_ID"]
        self.restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self.model = Model(balancer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.num_moves = 0

    def run(self, kill_rank: int | None) -> None:
        start_step = self.load()
        self.write("started", {**self.sight(), "start_step": start_step})
        for step in range(start_step, NUM_STEPS):
            if (self.restarts, self.rank, step) == (0, kill_rank, KILL_STEP):
                self.model.moe[-1].compute = DyingExperts(self.balancer, self.folder / "fell.json")
            self.train(step)
            if (step + 1) % CHECKPOINT_EVERY == 0:
                self.save(step + 1)
        parameters, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        hashes = {"parameters": sha256_of(parameters), "optimizer": sha256_of(optimizer)}
        self.write("ended", {**self.sight(), **hashes, "num_moves": self.num_moves})

    def train(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step * NUM_RANKS + self.rank)
        x = torch.randn(TOKENS, CONFIG.hidden, generator=generator)
        loss = (self.model(x + MEAN) - x.sin()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.balancer.check()
        feplb.training.sync_gradients(self.model, dist.group.WORLD, dist.group.WORLD)
        self.optimizer.step()
        calls = [self.balancer.last_call(layer) for layer in range(NUM_LAYERS)]
        self.num_moves += sum(len(call.moves) for call in calls if call is not None)
        with (self.folder / f"losses-{self.restarts}-{self.rank}").open("a") as file:
            file.write(f"{step} {loss.item().hex()}\n")

    def save(self, step: int) -> None:
        """This rank's part of a checkpoint; it is whole, under its name, or not there."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        part = self._part(step, self.rank)
        torch.save({**state, "step": step}, part.with_suffix(".unfinished"))
        part.with_suffix(".unfinished").replace(part)

    def load(self) -> int:
        """Go on from the latest checkpoint that all ranks have; returns its step, or 0."""
        for step in range(NUM_STEPS, 0, -1):
            if all(self._part(step, rank).exists() for rank in range(NUM_RANKS)):
                state = torch.load(self._part(step, self.rank), weights_only=True)
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                return int(state["step"])
        return 0

    def _part(self, step: int, rank: int) -> Path:
        return self.folder / f"checkpoint-{step}-{rank}.pt"

    def sight(self) -> dict[str, Any]:
        """What this rank sees of the job, beside its peers."""
        earlier = [
            json.loads(file.read_text())
            for life in range(self.restarts)
            for file in self.folder.glob(f"started-{life}-*.json")
        ]
        return {
            "pid": os.getpid(),
            "birth": birth_of(os.getpid()),
            "earlier": len(earlier),
            "alive": [seen["pid"] for seen in earlier if birth_of(seen["pid"]) == seen["birth"]],
            "mapped": mapped_names(self.job),
            "in /dev/shm": names_in_shared_memory(self.job),
        }

    def write(self, what: str, seen: dict[str, Any]) -> None:
        file = self.folder / f"{what}-{self.restarts}-{self.rank}.json"
        file.write_text(json.dumps(seen))


def sha256_of(state: Any) -> str:
    """Of every name, number and bit in a state_dict."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.numpy().tobytes())
        elif isinstance(value, dict):
            for key, entry in value.items():
                digest.update(str(key).encode())
                take(entry)
        elif isinstance(value, list):
            for entry in value:
                take(entry)
        else:
            digest.update(repr(value).encode())

    take(state)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-rank", type=int)
    args = parser.parse_args()
    # torchrun ends the survivors as soon as it sees the death, which may be before they have said
    # who died. They are to end by themselves.
    life, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    if life == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    atexit.register((args.folder / f"left-{life}-{rank}").touch)
    dist.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE_S))
    spec = CONFIG.layer_spec(NUM_RANKS, max_rows=NUM_RANKS * TOKENS * CONFIG.top_k)
    config = feplb.BalancerConfig(policy="greedy", deadline_s=DEADLINE_S)
    with feplb.Balancer(config, dist.group.WORLD, [spec] * NUM_LAYERS) as balancer:
        try:
            Life(args.folder, balancer).run(args.kill_rank)
        except RuntimeError:
            balancer.check()  # gloo may notice first, but names nobody
            raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
