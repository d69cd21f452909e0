"""What is public: listed in one place, documented with what goes in, comes out and is refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

MODULES = tuple(
    f"fastkd.{name}"
    for name in ("ops", "tokens", "losses", "models", "analysis", "training", "integrations.timm")
)


def public_by_module() -> dict[str, dict[str, Any]]:
    """Module -> what it offers; of `fastkd` itself without the modules below it."""
    modules = {name: importlib.import_module(name) for name in ("fastkd", *MODULES)}
    return {
        name: {
            offered: getattr(module, offered)
            for offered in module.__all__
            if not inspect.ismodule(getattr(module, offered))
        }
        for name, module in modules.items()
    }


def public_names() -> Iterator[tuple[str, Any]]:
    for module, names in public_by_module().items():
        for name, thing in names.items():
            yield f"{module}.{name}", thing


def overrides(cls: type, member: str) -> bool:
    """Whether a base class says already what the member is; `nn.Module.forward` says nothing."""
    bases = [base for base in cls.__mro__[1:] if (base, member) != (nn.Module, "forward")]
    return any(member in vars(base) for base in bases)


def documented(name: str, thing: Any) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(where, what is called, its docstring): a class is called by its constructor."""
    if inspect.isfunction(thing):
        yield name, thing, inspect.getdoc(thing) or ""
    if not inspect.isclass(thing):
        return
    if not dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        yield name, thing.__init__, inspect.getdoc(thing) or ""
    for member, value in vars(thing).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function) and not (member[0] == "_" or overrides(thing, member)):
            yield f"{name}.{member}", function, inspect.getdoc(getattr(thing, member)) or ""


CALLABLES = [found for name, thing in public_names() for found in documented(name, thing)]


def parameters(function: Callable[..., Any]) -> list[str]:
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("self", "cls")]


def raises(function: Callable[..., Any]) -> bool:
    """Whether its own body refuses something; what it calls says so itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    return any(isinstance(node, ast.Raise) and refuses(node) for node in ast.walk(tree))


def refuses(statement: ast.Raise) -> bool:
    """Not a bare ``raise``, which hands on, nor the mark of an abstract method."""
    error = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
    return error is not None and getattr(error, "id", "") != "NotImplementedError"


def has_section(text: str, *names: str) -> bool:
    """Whether a docstring has the section, or a sentence that begins by pointing elsewhere."""
    return bool(
        re.search(rf"^({'|'.join(names)}):", text, re.M)
        or re.search(r"(?:\A|\n\n|[.:]\s+)As `", text)
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise ValueError('x')", True),
        ("raise error", True),
        ("raise ValueError", True),
        ("raise", False),
        ("raise NotImplementedError", False),
        ("raise NotImplementedError()", False),
        ("pass", False),
    ],
)
def test_what_a_body_refuses_is_seen(body, expected):
    found = [node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Raise)]
    assert any(map(refuses, found)) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Compare.\n\nReturns:\n    it", True),
        ("As `forward`, of another.", True),
        ("Compare two. As `forward` otherwise.", True),
        ("Pool the maps as `feature_kd` does.", False),
        ("Compare two maps.", False),
    ],
)
def test_only_a_sentence_of_its_own_points_to_another_docstring(text, expected):
    assert has_section(text, "Returns") is expected


@pytest.mark.parametrize(
    ("name", "thing"), public_names(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_public_name_is_documented(name, thing):
    if inspect.isclass(thing) or callable(thing):
        text = inspect.getdoc(thing)
        assert text
        assert not text.startswith(f"{thing.__name__}("), "a dataclass's made docstring"


@pytest.mark.parametrize(("name", "function", "text"), CALLABLES, ids=[c[0] for c in CALLABLES])
def test_what_goes_in_comes_out_and_is_refused_is_documented(name, function, text):
    assert text, "no docstring"
    section = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", text, re.S | re.M)
    for parameter in parameters(function):
        assert section, f"no Args, but {parameter}"
        assert re.search(rf"^\s+\*{{0,2}}{parameter}\b.*:", section[1], re.M), f"Args: {parameter}"
    gives = inspect.signature(function).return_annotation not in (
        None,
        "None",
        inspect.Signature.empty,
    )
    if gives and parameters(function):
        assert has_section(text, "Returns", "Yields"), "no Returns"
    if raises(function):
        assert has_section(text, "Raises"), "no Raises"
