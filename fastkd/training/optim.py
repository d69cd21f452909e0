"""Optimizers and schedules by their names in timm: which there are, their options, and building."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.optim.kron import Kron
from timm.scheduler import create_scheduler_v2
from torch import nn

from fastkd.config import OptimConfig, refuse
from fastkd.recipe_fields import Options
from fastkd.training.updates import knows_found_inf
from fastkd.utils.hints import suggestion

LOOKAHEAD = "lookahead_"  # timm's prefix of any optimizer's name
# Arguments of optimizers that are fields of the recipe or the engine's business.
_NOT_OPTIONS = frozenset(
    {
        *("params", "lr", "weight_decay", "adamw_lr", "verbose"),
        *("foreach", "fused", "capturable", "differentiable", "maximize"),
    }
)
_CYCLES = ("cycle_mul", "cycle_decay", "cycle_limit", "cooldown_epochs", "warmup_prefix")
# Of `create_scheduler_v2`; without its noise, whose seed is not the run's.
SCHEDULE_OPTIONS = {
    "cosine": (*_CYCLES, "k_decay"),
    "multistep": ("decay_milestones", "decay_rate", "warmup_prefix"),
    "poly": (*_CYCLES, "k_decay", "decay_rate"),
    "step": ("decay_epochs", "decay_rate", "warmup_prefix"),
    "tanh": _CYCLES,
}


def optimizer_names() -> list[str]:
    """List timm's optimizers that a run can use, each also with the prefix ``lookahead_``."""
    infos = {name: get_optimizer_info(name) for name in list_optimizers()}
    return [  # which tests show to resume exactly, and to be left alone by a non-finite update
        name
        for name, info in infos.items()
        # A text names a class of apex or bitsandbytes, which needs a GPU.
        if not isinstance(info.opt_class, str)
        and not info.second_order  # Adahessian needs a gradient of the gradient
        and info.opt_class is not Kron  # draws random numbers, on every process its own
    ]


def _arguments(opt: str) -> Mapping[str, inspect.Parameter]:
    info = get_optimizer_info(opt.removeprefix(LOOKAHEAD))
    return inspect.signature(info.opt_class).parameters


def takes_adam_eps(opt: str) -> bool:
    """Check for AdamW's epsilon; others' mean something else or are of another size."""
    arguments = _arguments(opt)
    return "betas" in arguments and "eps" in arguments and arguments["eps"].default == 1e-8


def skips_on_device(opt: str) -> bool:
    """Check whether a non-finite update is skipped without the host: torch's fused steps can."""
    if opt.startswith(LOOKAHEAD) or "fused" not in _arguments(opt):
        return False
    stand_in = [nn.Parameter(torch.ones(1))]
    return knows_found_inf(get_optimizer_info(opt).opt_class(stand_in, fused=True))


def check_optimizer(recipe: OptimConfig) -> None:
    """Refuse an optimizer that a run cannot use, and options that it does not have."""
    known, base = optimizer_names(), recipe.opt.removeprefix(LOOKAHEAD)
    if base not in known:
        raise ValueError(
            f"opt: expected one of {', '.join(known)} (or {LOOKAHEAD} and one of them), got "
            f"{recipe.opt!r}{suggestion(base, known)}"
        )
    options, fields = dict(recipe.opt_kwargs or {}), {"lr": "lr", "weight_decay": "weight_decay"}
    if takes_adam_eps(base):
        fields["eps"] = "adam_eps"
    for name in options.keys() & fields.keys():
        raise ValueError(f"opt_kwargs: {name} is the recipe's field {fields[name]}")
    taken = {n: p for n, p in _arguments(base).items() if n not in _NOT_OPTIONS | fields.keys()}
    _check_arguments("opt_kwargs", recipe.opt, options, taken)
    if options:
        weights = nn.ParameterDict({"matrix": torch.ones(2, 2), "vector": torch.ones(2)})
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        with _blaming("opt_kwargs", recipe.opt, options):
            _create_optimizer(weights, recipe).step()


