"""MoELayer: expert parallel against the same layer on one process, and what surrounds it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from feplb.moe import MoEConfig, MoELayer
from feplb.training import is_expert_parameter, sync_gradients
from feplb.two_phase import run_experts_locally

CONFIG = MoEConfig(
    hidden=16,
    ffn_hidden=32,
    num_experts=8,
    top_k=2,
    num_shared_experts=2,
    dtype=torch.float64,
    init_std=0.3,
)
Tensors = dict[str, Tensor]


class StandInBalancer:
    """The door of a Balancer that moves nothing; keeps what it was asked, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> StandInBalancer:
        return self

    def prepare_weights(self, weights: Sequence[Tensor], *, layer: int) -> tuple[Tensor, ...]:
        self.calls.append(f"prepare {layer}")
        return tuple(weights)

    def begin(self, counts: list[int], *, layer: int) -> tuple[int, ...]:
        self.calls.append(f"begin {layer}")
        return tuple(counts)

    def run_experts(
        self,
        rows: Tensor,
        counts: list[int],
        weights: Sequence[Tensor],
        compute: Any,
        *,
        layer: int,
        ticket: tuple[int, ...],
    ) -> Tensor:
        assert ticket == tuple(counts)
        self.calls.append(f"run {layer}")
        return run_experts_locally(rows, counts, weights, compute)


def make_inputs(num_tokens: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(count, CONFIG.hidden, generator=generator, dtype=torch.float64).to(dtype)
        for count in num_tokens
    ]


def loss_of(out: Tensor, num_tokens: int) -> Tensor:
    """A mean over num_tokens that weighs every output element differently."""
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    return (out * weights + out.square()).sum() / num_tokens


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def grads_of(layer: MoELayer) -> Tensors:
    return {name: grad_of(param) for name, param in layer.named_parameters()}


def run_sharded(
    rank: int, num_ranks: int, xs: list[Tensor], with_balancer: bool, mean_tokens: float
) -> dict[str, Any]:
    """One forward and backward of this rank's tokens; gradients synced as in training."""
    group = dist.group.WORLD
    balancer = StandInBalancer() if with_balancer else None
    layer = MoELayer(CONFIG, balancer, group).double()
    x = xs[rank].requires_grad_()
    out = layer(x)
    loss_of(out, 1).div(mean_tokens).backward()
    grad_x = grad_of(x) / num_ranks
    sync_gradients(layer, group, group)
    return {"out": out.detach(), "x": grad_x, "grads": grads_of(layer), "counts": layer.last_counts}


def run_unsharded(xs: list[Tensor], mean_tokens: float) -> dict[str, Any]:
    layer = MoELayer(CONFIG).double()
    x = torch.cat(xs).requires_grad_()
    out = layer(x)
    loss_of(out, 1).div(mean_tokens * len(xs)).backward()
    sizes = [len(x) for x in xs]
    return {
        "out": out.detach().split(sizes),
        "x": grad_of(x).split(sizes),
        "grads": grads_of(layer),
        "counts": layer.last_counts,
    }


