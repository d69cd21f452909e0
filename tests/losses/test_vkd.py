"""VkD's distance and its whitening against computations of their own, and tokens that are hard."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from fastkd.losses.projectors import orthogonal_projector
from fastkd.losses.vkd import VkD, whiten
from tests.harness.devices import NoFloat64

B, N, D = 3, 8, 5


def tokens(
    seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape or (B, N, D), generator=generator, dtype=dtype)


def correlated(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """[n, dim] tokens with a mean, unequal variances and correlations."""
    mixing = tokens(seed + 1, dim, dim) + 0.5 * torch.eye(dim, dtype=torch.float64)
    return tokens(seed, n, dim) @ mixing + 3


def covariance(vectors: torch.Tensor) -> torch.Tensor:
    return torch.cov(vectors.double().T, correction=0)


def huber(difference: float, beta: float) -> float:
    if abs(difference) < beta:
        return difference**2 / (2 * beta)
    return abs(difference) - beta / 2


def standardized(vector: list[float]) -> list[float]:
    mean = sum(vector) / len(vector)
    variance = sum((x - mean) ** 2 for x in vector) / len(vector)
    return [(x - mean) / math.sqrt(variance + 1e-5) for x in vector]


def by_hand(student: torch.Tensor, teacher: torch.Tensor, beta: float = 1.0) -> float:
    """Smooth L1 to the standardised teacher, one number at a time."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total += sum(huber(a - b, beta) for a, b in zip(s, standardized(t), strict=True))
    return total / student.numel()