@contextmanager
def _blaming(field: str, owner: str, options: Options) -> Iterator[None]:
    """Raise whatever timm or a class raises at a value as an error of the field."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{field}: {owner!r} with {options}: {error}") from error


def _check_arguments(
    field: str, owner: str, options: Options, known: Mapping[str, inspect.Parameter]
) -> None:
    """Raise for options that ``owner`` does not have, or whose value is of another kind."""
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"{field}: {owner!r} has no option {name!r}{suggestion(name, known)}; it has "
                f"{', '.join(known)}"
            )
        default = known[name].default
        fits, expected = type(value) in (int, float), "a number"
        if isinstance(default, bool):
            fits, expected = isinstance(value, bool), "true or false"
        elif isinstance(default, tuple):
            fits, expected = isinstance(value, tuple), f"a list such as {list(default)}"
            if isinstance(value, tuple) and field == "opt_kwargs":
                fits = len(value) == len(default)
        elif not isinstance(default, int | float):
            continue
        if not fits:
            raise ValueError(f"{field}: {name} of {owner!r}: expected {expected}, got {value!r}")


def ends_at_min_lr(recipe: OptimConfig) -> bool:
    return recipe.sched not in ("multistep", "step")


def check_schedule(recipe: OptimConfig) -> None:
    """Refuse a schedule that does not fall, a warm-up that does, and options without effect."""
    options = dict(recipe.sched_kwargs or {})
    arguments = inspect.signature(create_scheduler_v2).parameters
    known = {name: arguments[name] for name in SCHEDULE_OPTIONS[recipe.sched]}
    _check_arguments("sched_kwargs", recipe.sched, options, known)
    if options.get("cycle_limit", 1) == 1:
        refuse(options, ("cycle_mul", "cycle_decay"), "sched_kwargs has no cycle_limit above 1")
    peak = f"the learning rate {recipe.scaled_lr:g}"
    if recipe.lr_scaling:
        peak += f" (= lr {recipe.lr:g} x batch_size {recipe.batch_size} / 512)"
    if ends_at_min_lr(recipe) and recipe.scaled_lr <= recipe.min_lr:
        raise ValueError(f"min_lr: {recipe.min_lr:g} is not below {peak}, so nothing would fall")
    if recipe.warmup_epochs > 0 and recipe.warmup_lr > recipe.scaled_lr:
        raise ValueError(
            f"warmup_lr: {recipe.warmup_lr:g} is above {peak}, so the warm-up would fall"
        )
    if options or not ends_at_min_lr(recipe):
        _try_schedule(recipe, options)


def _try_schedule(recipe: OptimConfig, options: Options) -> None:
    """Walk through a schedule, in at most a thousand steps, and refuse what would not train."""
    for name, value in options.items():
        items = value if isinstance(value, tuple) else (value,)
        numbers = [item for item in items if isinstance(item, int | float) and item >= 0]
        if len(numbers) < len(items) or numbers != sorted(numbers):
            expected = "at least 0, and ascending in a list"
            raise ValueError(f"sched_kwargs: {name}: expected {expected}, got {value!r}")
    stand_in = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=recipe.scaled_lr)
    per_epoch, rates = 100, []
    begin = per_epoch * recipe.warmup_epochs
    end = per_epoch * recipe.epochs - 2  # a milestone of timm's takes effect an update early
    with _blaming("sched_kwargs", recipe.sched, options):
        scheduler = _create_scheduler(stand_in, recipe, per_epoch)
        for update in (*range(begin, end, max(1, (end - begin) // 1000)), end):
            scheduler.step_update(update)
            rates.append(float(stand_in.param_groups[0]["lr"]))
    floor = recipe.min_lr if ends_at_min_lr(recipe) else 0
    if not min(rates) >= floor:
        raise ValueError(
            f"sched_kwargs: with {options} the learning rate would become {min(rates):g}, expected "
            f"at least {floor:g}"
        )
    if not rates[-1] < max(rates) and options.get("decay_rate") != 1:
        raise ValueError(
            f"sched_kwargs: {recipe.sched!r} with {options or 'no options'} does not fall within "
            f"{recipe.epochs} epochs (decay_rate=1 keeps the learning rate)"
        )


def build_optimizer(
    task: nn.Module, config: OptimConfig, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = _create_optimizer(task, config)
    return optimizer, _create_scheduler(optimizer, config, updates_per_epoch)


def _create_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = dict(config.opt_kwargs or {})
    if takes_adam_eps(config.opt):
        options["eps"] = config.adam_eps
    if skips_on_device(config.opt.removeprefix(LOOKAHEAD)):
        options["fused"] = True
    options |= {"lr": config.scaled_lr, "weight_decay": config.weight_decay}
    return create_optimizer_v2(module, opt=config.opt, **options)


def _create_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, updates_per_epoch: int
) -> Any:
    options: dict[str, Any] = dict(config.sched_kwargs or {})
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=_first_cycle(config, options),
        warmup_epochs=config.warmup_epochs,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
        **options,
    )
    return scheduler


def _first_cycle(config: OptimConfig, options: dict[str, Any]) -> int:
    """Return how many epochs timm's first cycle has for the run to have `epochs` with the rest."""
    # timm adds further cycles, the cool-down and, as a prefix, the warm-up to the first cycle.
    around = options.get("cooldown_epochs", 0)
    around += config.warmup_epochs if options.get("warmup_prefix") else 0
    growth, limit = options.get("cycle_mul", 1), options.get("cycle_limit", 1)
    cycles = range(min(limit, config.epochs + 1))  # of an epoch or more
    length = (config.epochs - around) / sum(growth**cycle for cycle in cycles)
    if length < 1 or length % 1:
        raise ValueError(
            f"{config.epochs} epochs, less {around} of warm-up and cool-down, cannot be divided "
            f"into {limit} cycles of whole epochs"
        )
    return int(length)
