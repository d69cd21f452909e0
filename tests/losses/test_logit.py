"""Soft and hard distillation of logits, against independent computations."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.losses import HardKD, SoftKD


def logits(seed: int, classes: int = 11) -> torch.Tensor:
    return 3 * torch.randn(7, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_soft_kd_is_tau_squared_times_the_kl_averaged_over_images(tau):
    student, teacher = logits(0), logits(1)
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    expected = tau**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(SoftKD(tau)(student, teacher), expected)


def test_soft_kd_agrees_with_torch_kl_div():
    student, teacher = logits(0), logits(1)
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(SoftKD()(student, teacher), expected)


def test_soft_kd_of_equal_logits_is_zero_with_zero_gradient():
    student = logits(0).requires_grad_()
    loss = SoftKD(2.0)(student, student.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_soft_kd_sends_no_gradient_to_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    SoftKD()(student, teacher).backward()
    assert teacher.grad is None


def test_hard_kd_is_cross_entropy_against_the_teachers_choice():
    student, teacher = logits(0), logits(1)
    rows = torch.arange(len(student))
    expected = -student.log_softmax(-1)[rows, teacher.max(-1).indices].mean()
    torch.testing.assert_close(HardKD()(student, teacher), expected)


@pytest.mark.parametrize("term", [SoftKD(), HardKD()])
def test_another_number_of_classes_is_refused(term):
    with pytest.raises(ValueError, match=r"teacher logits must be \[7, 11\].*got \[7, 5\]"):
        term(logits(0), logits(1, classes=5))


def test_soft_kd_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="tau must be positive"):
        SoftKD(0.0)
