"""The one-pass cross-entropy against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd import hard_losses as module
from asr_kd.hard_losses import certain_losses, count_correct, hard_losses


@settings(max_examples=25, deadline=None)
@given(members=st.integers(1, 3), frames=st.integers(1, 20), states=st.integers(1, 30), block_rows=st.integers(1, 70), scale=st.floats(0.1, 200.0))
def test_losses_gradients_and_counts(members: int, frames: int, states: int, block_rows: int, scale: float) -> None:
    logits = (scale * torch.randn(members, frames, states)).requires_grad_()
    targets = torch.randint(states, (frames,))
    expected = torch.stack([torch.nn.functional.cross_entropy(member, targets) for member in logits])
    (wanted,) = torch.autograd.grad((expected * torch.arange(1, members + 1)).sum(), logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_BLOCK_ELEMENTS", block_rows * states)
        overwritten = logits * 1.0
        losses, correct = hard_losses(overwritten, targets)
        (found,) = torch.autograd.grad((losses * torch.arange(1, members + 1)).sum(), logits)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, wanted)
    assert correct.tolist() == (logits.argmax(-1) == targets).sum(1).tolist() == count_correct(logits, targets).tolist()


def test_a_second_backward_pass_is_refused() -> None:
    """The memory of its gradient has been handed out."""
    logits = torch.randn(2, 4, 3, requires_grad=True)
    losses, _ = hard_losses(logits * 1.0, torch.zeros(4, dtype=torch.long))
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        losses.sum().backward()


def test_other_devices_take_the_distillation_loss_of_certain_targets() -> None:
    logits = torch.randn(3, 40, 30).mul_(5).requires_grad_()
    targets, weights = torch.randint(30, (40,)), torch.arange(1.0, 4.0)
    losses = certain_losses(logits, targets)
    expected = torch.stack([torch.nn.functional.cross_entropy(member, targets) for member in logits])
    torch.testing.assert_close(losses, expected)
    (found,), (wanted,) = (torch.autograd.grad((own * weights).sum(), logits) for own in (losses, expected))
    torch.testing.assert_close(found, wanted)
    logits.data[1, 2, 0] = torch.nan
    assert certain_losses(logits, targets).isfinite().tolist() == [True, False, True]


def test_bfloat16_logits_have_float32_losses() -> None:
    logits = torch.randn(2, 50, 30).bfloat16().requires_grad_()
    targets = torch.randint(30, (50,))
    losses, _ = hard_losses(logits * 1.0, targets)
    assert losses.dtype == torch.float32
    expected = torch.stack([torch.nn.functional.cross_entropy(member.float(), targets) for member in logits])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_loss_is_not_finite_where_a_logit_is_not(bad: float) -> None:
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 0] = bad
    losses, _ = hard_losses(logits.requires_grad_() * 1.0, torch.tensor([1, 1, 1]))
    assert losses.isfinite().tolist() == [True, False]
