"""lift_kd, forward + backward: eager, torch.compile, by hand on the library's products, and ours.

python bench/lift_kd.py --output bench/results/lift_kd_cpu.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import backends, lift_kd
from fastkd.ops.lift_kd import BACKENDS, LIFT_EPS
from fastkd.ops.lift_kd.reference import Inputs as OperatorInputs


def spectral(lifted: Tensor, teacher: Tensor) -> Tensor:
    """SpectralKD without an FFT, on square grids of tokens."""
    d = lifted.float() - teacher.float()
    side = round(d.shape[1] ** 0.5)
    halves = 2 - side % 2
    rows = d.unflatten(1, (side, side // halves, halves)).sum(dim=2)
    total = d.square().sum() + rows.square().sum() * (halves / side)
    return total / (4 * d.shape[0] * d.shape[2] * side * (side // 2 + 1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda z, t: F.mse_loss(z.float(), t.float()),
    "spectral": spectral,
    "smooth_l1": lambda z, t: F.smooth_l1_loss(z.float(), t.float()),
    "cosine": lambda z, t: 1 - F.cosine_similarity(z.float(), t.float(), dim=-1).mean(),
}


@dataclass
class Inputs:
    """Leaves that require gradients, the teacher's tokens, and a gradient for the pooled ones."""

    tokens: Tensor
    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    teacher: Tensor
    pooled_upstream: Tensor

    @staticmethod
    def draw(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Inputs:
        batch, count, narrow, wide = shape

        def randn(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(dtype)

        leaves = (
            randn(batch, count, narrow),
            randn(wide, narrow) * narrow**-0.5,
            1 + 0.1 * randn(wide),
            0.1 * randn(wide),
        )
        leaves = (leaf.requires_grad_() for leaf in leaves)
        return Inputs(*leaves, randn(batch, count, wide), randn(batch, wide))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.tokens, self.weight, self.norm_weight, self.norm_bias


Step = Callable[..., Any]


def layers(loss: str, pool: bool) -> Step:
    """The operation as everybody writes it."""

    def forward(tokens: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, t: Tensor):
        lifted = F.linear(tokens, weight)
        lifted = F.layer_norm(lifted, lifted.shape[-1:], norm_weight, norm_bias, LIFT_EPS)
        value = LOSSES[loss](lifted, t)
        return (value, lifted.mean(dim=1)) if pool else (value,)

    return forward


def ours(loss: str, pool: bool, backend: str) -> Step:
    def forward(tokens: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, t: Tensor):
        result = lift_kd(
            tokens, weight, t, None, norm_weight, norm_bias, LIFT_EPS,
            loss=loss, pool=pool, backend=backend,
        )  # fmt: skip
        return result if pool else (result,)

    return forward


def norm_slope(projected: Tensor, lifted_slope: Tensor, norm_weight: Tensor):
    """Gradients of LayerNorm's input and parameters, written out."""
    x = projected.float()
    mean = x.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(dim=-1, keepdim=True) + LIFT_EPS)
    normed = (x - mean) * rstd
    scaled = lifted_slope * norm_weight.float()
    slope = scaled - scaled.mean(dim=-1, keepdim=True)
    slope = rstd * (slope - normed * (scaled * normed).mean(dim=-1, keepdim=True))
    return slope, (lifted_slope * normed).sum(dim=0), lifted_slope.sum(dim=0)


def norm_mse_slope(projected: Tensor, norm_weight: Tensor, norm_bias: Tensor, t: Tensor):
    """LayerNorm, MSE and their gradient in one function, for torch.compile to fuse."""
    lifted = F.layer_norm(
        projected.float(), projected.shape[-1:], norm_weight.float(), norm_bias.float(), LIFT_EPS
    )
    d = lifted - t.float()
    slope, *vectors = norm_slope(projected, 2 / d.numel() * d, norm_weight)
    return d.square().mean(), slope.to(projected.dtype), *vectors


class InForward(torch.autograd.Function):
    """MSE with its gradients made in the forward, on the library's matrix products."""

    fused = staticmethod(norm_mse_slope)

    @staticmethod
    def forward(ctx, tokens, weight, norm_weight, norm_bias, t):
        rows, teacher = tokens.flatten(0, 1), t.flatten(0, 1)
        value, slope, *vectors = InForward.fused(rows @ weight.mT, norm_weight, norm_bias, teacher)
        vectors = [vector.to(norm_weight.dtype) for vector in vectors]
        ctx.save_for_backward((slope @ weight).view_as(tokens), slope.mT @ rows, *vectors)
        return value

    @staticmethod
    def backward(ctx, upstream):  # upstream is 1 here, and is left out in the baseline's favour
        return *ctx.saved_tensors, None


def norm_mse_pool(projected: Tensor, norm_weight: Tensor, norm_bias: Tensor, t: Tensor):
    """LayerNorm, MSE and pooling of [B, N, Dt] in one function, for torch.compile to fuse."""
    lifted = F.layer_norm(
        projected.float(), projected.shape[-1:], norm_weight.float(), norm_bias.float(), LIFT_EPS
    )
    return F.mse_loss(lifted, t.float()), lifted.mean(dim=1).to(projected.dtype)


def norm_mse_pool_slope(
    projected: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    t: Tensor,
    upstream: Tensor,
    pooled_upstream: Tensor,
):
    lifted = F.layer_norm(
        projected.float(), projected.shape[-1:], norm_weight.float(), norm_bias.float(), LIFT_EPS
    )
    slope = 2 * upstream / lifted.numel() * (lifted - t.float())
    slope = slope + pooled_upstream.float()[:, None] / projected.shape[1]
    flat = slope.flatten(0, 1)
    slope, *vectors = norm_slope(projected.flatten(0, 1), flat, norm_weight)
    return slope.to(projected.dtype), *vectors


class PooledByHand(torch.autograd.Function):
    """MSE and pooled tokens with a hand-written backward, on the library's matrix products."""

    compare = staticmethod(norm_mse_pool)
    slope = staticmethod(norm_mse_pool_slope)

    @staticmethod
    def forward(ctx, tokens, weight, norm_weight, norm_bias, t):
        projected = tokens @ weight.mT
        ctx.save_for_backward(tokens, weight, norm_weight, norm_bias, t, projected)
        return PooledByHand.compare(projected, norm_weight, norm_bias, t)

    @staticmethod
    def backward(ctx, upstream, pooled_upstream):
        tokens, weight, norm_weight, norm_bias, t, projected = ctx.saved_tensors
        slope, *vectors = PooledByHand.slope(
            projected, norm_weight, norm_bias, t, upstream, pooled_upstream
        )
        vectors = [vector.to(norm_weight.dtype) for vector in vectors]
        rows_gradient = (slope @ weight).view_as(tokens)
        return rows_gradient, slope.mT @ tokens.flatten(0, 1), *vectors, None


def chunked(chunk_rows: int) -> Step:
    """Liger-Kernel's pattern: chunks of rows, each differentiated at once, MSE."""

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tokens, weight, norm_weight, norm_bias, t):
            rows, teacher = tokens.flatten(0, 1), t.flatten(0, 1)
            total, rows_gradient = rows.new_zeros((), dtype=torch.float32), torch.empty_like(rows)
            sums = [torch.zeros_like(x) for x in (weight, norm_weight, norm_bias)]
            for first in range(0, len(rows), chunk_rows):
                part = slice(first, first + chunk_rows)
                leaves = [x.detach().requires_grad_() for x in (weight, norm_weight, norm_bias)]
                chunk = rows[part].detach().requires_grad_()
                with torch.enable_grad():
                    lifted = F.layer_norm(
                        F.linear(chunk, leaves[0]), teacher.shape[-1:], *leaves[1:], LIFT_EPS
                    )
                    value = F.mse_loss(lifted.float(), teacher[part].float(), reduction="sum")
                    value = value / teacher.numel()
                    rows_gradient[part], *gradients = torch.autograd.grad(value, [chunk, *leaves])
                for gradient, addend in zip(sums, gradients, strict=True):
                    gradient += addend
                total += value.detach()
            ctx.save_for_backward(rows_gradient.view_as(tokens), *sums)
            return total

        @staticmethod
        def backward(ctx, upstream):  # as above
            return *ctx.saved_tensors, None

    return lambda *inputs: (Chunked.apply(*inputs),)


