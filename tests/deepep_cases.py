"""What the tests of DeepEP share: arms (stand-in or the real package), and many programs per spawn.

An arm is an API of DeepEP and a number of ranks. A program is a function of a Kit, run on every
rank; each test looks at what one program returned. All numbers in a Case are small integers and
powers of two, so that every sum is exact in bfloat16 and a test can ask for equal bits.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepep_stand_in
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from feplb.dispatch import DeepEPDispatcher

HIDDEN = 256  # V2 takes multiples of it
MOST_TOKENS = 64
TOP_K = 3


@dataclass(frozen=True)
class Arm:
    """Where programs run."""

    api: str
    num_ranks: int
    is_real: bool = False

    def __str__(self) -> str:
        return f"{'real-' * self.is_real}{self.api}-{self.num_ranks}ranks"


def make_arms(apis: Sequence[str] = ("v1", "v2")) -> list[Any]:
    """Every API on 2 and 4 ranks of the stand-in; and on as many GPUs, where deep_ep is installed.

    Where it is not, one skipped arm stands for all of these.
    """
    arms = [Arm(api, n, real) for real in (False, True) for api in apis for n in (2, 4)]
    num_gpus = torch.cuda.device_count() if importlib.util.find_spec("deep_ep") else 0
    missing = pytest.mark.skip(reason="needs deep_ep and 2 GPUs")
    marks = [pytest.mark.gpu] if num_gpus >= 2 else [pytest.mark.gpu, missing]
    fitting = [arm for arm in arms if not arm.is_real or arm.num_ranks <= num_gpus]
    if num_gpus < 2:
        fitting.append(Arm(apis[0], 2, is_real=True))
    return [pytest.param(arm, id=str(arm), marks=marks if arm.is_real else []) for arm in fitting]


@dataclass(frozen=True)
class Kit:
    """An arm on one rank."""

    arm: Arm
    rank: int
    group: dist.ProcessGroup
    device: str

    @property
    def num_ranks(self) -> int:
        return self.arm.num_ranks

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) if self.arm.is_real else (torch.bfloat16, torch.float32)

    def dispatcher(self, **options: Any) -> DeepEPDispatcher:
        if self.arm.api == "v2":
            options.setdefault("num_max_tokens_per_rank", MOST_TOKENS)
        return DeepEPDispatcher(self.group, api=self.arm.api, **options)


def enter(rank: int, arm: Arm) -> Kit:
    """Make `import deep_ep` work in this rank's process."""
    if arm.is_real:
        torch.cuda.set_device(rank)
        return Kit(arm, rank, dist.new_group(backend="nccl"), "cuda")
    version = "1.2.1" if arm.api == "v1" else "2.1.0"
    deepep_stand_in.install(version, (torch.bfloat16, torch.float32))
    world = dist.group.WORLD
    assert world is not None
    return Kit(arm, rank, world, "cpu")


Program = Callable[[Kit], Any]


def _run_all(
    rank: int, num_ranks: int, arm: Arm, programs: Mapping[str, Program]
) -> dict[str, tuple[Any, str]]:
    kit = enter(rank, arm)
    outcomes: dict[str, tuple[Any, str]] = {}
    for name, program in programs.items():
        try:
            outcomes[name] = program(kit), ""
        except Exception:
            outcomes[name] = None, traceback.format_exc()
            break  # the peers may be waiting: what follows would not meet them
    return outcomes


class Runs:
    """What all programs of a file returned, on all ranks of one arm; one spawn."""

    def __init__(self, arm: Arm, programs: Mapping[str, Program]) -> None:
        self.arm = arm
        self.by_rank = run_ranks(_run_all, arm.num_ranks, arm, programs, timeout_s=120)

    def of(self, program: Program) -> list[Any]:
        """By rank what the program returned; the first error of a rank fails the test."""
        for outcomes in self.by_rank:
            for name, (_, error) in outcomes.items():
                assert not error, f"{name}: {error}"
        return [outcomes[program.__name__][0] for outcomes in self.by_rank]


def named(*programs: Program) -> dict[str, Program]:
    return {program.__name__: program for program in programs}


# ---------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One rank's part of a dispatch, and a gradient of what the combine returns."""

    tokens: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    grad: Tensor


def make_case(
    num_tokens: Sequence[int], *, rank: int, num_experts: int = 8, masked: bool = True
) -> Case:
    """Up to 9 tokens [T, H] that start with 1, 2, ...; with `masked` some choices are -1."""
    generator = torch.Generator().manual_seed(100 * rank + num_tokens[rank])
    count = num_tokens[rank]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    topk_idx = torch.rand(count, num_experts, generator=generator).argsort(1)[:, :TOP_K]
    topk_idx = topk_idx.contiguous()
    if masked:
        topk_idx[1::3, 1] = -1
        topk_idx[4::5] = -1
    tokens = integers(-2, 2, count, HIDDEN)
    tokens[:, 0] = torch.arange(1, count + 1)
    return Case(
        tokens=tokens.float(),
        topk_idx=topk_idx,
        topk_weights=2.0 ** integers(-1, 1, count, TOP_K),
        grad=integers(-2, 2, count, HIDDEN).float(),
    )


def make_scales(num_experts: int = 8) -> Tensor:
    """[E, H]: expert e multiplies its rows by these powers of two."""
    signs = 1 - 2 * (torch.arange(num_experts * HIDDEN).view(num_experts, HIDDEN) % 3 == 1).float()
    return signs * 2.0 ** (torch.arange(num_experts) % 2)[:, None]


def dense_reference(case: Case, scales: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one rank's tokens, with all experts at hand, in fp64.

    `scales` are the gradients of the expert scales [E, H] from these tokens alone.
    """
    leaves = [case.tokens, case.topk_weights, scales]
    tokens, weights, scales = (leaf.double().requires_grad_() for leaf in leaves)
    chosen = scales[case.topk_idx.clamp(min=0)] * (case.topk_idx >= 0)[..., None]
    out = (tokens[:, None] * chosen * weights[..., None]).sum(1)
    grads = torch.autograd.grad(out, [tokens, weights, scales], case.grad.double())
    return {"out": out.detach(), **dict(zip(("tokens", "weights", "scales"), grads, strict=True))}


def forget_deep_ep() -> dict[str, Any]:
    """Make `import deep_ep` fail; returns what undoes it, for sys.modules.update."""
    hidden = {name: sys.modules[name] for name in ("deep_ep", "deep_ep.utils")}
    sys.modules.pop("deep_ep.utils")
    sys.modules["deep_ep"] = None  # type: ignore[assignment]
    return hidden


def refusal_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
