"""Every operator, backend and dtype in a process of its own, at the shapes that training launches.

python bench/first_contact.py --output first_contact.json

For the first minutes on a GPU that has not run the kernels yet. Launches are synchronous
(CUDA_LAUNCH_BLOCKING=1), results are compared with float64, and a process that dies or hangs costs
its remaining cases only. Prints a table; ends within --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import feature_kd, lift_kd, second_moment, sep, spectral_ranks
from fastkd.ops.feature_kd.reference import definition as feature_kd_definition
from fastkd.ops.lift_kd import LIFT_EPS
from fastkd.ops.second_moment.reference import definition as moment_definition
from fastkd.ops.spectrum import LEVELS
from fastkd.ops.spectrum.reference import ranks_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Relative error of values and gradients; half precision rounds operands and results.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EXACT = {"feature_kd value": 1e-5, "energies": 1e-6, "moment": 1e-5, "curve": 1e-6}
LOSSES = ("mse", "spectral", "cosine", "smooth_l1")
# What a backend may refuse: these are its limits, everything else is a fault.
EXPECTED_REFUSALS = ("it multiplies in float16 or bfloat16", "it lifts ")
PROBE_SECONDS = 45.0  # of one process, its imports and compilations included

Errors = dict[str, tuple[float, float]]  # name: (error, error allowed)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        name: in the table.
        steps: calls the operator and yields nothing of interest, then yields its errors.
    """

    name: str
    steps: Callable[[], Iterator[Errors]]

    def launch(self) -> None:
        """Call the operator alone."""
        next(self.steps())

    def errors(self) -> Errors:
        """Call it and compare it with float64."""
        *_, errors = self.steps()
        return errors


