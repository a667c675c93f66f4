"""TopKRouter: choices, weights, ties, and the selection bias."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from feplb.router import TopKRouter


def router_of(logits_weight: list[list[float]], top_k: int, **options: object) -> TopKRouter:
    """A router whose logits for the token [1, 0, ...] are the first entries of each row."""
    weight = torch.tensor(logits_weight)
    router = TopKRouter(weight.shape[1], weight.shape[0], top_k, **options)  # type: ignore[arg-type]
    router.load_state_dict({"weight": weight}, strict=False)
    return router


def test_softmax_weights_are_those_of_all_experts_when_not_normalised() -> None:
    # logits ln 1, ln 5, ln 2, ln 2 -> probabilities 0.1, 0.5, 0.2, 0.2; the tie goes to expert 2
    router = router_of([[math.log(n)] for n in (1, 5, 2, 2)], 2, normalize_topk=False)
    topk_idx, topk_weights = router(torch.ones(1, 1))
    assert topk_idx.tolist() == [[1, 2]]
    torch.testing.assert_close(topk_weights, torch.tensor([[0.5, 0.2]]))


def test_normalised_weights_sum_to_one() -> None:
    router = router_of([[math.log(n)] for n in (1, 5, 2, 2)], 2)
    _, topk_weights = router(torch.ones(1, 1))
    torch.testing.assert_close(topk_weights, torch.tensor([[5 / 7, 2 / 7]]))


def test_sigmoid_scores_each_expert_by_itself() -> None:
    # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2
    router = router_of([[0.0], [math.log(3)]], 2, scoring="sigmoid", normalize_topk=False)
    topk_idx, topk_weights = router(torch.ones(1, 1))
    assert topk_idx.tolist() == [[1, 0]]
    torch.testing.assert_close(topk_weights, torch.tensor([[0.75, 0.5]]))


def test_equal_scores_go_to_the_lowest_experts() -> None:
    router = router_of([[0.0]] * 100, 3)
    topk_idx, _ = router(torch.randn(50, 1))
    assert topk_idx.tolist() == [[0, 1, 2]] * 50


def test_sigmoid_scores_that_underflow_give_finite_weights_and_gradients() -> None:
    router = router_of([[-1.0], [-1.0]], 1, scoring="sigmoid")
    tokens = torch.full((1, 1), 1e4, requires_grad=True)
    router(tokens)[1].sum().backward()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_shapes_and_dtypes_for_bf16_tokens_under_autocast(num_tokens: int) -> None:
    router = TopKRouter(8, 4, 2)
    tokens = torch.randn(num_tokens, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        topk_idx, topk_weights = router(tokens)
    plain = router(tokens.float())
    assert (topk_idx.shape, topk_idx.dtype) == ((num_tokens, 2), torch.int64)
    assert (topk_weights.shape, topk_weights.dtype) == ((num_tokens, 2), torch.float32)
    assert torch.equal(topk_idx, plain[0])
    assert torch.equal(topk_weights, plain[1])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradients_of_the_weights(scoring: str) -> None:
    torch.manual_seed(0)
    router = TopKRouter(5, 6, 3, scoring=scoring).double()
    router.reset_parameters(std=1.0)
    tokens = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: router(x)[1], (tokens, router.weight))


def biased_router(top_k: int = 1) -> TopKRouter:
    router = router_of([[2.0], [1.0], [0.0]], top_k, normalize_topk=False, bias_update_rate=0.1)
    return router.train()


def bias_of(router: TopKRouter) -> Tensor:
    assert router.expert_bias is not None
    return router.expert_bias


def test_bias_changes_the_choice_and_not_its_weight() -> None:
    router = biased_router()
    scores = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    bias_of(router).copy_(torch.tensor([0.0, 0.0, 1.0]))
    topk_idx, topk_weights = router(torch.ones(1, 1))
    assert topk_idx.tolist() == [[2]]
    torch.testing.assert_close(topk_weights, scores[2].view(1, 1))


def test_update_bias_moves_one_step_against_the_excess() -> None:
    # Three tokens, two choices each: counts 3, 3, 0, mean 2.
    router = biased_router(top_k=2)
    router(torch.ones(3, 1))
    router.update_bias()
    torch.testing.assert_close(bias_of(router), torch.tensor([-0.1, -0.1, 0.1]))
    router.update_bias()  # nothing was routed since
    torch.testing.assert_close(bias_of(router), torch.tensor([-0.1, -0.1, 0.1]))


def test_only_training_forwards_with_gradients_are_counted() -> None:
    router = biased_router()
    with torch.no_grad():
        router(torch.ones(3, 1))
    router.eval()(torch.ones(3, 1))
    router.update_bias()
    assert bias_of(router).tolist() == [0.0, 0.0, 0.0]


def test_bias_is_in_the_state_dict_and_stays_fp32() -> None:
    router = biased_router()
    bias_of(router).fill_(0.3)
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert list(router.state_dict()) == ["weight", "expert_bias"]
    assert torch.equal(bias_of(copy.deepcopy(router)), torch.full((3,), 0.3))


def test_without_a_rate_there_is_no_bias() -> None:
    router = TopKRouter(4, 4, 1)
    router(torch.randn(2, 4))
    router.update_bias()
    assert list(router.state_dict()) == ["weight"]


def route_and_update(rank: int, num_ranks: int) -> Tensor:
    router = biased_router()
    # Rank 0 routes 4 tokens to expert 0, rank 1 two tokens to expert 2: counts 4, 0, 2, mean 2.
    tokens = torch.ones(4, 1) if rank == 0 else -torch.ones(2, 1)
    router(tokens)
    router.update_bias(torch.distributed.group.WORLD)
    return bias_of(router)


def test_update_bias_uses_the_counts_of_all_ranks() -> None:
    for bias in run_ranks(route_and_update, 2):
        torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5}, "top_k is 5, expected 1 to num_experts=4"),
        ({"top_k": 0}, "top_k is 0, expected 1 to num_experts=4"),
        ({"scoring": "tanh"}, "scoring is 'tanh', expected one of softmax, sigmoid"),
        ({"bias_update_rate": -1.0}, "bias_update_rate is -1.0, expected 0 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(**{"hidden": 8, "num_experts": 4, "top_k": 2, **arguments})  # type: ignore[arg-type]
