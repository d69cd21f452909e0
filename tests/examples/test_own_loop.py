"""A plain PyTorch loop with a loss of its own takes the same path after its loss is swapped."""

import pytest
import torch
from torch import nn

from fastkd.losses import DistillationLoss, FeatureKD, SoftKD
from fastkd.tokens import Tokens
from tests.harness.tiny import tensor_data, vit

ALPHA, TAU, WEIGHT, SMOOTHING = 0.4, 3.0, 0.7, 0.1
GRID = (2, 2)


def cross_entropy(logits, target):
    uniform = torch.full_like(logits, SMOOTHING / logits.shape[1])
    smooth = uniform.scatter_add(1, target[:, None], torch.full_like(logits[:, :1], 1 - SMOOTHING))
    return -(smooth * logits.log_softmax(1)).sum(1).mean()


def soft_kd(student, teacher):
    p = (teacher / TAU).softmax(1)
    gap = (teacher / TAU).log_softmax(1) - (student / TAU).log_softmax(1)
    return TAU**2 * (p * gap).sum() / len(student)


def hint(student, teacher):
    return (student - teacher).pow(2).mean()


def spectral(student, teacher):
    spectra = [
        torch.fft.rfft2(x.transpose(1, 2).unflatten(2, GRID), norm="ortho")
        for x in (student, teacher)
    ]
    gap = spectra[0] - spectra[1]
    return (gap.real.pow(2) + gap.imag.pow(2)).sum() / (2 * gap.numel())


class OwnLoss:
    """What somebody wrote for themselves."""

    def __init__(self, distance):
        self.distance = {"mse": hint, "spectral": spectral}[distance]

    def __call__(self, logits, target, teacher_logits, student, teacher):
        labeled = (1 - ALPHA) * cross_entropy(logits, target)
        soft = ALPHA * soft_kd(logits, teacher_logits)
        return labeled + soft + WEIGHT * self.distance(student, teacher)


class Swapped:
    """The same with fastkd: one line where the loss is made, one where it is called."""

    def __init__(self, distance):
        self.loss = DistillationLoss(
            SoftKD(TAU, ALPHA), FeatureKD(distance, [(0, 0)], WEIGHT), label_smoothing=SMOOTHING
        )

    def __call__(self, logits, target, teacher_logits, student, teacher):
        maps = ({0: Tokens(tokens, GRID)} for tokens in (student, teacher))
        return self.loss(logits, target, teacher_logits, *maps)["loss"]


def train(criterion, dtype, steps=10):
    """SGD with momentum, a step schedule and forward hooks, as in torchvision's reference code."""
    student = vit(depth=2).to(dtype)
    teacher = vit(24, depth=3, seed=1).to(dtype).eval().requires_grad_(False)
    torch.manual_seed(2)
    regressor = nn.Linear(16, 24).to(dtype)
    captured = {}
    handles = [
        model.blocks[-1].register_forward_hook(
            lambda module, inputs, output, side=side: captured.__setitem__(side, output[:, 1:])
        )
        for side, model in (("student", student), ("teacher", teacher))
    ]
    trained = [*student.parameters(), *regressor.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.1)
    images_of_epoch, labels = tensor_data(train=12)[0].tensors
    losses = []
    for step in range(steps):
        batch = slice(6, 12) if step % 2 else slice(0, 6)
        images, target = images_of_epoch[batch].to(dtype), labels[batch]
        with torch.no_grad():
            teacher_logits = teacher(images)
        logits = student(images)
        tokens = regressor(captured["student"])
        loss = criterion(logits, target, teacher_logits, tokens, captured["teacher"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    for handle in handles:
        handle.remove()
    return torch.stack(losses), student.state_dict() | regressor.state_dict(prefix="regressor.")


# Measured: one or two units in the last place.
TOLERANCES = {torch.float32: 5e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
@pytest.mark.parametrize("distance", ["mse", "spectral"])
def test_ten_steps_after_the_swap_follow_the_ten_before_it(distance, dtype):
    losses, weights = train(OwnLoss(distance), dtype)
    swapped_losses, swapped_weights = train(Swapped(distance), dtype)
    tolerance = TOLERANCES[dtype]
    assert losses[-2:].sum() < losses[:2].sum()
    torch.testing.assert_close(swapped_losses, losses, rtol=tolerance, atol=tolerance)
    for name, value in weights.items():
        torch.testing.assert_close(
            swapped_weights[name], value, rtol=tolerance, atol=tolerance, msg=name
        )