def runner(step: Step, inputs: Inputs) -> Callable[[], object]:
    """Forward and backward, as a student's training step would call it."""

    def run() -> object:
        outputs = step(*inputs.leaves, inputs.teacher)
        upstream = [torch.ones_like(outputs[0])]
        if len(outputs) > 1:
            upstream.append(inputs.pooled_upstream.to(outputs[1].dtype))
        return torch.autograd.grad(outputs, inputs.leaves, upstream)

    return run


def baselines(loss: str, pool: bool, device: str, tune: bool = False) -> dict[str, Step]:
    plain = layers(loss, pool)
    found = {"eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    if tune:
        mode = "max-autotune-no-cudagraphs"  # the harness captures the graph
        found["torch.compile, max-autotune"] = torch.compile(plain, dynamic=False, mode=mode)
    if loss == "mse" and not pool:
        InForward.fused = staticmethod(torch.compile(norm_mse_slope, dynamic=False))
        found["gradients in forward, library products"] = lambda *x: (InForward.apply(*x),)
        found["chunks of rows (Liger's pattern)"] = chunked(16384 if device == "cuda" else 1024)
    if loss == "mse" and pool:
        PooledByHand.compare = staticmethod(torch.compile(norm_mse_pool, dynamic=False))
        PooledByHand.slope = staticmethod(torch.compile(norm_mse_pool_slope, dynamic=False))
        found["backward by hand, library products"] = lambda *x: PooledByHand.apply(*x)
    return found


def case(
    loss: str,
    shape: tuple[int, int, int, int],
    pool: bool,
    dtype: torch.dtype,
    device: str,
    tune: bool = False,
) -> harness.Case:
    """Forward and backward on one shape; ``tune`` adds max-autotune, which compiles slowly."""
    inputs = Inputs.draw(shape, dtype, device)
    batch, count, narrow, wide = shape
    name = f"{loss} [{batch}, {count}, {narrow}] -> {wide} {str(dtype).removeprefix('torch.')}"
    # One pass reads tokens and teacher and writes the tokens' gradient; with pooled tokens, whose
    # gradient comes in the backward, both are read again and the tokens lifted once more.
    reads = inputs.tokens.nbytes + inputs.teacher.nbytes
    traffic = (2 if pool else 1) * reads + inputs.tokens.nbytes
    flops = (4 if pool else 3) * 2 * batch * count * narrow * wide
    providers = [
        harness.Provider(label, runner(step, inputs), True)
        for label, step in baselines(loss, pool, device, tune).items()
    ]
    for backend, reason in backends(device).items():
        tokens, teacher = (x.unflatten(1, (1, count)) for x in (inputs.tokens, inputs.teacher))
        norm = inputs.norm_weight, inputs.norm_bias
        lifter = inputs.weight, None, *norm, LIFT_EPS, dtype
        reason = reason or BACKENDS.why_not(
            backend, OperatorInputs(tokens, *lifter, teacher, loss, 1.0)
        )
        if reason is None:
            step = ours(loss, pool, backend)
            providers.append(harness.Provider(f"fastkd ({backend})", runner(step, inputs)))
    form = "pooled" if pool else "loss alone"
    return harness.Case(f"{name}, {form}", traffic, providers, flops, dtype)


PAPER = [(256, 196, 192, 384), (512, 196, 192, 384)]
OTHERS = [
    (256, 196, 192, 768),
    (256, 196, 384, 768),
    (256, 196, 192, 1024),
    (512, 49, 192, 384),
    (256, 256, 192, 384),
]


def cases(options: Any) -> list[harness.Case]:
    device = options.device
    if options.smoke:
        return [case("mse", (2, 16, 8, 16), pool, torch.float32, device) for pool in (True, False)]
    if options.quick:
        return [
            case(loss, PAPER[1], pool, torch.bfloat16, device)
            for loss in ("mse", "spectral")
            for pool in (True, False)
        ]
    if device != "cuda":
        shape = (64, 196, 192, 384)
        return [
            case(loss, shape, pool, torch.float32, device)
            for loss in LOSSES
            for pool in (False, True)
        ]
    dtype = torch.bfloat16
    half, full = PAPER
    made = [
        case(loss, full, pool, dtype, device, tune=True)
        for pool in (True, False)
        for loss in ("mse", "spectral")
    ]
    made += [case("mse", half, pool, dtype, device) for pool in (True, False)]
    made += [case("mse", shape, True, dtype, device) for shape in OTHERS]
    return made + [case(loss, full, True, dtype, device) for loss in ("smooth_l1", "cosine")]


def main() -> None:
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # a baseline must not turn eager
    parser = harness.arguments(__doc__.splitlines()[0], quick=True)
    options = parser.parse_args()
    harness.run("lift_kd", cases(options), options)


if __name__ == "__main__":
    main()
