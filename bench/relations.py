"""Relations between patches and images, forward + backward: autograd, torch.compile, and ours.

python bench/relations.py --output bench/results/relations_cpu.json
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastkd.losses.crd import CRD
from fastkd.losses.manifold import ManifoldKD
from fastkd.losses.rkd import RKD

STUDENT, TEACHER = 192, 384
Loss = Callable[[Tensor, Tensor], Tensor]


def relation_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of [G, M, M] products of [G, M, D] unit vectors."""
    return (student @ student.mT - teacher @ teacher.mT).square().mean()


def eager_manifold(student: Tensor, teacher: Tensor) -> Tensor:
    """All matrices at once, left to autograd."""
    s, t = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
    drawn = torch.randperm(s.shape[0] * s.shape[1], device=s.device)[:192]
    across = relation_error(s.transpose(0, 1), t.transpose(0, 1))
    random = relation_error(*(x.flatten(0, 1)[drawn][None] for x in (s, t)))
    return 4 * relation_error(s, t) + 0.1 * across + 0.2 * random


def eager_rkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances and angles with all matrices at once, left to autograd."""
    return 25 * eager_distances(student, teacher) + eager_angles(student, teacher)


def eager_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """The [B, B] distances of both sides."""

    def relative(x: Tensor) -> Tensor:
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return distance / (distance.sum() / (distance > 0).sum())

    return F.smooth_l1_loss(relative(student.float()), relative(teacher.float()))


def eager_angles(student: Tensor, teacher: Tensor) -> Tensor:
    """The [B, B, B] cosines of both sides at once, left to autograd."""

    def cosines(x: Tensor) -> Tensor:
        legs = F.normalize(x[None] - x[:, None], dim=-1)
        return legs @ legs.mT

    return 50 * F.smooth_l1_loss(cosines(student.float()), cosines(teacher.float()))


def eager_contrast(term: CRD) -> Loss:
    """The [B, B] logits at once, left to autograd."""

    def contrast(student: Tensor, teacher: Tensor) -> Tensor:
        own = F.normalize(term.student_head(student), dim=-1)
        taught = F.normalize(term.teacher_head(teacher), dim=-1)
        logits = own @ taught.mT / term.temperature
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2

    return contrast


def case(name: str, batch: int, tokens: int, device: str) -> harness.Case:
    """One loss of [batch, tokens] maps, or of one embedding an image."""
    shape = (batch, tokens) if tokens > 1 else (batch,)
    student = torch.randn(*shape, STUDENT, device=device, requires_grad=True)
    teacher = torch.randn(*shape, TEACHER, device=device)
    crd = CRD(STUDENT, TEACHER).to(device)
    losses: dict[str, tuple[Loss, Loss]] = {
        "manifold": (eager_manifold, ManifoldKD()),
        "angles": (eager_angles, RKD(distance_weight=0)),
        "rkd": (eager_rkd, RKD()),
        "contrast": (eager_contrast(crd), crd),
    }
    eager, ours = losses[name]
    compiled = torch.compile(eager, dynamic=False)
    wanted = [student, *(crd.parameters() if name == "contrast" else ())]

    def step(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(student, teacher), wanted)

    return harness.Case(
        f"{name} {list(shape)}, {STUDENT} and {TEACHER} wide",
        2 * student.nbytes + teacher.nbytes,  # both sides are read, the gradient is written
        [
            harness.Provider("eager", step(eager), True),
            harness.Provider("torch.compile of it", step(compiled), True),
            harness.Provider("fastkd", step(ours)),
        ],
        products(ours, student, teacher),
    )


def products(loss: Loss, student: Tensor, teacher: Tensor) -> int:
    """FLOPs of ours' matrix products: the fewest that give the value and the gradient."""
    with FlopCounterMode(display=False) as counter:
        loss(student.detach().requires_grad_(), teacher).backward()
    return counter.get_total_flops()


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    if options.smoke:
        maps, images, contrast = [(2, 16)], [4], [8]
    elif options.device == "cuda":
        maps, images, contrast = [(256, 196)], [256], [4096]
    else:
        maps, images, contrast = [(32, 196), (64, 196), (128, 196)], [64, 256], [1024, 4096]
    shapes = [
        *[("manifold", *shape) for shape in maps],
        *[(name, batch, 1) for name in ("angles", "rkd") for batch in images],
        *[("contrast", batch, 1) for batch in contrast],
    ]
    cases = [case(*shape, options.device) for shape in shapes]
    harness.run("relations", cases, options)


if __name__ == "__main__":
    main()
