"""What may be logged: names, values, iterations, params and tags, checked and converted."""

from __future__ import annotations

from collections.abc import Mapping

from tracelet.records import Scalar

__all__ = ["check_name", "check_tags", "flatten_params", "to_float", "to_iteration"]


def check_name(name: object) -> str:
    """`name` itself, if it can be a metric's name; else InvalidValue."""
    raise NotImplementedError


def to_float(name: str, value: object) -> float:
    """`value` as a float; else InvalidValue with name and type."""
    raise NotImplementedError


def to_iteration(value: object) -> int:
    """`value` as an int64; else InvalidValue."""
    raise NotImplementedError


def flatten_params(params: object) -> dict[str, Scalar]:
    """Params with dotted keys and scalar values."""
    raise NotImplementedError


def check_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """Tags as str to str."""
    raise NotImplementedError
