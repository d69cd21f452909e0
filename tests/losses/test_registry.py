"""The registry of losses: every name builds a documented loss that trains the student."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastkd import losses
from fastkd.losses import (
    Distance,
    FeatureTerm,
    LogitTerm,
    MapDistance,
    base,
    create_feature_loss,
    create_logit_loss,
    registry,
)
from fastkd.losses.registry import Loss, check_options, find_loss, options_of
from fastkd.ops.feature_kd import LOSSES
from fastkd.tokens import Tokens

LOGIT = registry.names(registry.LOGIT_LOSSES)
FEATURE = registry.names(registry.FEATURE_LOSSES)
GRID = (3, 4)


def tokens(seed: int, dim: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randn(4, 12, dim, generator=generator), GRID)


def build(name: str, **options):
    projector = "none" if find_loss(name).projects else "linear"
    return create_feature_loss(
        name,
        ((0, 0), (1, 1)),
        projector=projector,
        student_dims={0: 6, 1: 6},
        teacher_dims={0: 8, 1: 8},
        **options,
    )


@pytest.mark.parametrize("name", LOGIT)
def test_every_logit_loss_is_built_by_name_and_trains_the_student(name):
    term = create_logit_loss(name, weight=0.5, tau=2.0)
    assert isinstance(term, LogitTerm)
    assert term.weight == 0.5
    student = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3]) if term.needs_target else None
    term(student, torch.randn(4, 5), target).backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FEATURE)
def test_every_feature_loss_is_built_by_name_and_trains_the_student(name):
    torch.manual_seed(0)
    term = build(name, weight=0.5)
    assert isinstance(term, FeatureTerm)
    assert term.weight == 0.5
    students = {key: tokens(key, 6) for key in (0, 1)}
    for one in students.values():
        one.data.requires_grad_()
    loss = term(students, {key: tokens(9 + key, 8) for key in (0, 1)})
    assert loss.shape == ()
    loss.backward()
    assert all(one.data.grad.abs().sum() > 0 for one in students.values())
    assert all(p.grad is not None for p in term.parameters())


@pytest.mark.parametrize("name", FEATURE)
def test_no_feature_loss_sends_a_gradient_to_the_teacher(name):
    term = build(name)
    teachers = {key: tokens(9 + key, 8) for key in (0, 1)}
    students = {key: tokens(key, 6) for key in (0, 1)}
    for one in (*teachers.values(), *students.values()):
        one.data.requires_grad_()
    term(students, teachers).backward()
    assert all(one.data.grad is None for one in teachers.values())
    assert all(one.data.grad is not None for one in students.values())


@pytest.mark.parametrize("entry", (*registry.LOGIT_LOSSES, *registry.FEATURE_LOSSES))
def test_every_entry_is_a_loss_whose_options_have_defaults(entry):
    assert issubclass(entry.load(), LogitTerm | Distance | FeatureTerm)
    assert inspect.Parameter.empty not in options_of(entry).values()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fastkd.losses.registry", ("torch", "timm", "pydantic")),
        ("fastkd.config", ("torch", "timm")),
    ],
)
def test_names_are_read_without_heavy_imports(module, absent):
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_feature_loss_needs_its_module_and_an_entry(monkeypatch):
    class Mine(base.Distance):
        def __init__(self, scale: float = 2.0) -> None:
            super().__init__()
            self.scale = scale

        def compare(self, student, teacher, grid):
            return self.scale * (student - teacher).square().mean()

    module = ModuleType("fastkd.losses.mine")
    module.Mine = Mine
    monkeypatch.setitem(sys.modules, "fastkd.losses.mine", module)
    entry = Loss("mine", "mine", "Mine", "-", "1", "a test's")
    monkeypatch.setattr(registry, "FEATURE_LOSSES", (*registry.FEATURE_LOSSES, entry))
    term = build("mine", options={"scale": 3.0})
    assert term.distances[0].scale == 3.0
    assert options_of(find_loss("mine")) == {"scale": 2.0}


def test_what_type_checkers_see_is_where_it_is_loaded_from():
    tree = ast.parse(Path(losses.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    homes = {name: f"fastkd.losses.{home}.{name}" for name, home in losses._HOMES.items()}
    assert imported.items() <= homes.items()
    of_losses = {e.class_name for e in (*registry.LOGIT_LOSSES, *registry.FEATURE_LOSSES)}
    assert homes.keys() - imported.keys() <= of_losses
    assert sorted(homes) == losses.__all__


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="Typo"):
        losses.Typo  # noqa: B018


def test_the_operators_losses_are_entries():
    assert {e.name for e in registry.FEATURE_LOSSES if e.load() is MapDistance} == set(LOSSES)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"logit_loss must be one of \('soft'.*got 'mse'"):
        create_logit_loss("mse")
    with pytest.raises(ValueError, match=r"feature_loss must be one of \('mse'.*got 'soft'"):
        create_feature_loss("soft", ((0, 0),), student_dims={0: 6}, teacher_dims={0: 8})


def test_an_unknown_loss_is_hinted_at():
    with pytest.raises(ValueError, match="did you mean 'manifold'"):
        find_loss("manifol")


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("dkd", {"target_weight": "abc"}, "options: target_weight of 'dkd'.* number.*got 'abc'"),
        ("dkd", {"target_weight": True}, "target_weight of 'dkd'.* number.*got True"),
        ("crd", {"gather": "maybe"}, "gather of 'crd'.* boolean.*got 'maybe'"),
        ("crd", {"dim": 12.5}, "dim of 'crd'.* integer.*got 12.5"),
        ("vkd", {"normalize": 1}, "normalize of 'vkd'.*'whiten'.*got 1"),
        ("smooth_l1", {"beta": "abc"}, "beta of 'smooth_l1'.* number.*got 'abc'"),
    ],
)
def test_a_value_of_another_type_is_refused(loss, options, message):
    with pytest.raises(TypeError, match=message):
        check_options(find_loss(loss), options, "options")


def test_what_may_be_none_may_be_none():
    check_options(find_loss("vkd"), {"beta": None, "pool": False}, "feature_options")


def test_tau_is_no_option():
    with pytest.raises(ValueError, match="tau is a field of its own"):
        create_logit_loss("dkd", options={"tau": 4.0})


def test_a_projector_before_a_loss_that_projects_itself_is_refused():
    with pytest.raises(ValueError, match="'vitkd' brings widths together itself"):
        create_feature_loss(
            "vitkd", ((0, 0),), projector="pool", student_dims={0: 6}, teacher_dims={0: 8}
        )
