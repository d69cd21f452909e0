"""LiftKD against the plain layers it stands for, and what it refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastkd.losses import LiftKD
from fastkd.losses.projectors import Lift
from fastkd.ops.lift_kd import LIFT_EPS
from fastkd.tokens import Tokens, match_grids

GRID = (3, 4)
STUDENT, TEACHER = 6, 10

LOSSES = ["mse", "spectral", "smooth_l1", "cosine"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def term_for(loss: str = "mse", **options) -> LiftKD:
    torch.manual_seed(0)
    term = LiftKD(STUDENT, TEACHER, loss, **options).double()
    for parameter in term.parameters():  # a LayerNorm begins with ones and zeros
        torch.nn.init.normal_(parameter)
    return term


def by_layers(term: LiftKD, tokens: torch.Tensor) -> torch.Tensor:
    """[B, N, Ds] -> [B, N, Dt] as anybody writes it."""
    projector = term.projector
    lifted = F.linear(tokens, projector.proj.weight, projector.proj.bias)
    if isinstance(projector.norm, torch.nn.Identity):
        return lifted
    norm = projector.norm
    return F.layer_norm(lifted, (TEACHER,), norm.weight, norm.bias, norm.eps)


def distance(loss: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if loss == "mse":
        return F.mse_loss(student, teacher)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(student, teacher)
    if loss == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    spectra = (
        torch.fft.rfft2(tokens.unflatten(1, GRID), dim=(1, 2), norm="ortho")
        for tokens in (student, teacher)
    )
    return F.mse_loss(*(torch.view_as_real(spectrum) for spectrum in spectra))


def assert_same(ours, theirs, inputs):
    """Equal values, and equal gradients of their sum of squares."""
    gradients = []
    for outputs in (ours, theirs):
        total = sum(output.square().sum() for output in outputs)
        gradients.append(torch.autograd.grad(total, inputs))
    for one, expected in zip((*ours, *gradients[0]), (*theirs, *gradients[1])):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias,norm,pool", itertools.product([False, True], repeat=3))
def test_value_and_gradients_are_those_of_the_layers(loss, bias, norm, pool):
    term = term_for(loss, bias=bias, norm=norm, pool=pool)
    tokens = random(2, 13, STUDENT).requires_grad_()
    teacher = random(2, 12, TEACHER, seed=1)
    patches = tokens[:, 1:]  # strided: the class token is sliced off, not copied
    outputs = term(patches, teacher, GRID)
    lifted = by_layers(term, patches)
    expected = [distance(loss, lifted, teacher)] + [lifted.mean(1)] * pool
    assert_same(outputs if pool else [outputs], expected, [tokens, *term.parameters()])


def test_maps_are_taken_as_they_are():
    term = term_for("spectral", pool=True)
    student, teacher = random(2, STUDENT, *GRID), random(2, TEACHER, *GRID, seed=1)
    value, pooled = term(student, teacher)
    lifted = by_layers(term, student.flatten(2).mT)
    torch.testing.assert_close(value, distance("spectral", lifted, teacher.flatten(2).mT))
    torch.testing.assert_close(pooled, lifted.mean(1))
    torch.testing.assert_close(term.lift(student, pool=False).flatten(2).mT, lifted)


@pytest.mark.parametrize("bias,norm", itertools.product([False, True], repeat=2))
def test_lift_gives_what_to_classify(bias, norm):
    term = term_for(bias=bias, norm=norm)
    tokens = random(2, 12, STUDENT)
    lifted = by_layers(term, tokens)
    torch.testing.assert_close(term.lift(tokens), lifted.mean(1))
    torch.testing.assert_close(term.lift(tokens, pool=False), lifted)


def test_pooled_tokens_are_the_same_with_a_teacher_and_without():
    term = term_for(pool=True)
    tokens, teacher = random(2, 12, STUDENT), random(2, 12, TEACHER, seed=1)
    torch.testing.assert_close(term(tokens, teacher)[1], term.lift(tokens))


def test_beta_is_the_threshold_of_smooth_l1():
    term = term_for("smooth_l1", beta=0.3)
    tokens, teacher = random(2, 12, STUDENT), random(2, 12, TEACHER, seed=1)
    expected = F.smooth_l1_loss(by_layers(term, tokens), teacher, beta=0.3)
    torch.testing.assert_close(term(tokens, teacher), expected)


def test_a_new_projector_is_the_papers_initialized_as_in_vits():
    projector = LiftKD(192, 384).projector
    assert list(projector.state_dict()) == ["proj.weight", "norm.weight", "norm.bias"]
    assert projector.norm.eps == LIFT_EPS
    assert projector.proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not LiftKD(6, 8, bias=True).projector.proj.bias.any()


def test_the_projector_called_gives_the_lifted_tokens():
    term = term_for(bias=True)
    tokens = random(2, 12, STUDENT)
    torch.testing.assert_close(term.projector(tokens), by_layers(term, tokens))


def test_a_projector_is_fused_only_as_it_was_built():
    assert Lift(4, 6).is_fusible() and Lift(4, 6, bias=True, norm=False).is_fusible()
    hooked, adapted, plain_norm = Lift(4, 6), Lift(4, 6), Lift(4, 6)
    hooked.proj.register_forward_hook(lambda *_: None)
    adapted.proj = torch.nn.Sequential(adapted.proj)
    plain_norm.norm = torch.nn.LayerNorm(6, elementwise_affine=False)
    assert not any(lift.is_fusible() for lift in (hooked, adapted, plain_norm))


@pytest.mark.parametrize("use", ["forward", "lift"])
def test_layers_that_do_more_than_their_weights_say_are_refused(use):
    term = term_for()
    term.projector.proj = torch.nn.utils.parametrizations.orthogonal(term.projector.proj)
    arguments = [random(2, 12, STUDENT), random(2, 12, TEACHER)][: 2 if use == "forward" else 1]
    with pytest.raises(ValueError, match="Lift: a layer has been exchanged"):
        getattr(term, use)(*arguments)


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match=r"LiftKD: loss .* one of .*, got 'l2'"):
        LiftKD(STUDENT, TEACHER, loss="l2")


def test_a_backend_that_cannot_run_here_is_refused():
    with pytest.raises((RuntimeError, ValueError), match="backend"):
        term_for(backend="abacus")(random(2, 12, STUDENT), random(2, 12, TEACHER))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 12, 7), (2, 12, 10), r"student_tokens must be \[B, N, 6\].*got \[2, 12, 7\]"),
        ((2, 12, 6), (2, 12, 6), r"teacher_tokens must be \[B, N, 10\].*got \[2, 12, 6\]"),
        ((2, 6, 3, 4), (2, 7, 3, 4), r"teacher_tokens must be .*\[B, 10, H, W\], got \[2, 7, 3"),
        ((2, 12, 6), (2, 13, 10), r"must be \[2, 12, 10\].*got \[2, 13, 10\].*CLS"),
        ((12, 6), (12, 10), r"student_tokens must be \[B, N, 6\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        term_for()(random(*student), random(*teacher))


@pytest.mark.parametrize("wrap", [lambda x, grid: x, Tokens])
def test_a_teacher_on_another_grid_is_sent_to_match_grids(wrap):
    student, teacher = random(2, 12, STUDENT), random(2, 48, TEACHER, seed=1)
    with pytest.raises((TypeError, ValueError), match=r"(?:Tokens|\[2, 48, 10\]).*match_grids"):
        term_for()(wrap(student, GRID), wrap(teacher, (6, 8)))
    _, matched = match_grids(Tokens(student, GRID), Tokens(teacher, (6, 8)), "bicubic")
    assert term_for()(student, matched.data).isfinite()


def test_a_teacher_that_wants_a_gradient_is_refused():
    with pytest.raises(ValueError, match="frozen"):
        term_for()(random(2, 12, STUDENT), random(2, 12, TEACHER).requires_grad_())


def test_ten_steps_of_the_loss_alone_follow_those_of_plain_layers():
    """Gradients made in the forward, scaled by the loss weight: equal to float32 rounding."""

    def losses(fused: bool) -> list[float]:
        torch.manual_seed(0)
        body, term = torch.nn.Linear(12, 16), LiftKD(16, 24, "mse")
        optimizer = torch.optim.AdamW([*body.parameters(), *term.parameters()], lr=1e-2)
        images, teacher = torch.randn(4, 9, 12), torch.randn(4, 9, 24)
        seen = []
        for _ in range(10):
            tokens = body(images)
            loss = term(tokens, teacher) if fused else F.mse_loss(term.projector(tokens), teacher)
            optimizer.zero_grad()
            (0.2 * loss).backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("lift_eps", [1e-5, 0.3])
def test_the_layer_norm_takes_its_eps(loss, lift_eps):
    """Tokens so small that eps is a part of their variance that nobody can miss."""
    tokens, teacher = 0.05 * random(2, 12, STUDENT).requires_grad_(), random(2, 12, TEACHER, seed=1)
    term = term_for(loss, pool=True, lift_eps=lift_eps)
    assert term.projector.norm.eps == lift_eps
    lifted = F.layer_norm(
        tokens @ term.projector.proj.weight.mT,
        (TEACHER,),
        term.projector.norm.weight,
        term.projector.norm.bias,
        eps=lift_eps,
    )
    found = term(tokens, teacher, GRID)
    assert_same(found, [distance(loss, lifted, teacher), lifted.mean(1)], [*term.parameters()])
    torch.testing.assert_close(term.lift(tokens), lifted.mean(1))
    alone = term_for(loss, lift_eps=lift_eps)
    torch.testing.assert_close(alone(tokens, teacher, GRID), found[0])
