"""What may be logged: names, values, iterations, params and tags, checked and converted.

Neither numpy nor torch is imported: what they give is known by what it can do (`__float__`, `__index__`, `item`,
`shape`). Everything here is called before anything is written, so whatever it raises leaves the run as it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from decimal import Decimal
from enum import Enum
from typing import Any

from tracelet.errors import InvalidValue
from tracelet.records import Scalar

__all__ = ["MAX_NAME", "check_name", "check_tags", "flatten_params", "to_float", "to_iteration"]

MAX_NAME = 3000
"""The most characters of a name or key: some 12 kB in UTF-8 still fit a frame, an OTLP request and a log line."""

_INT64 = range(-(2**63), 2**63)


# ---- names -------------------------------------------------------------------------------------------------------


def check_name(name: object) -> str:
    """`name` itself, if it can name a metric; any other script, spaces, slashes and emoji are fine.

    Refused, each because a backend or a file could not give it back as it was: what is not a str; an empty or blank
    one (nobody could ask for it); `tracelet.` in front (ours, on the wire); NUL (databases cut there); a lone
    surrogate (no UTF-8); more than `MAX_NAME` characters (most likely the text was meant as a value).

    Raises:
        InvalidValue: with `name` and the reason.
    """
    return _key(name, "a metric's name")


def _key(key: object, what: str) -> str:
    if not isinstance(key, str):
        raise InvalidValue(f"{what} has to be a str, not {_type(key)}: {_short(key)}", name=key, type=_type(key))
    reason = None
    if not key.strip():
        reason = "is empty"
    elif key.startswith("tracelet."):
        reason = "begins with 'tracelet.', which is kept for tracelet's own"
    elif "\0" in key:
        reason = "holds a NUL character"
    elif len(key) > MAX_NAME:
        reason = f"has {len(key)} characters, and at most {MAX_NAME} are possible"
    elif not _is_utf8(key):
        reason = "holds half a character (a lone surrogate), which can't be written as UTF-8"
    if reason is not None:
        raise InvalidValue(f"{what} {reason}: {_short(key)}", name=key, type="str")
    # A subclass of str (numpy.str_, an Enum's) would be kept alive, and compare in its own way, as a dict's key.
    return key if type(key) is str else str.__str__(key)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _short(value: object) -> str:
    text = ascii(value) if isinstance(value, (str, bytes, int, float)) else f"<{_type(value)}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- values ------------------------------------------------------------------------------------------------------


def to_float(name: str, value: object) -> float:
    """`value` as a float: any real number, bool, Decimal, numpy scalar, 0-d array or tensor; NaN and infinities too.

    A tensor is moved to the host once, by its own `__float__`; only the float is kept, so no graph stays alive.
    What that raises (Ctrl-C, a CUDA error) passes unchanged.

    Raises:
        InvalidValue: a str, bytes, None, a complex number, an array with a dimension, an integer beyond a double;
            with `name` and `type`.
    """
    kind = type(value)
    if kind is float:
        return value  # type: ignore[return-value]
    if kind is not int and kind is not bool:
        # Refused by name: float("0.1") works, and would hide that a text was logged. numpy.complex128 is a complex.
        if value is None or isinstance(value, (str, bytes, bytearray, memoryview, complex)):
            raise _not_a_number(name, value)
        shape = getattr(value, "shape", ())
        # float() takes arrays and tensors of one element and any shape; which one was meant is not for us to guess.
        if hasattr(shape, "__len__") and len(shape) > 0:
            raise InvalidValue(
                f"metric {name!r} can't be {_type(value)} of shape {tuple(shape)!r}: log one number a name,"
                " for example its mean",
                name=name,
                type=_type(value),
            )
        if not hasattr(kind, "__float__") and not hasattr(kind, "__index__"):
            raise _not_a_number(name, value)
        dtype = getattr(value, "dtype", None)
        dtype_kind = getattr(dtype, "kind", None)
        # numpy drops the imaginary part with a mere warning, reads text as a number, and a date as its nanoseconds.
        if dtype_kind in ("c", "S", "U", "M", "m") or getattr(dtype, "is_complex", False):
            raise _not_a_number(name, value)
        if dtype_kind == "O" and hasattr(value, "item"):  # a 0-d array of any object: what it holds decides
            return to_float(name, value.item())
        if getattr(value, "requires_grad", False) is True:
            value = value.detach()  # type: ignore[attr-defined] # PyTorch warns of converting one that is in a graph
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        if isinstance(value, int) or hasattr(kind, "__index__") or hasattr(value, "numerator"):
            raise InvalidValue(
                f"metric {name!r} can't be {_short(value)}: it is beyond the largest float, {1.7976931348623157e308}",
                name=name,
                type=_type(value),
            ) from None
        raise
    except TypeError as error:
        # An object array of a str, a masked value: numpy has `__float__` and refuses.
        raise _not_a_number(name, value) from error
    if math.isinf(number) and isinstance(value, Decimal) and value.is_finite():
        raise InvalidValue(
            f"metric {name!r} can't be Decimal {_short(str(value))}: it is beyond the largest float",
            name=name,
            type=_type(value),
        )
    return number


def _not_a_number(name: str, value: object) -> InvalidValue:
    advice = ""
    if isinstance(value, str):
        advice = f"; if it holds a number, write float({_short(value)}), else log it as a param or tag"
    elif value is None:
        advice = "; for 'no value' log nothing, or float('nan')"
    elif isinstance(value, Mapping):
        advice = "; log_metrics takes a dict of names and numbers"
    return InvalidValue(f"metric {name!r} has to be a number, not {_type(value)}{advice}", name=name, type=_type(value))


def to_iteration(value: object) -> int:
    """`value` as an int64: what Python itself takes as an index (int, bool, numpy integers, 0-d integer tensors).

    Floats are refused even when they are whole: `iteration=epoch / 2` is whole every second time, and a run that
    fails at its third epoch says more than one whose epochs were quietly rounded.

    Raises:
        InvalidValue: not an integer, or beyond int64.
    """
    kind = type(value)
    if isinstance(value, int) and kind is int:
        number = value
    elif not hasattr(kind, "__index__"):
        raise _not_an_integer(value)
    else:
        try:
            number = kind.__index__(value)
        except TypeError as error:  # an array or tensor of floats has the method, and refuses
            raise _not_an_integer(value) from error
    if number not in _INT64:
        raise InvalidValue(
            f"iteration {_short(number)} is beyond 64 bits (-2**63 to 2**63 - 1)", name="iteration", type=_type(value)
        )
    return number


def _not_an_integer(value: object) -> InvalidValue:
    advice = f": write int({value!r})" if isinstance(value, float) and value.is_integer() else ""
    return InvalidValue(
        f"iteration has to be an integer, not {_type(value)} {_short(value)}{advice}",
        name="iteration",
        type=_type(value),
    )


# ---- params and tags ---------------------------------------------------------------------------------------------


def flatten_params(params: object) -> dict[str, Scalar]:
    """Params with dotted keys: scalars as they are, None as "None", the rest as JSON, nested dicts as more keys.

    `params` is a mapping, or what has its values in `vars()` (an argparse.Namespace) or is a dataclass. Two keys that
    become the same (`{"a.b": 1, "a": {"b": 2}}`) are refused, since one of them would be lost. An empty dict is "{}".

    Numpy scalars become Python's. An Enum is its value if that is a scalar, a path and a datetime their text, a set a
    sorted list; what JSON can't say is its `str()`. An integer beyond int64 is its digits, since OTLP has 64 bits.

    Half characters in a text are their escapes. A long value may take a while: it is written out here.

    Raises:
        InvalidValue: a key that is no name, two equal ones, or a value that holds itself.

    Examples:
        >>> from tracelet.core.values import flatten_params
        >>> flatten_params({"model": {"layers": 2, "sizes": [64, 10]}, "seed": None})
        {'model.layers': 2, 'model.sizes': '[64, 10]', 'seed': 'None'}
    """
    flat: dict[str, Scalar] = {}
    _flatten(_as_mapping(params), "", flat, [])
    return flat


def _as_mapping(params: object) -> Mapping[Any, Any]:
    if isinstance(params, Mapping):
        return params
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return _fields(params)
    if hasattr(params, "__dict__") and not isinstance(params, type):
        return vars(params)
    raise InvalidValue(f"params have to be a dict, not {_type(params)}", name="params", type=_type(params))


def _fields(value: Any) -> dict[str, Any]:
    # Not dataclasses.asdict, which deep-copies every value, tensors included.
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _flatten(params: Mapping[Any, Any], prefix: str, flat: dict[str, Scalar], inside: list[int]) -> None:
    if id(params) in inside:
        raise InvalidValue(f"param {prefix.rstrip('.')!r} holds itself", name=prefix.rstrip("."), type=_type(params))
    inside.append(id(params))
    for part, value in params.items():
        # {0: "adam"} and {Enum: ...} are common in configs: a scalar key is its text.
        text = part if isinstance(part, str) else _key_text(part)
        key = _key(prefix + text, "a param's key")
        if isinstance(value, Mapping) and value:
            _flatten(value, f"{key}.", flat, inside)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type) and dataclasses.fields(value):
            _flatten(_fields(value), f"{key}.", flat, inside)
        elif key in flat:
            raise InvalidValue(f"param {key!r} is given twice, nested and with dots", name=key, type=_type(value))
        else:
            flat[key] = _param(key, value)
    inside.pop()


def _key_text(part: object) -> str:
    part = part.value if isinstance(part, Enum) else part
    if isinstance(part, (str, bool, int, float)) or part is None:
        return str(part)
    raise InvalidValue(f"a param's key has to be a str, not {_type(part)}", name=part, type=_type(part))


def _param(key: str, value: object) -> Scalar:
    value = _plain(value)
    if value is None:
        return "None"
    if isinstance(value, str):
        return _utf8(value)
    if isinstance(value, bool) or type(value) is float:
        return value
    if isinstance(value, int):
        return value if value in _INT64 else _digits(value)
    if not isinstance(value, (dict, list, tuple)):
        value = _one_level(value)
        if isinstance(value, str):
            return _utf8(value)  # a path, a date, a class: its text, without JSON's quotes
    try:
        try:
            return _utf8(json.dumps(value, default=_one_level, ensure_ascii=False))  # at C speed
        except (TypeError, ValueError):  # a key that is no text, an integer of 5000 digits, or a cycle
            return _utf8(json.dumps(_jsonable(value, []), ensure_ascii=False))
    except RecursionError:
        raise InvalidValue(f"param {key!r} is nested too deeply", name=key, type=_type(value)) from None
    except _HoldsItself:
        raise InvalidValue(f"param {key!r} holds itself", name=key, type=_type(value)) from None


def _utf8(text: str) -> str:
    """`text` with half characters (lone surrogates, as in file names that are no UTF-8) as their escapes."""
    return text if text.isascii() or _is_utf8(text) else text.encode("utf-8", "backslashreplace").decode()


class _HoldsItself(Exception):
    pass


def _digits(value: int) -> str:
    # str() refuses integers of more than 4300 digits (a guard against slow input); hex has no such limit.
    try:
        return str(value)
    except ValueError:
        return hex(value)


def _plain(value: object) -> object:
    """A Python scalar for what is one in other clothes: an Enum's value, a numpy scalar, a 0-d array."""
    if isinstance(value, Enum):
        value = value.value if isinstance(value.value, (str, int, float)) else value.name
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return float.__float__(value)
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(shape, "__len__") and len(shape) == 0 and callable(getattr(value, "item", None)):
        item = value.item()  # type: ignore[attr-defined]
        if isinstance(item, (str, bool, int, float)):
            return item
    return value


