"""A config value that checks itself: a frozen dataclass whose fields are held against their annotations when it is made.

A mistake is a UserError of one line that names the field, the value and the choices.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can mend: one line, in the user's words. Entry points print it and exit with code 2."""


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy besides its type, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


def at_least(bound: float) -> Rule:
    return Rule(f"at least {bound}", lambda value: value is None or value >= bound)


def above(bound: float) -> Rule:
    return Rule(f"above {bound}", lambda value: value is None or value > bound)


def between(low: float, high: float) -> Rule:
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


NOT_EMPTY = Rule("not empty", lambda value: value is None or len(value) > 0)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that checks its fields."""
    return _checked(dataclass(frozen=True, kw_only=True)(cls))


@dataclass_transform(frozen_default=True)
def short_spec(cls: type[T]) -> type[T]:
    """The same with positional fields, for values of one or two obvious parts such as Jsonl("rows.jsonl")."""
    return _checked(dataclass(frozen=True)(cls))


def _checked(cls: type[T]) -> type[T]:
    assign: Callable[..., None] = cls.__init__

    @functools.wraps(assign)
    def checked(self: object, *args: object, **named: object) -> None:
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        if len(args) > len(known) or (args and _keyword_only(cls)):
            raise UserError(f"{cls.__name__} takes its fields by name: {', '.join(known)}")
        given = dict(zip(known, args, strict=False)) | named
        for name in given:
            if name not in known:
                raise UserError(f"{cls.__name__} has no field {name!r}; {choices(name, known)}")
        for name in known:
            if name not in given and _required(cls, name):
                raise UserError(f"{cls.__name__}.{name} is missing")
        hints = field_types(cls)
        assign(self, **{name: conform(value, hints[name], f"{cls.__name__}.{name}") for name, value in given.items()})

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def _keyword_only(cls: type) -> bool:
    return all(field.kw_only for field in dataclasses.fields(cls))


def _required(cls: type, name: str) -> bool:
    field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def field_types(cls: type) -> dict[str, Any]:
    """The annotation of every field of a spec, rules included."""
    return typing.get_type_hints(cls, include_extras=True)


def choices(wrong: str, known: Iterable[str]) -> str:
    """`did you mean x? (choices: x, y, z)`, or only the choices where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(wrong, known, n=1)
    listed = ", ".join(known) or "none"
    return f"did you mean {near[0]!r}? (choices: {listed})" if near else f"choices: {listed}"


def conform(value: object, annotation: Any, where: str) -> Any:
    """`value` as the annotated type: an int where a float is wanted becomes one, a list a tuple, a Path a str.

    Raises UserError, naming `where`, for any other type and for a broken rule.
    """
    result = _conform(value, annotation)
    if result is _WRONG:
        raise UserError(f"{where} = {value!r}: must be {describe(annotation)}{_hint(value, annotation)}")
    _obey(result, annotation, where)
    return result


_WRONG: Any = object()


