"""Which gradients are asked for, where they go, and who else uses the weights.

Expected values come from the same experts without any Balancer, unless a case says otherwise. All
cases run in one spawn of four ranks; each test looks at one of them.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from balancer_cases import (
    PLAIN,
    PROBS,
    Arm,
    Bits,
    Case,
    Outcomes,
    Weights,
    flat,
    grads,
    layer_spec,
    loss_of,
)
from torch import Tensor

from feplb import as_compute

WITH_PROBS = (layer_spec(row_data=PROBS),)
NEGATIVE_ZERO = as_compute(
    lambda rows, row_data, weights: rows + sum(weight.sum() * -0.0 for weight in weights)
)
BF16 = (layer_spec(dtype=torch.bfloat16),)


def backward_twice(arm: Arm) -> Bits:
    weights, (rows, _) = arm.weights(), arm.rows()
    loss = loss_of(arm.run(rows, weights))
    loss.backward(retain_graph=True)
    loss.backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def backward_of_rows_then_all(arm: Arm) -> Bits:
    weights, (rows, _) = arm.weights(), arm.rows()
    loss = loss_of(arm.run(rows, weights))
    loss.backward(inputs=[rows], retain_graph=True)
    assert all(leaf.grad is None for leaf in flat(weights))
    loss.backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def backward_of_rows_then_next_step(arm: Arm) -> Bits:
    weights, (rows, _) = arm.weights(), arm.rows()
    loss_of(arm.run(rows, weights)).backward(inputs=[rows])
    arm.check()
    next_rows, _ = arm.rows(step=1)
    loss_of(arm.run(next_rows, weights, step=1)).backward()
    arm.check()
    return grads(rows=rows, next_rows=next_rows, weights=weights)


def prepare(arm: Arm, weights: Weights) -> Weights:
    return weights if arm.balancer is None else arm.balancer.prepare_weights(weights, layer=0)


def add_l2(arm: Arm, on_prepared: bool, on_raw: bool) -> Bits:
    """Twice the weights is the L2 term's gradient, on top of what the experts give."""
    weights, (rows, _) = arm.weights(), arm.rows()
    prepared = prepare(arm, weights)
    loss = loss_of(arm.run(rows, prepared, prepared=False))
    for used in [prepared] * on_prepared + [weights] * on_raw:
        loss = loss + torch.stack([leaf.square().sum() for leaf in flat(used)]).sum()
    loss.backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def use_prepared_weights_twice(arm: Arm) -> Bits:
    """One prepare_weights for two calls: only one of them may leave its grads for later."""
    weights, (rows, _) = arm.weights(), arm.rows()
    prepared = prepare(arm, weights)
    hidden = arm.run(rows, prepared, prepared=False)
    loss_of(arm.run(hidden, prepared, prepared=False)).backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def prepare_some_tensors(arm: Arm, prepared: int) -> Bits:
    """Only one tensor of the experts went through prepare_weights."""
    weights, (rows, _) = arm.weights(), arm.rows()
    used = list(weights)
    used[prepared : prepared + 1] = prepare(arm, [weights[prepared]])
    loss_of(arm.run(rows, used, prepared=False)).backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def hand_in_some_prepared(arm: Arm, prepared: int) -> Bits:
    """All tensors went through prepare_weights, and only one of the results is used."""
    weights, (rows, _) = arm.weights(), arm.rows()
    used = list(weights)
    used[prepared] = prepare(arm, weights)[prepared]
    loss_of(arm.run(rows, used, prepared=False)).backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def unbind_prepared_weights(arm: Arm) -> Bits:
    """Stacked when prepared, one tensor per expert when run."""
    weights, (rows, _) = arm.weights(), arm.rows()
    used = [list(entry.unbind()) for entry in prepare(arm, weights)]
    loss_of(arm.run(rows, used, prepared=False)).backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def give_negative_zeros(arm: Arm, prepared: bool) -> Bits:
    """Grads of -0.0, which would be 0.0 if they were added to zeros at home."""
    weights, (rows, _) = arm.weights(), arm.rows()
    arm.run(rows, weights, prepared=prepared, compute=NEGATIVE_ZERO).sum().backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def leave_prepared_weights_unused(arm: Arm) -> Bits:
    weights, (rows, _) = arm.weights(), arm.rows()
    prepare(arm, weights)
    loss_of(arm.run(rows, weights, prepared=False)).backward()
    arm.check()
    return grads(rows=rows, weights=weights)