def _one_level(value: object) -> object:
    """What json can't say itself, in its types, one level deep; what has no such form is its text."""
    plain = _plain(value)
    if plain is not value:
        return plain
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return _sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if callable(getattr(value, "tolist", None)):  # arrays and tensors
        return value.tolist()  # type: ignore[attr-defined]
    return _text(value)


def _jsonable(value: object, inside: list[int]) -> object:
    """`value` in JSON's own types, all the way down."""
    value = _plain(value)
    if value is None or isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 10_000 else _digits(value)
    if id(value) in inside:
        raise _HoldsItself
    inside.append(id(value))
    try:
        if not isinstance(value, (dict, list, tuple)):
            return _jsonable(_one_level(value), inside)
        if isinstance(value, dict):
            return {_json_key(key): _jsonable(item, inside) for key, item in value.items()}
        return [_jsonable(item, inside) for item in value]
    finally:
        inside.pop()


def _json_key(key: object) -> str:
    plain = _plain(key)
    return plain if isinstance(plain, str) else _text(plain)


def _text(value: object) -> str:
    if isinstance(value, os.PathLike):
        path = os.fspath(value)
        return path if isinstance(path, str) else os.fsdecode(path)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    # A function's str() ends with its address, which differs from run to run and says nothing.
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    return str(value)


def _sorted(values: Iterable[object]) -> list[object]:
    """A set's items in an order that doesn't change from run to run, as hashes of text do."""
    items = list(values)
    try:
        return sorted(items)  # type: ignore[type-var]
    except TypeError:
        return sorted(items, key=repr)


def check_tags(tags: object) -> dict[str, str]:
    """Tags as text: keys as for metrics, values by `str()`; None is refused, as nobody looks for a tag "None".

    Raises:
        InvalidValue: not a mapping, a key that is no name, or a value of None.
    """
    if not isinstance(tags, Mapping):
        raise InvalidValue(f"tags have to be a dict, not {_type(tags)}", name="tags", type=_type(tags))
    checked: dict[str, str] = {}
    for key, value in tags.items():
        name = _key(key, "a tag's key")
        if value is None:
            raise InvalidValue(f"tag {name!r} has no value (None): leave it out", name=name, type="None")
        plain = _plain(value)
        checked[name] = _utf8(plain if isinstance(plain, str) else _text(plain))
    return checked