def noise(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every run."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth; infinite where anything is NaN."""
    error = ((found.double() - truth).norm() / truth.norm()).item()
    return error if error == error else float("inf")


# [B, N, D] tokens of a layout; the batch of 160 is more than one band of lift_kd's launches.
LAYOUTS = ("tokens", "channels first", "class token sliced off")


def as_layout(tokens: Tensor, grid: tuple[int, int], layout: str) -> Tensor:
    """[B, N, D] as models produce it."""
    if layout == "channels first":
        return tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
    if layout == "class token sliced off":
        return torch.cat([tokens[:, :1], tokens], dim=1)[:, 1:]
    return tokens


def as_maps(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.unflatten(1, grid)


def feature_kd_cases(backend: str, dtype: torch.dtype, device: str, batch: int) -> Iterator[Case]:
    """Values and gradients at DeiT's and Swin's maps, and at one that fits no tile."""

    def errors(
        loss: str, count: int, grid: tuple[int, int], widths: tuple[int, int], layout: str
    ) -> Iterator[Errors]:
        tokens = grid[0] * grid[1]
        maps = [noise((count, tokens, d), dtype, device, seed) for seed, d in enumerate(widths)]
        student, teacher = (as_layout(x, grid, layout) for x in maps)
        student = student.detach().requires_grad_()
        pool = "teacher" if widths[0] != widths[1] else "none"
        square = None if student.ndim == 4 else grid
        value = feature_kd(student, teacher, loss, grid=square, pool=pool, backend=backend)
        # A loss scale, as float16 needs: per token, gradients are about 1 / D.
        scale = torch.full_like(value, count * tokens)
        (gradient,) = torch.autograd.grad(value, student, scale)
        yield {}
        exact = student.detach().double().requires_grad_()
        exact_maps = as_maps(exact, grid), as_maps(teacher.double(), grid)
        truth = feature_kd_definition(*exact_maps, loss)
        (true_gradient,) = torch.autograd.grad(truth, exact, scale.double())
        yield {
            "value": (relative_error(value, truth), EXACT["feature_kd value"]),
            "gradient": (relative_error(gradient, true_gradient), ALLOWED[dtype]),
        }

    paper = (14, 14), (384, 384)
    shapes = [
        *(("", batch, *paper, layout) for layout in LAYOUTS),
        ("odd", min(batch, 37), (5, 7), (219, 219), "tokens"),
        ("7 x 7", batch, (7, 7), (768, 768), "tokens"),
        ("pooled to 192", batch, (14, 14), (192, 384), "tokens"),
    ]
    for name, *shape in shapes:
        for loss in LOSSES:
            label = f"{loss}, {name or shape[-1]}"
            yield Case(label, lambda loss=loss, shape=shape: errors(loss, *shape))


def lift_kd_cases(backend: str, dtype: torch.dtype, device: str, batch: int) -> Iterator[Case]:
    """Values, pooled tokens and all gradients at the paper's widths, and at odd ones."""

    def errors(
        loss: str,
        pool: bool,
        count: int,
        grid: tuple[int, int],
        widths: tuple[int, int],
        layout: str,
    ) -> Iterator[Errors]:
        narrow, wide = widths
        tokens = noise((count, grid[0] * grid[1], narrow), dtype, device)
        teacher = noise((count, grid[0] * grid[1], wide), dtype, device, 1)
        leaves = [
            as_layout(tokens, grid, layout),
            noise((wide, narrow), dtype, device, 2) * narrow**-0.5,
            1 + 0.1 * noise((wide,), dtype, device, 3),
            0.1 * noise((wide,), dtype, device, 4),
        ]
        teacher = as_layout(teacher, grid, layout)
        pooled_upstream = noise((count, wide), dtype, device, 5)
        leaves = [x.detach().requires_grad_() for x in leaves]
        result = lift_kd(
            leaves[0], leaves[1], teacher, None, *leaves[2:], LIFT_EPS,
            loss=loss, grid=None if teacher.ndim == 4 else grid, pool=pool, backend=backend,
        )  # fmt: skip
        outputs = result if pool else (result,)
        scale = torch.full_like(outputs[0], teacher.numel() // wide)  # as above
        upstream = [scale, pooled_upstream.to(outputs[-1].dtype)]
        gradients = torch.autograd.grad(outputs, leaves, upstream[: len(outputs)])
        yield {}

        exact = [x.detach().double().requires_grad_() for x in leaves]
        lifted = F.linear(as_maps(exact[0], grid), exact[1])
        lifted = F.layer_norm(lifted, (wide,), *exact[2:], LIFT_EPS)
        truth = feature_kd_definition(lifted, as_maps(teacher.double(), grid), loss)
        true_outputs = (truth, lifted.mean(dim=(1, 2))) if pool else (truth,)
        true_upstream = [x.double() for x in upstream[: len(outputs)]]
        truths = torch.autograd.grad(true_outputs, exact, true_upstream)

        names = ("value", "pooled")[: len(outputs)]
        names += ("tokens'", "weight's", "norm weight's", "norm bias's")
        pairs = zip((*outputs, *gradients), (*true_outputs, *truths), strict=True)
        found = [relative_error(ours.detach(), exactly) for ours, exactly in pairs]
        yield {name: (error, ALLOWED[dtype]) for name, error in zip(names, found, strict=True)}

    deit = (14, 14)
    shapes = [
        ("192 -> 384", batch, deit, (192, 384), "tokens"),
        ("384 -> 768", batch, deit, (384, 768), "tokens"),
        ("odd, 33 -> 57", min(batch, 37), (5, 7), (33, 57), "tokens"),
        ("192 -> 384, channels first", batch, deit, (192, 384), "channels first"),
        ("192 -> 384, class token sliced off", batch, deit, (192, 384), LAYOUTS[2]),
    ]
    # The forms of the paper's recipes first, on every shape: time may run out.
    for loss, pool in (("spectral", True), ("mse", False), ("cosine", True), ("smooth_l1", True)):
        for name, *shape in shapes:
            form = "pooled" if pool else "loss alone"
            yield Case(
                f"{loss}, {form}, {name}",
                lambda loss=loss, pool=pool, shape=shape: errors(loss, pool, *shape),
            )


def ranks_near(
    energies: Tensor, ranks: Tensor, levels: tuple[float, ...], band: float = 1e-5
) -> bool:
    """Whether ranks of float64 energies are right; one within ``band`` of a level may be either."""
    least = ranks_of(energies, tuple(level - band for level in levels))
    most = ranks_of(energies, tuple(level + band for level in levels))
    return bool(((least <= ranks) & (ranks <= most)).all())


def spectrum_cases(backend: str, dtype: torch.dtype, device: str, batch: int) -> Iterator[Case]:
    """Energies and ranks of token matrices; noise has no ties."""

    def errors(shape: tuple[int, int, int], sliced: bool) -> Iterator[Errors]:
        tokens = noise(shape, dtype, device)
        tokens = as_layout(tokens, (1, shape[1]), LAYOUTS[2]) if sliced else tokens
        energies, ranks = spectral_ranks(tokens, backend=backend)
        yield {}
        # On the CPU: on a GPU, the library takes one matrix after the other.
        truth = torch.linalg.svdvals(tokens.double().cpu()).square()
        energies, ranks = energies.cpu(), ranks.cpu()
        error = ((energies.double() - truth).abs() / truth.sum(-1, keepdim=True)).max().item()
        right = ranks_near(truth, ranks, LEVELS)
        yield {
            "energies": (error if error == error else float("inf"), EXACT["energies"]),
            "ranks": (0.0 if right else float("inf"), 0.5),
        }

    few = min(batch, 16)
    for name, shape, sliced in (
        ("196 x 384", (few, 196, 384), False),
        ("196 x 384, class token sliced off", (few, 196, 384), True),
        ("49 x 768", (few, 49, 768), False),
        ("197 x 192", (few, 197, 192), False),
        ("257 x 1280", (few, 257, 1280), False),
        ("odd, 33 x 57", (few, 33, 57), False),
    ):
        yield Case(name, lambda shape=shape, sliced=sliced: errors(shape, sliced))


def second_moment_cases(
    backend: str, dtype: torch.dtype, device: str, batch: int
) -> Iterator[Case]:
    """Second moments and SEP's mean and deviation."""

    def moment_errors(channels: int, weight: str, layout: str) -> Iterator[Errors]:
        tokens = as_layout(noise((batch, 196, channels), dtype, device), (14, 14), layout)
        found = second_moment(tokens, weight, backend=backend)
        yield {}
        truth = moment_definition(tokens.double(), weight)
        yield {"moment": (relative_error(found, truth), EXACT["moment"])}

    def sep_errors(channels: int) -> Iterator[Errors]:
        tokens = noise((batch, 196, channels), dtype, device)
        mean, std = sep(tokens, std=True, backend=backend)
        yield {}
        energy = torch.fft.fft(tokens.double()).abs().square().flatten(0, 1)
        curves = energy.cumsum(dim=-1) / energy.sum(dim=-1, keepdim=True)
        truths = curves.mean(dim=0), curves.std(dim=0, correction=0)
        worst = max((a - b).abs().max().item() for a, b in zip((mean, std), truths, strict=True))
        yield {"curve": (worst if worst == worst else float("inf"), EXACT["curve"])}

    for channels, layout in (
        (384, "tokens"),
        (384, LAYOUTS[2]),
        (192, "tokens"),
        (768, "tokens"),
        (219, "tokens"),
    ):
        for weight in ("none", "row_norm"):
            yield Case(
                f"{channels}, {weight}, {layout}",
                lambda c=channels, w=weight, la=layout: moment_errors(c, w, la),
            )
    for channels in (384, 219):
        yield Case(f"sep, {channels}", lambda c=channels: sep_errors(c))


OPERATORS: dict[str, tuple[Callable[..., Iterator[Case]], tuple[str, ...]]] = {
    "lift_kd": (lift_kd_cases, ("triton", "cuda", "torch")),
    "feature_kd": (feature_kd_cases, ("triton", "cuda", "torch")),
    "spectrum": (spectrum_cases, ("cuda", "torch")),
    "second_moment": (second_moment_cases, ("triton", "torch")),
}


def probe(operator: str, backend: str, dtype: str, device: str, batch: int) -> None:
    """Run all cases in this process; two JSON lines each, before it and after it."""
    cases, _ = OPERATORS[operator]
    for case in cases(backend, DTYPES[dtype], device, batch):
        print(json.dumps({"case": case.name}), flush=True)
        start = time.perf_counter()
        result: dict[str, object] = {}
        try:
            result["errors"] = case.errors()
        except RuntimeError as error:
            if "cannot run" in str(error):  # of a backend that was asked for by name
                result["refused"] = str(error).split("cannot run: ", 1)[1]
            else:
                result["failed"] = f"{type(error).__name__}: {error}"
        except Exception as error:
            result["failed"] = f"{type(error).__name__}: {error}"
        result["seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps(result), flush=True)


@dataclass
class Probe:
    """One process and what it said.

    Attributes:
        name: of its row, e.g. "lift_kd triton bfloat16".
        command: to start.
        status: "" while it runs or waits; then "ok", or its first two faults.
        cases: by name, what is known of each.
        output: the end of what a process that did not end by itself has written.
    """

    name: str
    command: list[str]
    status: str = ""
    cases: dict[str, dict[str, object]] = field(default_factory=dict)
    output: str = ""

    def read(self, output: str) -> None:
        """Take in the lines of its output; a case without a second line was not finished."""
        current = ""
        for line in output.splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a library's message, or a line cut short
            if not isinstance(said, dict):
                continue
            if "case" in said:
                current = said["case"]
                self.cases[current] = {"unfinished": True}
            elif current:
                self.cases[current] = said

    def judge(self, ending: str | None) -> None:
        """Set the status, from the cases and from how the process ended if not by itself."""
        faults = []
        if ending is not None:
            unfinished = [name for name, case in self.cases.items() if "unfinished" in case]
            faults.append(f"{ending} in: {unfinished[-1]}" if unfinished else ending)
        for name, case in self.cases.items():
            if "failed" in case:
                faults.append(f"failed: {name}: {str(case['failed']).splitlines()[0]}")
            elif _worst(case) > 1:
                faults.append(f"wrong: {name} ({_worst(case):.1f}x the error allowed)")
            elif not str(case.get("refused", EXPECTED_REFUSALS[0])).startswith(EXPECTED_REFUSALS):
                faults.append(f"refused: {name}: {case['refused']}")
        refused = [case["refused"] for case in self.cases.values() if "refused" in case]
        if faults:
            self.status = "; ".join(faults[:2])
        elif refused:
            self.status = f"ok, {len(refused)} refused: {refused[0]}"
        else:
            self.status = "ok" if self.cases else "no cases"

    @property
    def worst(self) -> float:
        """Largest error as a multiple of what is allowed."""
        return max((_worst(case) for case in self.cases.values()), default=0.0)

    @property
    def good(self) -> int:
        """Cases that were compared and are right."""
        return sum("errors" in case and _worst(case) <= 1 for case in self.cases.values())


def _worst(case: dict[str, object]) -> float:
    errors = case.get("errors")
    if not isinstance(errors, dict):
        return 0.0
    return max(error / allowed for error, allowed in errors.values())


@dataclass
class _Running:
    """A started process, and the file that takes what it writes."""

    probe: Probe
    process: subprocess.Popen[bytes]
    log: Path
    started: float


def run_probes(
    probes: Sequence[Probe],
    jobs: int,
    seconds: float,
    each: float,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Run processes side by side; set each one's cases and status.

    Args:
        probes: in the order in which they start.
        jobs: how many run at once.
        seconds: after which those that run are killed and the others not started.
        each: seconds after which one that still runs is killed.
        save: called when one has ended.
    """
    end = time.monotonic() + seconds
    waiting, running = list(probes), []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < end:
                log = Path(folder, str(len(waiting)))
                running.append(_start(waiting.pop(0), log))
            time.sleep(0.05)
            ended = [one for one in running if _ended(one, end, seconds, each)]
            running = [one for one in running if one not in ended]
            if ended:
                save()
            if time.monotonic() >= end:
                for probe in waiting:
                    probe.status = "not started: out of time"
                    print(row(probe), flush=True)
                waiting = []


def _start(probe: Probe, log: Path) -> _Running:
    environment = {
        **os.environ,
        "CUDA_LAUNCH_BLOCKING": "1",
        "PYTHONUNBUFFERED": "1",
        # Otherwise a kernel that is wrong is refused before it is compared.
        "FASTKD_SELF_CHECK": "0",
        "FASTKD_UNPROVEN": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            probe.command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    return _Running(probe, process, log, time.monotonic())


def _ended(one: _Running, end: float, seconds: float, each: float) -> bool:
    """Judge and print a process that has ended, or kill it where its time is over."""
    code, now = one.process.poll(), time.monotonic()
    ending = None
    if code is None:
        if now < min(end, one.started + each):
            return False
        one.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver stays
            one.process.wait(timeout=2)
        ending = f"killed after {each if now >= one.started + each else seconds:.0f} s"
    elif code != 0:
        ending = f"died by signal {-code}" if code < 0 else f"exit status {code}"
    output = one.log.read_text(encoding="utf-8", errors="replace")
    one.probe.read(output)
    one.probe.judge(ending)
    one.probe.output = "" if ending is None else output[-2000:]
    print(row(one.probe), flush=True)
    return True


def row(one: Probe) -> str:
    """A line of the table."""
    done = f"{one.good} of {len(one.cases)}" if one.cases else "-"
    return f"{one.name:<32}{done:>10}{one.worst:>10.3f}  {one.status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=12, help="processes at once")
    parser.add_argument("--seconds", type=float, default=90.0, help="limit for all")
    parser.add_argument("--output", type=Path, help="write all errors as JSON here")
    parser.add_argument("--smoke", action="store_true", help="few images, torch in bfloat16 alone")
    parser.add_argument("--probe", nargs=3, metavar=("OPERATOR", "BACKEND", "DTYPE"))
    options = parser.parse_args()
    batch = 2 if options.smoke else 160
    if options.probe:
        probe(*options.probe, options.device, batch)
        return 0
    start = time.monotonic()
    this = [sys.executable, __file__, "--device", options.device]
    this += ["--smoke"] if options.smoke else []
    probes = [
        Probe(f"{operator} {backend} {dtype}", [*this, "--probe", operator, backend, dtype])
        # Kernels first, and of them those that training uses most.
        for backend in ("triton", "cuda", "torch")
        for dtype in ("bfloat16", "float16", "float32")
        for operator, (_, backends) in OPERATORS.items()
        if backend in backends
        if not options.smoke or (backend, dtype) == ("torch", "bfloat16")
    ]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"

    def save() -> None:
        if options.output is None:
            return
        record = {
            "device": device,
            "torch": torch.__version__,
            "commit": os.environ.get("FASTKD_COMMIT", "unknown"),
            "probes": [asdict(one) | {"worst": one.worst} for one in probes],
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")

    print(f"{'':32}{'right':>10}{'worst':>10}  (1 is the error allowed)")
    run_probes(probes, options.jobs, options.seconds, PROBE_SECONDS, save)
    save()
    bad = [one for one in probes if not one.status.startswith("ok")]
    seconds = time.monotonic() - start
    print(f"{len(probes) - len(bad)} of {len(probes)} as expected, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