def test_the_defaults_are_smooth_l1_of_pooled_tokens_to_the_standardised_teacher():
    student, teacher = tokens(0), tokens(1, scale=4.0)
    expected = by_hand(student.mean(1), teacher.mean(1))
    assert VkD()(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_without_pool_every_token_is_standardised_and_compared():
    student, teacher = tokens(0), tokens(1, scale=4.0)
    expected = by_hand(student.flatten(0, 1), teacher.flatten(0, 1))
    assert VkD(pool=False)(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_beta_is_the_threshold_of_smooth_l1():
    student, teacher = tokens(0), tokens(1)
    expected = by_hand(student.mean(1), teacher.mean(1), beta=0.1)
    assert VkD(beta=0.1)(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_mse_squares_the_difference():
    student, teacher = tokens(0), tokens(1)
    difference = student - F.layer_norm(teacher, (D,))
    loss = VkD(distance="mse", pool=False)(student, teacher)
    torch.testing.assert_close(loss, difference.square().mean())


def test_none_compares_with_the_teacher_as_it_is():
    student, teacher = tokens(0), tokens(1)
    loss = VkD("none", distance="mse", pool=False)(student, teacher)
    torch.testing.assert_close(loss, (student - teacher).square().mean())


@pytest.mark.parametrize("pool", [True, False])
def test_whiten_compares_with_the_whitened_teacher(pool):
    student, teacher = tokens(0, 9, N, D), correlated(9 * N, D).unflatten(0, (9, N))
    if pool:
        expected = (student.mean(1) - whiten(teacher.mean(1))).square().mean()
    else:
        expected = (student - whiten(teacher)).square().mean()
    loss = VkD("whiten", distance="mse", pool=pool)(student, teacher)
    torch.testing.assert_close(loss, expected)


def test_whitened_tokens_have_mean_zero_and_the_identity_for_a_covariance():
    whitened = whiten(correlated(200, 6), eps=1e-12)
    torch.testing.assert_close(
        whitened.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-10, rtol=0
    )
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(covariance(whitened), identity, atol=1e-8, rtol=0)


def test_whitening_is_zcas_up_to_a_rotation():
    vectors = correlated(200, 6)
    values, directions = torch.linalg.eigh(covariance(vectors))
    zca = (vectors - vectors.mean(0)) @ directions @ torch.diag(values**-0.5) @ directions.T
    whitened = whiten(vectors, eps=1e-12)
    rotation = torch.linalg.lstsq(zca, whitened).solution
    torch.testing.assert_close(zca @ rotation, whitened, atol=1e-8, rtol=0)
    torch.testing.assert_close(
        rotation @ rotation.T, torch.eye(6, dtype=torch.float64), atol=1e-8, rtol=0
    )


def test_whitening_counts_every_token_of_every_image_alike():
    vectors = correlated(24, D)
    torch.testing.assert_close(whiten(vectors.unflatten(0, (3, 8))).flatten(0, 1), whiten(vectors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_direction_that_dominates_a_thousandfold_does_not_drown_the_others(dtype):
    direction = F.normalize(torch.ones(64, dtype=torch.float64), dim=0)
    vectors = tokens(0, 2000, 64)
    if dtype == torch.bfloat16:  # in one channel, whose rounding is then its own
        direction = torch.eye(64, dtype=torch.float64)[0]
    vectors = vectors + 1e3 * tokens(1, 2000, 1) * direction
    spread = torch.linalg.eigvalsh(covariance(whiten(vectors.to(dtype))))
    assert spread.min() > 0.97  # eps of the mean variance, 0.016, is missing
    assert spread.max() < 1 + 1e-5


def test_directions_that_too_few_tokens_do_not_show_are_zero():
    spread = torch.linalg.eigvalsh(covariance(whiten(tokens(0, 4, 10))))
    torch.testing.assert_close(spread[:7], torch.zeros(7, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(spread[7:], torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 12345.678])  # the mean of 49 of the last is another
def test_equal_tokens_whiten_to_zero(value):
    assert not whiten(torch.full((49, D), value, dtype=torch.float64)).any()


def test_eps_shrinks_directions_of_less_variance_than_its_share():
    vectors = tokens(0, 500, 2) * torch.tensor([1.0, 1e-3], dtype=torch.float64)
    variance, mean = covariance(vectors)[1, 1], covariance(vectors).diagonal().mean()
    spread = covariance(whiten(vectors, eps=1e-2))[1, 1]
    torch.testing.assert_close(spread, variance / (variance + 1e-2 * mean), atol=1e-6, rtol=1e-2)


def test_a_covariance_that_cannot_be_factored_gives_nan_not_a_wrong_answer():
    vectors = tokens(0, 3, 40) * 1e3 + tokens(1, 1, 40)
    assert whiten(vectors, eps=1e-30).isnan().all()


def test_the_whitened_gradient_is_that_of_the_definition():
    vectors = tokens(0, 7, 3).requires_grad_()
    assert torch.autograd.gradcheck(whiten, vectors)


@pytest.mark.parametrize("normalize", ["standardize", "whiten", "none"])
@pytest.mark.parametrize("pool", [True, False])
def test_the_students_gradient_is_that_of_the_definition(normalize, pool):
    student, teacher = tokens(0).requires_grad_(), tokens(1)
    term = VkD(normalize, pool=pool)
    assert torch.autograd.gradcheck(lambda x: term(x, teacher), student)


@pytest.mark.parametrize("normalize", ["standardize", "whiten", "none"])
def test_the_teacher_gets_no_gradient(normalize):
    student, teacher = tokens(0).requires_grad_(), tokens(1).requires_grad_()
    VkD(normalize)(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("normalize", ["standardize", "whiten"])
def test_a_student_that_is_the_normalized_teacher_is_at_distance_zero(normalize):
    teacher = tokens(1)
    target = F.layer_norm(teacher, (D,)) if normalize == "standardize" else whiten(teacher)
    student = target.clone().requires_grad_()
    loss = VkD(normalize, pool=False)(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["standardize", "whiten", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_tokens_are_compared_in_float32(normalize, dtype):
    student, teacher = tokens(0).to(dtype).requires_grad_(), tokens(1, scale=100.0).to(dtype)
    loss = VkD(normalize)(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, VkD(normalize)(student.float(), teacher.float()))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["standardize", "whiten"])
@pytest.mark.parametrize(
    "teacher",
    [torch.zeros(B, N, D), torch.full((B, N, D), 7.0), tokens(1, 1, 1, D).float()],
    ids=["zero", "equal", "one_token"],
)
def test_tokens_without_spread_give_a_finite_loss_and_gradient(normalize, teacher):
    student = tokens(0, *teacher.shape).float().requires_grad_()
    loss = VkD(normalize)(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["standardize", "whiten", "none"])
@pytest.mark.parametrize("pool", [True, False])
def test_nan_of_the_teacher_is_nan_of_the_loss(normalize, pool):
    teacher = tokens(1)
    teacher[0, 0, 0] = torch.nan
    assert VkD(normalize, pool=pool)(tokens(0), teacher).isnan()


@pytest.mark.parametrize("pool", [True, False])
def test_maps_are_compared_as_their_tokens(pool):
    student, teacher = tokens(0, B, D, 2, 4), tokens(1, B, D, 2, 4)
    as_tokens = [x.flatten(2).mT for x in (student, teacher)]
    torch.testing.assert_close(VkD(pool=pool)(student, teacher), VkD(pool=pool)(*as_tokens))


def test_embeddings_are_compared_as_the_pooled_tokens_that_they_are():
    student, teacher = tokens(0), tokens(1)
    torch.testing.assert_close(VkD()(student.mean(1), teacher.mean(1)), VkD()(student, teacher))


def test_autocast_leaves_whitening_alone():
    vectors = correlated(24, D).float()
    expected = whiten(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        whitened = whiten(vectors)
    torch.testing.assert_close(whitened, expected, rtol=0, atol=0)


def test_a_device_without_float64_leaves_whitening_to_the_cpu():
    with torch.no_grad(), FakeTensorMode(), NoFloat64("mps"):
        whitened = whiten(torch.empty(B, N, D, device="mps", dtype=torch.float16))
    assert (whitened.device.type, whitened.dtype) == ("mps", torch.float32)


@pytest.mark.parametrize("normalize", ["standardize", "whiten", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_pools_first_may_be_projected_after_it(normalize, bias):
    layer = nn.Linear(3, D, bias=bias).double()
    student, teacher = tokens(0, 9, N, 3), correlated(9 * N, D).unflatten(0, (9, N))
    term = VkD(normalize)
    assert term.pools_first
    pooled = [x.mean(1, keepdim=True) for x in (student, teacher)]
    expected = term(layer(student), teacher)
    torch.testing.assert_close(term(layer(pooled[0]), pooled[1]), expected)


def test_without_pool_nothing_is_pooled_first():
    assert not VkD(pool=False).pools_first


@pytest.mark.parametrize("normalize", ["standardize", "whiten", "none"])
@pytest.mark.parametrize("pool", [True, False])
def test_an_empty_batch_costs_nothing(normalize, pool):
    student = tokens(0, 0, N, D).requires_grad_()
    loss = VkD(normalize, pool=pool)(student, tokens(1, 0, N, D))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("normalize", ["standardize", "whiten"])
def test_it_compiles_to_one_graph(normalize):
    term = VkD(normalize, pool=False)
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager")
    student, teacher = tokens(0).float().requires_grad_(), tokens(1).float()
    loss = compiled(student, teacher)
    torch.testing.assert_close(loss, term(student, teacher))
    loss.backward()
    assert student.grad.any()


def test_with_its_projector_a_student_learns_a_teacher_of_its_own_rank():
    torch.manual_seed(0)
    teacher = F.layer_norm(tokens(1, 16, 4, 3).float() @ tokens(2, 3, 12).float(), (12,))
    student, projector = nn.Parameter(torch.zeros(16, 4, 3)), orthogonal_projector(3, 12)
    optimizer = torch.optim.Adam([student, *projector.parameters()], lr=0.05)
    losses = []
    for _ in range(150):
        loss = VkD(pool=False)(projector(student), teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "zca"}, r"VkD: normalize must be one of .*got 'zca'"),
        ({"distance": "cosine"}, r"VkD: distance must be one of .*got 'cosine'"),
        ({"distance": "mse", "beta": 0.5}, "beta is of smooth_l1"),
        ({"eps": 1e-4}, "VkD: eps is of 'whiten', got eps=0.0001 with 'standardize'"),
        ({"normalize": "whiten", "eps": 0.0}, "VkD: eps must be positive, got 0.0"),
        ({"normalize": "whiten", "eps": math.inf}, "VkD: eps must be positive, got inf"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VkD(**options)


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"VkD: teacher must be \[3, 8, 5\] like student"):
        VkD()(tokens(0), tokens(1, B, N, 6))
