"""Records of results as JSON values and named arrays, and back.

Driven by the dataclasses' own annotations, so that a new field needs no line here. Arrays never go
through pickle, and what JSON cannot say (NaN, infinity) is written as a string. Knows types, not
what they mean.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from typing import Any

import numpy as np


def encode(value: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """Turn a record into what JSON can say.

    Args:
        value: dataclasses, lists, tuples, dicts with string keys, numbers, strings, arrays, None.
        arrays: receives every array under its path, such as ``"models.0.layers.3.ranks.values"``.
        path: where the value stands; the prefix of its arrays' names.

    Returns:
        dicts, lists, strings, finite numbers, booleans and None; ``{"array": path}`` for an array,
        ``"nan"``, ``"inf"`` or ``"-inf"`` for a float that is not finite.

    Raises:
        TypeError: a value of another type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return encode(named, arrays, path)
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"encode: {path} must be an array of numbers, got dtype {value.dtype}")
        arrays[path] = value
        return {"array": path}
    if isinstance(value, np.generic):
        return encode(value.item(), arrays, path)
    if isinstance(value, dict):
        return {str(key): encode(item, arrays, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, arrays, f"{path}.{index}") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"encode: {path} must be a plain value, got {type(value).__name__}")


def decode(kind: Any, value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> Any:
    """Undo `encode`.

    Args:
        kind: the annotation to build: a dataclass, ``list[T]``, ``tuple[T, ...]``,
            ``dict[str, T]``, ``T | None``, ``np.ndarray``, a plain type, or ``Any``.
        value: what `encode` gave.
        arrays: by name.
        path: where the value stands, for the errors.

    Returns:
        The record.

    Raises:
        ValueError: the value is none of that kind, or its array is missing.
    """
    if kind is Any:
        return value
    if kind is np.ndarray:
        return _array(value, arrays, path)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, arrays, path)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        return decode(inner, value, arrays, path)
    if typing.get_origin(kind) in (list, tuple):
        return _sequence(kind, value, arrays, path)
    if typing.get_origin(kind) is dict:
        items = _expect(dict, value, path).items()
        inner = typing.get_args(kind)[1]
        return {key: decode(inner, item, arrays, f"{path}.{key}") for key, item in items}
    if kind is float and not isinstance(value, bool | None):
        return _float(value, path)
    return _expect(kind, value, path)


def same(left: Any, right: Any) -> bool:
    """Are two records equal, array by array, with NaN equal to NaN and lists equal to tuples?"""
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return _same_arrays(left, right)
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and same(vars(left), vars(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def _same_arrays(left: Any, right: Any) -> bool:
    if not (isinstance(left, np.ndarray) and isinstance(right, np.ndarray)):
        return False
    floats = left.dtype.kind == "f"
    return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=floats)


def _array(value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> np.ndarray:
    name = _expect(dict, value, path).get("array")
    if name not in arrays:
        raise ValueError(f"{path}: its array {name!r} is missing")
    return arrays[name]


def _record(kind: Any, value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> Any:
    annotations = typing.get_type_hints(kind)
    given = _expect(dict, value, path)
    if given.keys() != annotations.keys():
        raise ValueError(f"{path} must have the fields {sorted(annotations)}, got {sorted(given)}")
    return kind(
        **{
            name: decode(a, given[name], arrays, f"{path}.{name}")
            for name, a in annotations.items()
        }
    )


def _sequence(kind: Any, value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> Any:
    items = _expect(list, value, path)
    arms = typing.get_args(kind)
    if len(arms) == 1 or arms[-1] is Ellipsis:
        arms = (arms[0],) * len(items)
    if len(arms) != len(items):
        raise ValueError(f"{path} must have {len(arms)} items, got {len(items)}")
    pairs = enumerate(zip(arms, items, strict=True))
    decoded = [decode(arm, item, arrays, f"{path}.{index}") for index, (arm, item) in pairs]
    return typing.get_origin(kind)(decoded)


def _float(value: Any, path: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{path} must be a number, got {value!r}") from None


def _expect(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path} must be a {kind.__name__}, got {value!r:.80}")
    return value