def _conform(value: Any, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _conform(value, args[0])
    if origin in (Union, types.UnionType):
        # An exact member first: 1 stays an int in `int | float`.
        results = [_conform(value, member) for member in args]
        exact = [result for result in results if result is not _WRONG and type(result) is type(value)]
        return next(iter(exact + [result for result in results if result is not _WRONG]), _WRONG)
    if origin is Literal:
        return value if value in args and not isinstance(value, bool) else _WRONG
    if origin is tuple:
        return _conform_tuple(value, args)
    if origin is dict:
        return value if isinstance(value, dict) else _WRONG
    if origin is Callable:
        return value if callable(value) else _WRONG
    if annotation is None or annotation is types.NoneType:
        return value if value is None else _WRONG
    if annotation in (Any, object):
        return value
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if number else _WRONG
    if annotation is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _WRONG
    if annotation is str and isinstance(value, Path):
        return str(value)
    # A class where an instance belongs (method=Lora) must not pass as the callable that it also is.
    return value if isinstance(value, annotation) and not isinstance(value, type) else _WRONG


def _conform_tuple(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return _WRONG
    members = [_conform(member, args[0]) for member in value]
    return _WRONG if any(member is _WRONG for member in members) else tuple(members)


def _obey(value: Any, annotation: Any, where: str) -> None:
    if get_origin(annotation) is Annotated:
        for rule in annotation.__metadata__:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise UserError(f"{where} = {value!r}: must be {rule.words}")


def _hint(value: object, annotation: Any) -> str:
    if isinstance(value, type) and dataclasses.is_dataclass(value):
        return f" (an instance: {value.__name__}(...))"
    words = [str(choice) for choice in _literals(annotation)]
    near = difflib.get_close_matches(str(value), words, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for member in get_args(annotation) for word in _literals(member)] if _is_union(annotation) else []


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType, Annotated)


def describe(annotation: Any) -> str:
    """An annotation in words, for a message."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(member) for member in args))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if origin is tuple:
        return f"a tuple of {describe(args[0])}"
    if origin is Callable:
        return "callable"
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", types.NoneType: "None"}
    return words.get(annotation) or f"{getattr(annotation, '__name__', annotation)}(...)"


@dataclass(frozen=True)
class _Change:
    """`path`=`text`, of which `names` is what is left of the path here."""

    names: list[str]
    text: str
    path: str

    def inside(self) -> "_Change":
        return _Change(self.names[1:], self.text, self.path)


def override(value: Any, *assignments: str) -> Any:
    """A copy of the spec `value` with each `a.b=text` applied, the text coerced by the field's own type.

    All are applied before a rule that holds between fields is asked, so their order does not matter. Raises UserError for
    an unknown field, a text that is not of the field's type, or a broken rule.
    """
    changes = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(f"override {assignment!r}: write it as field=value, for example optim.lr=3e-4")
        changes.append(_Change(path.split("."), text, path))
    return _override(value, changes) if changes else value


def _override(value: Any, changes: list[_Change]) -> Any:
    by_name: dict[str, list[_Change]] = {}
    for change in changes:
        _check_name(value, change)
        by_name.setdefault(change.names[0], []).append(change)
    if isinstance(value, tuple):
        return tuple(_override_field(value, str(index), by_name.get(str(index), [])) for index in range(len(value)))
    return dataclasses.replace(value, **{name: _override_field(value, name, here) for name, here in by_name.items()})


def _check_name(value: Any, change: _Change) -> None:
    name, path = change.names[0], change.path
    if isinstance(value, tuple):
        if not name.isdecimal() or int(name) >= len(value):
            raise UserError(f"{path}: {name!r} is not one of the {len(value)} items (choices: 0 to {len(value) - 1})")
        if len(change.names) == 1:
            raise UserError(f"{path}: name a field of item {name}, for example {path}.{_first_field(value[int(name)])}")
        return
    if not dataclasses.is_dataclass(value):
        raise UserError(f"{path}: {type(value).__name__} {value!r} has no field {name!r}")
    known = [field.name for field in dataclasses.fields(value)]
    if name not in known:
        raise UserError(f"{path}: {type(value).__name__} has no field {name!r}; {choices(name, known)}")


def _override_field(value: Any, name: str, changes: list[_Change]) -> Any:
    """Field `name` of `value`, first as a whole (`method=Full`), then its own fields."""
    member = value[int(name)] if isinstance(value, tuple) else getattr(value, name)
    for change in changes:
        if len(change.names) == 1:
            hint = field_types(type(value))[name]
            coerced = _coerce(change.text, hint)
            if coerced is _WRONG:
                wrong = _hint(change.text, hint)
                raise UserError(f"{change.path} = {change.text!r}: must be {describe(hint)}{wrong}")
            member = conform(coerced, hint, change.path)
    inner = [change.inside() for change in changes if len(change.names) > 1]
    return _override(member, inner) if inner else member


def _first_field(value: Any) -> str:
    return dataclasses.fields(value)[0].name if dataclasses.is_dataclass(value) else "field"


def _coerce(text: str, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _coerce(text, args[0])
    if origin in (Union, types.UnionType):
        # Text takes anything, so it comes last.
        ordered = sorted(args, key=lambda member: member is str)
        return next((result for member in ordered if (result := _coerce(text, member)) is not _WRONG), _WRONG)
    if origin is Literal:
        return next((choice for choice in args if str(choice) == text), _WRONG)
    if origin is tuple:
        members = [_coerce(part.strip(), args[0]) for part in text.split(",") if part.strip()]
        return _WRONG if any(member is _WRONG for member in members) else tuple(members)
    if annotation is types.NoneType:
        return None if text.lower() in ("none", "null") else _WRONG
    if annotation is bool:
        return {"true": True, "false": False}.get(text.lower(), _WRONG)
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            return _WRONG
    if annotation is str:
        return text
    # `method=Full` chooses the variant by its name, with its defaults.
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) and annotation.__name__ == text:
        return annotation()
    return _WRONG


def render(value: Any, indent: str = "") -> str:
    """A spec as the Python expression that makes it, a field a line."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = indent + "    "
        fields = [f"{inner}{f.name}={render(getattr(value, f.name), inner)},\n" for f in dataclasses.fields(value)]
        return f"{type(value).__name__}({'' if not fields else chr(10) + ''.join(fields) + indent})"
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(member) for member in value):
        inner = indent + "    "
        return "(\n" + "".join(f"{inner}{render(member, inner)},\n" for member in value) + indent + ")"
    if isinstance(value, type | types.FunctionType):
        return value.__qualname__
    return repr(value)


def plain(value: Any) -> Any:
    """A spec as values that JSON can hold, its class name under `type`; of another object only the name of its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, tuple | list):
        return [plain(member) for member in value]
    if isinstance(value, dict):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    return value.__qualname__ if hasattr(value, "__qualname__") else type(value).__qualname__
