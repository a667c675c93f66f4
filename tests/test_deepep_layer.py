"""MoELayer through DeepEPDispatcher: against all-to-all, recomputed, and with a Balancer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepep_cases import HIDDEN, Kit, Runs, make_arms, named, refusal_of
from test_moe_layer import RecordingBalancer, grads_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from feplb import Balancer, BalancerConfig
from feplb.moe import MoEConfig, MoELayer

CONFIG = MoEConfig(
    hidden=HIDDEN, ffn_hidden=32, num_experts=8, top_k=3, init_std=0.3, dtype=torch.bfloat16
)


def make_layer(kit: Kit, balancer: Any = None, **changes: Any) -> MoELayer:
    config = dataclasses.replace(CONFIG, **changes)
    dispatcher = kit.dispatcher(check_choices=False)
    return MoELayer(config, balancer, kit.group, dispatcher=dispatcher).to(kit.device)


def inputs_of(kit: Kit, dtype: torch.dtype, num_tokens: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(50 + kit.rank)
    count = 0 if kit.rank == 1 and kit.num_ranks > 2 else num_tokens
    # Leaning towards some experts, so that a balancer has something to move.
    x = torch.randn(count, HIDDEN, generator=generator) + 2 * torch.linspace(-1, 1, HIDDEN)
    return x.to(kit.device, dtype).requires_grad_()


def train_bits(layer: Callable[[Tensor], Tensor], module: MoELayer, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one step."""
    out = layer(x)
    out.backward(torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out).to(out.dtype))
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **grads_of(module)}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def repeats_and_recomputes(kit: Kit) -> list[bool]:
    """The same bits again, recomputed by both checkpoints, and from a copy of the layer."""
    runs = []
    for kind in ("plain", "again", "reentrant", "non-reentrant", "copied"):
        module = make_layer(kit)
        layer: Any = module
        if kind.endswith("reentrant"):
            layer = functools.partial(checkpoint, module, use_reentrant=kind == "reentrant")
        if kind == "copied":
            module = layer = copy.deepcopy(module)
        runs.append(train_bits(layer, module, inputs_of(kit, torch.bfloat16)))
    return [same_bits(runs[0], other) for other in runs[1:]]


# ----------------------------------------------------------------------- against all-to-all


def against_all_to_all(kit: Kit) -> dict[str, float]:
    """Differences between the dispatchers, each over what the derivation in its test allows."""
    dtype = kit.dtypes[-1]
    plain = MoELayer(dataclasses.replace(CONFIG, dtype=dtype), None, kit.group).to(kit.device)
    largest: dict[str, Tensor] = {}
    dispatch, combine = plain.dispatcher.dispatch, plain.dispatcher.combine

    def watching_dispatch(*args: Any, **kwargs: Any) -> Any:
        rows, handle = dispatch(*args, **kwargs)
        rows.register_hook(lambda grad: largest.update(x=most(grad)))
        return rows, handle

    def watching_combine(rows: Tensor, *args: Any) -> Any:
        largest["out"] = most(rows)
        return combine(rows, *args)

    plain.dispatcher.__dict__.update(dispatch=watching_dispatch, combine=watching_combine)
    expected = train_bits(plain, plain, inputs_of(kit, dtype))
    layer = make_layer(kit, dtype=dtype)
    got = train_bits(layer, layer, inputs_of(kit, dtype))
    off = {name: float(most(got[name] - tensor)) for name, tensor in expected.items()}
    for magnitude in largest.values():
        dist.all_reduce(magnitude, dist.ReduceOp.MAX, group=kit.group)
    half_unit = torch.finfo(dtype).eps / 2
    allowed = {
        "out": 4 * half_unit * float(largest["out"]),
        "x": half_unit * (4 * CONFIG.top_k * float(largest["x"]) + 2 * float(most(expected["x"]))),
        "router.weight": 2**-23 * HIDDEN * float(most(expected["router.weight"])),
    }
    return {name: off[name] / allowed.get(name, 1.0) for name in off if off[name]}


def most(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.detach().float().abs().flatten(), tensor.new_zeros(1)]).max()


# ---------------------------------------------------------------------------- with a balancer


def greedy_against_none(kit: Kit) -> list[tuple[bool, int]]:
    """Per dtype: (all bits of three steps are equal, rows that greedy moved)."""
    if kit.arm.is_real:
        return []  # the host lane balances CPU tensors
    outcomes = []
    for dtype in kit.dtypes:
        spec = dataclasses.replace(CONFIG, dtype=dtype).layer_spec(kit.num_ranks, 256)
        arms: dict[str, list[dict[str, Tensor]]] = {"none": [], "greedy": []}
        num_moved = 0
        for policy, bits in arms.items():
            config = BalancerConfig(policy=policy, deadline_s=15)
            with Balancer(config, kit.group, layers=[spec]) as balancer:
                for step in range(3):
                    layer = make_layer(kit, balancer, dtype=dtype, seed=step)
                    bits.append(train_bits(layer, layer, inputs_of(kit, dtype, 20)))
                    balancer.check()
                    record = balancer.last_call(0)
                    assert record is not None
                    num_moved += record.num_rows_moved
        pairs = zip(arms["none"], arms["greedy"], strict=True)
        outcomes.append((all(same_bits(*pair) for pair in pairs), num_moved))
    return outcomes


