"""What every distance between token maps checks and brings into form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastkd.losses import RKD, AttentionTransfer, Distance, MapDistance, VkD


class Mean(Distance):
    """Compares means, and says what it was handed."""

    equal_widths = False

    def compare(self, student, teacher, grid):
        self.seen = (tuple(student.shape), tuple(teacher.shape), grid, teacher.requires_grad)
        assert not torch.is_autocast_enabled("cpu")
        return (student.mean() - teacher.mean()).square()


def test_maps_become_tokens_in_row_order():
    student, teacher = torch.randn(2, 6, 3, 4), torch.randn(2, 8, 3, 4)
    distance = Mean()
    distance(student, teacher)
    assert distance.seen == ((2, 12, 6), (2, 12, 8), (3, 4), False)
    as_tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    torch.testing.assert_close(
        AttentionTransfer()(student, teacher), AttentionTransfer()(*as_tokens)
    )


def test_the_teacher_is_detached_and_autocast_is_off():
    distance = Mean()
    with torch.autocast("cpu"):
        distance(torch.randn(2, 12, 6), torch.randn(2, 12, 8, requires_grad=True))
    assert distance.seen[3] is False


def test_an_embedding_is_one_token_where_a_distance_takes_it():
    student, teacher = torch.randn(5, 6), torch.randn(5, 8)
    torch.testing.assert_close(
        RKD()(student, teacher), RKD()(student.unsqueeze(1), teacher.unsqueeze(1))
    )
    with pytest.raises(ValueError, match=r"student must be \[B, N, D\] or \[B, D, H, W\], got"):
        Mean()(student, teacher)


@pytest.mark.parametrize("loss", ["mse", "spectral", "smooth_l1", "cosine"])
def test_the_fused_distances_are_modules_too(loss):
    student, teacher = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4)
    expected = {
        "mse": lambda s, t: F.mse_loss(s, t),
        "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t),
        "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=1).mean(),
        "spectral": lambda s, t: F.mse_loss(
            *(torch.view_as_real(torch.fft.rfft2(x, norm="ortho")) for x in (s, t))
        ),
    }[loss](student, teacher)
    torch.testing.assert_close(MapDistance(loss)(student, teacher), expected)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (np.zeros((2, 4, 6)), torch.zeros(2, 4, 6), TypeError, "student must be .* got ndarray"),
        (torch.zeros(2, 4, 6), torch.zeros(2, 4, 6).int(), TypeError, "teacher must .*int32"),
        (torch.zeros(2, 4, 6), torch.zeros(2, 5, 6), ValueError, r"\(a CLS token left in\?\)"),
        (torch.zeros(2, 4, 6), torch.zeros(2, 4, 8), ValueError, "FeatureKD's projector"),
        (torch.zeros(2, 4, 6), torch.zeros(3, 4, 6), ValueError, r"must be \[2, 4, 6\]"),
        (torch.zeros(2, 4, 6), torch.zeros(2, 6, 2, 2), ValueError, "like student"),
        (torch.zeros(2, 0, 6), torch.zeros(2, 0, 6), ValueError, "must be tokens and channels"),
    ],
)
def test_what_cannot_be_compared_is_named(student, teacher, error, message):
    with pytest.raises(error, match=f"VkD: .*{message}"):
        VkD()(student, teacher)


def test_beta_is_of_smooth_l1_alone():
    with pytest.raises(ValueError, match="beta is of smooth_l1"):
        MapDistance("mse", beta=2.0)