def visit_by_hooks(arm: Arm, prepared: bool) -> Bits:
    """What a hook on a weight sees (DDP has such) at its one and only visit."""
    weights, (rows, _) = arm.weights(), arm.rows()
    seen: Bits = {}

    def hook(leaf: Tensor, name: str) -> None:
        assert name not in seen, f"{name} was visited twice"
        assert leaf.grad is not None
        seen[name] = leaf.grad.clone()

    for i, leaf in enumerate(flat(weights)):
        leaf.register_post_accumulate_grad_hook(functools.partial(hook, name=f"weight {i}"))
    loss_of(arm.run(rows, weights, prepared=prepared)).backward()
    arm.check()
    return seen


def freeze(arm: Arm, frozen: tuple[int, ...], rows_need: bool, probs_need: bool) -> Bits:
    """Some tensors of every expert frozen on all ranks; rows or side data without gradients."""
    weights = arm.weights()
    for t in frozen:
        weights[t].requires_grad_(False)
    rows, (probs,) = arm.rows()
    rows.requires_grad_(rows_need)
    probs.requires_grad_(probs_need)
    out = arm.run(rows, weights, row_data=[probs])
    if arm.balancer is not None or out.requires_grad:
        loss_of(out).backward()
    arm.check()
    leaves = {"rows": rows, "probs": probs, "w1": weights[0], "w2": weights[1]}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
    return {"out": out.detach()} | grads(**{n: t for n, t in leaves.items() if t.requires_grad})


def sink_grads(arm: Arm, prepared: bool, dtype: torch.dtype) -> Bits:
    """Weight grads of two micro-batches go to main_grad; what autograd gets is zero."""
    weights = arm.weights()
    sinks = [torch.zeros_like(leaf, dtype=dtype) for leaf in flat(weights)]
    bits: Bits = {f"sink {t}": sink for t, sink in enumerate(sinks)}
    for step in range(2):
        rows, _ = arm.rows(step=step)
        out = arm.run(rows, weights, step=step, prepared=prepared, grad_sinks=sinks)
        loss_of(out).backward()
        bits |= grads(**{f"rows of step {step}": rows})
    arm.check()
    return bits | grads(weights=weights)


def sum_grads(arm: Arm, dtype: torch.dtype) -> Bits:
    """The same sums by hand."""
    weights = arm.weights()
    sinks = [torch.zeros_like(leaf, dtype=dtype) for leaf in flat(weights)]
    bits: Bits = {f"sink {t}": sink for t, sink in enumerate(sinks)}
    for step in range(2):
        rows, _ = arm.rows(step=step)
        loss_of(arm.run(rows, weights, step=step)).backward()
        bits |= grads(**{f"rows of step {step}": rows})
        for sink, leaf in zip(sinks, flat(weights), strict=True):
            assert leaf.grad is not None
            sink.add_(leaf.grad)
            leaf.grad = None
    return bits | {f"grad of weights {t}": torch.zeros_like(w) for t, w in enumerate(weights)}


def local(program: Any, specs: Any = PLAIN, **kwargs: Any) -> Case:
    return Case(functools.partial(program, **kwargs), specs, expected_policy="local")


def frozen(*tensors: int, rows_need: bool = True, probs_need: bool = True) -> Case:
    return local(freeze, WITH_PROBS, frozen=tensors, rows_need=rows_need, probs_need=probs_need)


def sunk(specs: Any, prepared: bool, **config: Any) -> Case:
    return Case(
        functools.partial(sink_grads, prepared=prepared, dtype=torch.float32),
        specs,
        functools.partial(sum_grads, dtype=torch.float32),
        expected_policy="local",
        config=config,
    )


