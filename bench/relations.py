"""Relations between patches and images, forward + backward: autograd, torch.compile, and ours.

python bench/relations.py --output bench/results/relations_cpu.json
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.contrastive import CRD
from fastkd.losses.manifold import ManifoldKD
from fastkd.losses.relational import RKD

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
    shape = (batch, tokens) if name == "manifold" else (batch,)
    student = torch.randn(*shape, STUDENT, device=device, requires_grad=True)
    teacher = torch.randn(*shape, TEACHER, device=device)
    widths = 2 * STUDENT + TEACHER  # a product for either side, and the gradient's
    flops = {
        "manifold": 2 * widths * (batch * tokens**2 + tokens * batch**2 + 192**2),
        "angles": 2 * widths * batch**3,
        "contrast": 12 * 128 * batch**2,  # three products in each of two directions
    }
    crd = CRD(STUDENT, TEACHER).to(device)
    losses: dict[str, tuple[Loss, Loss]] = {
        "manifold": (eager_manifold, ManifoldKD()),
        "angles": (eager_angles, RKD(distance_weight=0)),
        "contrast": (eager_contrast(crd), crd),
    }
    eager, ours = losses[name]
    compiled = torch.compile(eager, dynamic=False)

    def step(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(student, teacher), student)

    return harness.Case(
        f"{name} {list(shape)}, {STUDENT} and {TEACHER} wide",
        2 * student.nbytes + teacher.nbytes,  # both sides are read, the gradient is written
        [
            harness.Provider("eager", step(eager), True),
            harness.Provider("torch.compile of it", step(compiled), True),
            harness.Provider("fastkd", step(ours)),
        ],
        flops[name],
    )


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    if options.smoke:
        shapes = [("manifold", 2, 16), ("angles", 4, 1), ("contrast", 8, 1)]
    elif options.device == "cuda":
        shapes = [("manifold", 256, 196), ("angles", 256, 1), ("contrast", 4096, 1)]
    else:
        shapes = [
            *[("manifold", batch, 196) for batch in (32, 64, 128)],
            *[("angles", batch, 1) for batch in (64, 256)],
            *[("contrast", batch, 1) for batch in (1024, 4096)],
        ]
    cases = [case(*shape, options.device) for shape in shapes]
    harness.run("relations", cases, options)


if __name__ == "__main__":
    main()
