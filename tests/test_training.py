"""Gradient sync, clipping and checkpoints of models whose experts live on different ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_moe_layer import assert_equal_up_to_order
from torch import Tensor, nn

from feplb import training
from feplb.moe import MoEConfig, MoELayer
from feplb.training import (
    clip_grad_norm,
    expert_parameter_names,
    expert_state_dict,
    load_expert_state_dict,
    make_expert_groups,
    mark_expert_parameters,
    sync_gradients,
)

HIDDEN = 16
TOKENS_PER_RANK = 6
EXPERTS = {"layers.0.w1", "layers.0.w2", "layers.1.w1", "layers.1.w2"}
Tensors = dict[str, Tensor]


class TinyModel(nn.Module):
    """A dense layer, two MoE layers, and a parameter that no loss reaches."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        config = MoEConfig(
            hidden=HIDDEN,
            ffn_hidden=32,
            num_experts=4,
            top_k=2,
            dtype=torch.float64,
            init_std=0.3,
            router_bias_update_rate=0.001,
        )
        weight = torch.linspace(-0.5, 0.5, HIDDEN * HIDDEN, dtype=torch.float64)
        self.dense = nn.Parameter(weight.view(HIDDEN, HIDDEN))
        self.unused = nn.Parameter(torch.ones(3))
        self.layers = nn.ModuleList(MoELayer(config, None, group, layer=i) for i in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.dense
        for layer in self.layers:
            x = x + layer(x)
        return x


def make_tokens(num_ranks: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_ranks * TOKENS_PER_RANK, HIDDEN, generator=generator).double()


def mean_loss(model: TinyModel, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out.square().sum(-1).mean()


def grads_of(model: nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_step(rank: int, num_ranks: int, ep_size: int, bucket_bytes: int) -> dict[str, Any]:
    training._BUCKET_BYTES = bucket_bytes
    groups = make_expert_groups(ep_size)
    model = TinyModel(groups.ep)
    mean_loss(model, make_tokens(num_ranks).chunk(num_ranks)[rank]).backward()
    sync_gradients(model, dist.group.WORLD, groups.ep, groups.expert_dp)
    grads = {name: grad.clone() for name, grad in grads_of(model).items()}
    norm = clip_grad_norm(model, 0.5, groups.ep)
    return {"grads": grads, "norm": norm, "clipped": grads_of(model)}


def own_part(whole: Tensor, name: str, rank: int, ep_size: int) -> Tensor:
    return whole.chunk(ep_size)[rank % ep_size] if name in EXPERTS else whole


@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "bucket_bytes"),
    [(4, 4, 2**25), (4, 2, 2**25), (4, 2, 1000), (4, 1, 2**25), (2, 2, 1)],
)
def test_synced_gradients_and_norm_equal_one_process(
    num_ranks: int, ep_size: int, bucket_bytes: int
) -> None:
    model = TinyModel()
    mean_loss(model, make_tokens(num_ranks)).backward()
    expected = {name: grad.clone() for name, grad in grads_of(model).items()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm > 0.5
    for rank, seen in enumerate(run_ranks(run_step, num_ranks, ep_size, bucket_bytes)):
        assert seen["grads"].keys() == expected.keys()
        for name, whole in expected.items():
            own = own_part(whole, name, rank, ep_size)
            assert_equal_up_to_order(seen["grads"][name], own, name)
            clipped = own * (0.5 / (norm + 1e-6))
            assert_equal_up_to_order(seen["clipped"][name], clipped, f"clipped {name}")
        assert_equal_up_to_order(seen["norm"], norm, "norm")


def test_the_norm_of_one_process_is_torchs() -> None:
    model = TinyModel()
    mean_loss(model, make_tokens(1)).backward()
    other = copy.deepcopy(model)
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        twin.grad = None if param.grad is None else param.grad.clone()
    norm = clip_grad_norm(model, 1e9, None)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(other.parameters(), 1e9))
    assert all(torch.equal(grad, grads_of(other)[name]) for name, grad in grads_of(model).items())


def norms_of_given_gradients(rank: int, num_ranks: int, grads: Tensors, ep_size: int) -> Tensor:
    groups = make_expert_groups(ep_size)
    model = TinyModel(groups.ep)
    for name, param in model.named_parameters():
        if name in grads:
            param.grad = own_part(grads[name], name, rank, ep_size).clone()
    return clip_grad_norm(model, 1.0, groups.ep)


def test_equal_gradients_give_the_same_norm_to_the_bit_at_every_ep_degree() -> None:
    generator = torch.Generator().manual_seed(11)
    grads = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in TinyModel().named_parameters()
        if name != "unused"
    }
    norms = [
        float(norm)
        for num_ranks, ep_size in [(1, 1), (2, 2), (4, 4), (4, 2)]
        for norm in run_ranks(norms_of_given_gradients, num_ranks, grads, ep_size)
    ]
    assert len(set(norms)) == 1


class TwoParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2))


def sync_with_missing_gradients(rank: int, num_ranks: int) -> list[list[float] | None]:
    model = TwoParameters()
    if rank == 0:
        model.a.grad = torch.tensor([4.0, 6.0], dtype=torch.bfloat16)
    sync_gradients(model, dist.group.WORLD, None, dist.group.WORLD)
    return [None if p.grad is None else p.grad.tolist() for p in model.parameters()]


def test_a_missing_gradient_is_zero_unless_it_is_missing_everywhere() -> None:
    assert run_ranks(sync_with_missing_gradients, 2) == [[[2.0, 3.0], None]] * 2


def save_and_reload(
    rank: int, num_ranks: int, file: Tensors | None
) -> tuple[Tensors, dict[str, Any]]:
    """Load the given checkpoint, or perturb the initial weights; save again."""
    group = dist.group.WORLD
    model = TinyModel(group)
    if file is not None:
        load_expert_state_dict(model, file, group)
    else:
        for name, tensor in model.state_dict().items():
            tensor.add_(rank + 1 if name in EXPERTS else 1)
    return expert_state_dict(model, group), dict(model.state_dict())


def test_checkpoint_from_ep_4_to_2_to_1_is_byte_for_byte_the_same() -> None:
    saved = [run_ranks(save_and_reload, 4, None)]
    saved.append(run_ranks(save_and_reload, 2, saved[0][0][0]))
    file = saved[1][0][0]
    whole = TinyModel()
    load_expert_state_dict(whole, file, None)
    for state, own in [entry for run in saved for entry in run]:
        assert list(state) == list(own) == list(whole.state_dict())
        for name, tensor in whole.state_dict().items():
            assert tensor.numpy().tobytes() == state[name].numpy().tobytes(), name
    for rank, (_, own) in enumerate(saved[0]):
        assert torch.equal(own["layers.1.w2"], whole.state_dict()["layers.1.w2"][rank : rank + 1])


def save_on_rank_0_only(rank: int, num_ranks: int) -> int:
    return len(expert_state_dict(TinyModel(dist.group.WORLD), dist.group.WORLD, rank0_only=True))


def test_rank0_only_keeps_the_file_on_one_rank() -> None:
    assert run_ranks(save_on_rank_0_only, 2) == [len(TinyModel().state_dict()), 0]


def test_an_unsharded_checkpoint_is_the_plain_state_dict_and_does_not_alias_it() -> None:
    model = TinyModel()
    state = expert_state_dict(model, None)
    model.load_state_dict(state)
    with torch.no_grad():
        model.dense.zero_()
    assert state["dense"].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": None}, "the checkpoint lacks dense. Nothing was loaded."),
        ({"more": torch.zeros(1)}, "the model has no more. Nothing was loaded."),
        ({"dense": torch.zeros(2)}, r"dense is \[2\] in the checkpoint, expected \[16, 16\]"),
        (
            {"layers.0.w1": torch.zeros(2, 64, 16)},
            r"layers.0.w1 is \[2, 64, 16\] in the checkpoint, expected \[4, 64, 16\] \(EP size 1\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_as_a_whole(
    change: dict[str, Tensor | None], message: str
) -> None:
    model = TinyModel()
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in before.items()} | change
    with pytest.raises(ValueError, match=message):
        load_expert_state_dict(model, {k: v for k, v in state.items() if v is not None}, None)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_marks_are_found_by_name_in_copies_and_refuse_unknown_names() -> None:
    model = copy.deepcopy(TinyModel()).to(torch.float32)
    assert expert_parameter_names(model) == EXPERTS
    with pytest.raises(ValueError, match="TinyModel has no parameter 'w3' to mark"):
        mark_expert_parameters(model, "w3")


def groups_that_do_not_fit(rank: int, num_ranks: int) -> list[str]:
    groups = make_expert_groups(2)
    messages = []
    for call in (
        lambda: sync_gradients(TinyModel(groups.ep), dist.group.WORLD, groups.ep),
        lambda: make_expert_groups(3),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_groups_that_do_not_fit_are_refused() -> None:
    for messages in run_ranks(groups_that_do_not_fit, 4):
        assert messages[0].startswith("dp_group has 4 ranks, ep_group 2 and expert_dp_group 1, ")
        assert messages[1] == "ep_size is 3, expected a divisor of the 4 ranks."
