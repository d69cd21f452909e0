"""What is public: listed in one place, documented with what goes in, comes out and is refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fastkd

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODULES = (
    *("ops", "tokens", "losses", "models", "analysis", "training"),
    "integrations.timm",
)


def public_names() -> Iterator[tuple[str, Any]]:
    for name in fastkd.__all__:
        if not inspect.ismodule(getattr(fastkd, name)):
            yield f"fastkd.{name}", getattr(fastkd, name)
    for package in MODULES:
        module = importlib.import_module(f"fastkd.{package}")
        for name in module.__all__:
            yield f"fastkd.{package}.{name}", getattr(module, name)


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
    return any(
        isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") != "NotImplementedError"
        for node in ast.walk(tree)
    )


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
        assert re.search(r"^(Returns|Yields):", text, re.M) or "as `" in text.lower(), "no Returns"
    if raises(function):
        assert re.search(r"^Raises:", text, re.M) or "as `" in text.lower(), "no Raises"


def test_everything_public_is_in_the_table_of_the_readme():
    table = README.split("## What is public")[1].split("\n## ")[0]
    listed = set(re.findall(r"`([\w.]+)`", table))
    wanted = {name.rpartition(".")[2] for name, _ in public_names()}
    assert wanted <= listed, wanted - listed
