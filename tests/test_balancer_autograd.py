"""What a model may do around ``run_experts``, and still every gradient has the right bits.

Expected values come from the same experts without any Balancer, unless a case says otherwise. All
cases run in one spawn of four ranks; each test looks at one of them.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from balancer_cases import (
    TWO_LAYERS,
    Arm,
    Bits,
    Case,
    Outcomes,
    Weights,
    device,
    grads,
    loss_of,
)
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from feplb import as_compute

Wrap = Callable[..., Tensor]


def swiglu(rows: Tensor, row_data: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
    gate, up = (rows @ weights[0].t()).chunk(2, dim=1)
    return (nn.functional.silu(gate) * up) @ weights[1].t()


PLAIN_FUNCTION = as_compute(swiglu)


def call_it(block: Wrap, *args: Any) -> Tensor:
    return block(*args)


def offload(block: Wrap, *args: Any) -> Tensor:
    with save_on_cpu():
        return block(*args)


def autocast(block: Wrap, *args: Any) -> Tensor:
    with torch.autocast(device().type, dtype=torch.bfloat16):
        return block(*args)


reentrant = functools.partial(checkpoint, use_reentrant=True)
non_reentrant = functools.partial(checkpoint, use_reentrant=False)


def two_blocks(arm: Arm, wrap: Wrap = call_it, plain_function: bool = False) -> Bits:
    """Two steps of two residual layers; ``wrap`` runs each layer."""
    compute = PLAIN_FUNCTION if plain_function else None
    weights = [arm.weights(layer) for layer in range(2)]
    bits: Bits = {}
    for step in range(2):
        rows, _ = arm.rows(step=step)

        def block(x: Tensor, layer: int, step: int = step) -> Tensor:
            return x + arm.run(x / 2, weights[layer], layer=layer, step=step, compute=compute)

        hidden = wrap(block, wrap(block, rows, 0), 1)
        loss_of(hidden).backward()
        arm.check()
        bits |= {f"out of step {step}": hidden.detach()} | grads(**{f"rows {step}": rows})
    return bits | grads(first=weights[0], second=weights[1])


def eval_then_train(arm: Arm) -> Bits:
    weights, (rows, _) = arm.weights(), arm.rows()
    with torch.no_grad():
        evaluated = arm.run(rows, weights)
    assert not evaluated.requires_grad
    loss_of(arm.run(rows, weights)).backward()
    arm.check()
    return {"evaluated": evaluated, **grads(rows=rows, weights=weights)}


def eval_in_grad_mode(arm: Arm) -> Bits:
    """In every step a forward that never meets its backward."""
    weights = arm.weights()
    bits: Bits = {}
    for step in range(2):
        rows, _ = arm.rows(step=step)
        bits[f"step {step}"] = arm.run(rows, weights, step=step).detach()
        loss_of(arm.run(rows, weights, step=step)).backward()
        arm.check()
    return bits | grads(weights=weights)


def backward_in_a_thread(arm: Arm) -> Bits:
    weights, (rows, _) = arm.weights(), arm.rows()
    thread = threading.Thread(target=loss_of(arm.run(rows, weights)).backward)
    thread.start()
    thread.join()
    arm.check()
    return grads(rows=rows, weights=weights)


class Block(nn.Module):
    """A model with something to compile before the experts, and after."""

    def __init__(self, arm: Arm, weights: Weights) -> None:
        super().__init__()
        self.balancer, self.run, self.weights = arm.balancer, arm.run, weights

    def forward(self, rows: Tensor) -> Tensor:
        hidden = rows / 2
        hidden = hidden + 1
        out = self.experts(hidden)
        return hidden + out * 3

    def experts(self, hidden: Tensor) -> Tensor:
        return self.run(hidden, self.weights)


class BareBlock(Block):
    """Calls the Balancer itself, so that its own graph break is the one that is tested."""

    def __init__(self, arm: Arm, weights: Weights) -> None:
        super().__init__(arm, weights)
        self.counts = arm.counts()
        self.compute = PLAIN_FUNCTION

    def experts(self, hidden: Tensor) -> Tensor:
        assert self.balancer is not None
        return self.balancer.run_experts(hidden, self.counts, self.weights, self.compute, layer=0)


def run_compiled(arm: Arm) -> Bits:
    num_graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    block = BareBlock(arm, arm.weights())
    rows, _ = arm.rows()
    out = torch.compile(block, backend=backend)(rows)
    loss_of(out).backward()
    assert num_graphs == 2, f"{num_graphs} graphs, expected one before the experts and one after"
    arm.check()
    arm.num_moves += 1  # run_experts was not called through the arm
    return {"out": out.detach(), **grads(rows=rows, weights=block.weights)}


def run_eager(arm: Arm) -> Bits:
    block = Block(arm, arm.weights())
    block.run = functools.partial(arm.run, compute=PLAIN_FUNCTION)
    rows, _ = arm.rows()
    out = block(rows)
    loss_of(out).backward()
    return {"out": out.detach(), **grads(rows=rows, weights=block.weights)}


def copy_module(arm: Arm) -> Bits:
    block = Block(arm, [])
    block.run = None  # type: ignore[assignment]
    assert copy.deepcopy(block).balancer is arm.balancer
    return {}


def pickle_it(arm: Arm) -> Bits:
    if arm.balancer is not None:
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(arm.balancer)
    return {}


def blocks(**kwargs: Any) -> Case:
    return Case(
        functools.partial(two_blocks, **kwargs),
        TWO_LAYERS,
        functools.partial(two_blocks, plain_function=kwargs.get("plain_function", False)),
        expected_policy="local",
    )


CASES = {
    "reentrant": blocks(wrap=reentrant),
    "non-reentrant": blocks(wrap=non_reentrant),
    "function in reentrant": blocks(wrap=reentrant, plain_function=True),
    "function in non-reentrant": blocks(wrap=non_reentrant, plain_function=True),
    "offload": blocks(wrap=offload),
    "autocast": blocks(wrap=autocast),
    "function in autocast": blocks(wrap=autocast, plain_function=True),
    "plain function": blocks(plain_function=True),
    "plain function against SwiGLU": Case(
        functools.partial(two_blocks, plain_function=True), TWO_LAYERS, two_blocks
    ),
    "eval then train": Case(eval_then_train, expected_policy="local"),
    "eval in grad mode": Case(eval_in_grad_mode, expected_policy="local"),
    "backward in a thread": Case(backward_in_a_thread, expected_policy="local"),
    "compile": Case(run_compiled, expected=run_eager, expected_policy="local"),
    "deepcopy": Case(copy_module, expected_policy="local"),
    "pickle": Case(pickle_it, expected_policy="local"),
}


@pytest.fixture(scope="module")
def autograd(lane: str) -> Outcomes:
    return Outcomes(CASES)


def test_reentrant_checkpoint_changes_no_bit(autograd: Outcomes) -> None:
    autograd.assert_same_bits("reentrant")


def test_non_reentrant_checkpoint_changes_no_bit(autograd: Outcomes) -> None:
    autograd.assert_same_bits("non-reentrant")


def test_reentrant_checkpoint_of_a_plain_function_changes_no_bit(autograd: Outcomes) -> None:
    autograd.assert_same_bits("function in reentrant")


def test_non_reentrant_checkpoint_of_a_plain_function_changes_no_bit(autograd: Outcomes) -> None:
    autograd.assert_same_bits("function in non-reentrant")


def test_offload_hooks_see_what_backward_needs(autograd: Outcomes) -> None:
    autograd.assert_same_bits("offload")


def test_autocast_around_the_experts_changes_no_bit(autograd: Outcomes) -> None:
    autograd.assert_same_bits("autocast")


def test_autocast_around_a_plain_function_changes_no_bit(autograd: Outcomes) -> None:
    autograd.assert_same_bits("function in autocast")


def test_plain_function_has_the_bits_of_none(autograd: Outcomes) -> None:
    autograd.assert_same_bits("plain function")


def test_plain_function_has_the_bits_of_swiglu(autograd: Outcomes, lane: str) -> None:
    if lane == "gpu":
        pytest.skip("on a GPU SwiGLU runs in Triton, which rounds less often")
    autograd.assert_same_bits("plain function against SwiGLU")


def test_training_follows_an_eval_forward_without_grad_mode(autograd: Outcomes) -> None:
    autograd.assert_same_bits("eval then train")


def test_forward_in_grad_mode_may_stay_without_backward(autograd: Outcomes) -> None:
    autograd.assert_same_bits("eval in grad mode")


def test_backward_may_run_in_another_thread(autograd: Outcomes) -> None:
    autograd.assert_same_bits("backward in a thread")


def test_compiled_model_breaks_its_graph_once_at_the_experts(autograd: Outcomes) -> None:
    autograd.assert_same_bits("compile")


def test_deepcopy_of_a_module_shares_its_balancer(autograd: Outcomes) -> None:
    autograd.assert_same_bits("deepcopy", moved=False)


def test_balancer_refuses_to_be_pickled(autograd: Outcomes) -> None:
    autograd.assert_same_bits("pickle", moved=False)
