"""CRD against InfoNCE row by row, alone and over processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.harness import peak_extra_bytes
from fastkd.losses.crd import CRD, _gather_rows
from fastkd.training import Result, train
from tests.harness.tiny import FAST, tensor_data, vit
from tests.harness.torchrun import run_ranks


def embeddings(seed: int, dim: int = 5, batch: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, generator=generator, dtype=torch.float64)


def crd(student_dim: int = 5, teacher_dim: int = 7, **options) -> CRD:
    torch.manual_seed(0)
    return CRD(student_dim, teacher_dim, **{"dim": 4, **options}).double()


def definition(distance: CRD, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    def project(x, head):
        return x @ head.weight.T + head.bias

    ours, theirs = project(student, distance.student_head), project(teacher, distance.teacher_head)
    total = torch.zeros((), dtype=torch.float64)
    for anchors, others in ((ours, theirs), (theirs, ours)):
        for index, anchor in enumerate(anchors):
            likeness = F.cosine_similarity(anchor[None], others, dim=1) / distance.temperature
            exponentials = likeness.exp()
            total = total - (exponentials[index] / exponentials.sum()).log()
    return total / (2 * len(student))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_is_infonce_averaged_over_both_directions(temperature):
    distance = crd(temperature=temperature)
    student, teacher = embeddings(0).requires_grad_(), embeddings(1, dim=7)
    value, expected = distance(student, teacher), definition(distance, student, teacher)
    torch.testing.assert_close(value, expected)
    wanted = (student, *distance.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(x, wanted) for x in (value, expected))):
        torch.testing.assert_close(ours, theirs)


def test_tokens_are_averaged_per_image():
    distance = crd()
    tokens, teacher = embeddings(0, batch=24).unflatten(0, (6, 4)), embeddings(1, dim=7)
    torch.testing.assert_close(
        distance(tokens, teacher[:, None].expand(-1, 4, -1)), distance(tokens.mean(1), teacher)
    )


def test_both_heads_learn():
    distance = crd()
    distance(embeddings(0), embeddings(1, dim=7)).backward()
    assert all(p.grad.abs().sum() > 0 for p in distance.parameters())
    shapes = {name: tuple(p.shape) for name, p in distance.named_parameters()}
    assert shapes["student_head.weight"] == (4, 5) and shapes["teacher_head.weight"] == (4, 7)


def test_one_image_has_no_negatives():
    student = embeddings(0, batch=1).requires_grad_()
    value = crd()(student, embeddings(1, dim=7, batch=1))
    value.backward()
    assert value.item() == 0
    assert student.grad.abs().max() == 0


def test_knowing_nothing_costs_the_logarithm_of_the_batch():
    same = embeddings(0)[:1].expand(6, -1)
    value = crd()(same, embeddings(1, dim=7)[:1].expand(6, -1))
    torch.testing.assert_close(value.exp().item(), 6.0)


def test_large_logits_do_not_overflow():
    distance = crd(temperature=1e-4).float()
    student = embeddings(0).float().requires_grad_()
    value = distance(student, embeddings(1, dim=7).float())
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"student_dim": 0}, "student_dim must be at least 1, got 0"),
        ({"teacher_dim": -1}, "teacher_dim must be at least 1, got -1"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        crd(**option)


def test_the_logits_are_never_all_there():
    batch, limit = 512, 1 << 17
    distance = crd(dim=8, chunk_bytes=limit).float()
    student = embeddings(0, batch=batch).float().requires_grad_()
    teacher = embeddings(1, dim=7, batch=batch).float()
    wanted = (student, *distance.parameters())
    peak = peak_extra_bytes(lambda: torch.autograd.grad(distance(student, teacher), wanted), "cpu")
    embedding = batch * 8 * 4
    assert peak < limit + 12 * embedding < batch**2 * 4 / 2


def test_gathering_without_other_processes_changes_nothing():
    student, teacher = embeddings(0), embeddings(1, dim=7)
    assert crd(gather=True)(student, teacher) == crd()(student, teacher)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_heads_compute_in_the_dtype_of_their_parameters(dtype, parameters):
    distance = crd().to(parameters)
    student, teacher = embeddings(0).to(dtype), embeddings(1, dim=7).to(dtype)
    value = distance(student, teacher)
    expected = crd()(student.double(), teacher.double())
    assert value.dtype == (torch.float64 if parameters == torch.float64 else torch.float32)
    rounding = 0.2 if parameters == torch.bfloat16 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((7, 7), "student must have student_dim=5 channels, got 7"),
        ((5, 5), "teacher must have teacher_dim=7 channels, got 5"),
    ],
)
def test_other_widths_than_those_of_the_heads_are_refused(widths, message):
    student, teacher = (embeddings(seed, dim) for seed, dim in enumerate(widths))
    with pytest.raises(ValueError, match=message):
        crd()(student, teacher)


def gather_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    wanted = {
        "wrapped": DistributedDataParallel(crd(gather=True)),
        "compiled": torch.compile(crd(gather=True), fullgraph=True, backend="aot_eager"),
    }
    found = {name: value_and_gradients(distance, rank) for name, distance in wanted.items()}
    found["accumulated"] = accumulate(rank)
    own = embeddings(rank).mT  # not contiguous
    found["rows"] = _gather_rows(own, 2)
    found |= evaluate(rank)
    with pytest.raises(ValueError, match=r"gather=True needs equally many.*got \[3, 4\]"):
        crd(gather=True)(embeddings(0, batch=3 + rank), embeddings(1, dim=7, batch=3 + rank))
    torch.save(found, f"{folder}/{rank}.pth")
    train_with_uneven_shares(rank, folder)
    dist.destroy_process_group()


def value_and_gradients(distance, rank: int) -> list[torch.Tensor]:
    student, teacher = share(rank, slice(None))
    value = distance(student.requires_grad_(), teacher)
    value.backward()
    return [value.detach(), student.grad, *(p.grad for p in distance.parameters())]


def share(rank: int, chosen: slice) -> list[torch.Tensor]:
    return [x[3 * rank : 3 * rank + 3][chosen] for x in (embeddings(0), embeddings(1, dim=7))]


def accumulate(rank: int) -> list[torch.Tensor]:
    """Gradients of two slices of a share, of which only the second is synchronized."""
    distance = DistributedDataParallel(crd(gather=True))
    with distance.no_sync():
        distance(*share(rank, slice(0, 2))).backward()
    distance(*share(rank, slice(2, 3))).backward()
    return [p.grad for p in distance.parameters()]


def evaluate(rank: int) -> dict[str, torch.Tensor]:
    """Of shares of different sizes, in eval mode and without gradients."""
    student, teacher = embeddings(0, batch=3 + rank), embeddings(1, dim=7, batch=3 + rank)
    distance = crd(gather=True)
    with torch.no_grad():
        ungraded = distance(student, teacher)
    alone = crd()(student, teacher).detach()
    return {
        "evaluated": [distance.eval()(student, teacher).detach(), ungraded],
        "alone": [alone, alone],
    }


def train_with_uneven_shares(rank: int, folder: str) -> None:
    # 31 evaluation images: the ranks' shares differ by one.
    terms = {"feature_loss": "crd", "feature_options": {"gather": True}, "pairs": [(-1, -1)]}
    options = FAST | {"epochs": 1, "labels": False, "alpha": 0.0} | terms
    train(vit(), vit(24, seed=1), tensor_data(32, 31), **options).save(f"{folder}/run{rank}.json")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(gather_on_rank, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(ranks):
    return [torch.load(ranks / f"{rank}.pth") for rank in range(2)]


def of_all_images(chosen: list[int]) -> list[torch.Tensor]:
    """Value, and gradients of the student and the parameters, in one process."""
    student, teacher = embeddings(0)[chosen].requires_grad_(), embeddings(1, dim=7)[chosen]
    distance = crd()
    value = distance(student, teacher)
    value.backward()
    return [value.detach(), student.grad, *(p.grad for p in distance.parameters())]


@pytest.mark.slow
def test_gathering_two_processes_is_one_with_all_images(found):
    value, student, *parameters = of_all_images(list(range(6)))
    (one, its_student, *averaged), (other, its_other, *_) = (rank["wrapped"] for rank in found)
    torch.testing.assert_close((one + other) / 2, value)
    # What DDP averages, it has averaged; the student's would be by the student's own DDP.
    torch.testing.assert_close(torch.cat((its_student, its_other)) / 2, student)
    torch.testing.assert_close(averaged, parameters)


@pytest.mark.slow
def test_a_compiled_gathering_is_the_same_with_its_gradients(found):
    _, _, *parameters = of_all_images(list(range(6)))
    for rank in found:
        torch.testing.assert_close(rank["compiled"][:2], rank["wrapped"][:2])
    both = zip(*(rank["compiled"][2:] for rank in found))
    torch.testing.assert_close([(one + other) / 2 for one, other in both], parameters)


@pytest.mark.slow
def test_slices_of_an_update_gather_one_by_one(found):
    slices = [of_all_images(chosen)[2:] for chosen in ([0, 1, 3, 4], [2, 5])]
    expected = [one + other for one, other in zip(*slices)]
    for rank in found:
        torch.testing.assert_close(rank["accumulated"], expected)


def test_gathering_takes_embeddings_of_any_strides(found):
    expected = torch.cat([embeddings(rank).mT for rank in range(2)])
    for rank in found:
        torch.testing.assert_close(rank["rows"], expected)


def test_evaluation_takes_the_images_of_its_own_process(found):
    for rank in found:
        torch.testing.assert_close(rank["evaluated"], rank["alone"])


def test_a_run_that_gathers_is_evaluated_on_uneven_shares(ranks):
    first, second = (Result.load(ranks / f"run{rank}.json") for rank in range(2))
    assert first.eval_loss == second.eval_loss
    assert math.isfinite(first.eval_loss)