def order_of_events(kit: Kit) -> tuple[list[str], list[str]]:
    """What happens in a forward and in its backward, as seen at deep_ep's own methods."""
    import deep_ep

    events: list[str] = []
    cls = deep_ep.ElasticBuffer if kit.arm.api == "v2" else deep_ep.Buffer
    methods: dict[str, Any] = {name: getattr(cls, name) for name in ("dispatch", "combine")}

    def watch(owner: Any, name: str, method: Any) -> None:
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            events.append("dispatch again" if "handle" in kwargs else name)
            return result

        setattr(owner, name, watched)

    for name, method in methods.items():
        watch(cls, name, method)
    wait = deep_ep.EventOverlap.current_stream_wait
    watch(deep_ep.EventOverlap, "current_stream_wait", wait)
    balancer = RecordingBalancer()
    balancer.calls = events
    out = make_layer(kit, balancer)(inputs_of(kit, torch.bfloat16))
    forward, events[:] = list(events), []
    out.sum().backward()
    for name, method in methods.items():
        setattr(cls, name, method)
    deep_ep.EventOverlap.current_stream_wait = wait
    return forward, events


def refused_layers(kit: Kit) -> dict[str, str]:
    group = kit.group
    return {
        "by name": refusal_of(lambda: MoELayer(CONFIG, None, group, dispatcher="deepep")),
        "fp64": refusal_of(lambda: make_layer(kit, dtype=torch.float64)),
        "unknown": refusal_of(lambda: MoELayer(CONFIG, None, group, dispatcher="deep_ep")),
        "group": refusal_of(lambda: MoELayer(CONFIG, dispatcher=kit.dispatcher())),
    }


def lines_of_the_docs(kit: Kit) -> list[tuple[int, int]]:
    """Run the code blocks of docs/deepep.md; the shapes of what they call `y`."""
    if kit.arm.is_real:
        return []  # the host lane balances CPU tensors
    shapes = []
    text = (Path(__file__).resolve().parent.parent / "docs" / "deepep.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names: dict[str, Any] = {"x": inputs_of(kit, torch.bfloat16).detach()}
        exec(block, names)
        shapes.append(tuple(names["y"].shape))
    return shapes


PROGRAMS = named(
    against_all_to_all, repeats_and_recomputes, order_of_events, greedy_against_none,
    refused_layers, lines_of_the_docs,
)  # fmt: skip


@pytest.fixture(scope="module", params=make_arms())
def runs(request: pytest.FixtureRequest) -> Runs:
    return Runs(request.param, PROGRAMS)


def test_the_layer_equals_the_one_over_all_to_all(runs: Runs) -> None:
    """Experts see the same rows and gradients in the same order: their gradients have equal bits.

    With u half a unit of the dtype and K choices: all-to-all rounds the sum of K weighted rows
    once; DeepEP rounds each rank's part and then their sum. So outputs differ by at most
    3 u S + O(u^2), S = sum of |weight * row| <= the largest |row|, as weights sum to one; input
    gradients by 3 u K * (largest row gradient), and by a rounding where autograd adds the router's
    part. The router's gradient sums products over H in fp32, in whatever order.
    """
    for differences in runs.of(against_all_to_all):
        assert differences.keys() <= {"out", "x", "router.weight"}
        assert all(over_allowed <= 1 for over_allowed in differences.values())


def test_steps_repeat_and_recompute_to_the_same_bits(runs: Runs) -> None:
    assert runs.of(repeats_and_recomputes) == [[True] * 4] * runs.arm.num_ranks


def test_the_balancer_has_the_counts_while_the_payload_is_in_flight(runs: Runs) -> None:
    for forward, _ in runs.of(order_of_events):
        assert forward == ["dispatch", "begin 0", "current_stream_wait", "run 0", "combine"]


def test_late_weight_grads_are_met_after_the_dispatch_backward(runs: Runs) -> None:
    for _, backward in runs.of(order_of_events):
        assert backward == ["dispatch again", "combine", "late 0"]


def test_greedy_has_the_bits_of_none(runs: Runs) -> None:
    if runs.arm.is_real:
        pytest.skip("the host lane balances CPU tensors")
    for outcomes in runs.of(greedy_against_none):
        assert [same for same, _ in outcomes] == [True, True]
        assert all(num_moved > 0 for _, num_moved in outcomes)


def test_a_layer_that_deepep_cannot_carry_is_refused_at_construction(runs: Runs) -> None:
    for seen in runs.of(refused_layers):
        assert seen["by name"] == "nothing"
        assert "tokens are torch.float64, expected torch.bfloat16" in seen["fp64"]
        assert "dispatcher is 'deep_ep', expected all_to_all or deepep." in seen["unknown"]
        assert "over another EP group than `group`" in seen["group"]


def test_the_lines_of_the_docs_run(runs: Runs) -> None:
    if runs.arm.is_real:
        pytest.skip("the host lane balances CPU tensors")
    for shapes in runs.of(lines_of_the_docs):
        assert len(shapes) == 2
        assert shapes[0] == shapes[1]
        assert shapes[0] in [(12, HIDDEN), (0, HIDDEN)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_process_needs_no_deep_ep(dtype: torch.dtype) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    arms = [MoELayer(config, dispatcher=name) for name in ("all_to_all", "deepep")]
    plain, deepep = (train_bits(arm, arm, x.clone().requires_grad_()) for arm in arms)
    assert same_bits(plain, deepep)
