"""CRD against InfoNCE row by row, alone and over processes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.harness import peak_extra_bytes
from fastkd.losses.contrastive import CRD
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
        ({"student_dim": 0}, "student_dim must be positive, got 0"),
        ({"teacher_dim": -1}, "teacher_dim must be positive, got -1"),
        ({"dim": 0}, "dim must be positive, got 0"),
        ({"temperature": 0.0}, r"temperature must be finite and positive, got 0\.0"),
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


def gather_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    student, teacher = (x[3 * rank : 3 * rank + 3] for x in (embeddings(0), embeddings(1, dim=7)))
    student.requires_grad_()
    wrapped = DistributedDataParallel(crd(gather=True))
    value = wrapped(student, teacher)
    value.backward()
    gradients = [p.grad for p in wrapped.parameters()]
    found = {"value": value.detach(), "student": student.grad, "parameters": gradients}
    alone = crd()(student, teacher).detach()
    compiled = torch.compile(crd(gather=True), fullgraph=True, backend="aot_eager")
    found |= {"alone": alone, "compiled": compiled(student, teacher).detach()}
    torch.save(found, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_gathering_two_processes_is_one_with_all_images(tmp_path):
    run_ranks(gather_on_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    student, teacher = embeddings(0).requires_grad_(), embeddings(1, dim=7)
    distance = crd()
    value = distance(student, teacher)
    value.backward()
    torch.testing.assert_close((first["value"] + second["value"]) / 2, value.detach())
    # What DDP averages, it has averaged; the student's would be by the student's own DDP.
    torch.testing.assert_close(torch.cat((first["student"], second["student"])) / 2, student.grad)
    for averaged, whole in zip(first["parameters"], distance.parameters()):
        torch.testing.assert_close(averaged, whole.grad)
    torch.testing.assert_close(first["compiled"], first["value"])
    assert first["alone"] < first["value"]  # fewer negatives are easier