def assert_equal_up_to_order(seen: Tensor, expected: Tensor, what: str) -> None:
    # The same terms, added in another order. A sum of n terms is off by n * eps relative to the
    # sum of their magnitudes; n <= 64 in these tests, at most 16 sums follow each other, and the
    # magnitudes exceed the results by well below 100. A wrong gradient is off by some percent.
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    atol = 100 * 16 * 64 * torch.finfo(torch.float64).eps * scale
    torch.testing.assert_close(seen, expected, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(
    ("num_tokens", "with_balancer"),
    [([12, 12], False), ([12, 12, 12, 12], True), ([0, 20, 0, 1], True), ([0, 0], False)],
    ids=["ep2", "ep4", "ep4-empty-ranks", "ep2-no-token"],
)
def test_expert_parallel_equals_one_process(num_tokens: list[int], with_balancer: bool) -> None:
    xs = make_inputs(num_tokens)
    mean_tokens = max(1.0, sum(num_tokens) / len(num_tokens))
    expected = run_unsharded([x.clone() for x in xs], mean_tokens)
    num_ranks = len(num_tokens)
    ranks = run_ranks(run_sharded, num_ranks, xs, with_balancer, mean_tokens)
    for rank, seen in enumerate(ranks):
        assert_equal_up_to_order(seen["out"], expected["out"][rank], f"out of rank {rank}")
        assert_equal_up_to_order(seen["x"], expected["x"][rank], f"input grad of rank {rank}")
        for name, grad in seen["grads"].items():
            whole = expected["grads"][name]
            own = whole.chunk(num_ranks)[rank] if name in ("w1", "w2") else whole
            assert_equal_up_to_order(grad, own, f"grad of {name} on rank {rank}")
    counts = [count for seen in ranks for count in seen["counts"]]
    assert counts == expected["counts"]


def test_routing_uses_every_expert_in_these_tests() -> None:
    counts = run_unsharded(make_inputs([12, 12, 12, 12]), 12)["counts"]
    assert min(counts) > 0
    assert sum(counts) == 48 * CONFIG.top_k


def initial_weights(rank: int, num_ranks: int) -> Tensors:
    return MoELayer(CONFIG, group=dist.group.WORLD).state_dict()


def test_initial_weights_do_not_depend_on_the_ep_degree() -> None:
    whole = MoELayer(CONFIG).state_dict()
    for rank, own in enumerate(run_ranks(initial_weights, 4)):
        for name, tensor in own.items():
            sharded = name in ("w1", "w2")
            assert torch.equal(tensor, whole[name].chunk(4)[rank] if sharded else whole[name])
    assert len({float(expert[0, 0]) for expert in whole["w1"]}) == CONFIG.num_experts


def test_layers_and_seeds_start_from_other_weights() -> None:
    first = MoELayer(CONFIG)
    for other in (
        MoELayer(CONFIG, layer=1),
        MoELayer(dataclasses.replace(CONFIG, seed=1)),
    ):
        for (name, a), b in zip(first.named_parameters(), other.parameters(), strict=True):
            assert not torch.equal(a, b), name


def test_the_balancer_is_called_in_the_order_of_its_contract() -> None:
    balancer = StandInBalancer()
    MoELayer(CONFIG, balancer, layer=3)(make_inputs([4])[0])
    assert balancer.calls == ["prepare 3", "begin 3", "run 3"]


class _Recorded(torch.autograd.Function):
    """Stands for a Balancer's prepare_weights, whose backward waits for late weight grads."""

    @staticmethod
    def forward(ctx: Any, events: list[str], name: str, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.events, ctx.name = events, name
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.events.append(ctx.name)
        return None, None, *grads


class RecordingBalancer(StandInBalancer):
    def prepare_weights(self, weights: Sequence[Tensor], *, layer: int) -> tuple[Tensor, ...]:
        prepared: tuple[Tensor, ...] = _Recorded.apply(self.calls, f"late {layer}", *weights)
        return prepared


def backward_events(rank: int, num_ranks: int, recompute: bool) -> list[str]:
    balancer = RecordingBalancer()
    layers = [MoELayer(CONFIG, balancer, dist.group.WORLD, layer=i) for i in range(2)]
    x = make_inputs([9, 7])[rank].requires_grad_()
    for layer in layers:
        x = x + (checkpoint(layer, x, use_reentrant=False) if recompute else layer(x))
    all_to_all = dist.all_to_all_single

    def recording(*args: Any, **kwargs: Any) -> Any:
        balancer.calls.append("all-to-all")
        return all_to_all(*args, **kwargs)

    balancer.calls.clear()
    dist.all_to_all_single = recording
    x.sum().backward()
    return balancer.calls


def test_late_weight_grads_are_met_after_the_dispatch_backward() -> None:
    combine = dispatch = "all-to-all"
    expected = [combine, dispatch, "late 1", combine, dispatch, "late 0"]
    assert run_ranks(backward_events, 2, False) == [expected] * 2


def test_late_weight_grads_are_met_after_the_dispatch_backward_of_a_recomputed_layer() -> None:
    # Recomputed are counts and payload of the dispatch, the experts and, unless torch stops early,
    # the combine; then the same order as without.
    for events in run_ranks(backward_events, 2, True):
        of_layer_1, of_layer_0 = events[: len(events) // 2], events[len(events) // 2 :]
        assert of_layer_1[:4] == ["all-to-all", "begin 1", "all-to-all", "run 1"]
        assert of_layer_1[-3:] == ["all-to-all", "all-to-all", "late 1"]
        assert of_layer_0 == [event.replace("1", "0") for event in of_layer_1]


def test_copies_share_the_balancer_and_keep_their_mark() -> None:
    balancer = StandInBalancer()
    layer = copy.deepcopy(MoELayer(CONFIG, balancer))
    assert layer.balancer is balancer
    assert is_expert_parameter(layer, "w1")
    assert not is_expert_parameter(layer, "router.weight")


def run_copied(rank: int, num_ranks: int) -> bool:
    layer = MoELayer(CONFIG, group=dist.group.WORLD)
    x = make_inputs([3, 4])[rank]
    return torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_copy_dispatches_over_the_same_group() -> None:
    assert run_ranks(run_copied, 2) == [True, True]


def test_state_dict_is_the_same_with_and_without_a_balancer() -> None:
    config = dataclasses.replace(CONFIG, router_bias_update_rate=0.001)
    plain, balanced = (MoELayer(config, b).state_dict() for b in (None, StandInBalancer()))
    names = ["router.expert_bias", "router.weight", "shared.w1", "shared.w2", "w1", "w2"]
    assert sorted(plain) == names
    assert list(plain) == list(balanced)
    assert all(torch.equal(plain[name], balanced[name]) for name in names)


def test_autocast_does_not_change_what_experts_compute_in() -> None:
    config = dataclasses.replace(CONFIG, dtype=torch.float32)
    layer, x = MoELayer(config), make_inputs([12], torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_rows_are_cast_to_the_config_dtype_and_back(x_dtype: torch.dtype) -> None:
    layer = MoELayer(dataclasses.replace(CONFIG, dtype=torch.bfloat16))
    x = make_inputs([12], x_dtype)[0].view(3, 4, 16).requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert (out.shape, out.dtype, grad_of(x).dtype) == ((3, 4, 16), x_dtype, x_dtype)
    # Against the same weights in fp64. Two roundings of inputs and weights, one of h, of a, and of
    # each of the k + 1 outputs: below 8 half units of bf16 relative to the largest magnitude.
    exact = copy.deepcopy(layer).double()(x.detach().double())
    assert (out - exact).abs().max() < 8 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recompute_gives_the_same_gradients(use_reentrant: bool) -> None:
    results = []
    for recompute in (False, True):
        layer, x = MoELayer(CONFIG, StandInBalancer()), make_inputs([12])[0].requires_grad_()
        out = checkpoint(layer, x, use_reentrant=use_reentrant) if recompute else layer(x)
        loss_of(out, 1).backward()
        results.append({**grads_of(layer), "x": grad_of(x)})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def run_recomputed(rank: int, num_ranks: int, use_reentrant: bool) -> bool:
    results = []
    for recompute in (False, True):
        layer = MoELayer(CONFIG, group=dist.group.WORLD)
        x = make_inputs([9, 0])[rank].requires_grad_()
        out = checkpoint(layer, x, use_reentrant=use_reentrant) if recompute else layer(x)
        loss_of(out, 1).backward()
        results.append({**grads_of(layer), "x": grad_of(x)})
    return all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recompute_dispatches_again_on_all_ranks(use_reentrant: bool) -> None:
    assert run_ranks(run_recomputed, 2, use_reentrant) == [True, True]


def run_twice(rank: int, num_ranks: int) -> list[Tensors]:
    runs = []
    for _ in range(2):
        layer = MoELayer(CONFIG, group=dist.group.WORLD)
        out = layer(make_inputs([9, 7])[rank])
        loss_of(out, 1).backward()
        sync_gradients(layer, dist.group.WORLD, dist.group.WORLD)
        runs.append({**grads_of(layer), "out": out.detach()})
    return runs


def test_same_seed_same_bits_run_after_run() -> None:
    for first, second in run_ranks(run_twice, 2):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_gradient_mode_leaves_nothing_behind() -> None:
    with torch.no_grad():
        out = MoELayer(CONFIG, StandInBalancer())(make_inputs([4])[0].requires_grad_())
    assert not out.requires_grad


def run_in_bf16(rank: int, num_ranks: int, xs: list[Tensor]) -> Tensor:
    layer = MoELayer(dataclasses.replace(CONFIG, dtype=torch.bfloat16), group=dist.group.WORLD)
    out: Tensor = layer(xs[rank].requires_grad_())
    out.sum().backward()
    return out.detach()


def test_bf16_rows_travel_between_ranks() -> None:
    xs = make_inputs([9, 7], torch.bfloat16)
    layer = MoELayer(dataclasses.replace(CONFIG, dtype=torch.bfloat16))
    whole = layer(torch.cat(xs)).split([9, 7])
    for seen, expected in zip(run_ranks(run_in_bf16, 2, xs), whole, strict=True):
        # Each expert sees the same rows in the same order, so at most a rounding differs.
        assert (seen - expected).abs().max() <= 2**-7 * expected.abs().max()


def refuse_eight_experts_on_three_ranks(rank: int, num_ranks: int) -> str:
    try:
        MoELayer(CONFIG, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def test_experts_that_do_not_divide_among_the_ranks_are_refused() -> None:
    message = "num_experts is 8, expected a multiple of the EP group's 3 ranks."
    assert run_ranks(refuse_eight_experts_on_three_ranks, 3) == [message] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "top_k is 9, expected at most num_experts=8"),
        ({"hidden": 0}, "hidden is 0, expected 1 or more"),
        ({"init_std": -1.0}, "init_std is -1.0, expected 0 or more"),
        ({"num_experts": 2**16}, "num_experts is 65536, expected 65534 at most"),
        ({"dtype": torch.int32}, "dtype is torch.int32, expected a floating dtype"),
        ({"num_shared_experts": 0, "shared_ffn_hidden": 4}, "num_shared_experts is 0"),
        ({"shared_ffn_hidden": 0}, "shared_ffn_hidden is 0, expected 1 or more"),
    ],
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input \(layer 2\) is \[3, 8\], expected \[\.\.\., 16\]"):
        MoELayer(CONFIG, layer=2)(torch.zeros(3, 8))
