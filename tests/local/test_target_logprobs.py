"""Against torch's own log_softmax, in double precision."""

import pytest
import torch

from tinkex_py.local.passes import target_logprobs

SHAPES = [((1, 1), 1), ((2, 3), 1), ((5, 20), 2), ((1, 33), 3)]


def made(shape: tuple[int, int], candidates: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + candidates)
    logits = torch.randn(*shape, 17, generator=generator) * 5
    targets = torch.randint(0, 17, (*shape, candidates), generator=generator)
    return logits, targets, torch.randn(*shape, candidates, generator=generator)


@pytest.mark.parametrize(("shape", "candidates"), SHAPES)
def test_values_and_gradients_are_those_of_log_softmax(shape: tuple[int, int], candidates: int):
    logits, targets, weights = made(shape, candidates)
    leaf = logits.clone().requires_grad_()
    logprobs = target_logprobs(leaf, targets)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), leaf)

    exact = logits.double().requires_grad_()
    expected = torch.log_softmax(exact, -1).gather(-1, targets)
    (expected_gradient,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


def test_a_target_that_comes_twice_gets_the_gradient_of_both():
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(target_logprobs(logits, torch.tensor([[[1, 1]]])).sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[[-2 / 3, 4 / 3, -2 / 3]]]))


def test_half_precision_logits_give_float32_logprobs_and_a_gradient_of_their_own_kind():
    logits, targets, _ = made((2, 3), 1)
    leaf = logits.bfloat16().requires_grad_()
    logprobs = target_logprobs(leaf, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert (logprobs.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    expected = torch.log_softmax(leaf.detach().double(), -1).gather(-1, targets)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_logits_are_left_as_they_were():
    logits, targets, _ = made((2, 3), 1)
    leaf = logits.clone().requires_grad_()
    torch.autograd.grad(target_logprobs(leaf, targets).sum(), leaf)
    assert torch.equal(leaf.detach(), logits)