CASES = {
    "backward twice": local(backward_twice),
    "rows, then all": local(backward_of_rows_then_all),
    "rows, then next step": local(backward_of_rows_then_next_step),
    "L2 on prepared": local(add_l2, on_prepared=True, on_raw=False),
    "L2 on raw": local(add_l2, on_prepared=False, on_raw=True),
    # Three terms: their order is that of ``none``, which has the same nodes.
    "L2 on both": Case(functools.partial(add_l2, on_prepared=True, on_raw=True)),
    "used twice": local(use_prepared_weights_twice),
    "w1 prepared": local(prepare_some_tensors, prepared=0),
    "w2 prepared": local(prepare_some_tensors, prepared=1),
    "w1 used": local(hand_in_some_prepared, prepared=0),
    "w2 used": local(hand_in_some_prepared, prepared=1),
    "-0.0 late": local(give_negative_zeros, prepared=True),
    "-0.0 at once": local(give_negative_zeros, prepared=False),
    "unbound": local(unbind_prepared_weights),
    "unused": local(leave_prepared_weights_unused),
    "hooks, prepared": local(visit_by_hooks, prepared=True),
    "hooks, raw": local(visit_by_hooks, prepared=False),
    "all trains": frozen(),
    "all experts frozen": frozen(0, 1),
    "w1 frozen": frozen(0),
    "w2 frozen": frozen(1),
    "rows frozen": frozen(rows_need=False),
    "probs frozen": frozen(probs_need=False),
    "only probs train": frozen(0, 1, rows_need=False),
    "everything frozen": frozen(0, 1, rows_need=False, probs_need=False),
    "fp32 sinks": sunk(PLAIN, prepared=True),
    "fp32 sinks, raw": sunk(PLAIN, prepared=False),
    "fp32 sinks, beside": sunk(PLAIN, prepared=True, late_stream=True),
    "fp32 sinks, raw, beside": sunk(PLAIN, prepared=False, late_stream=True),
    "bf16 to fp32 sinks": sunk(BF16, prepared=True),
    "bf16 to fp32 sinks, raw": sunk(BF16, prepared=False),
}


@pytest.fixture(scope="module")
def outcomes(lane: str) -> Outcomes:
    return Outcomes(CASES)


def test_second_backward_through_a_retained_graph_adds_the_same(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("backward twice")


def test_full_backward_is_right_after_one_that_asked_for_rows_only(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("rows, then all")


def test_next_step_is_right_after_a_backward_that_asked_for_rows_only(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("rows, then next step")


@pytest.mark.parametrize("use", ["L2 on prepared", "L2 on raw", "L2 on both"])
def test_weights_may_have_another_use_in_the_loss(outcomes: Outcomes, use: str) -> None:
    outcomes.assert_same_bits(use)


def test_weights_prepared_once_serve_two_calls(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("used twice")


def test_prepared_weights_may_stay_unused(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("unused")


@pytest.mark.parametrize("form", ["w1 prepared", "w2 prepared", "w1 used", "w2 used"])
def test_one_tensor_of_the_experts_may_be_prepared_alone(outcomes: Outcomes, form: str) -> None:
    outcomes.assert_same_bits(form)


def test_prepared_weights_may_be_unbound_before_the_call(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("unbound")


@pytest.mark.parametrize("form", ["-0.0 late", "-0.0 at once"])
def test_negative_zero_comes_home_as_it_is(outcomes: Outcomes, form: str) -> None:
    outcomes.assert_same_bits(form)


@pytest.mark.parametrize("form", ["hooks, prepared", "hooks, raw"])
def test_hooks_on_weights_see_complete_grads_once(outcomes: Outcomes, form: str) -> None:
    outcomes.assert_same_bits(form)


def test_side_data_gets_its_grads(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("all trains")


def test_experts_may_be_frozen_on_all_ranks(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("all experts frozen")


@pytest.mark.parametrize("tensor", ["w1 frozen", "w2 frozen"])
def test_one_tensor_of_the_experts_may_be_frozen(outcomes: Outcomes, tensor: str) -> None:
    outcomes.assert_same_bits(tensor)


def test_rows_may_need_no_grad(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("rows frozen")


def test_side_data_may_need_no_grad(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("probs frozen")


def test_side_data_alone_may_need_grad(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("only probs train")


def test_backward_runs_where_nothing_needs_grad(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("everything frozen")


@pytest.mark.parametrize(
    "form", ["fp32 sinks", "fp32 sinks, raw", "fp32 sinks, beside", "fp32 sinks, raw, beside"]
)
def test_grad_sinks_get_the_sums_and_autograd_zeros(outcomes: Outcomes, form: str) -> None:
    outcomes.assert_same_bits(form)


@pytest.mark.parametrize("form", ["bf16 to fp32 sinks", "bf16 to fp32 sinks, raw"])
def test_fp32_grad_sinks_take_grads_of_bf16_weights(outcomes: Outcomes, form: str) -> None:
    outcomes.assert_same_bits(form)
