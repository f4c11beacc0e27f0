"""Plain data to frozen spec dataclasses and back, for any dataclass.

The library declares each setting once, as an annotated field of a spec; nothing here repeats a type, a range or a
default. Pydantic validates the values strictly (text is no number, `true` is no integer, an integer is a number), and
this file turns its report into one line in the words of the config.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import annotated_types
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import Doc

from train import yaml12
from train.errors import ConfigError

T = TypeVar("T")
Place = tuple[str | int, ...]

TAG = "name"
# Marks a field that holds one of several specs, told apart by their `name`: `codec: Tagged[GaussianSpec | PixelSpec]`.
Tagged = Annotated[T, Field(discriminator=TAG)]


class Registered:
    """Marks a field that holds one of the specs of a registry, by its name: `codec: Annotated[Any, Registered(SPECS)]`.

    The registry may grow until a config is read; `forget` lets what was read before see what came later.
    """

    def __init__(self, specs: Mapping[str, type]):
        self._specs = specs

    @property
    def annotation(self) -> Any:
        """The union of the specs."""
        return Tagged[typing.Union[tuple(self._specs.values())]]  # type: ignore[misc]  # noqa: UP007

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Lets pydantic validate the union."""
        return handler.generate_schema(self.annotation)


_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    dict: "a mapping",
    types.NoneType: "null",
    Any: "any value",
}
_SIGNS: dict[type, tuple[str, str]] = {
    annotated_types.Ge: (">=", "ge"),
    annotated_types.Gt: (">", "gt"),
    annotated_types.Le: ("<=", "le"),
    annotated_types.Lt: ("<", "lt"),
    annotated_types.MinLen: (">=", "min_length"),
    annotated_types.MaxLen: ("<=", "max_length"),
}
# Failures that "expected ..., found ..." explains in full; any other one carries the validator's own words as well.
_EXPLAINED = ("_type", "_than", "literal_error", "too_short", "too_long", "finite_number", "multiple_of")


def build(cls: type[T], data: dict[str, Any], *, where: Callable[[Place], str]) -> T:
    """Validates plain data into a spec.

    Args:
        cls: a dataclass whose fields are plain types, `Annotated` ones, other dataclasses or `Tagged` unions.
        data: what a config holds; keys are text.
        where: names the origin of the value at a place, for messages.

    Returns:
        The instance, defaults filled in.

    Raises:
        ConfigError: the first failure in the order of `data`, and the number of further ones.
        TypeError: `cls` holds a union of specs that is not `Tagged`; a defect of the declaration.
    """
    found: dict[Place, str] = {}
    try:
        # As JSON, because strict validation takes a list for a tuple and a mapping for a dataclass only there.
        config = _adapter(typing.cast(type, cls)).validate_json(json.dumps([data]))[0]
    except ValidationError as error:
        for failure in error.errors(include_url=False):
            place, text = _explain(cls, data, failure)
            found.setdefault(place, text)
    else:
        found.update(_equated(data, config, cls))
        if not found:
            return config
    places = sorted(found, key=lambda place: _position(data, place))
    key = dotted(places[0])
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    text = found[places[0]]
    # A spec that checks its fields against each other names them itself: `data.path is needed with ...`.
    head = f"{key}: " if key and not text.startswith(f"{key}.") else ""
    raise ConfigError(f"{head}{text} (in {where(places[0])}){more}")


def plain(config: Any) -> Any:
    """Turns a spec into plain data: dicts in field order, lists for tuples, text for paths."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def describe(cls: type) -> str:
    """Lists every setting of a spec, one a line: key, type and range, default, what it means."""
    rows = [(f"{'  ' * bool(row[4])}{row[0]}", *row[1:]) for row in _rows(cls)]
    # A long list of choices pushes its own line out, not everyone's.
    widths = [min(max((len(row[column]) for row in rows), default=0), 40) for column in range(3)]
    lines = []
    group = ""
    for key, kind, default, sentence, condition in rows:
        if condition != group and condition:
            lines.append(f"when {condition}:")
        group = condition
        lines.append(f"{key:<{widths[0]}}  {kind:<{widths[1]}}  {default:<{widths[2]}}  {sentence}".rstrip())
    return "\n".join(lines)


def has_tag(cls: type, place: Sequence[str | int]) -> bool:
    """Says whether the section at a place, with list positions as numbers or text, is of one of several specs."""
    annotation: Any = cls
    for part in place:
        if members := _specs(annotation):
            annotation = next((_hints(member)[str(part)] for member in members if str(part) in _hints(member)), None)
        else:
            annotation = _element(annotation, int(part)) if str(part).isdecimal() else None
    return len(_specs(annotation)) > 1


def dotted(place: Place) -> str:
    """Writes a place as it is given in an override: `codec.images_per_class`, `baselines.0.images_per_class`."""
    return ".".join(str(part) for part in place)


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    list(_rows(cls))  # meets every annotation once, so that a wrong declaration fails before any config is read
    # Pydantic takes settings for a foreign dataclass only from what surrounds it; nested ones inherit them.
    return TypeAdapter(tuple[cls], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # type: ignore[valid-type]


def forget() -> None:
    """Forgets what was derived from the registries of specs, which have grown."""
    _adapter.cache_clear()
    _hints.cache_clear()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, annotation in hints.items():
        metadata = _strip(annotation)[1]
        if registered := next((item for item in metadata if isinstance(item, Registered)), None):
            hints[name] = Annotated[registered.annotation, *metadata]
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _strip(annotation: Any) -> tuple[Any, list[Any]]:
    """Splits `Annotated[base, ...]` into the base and its metadata, groups such as `Interval` taken apart."""
    if typing.get_origin(annotation) is not Annotated:
        return annotation, []
    base, *metadata = typing.get_args(annotation)
    flat: list[Any] = []
    for item in metadata:
        flat.extend(item if isinstance(item, annotated_types.GroupedMetadata) else [item])
    return base, flat


def _specs(annotation: Any) -> tuple[type, ...]:
    """Returns the spec classes that a value of this annotation may have: none, one, or the members of a union."""
    base, metadata = _strip(annotation)
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return (base,)
    if not _is_union(base):
        return ()
    alternatives = [_specs(part) for part in typing.get_args(base)]
    if sum(map(bool, alternatives)) > 1 and not any(getattr(item, "discriminator", None) == TAG for item in metadata):
        names = " | ".join(member.__name__ for members in alternatives for member in members)
        raise TypeError(f"a union of specs must be marked: write Tagged[{names}] for {names}")
    return tuple(member for members in alternatives for member in members)


def _is_union(base: Any) -> bool:
    return typing.get_origin(base) in (typing.Union, types.UnionType)


def _tags(members: Sequence[type]) -> dict[str, type]:
    return {tag: member for member in members for tag in typing.get_args(_strip(_hints(member)[TAG])[0])}


def _element(annotation: Any, index: int = 0) -> Any:
    """Returns the annotation of an element of a list or tuple, or None where there are no elements."""
    base, _ = _strip(annotation)
    if _is_union(base):
        inner = [part for part in typing.get_args(base) if _strip(part)[0] is not types.NoneType]
        return _element(inner[0], index) if len(inner) == 1 else None
    arguments = typing.get_args(base)
    if typing.get_origin(base) not in (tuple, list) or not arguments:
        return None
    if len(arguments) == 1 or arguments[-1] is Ellipsis:
        return arguments[0]
    return arguments[index] if index < len(arguments) else None


def _follow(cls: type, location: Sequence[str | int]) -> tuple[Place, Any]:
    """Turns pydantic's location, which also names union members, into keys as written and the annotation there."""
    place: list[str | int] = []
    annotation: Any = cls
    for part in location:
        members = _specs(annotation)
        if len(members) > 1:
            annotation = _tags(members)[str(part)]
        elif members:
            place.append(part)
            annotation = _hints(members[0]).get(str(part))
        elif isinstance(part, int) and (element := _element(annotation, part)) is not None:
            place.append(part)
            annotation = element
        else:
            break
    return tuple(place), annotation


def _explain(cls: type, data: Any, failure: Any) -> tuple[Place, str]:
    """Says what is wrong at which place, in the words of the config."""
    kind = failure["type"]
    place, annotation = _follow(cls, failure["loc"][1:])
    if kind == "unexpected_keyword_argument":
        return place, _unknown_key(cls, failure["loc"][1:])
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        choices = "one of " + ", ".join(_tags(_specs(annotation)))
        found = "missing; " if kind == "union_tag_not_found" else ""
        tail = "" if found else f", found {_show(_at(data, place)[TAG])}"
        return (*place, TAG), f"{found}expected {choices}{tail}"
    if kind == "missing":
        return place, f"missing; expected {_expected(annotation)}"
    if kind in ("value_error", "assertion_error"):
        return place, str(failure["ctx"]["error"]).removeprefix(f"{dotted(place)}: ")
    expected = _expected(annotation)
    if kind == "finite_number":
        expected = expected.replace("a number", "a finite number", 1)
    words = "" if any(part in kind for part in _EXPLAINED) else f" ({failure['msg']})"
    return place, f"expected {expected}, found {_show(_at(data, place))}{words}"


def _equated(data: Any, value: Any, annotation: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Finds `true` or `1.0` taken for the choice 1: pydantic compares choices with ==, strict or not."""
    if dataclasses.is_dataclass(value):
        hints = _hints(value.__class__)
        for key, item in data.items():
            yield from _equated(item, getattr(value, key), hints[key], (*place, key))
    elif isinstance(data, list) and isinstance(value, (list, tuple)):
        for index, pair in enumerate(zip(data, value, strict=True)):
            yield from _equated(*pair, _element(annotation, index), (*place, index))
    elif isinstance(data, bool) != isinstance(value, bool) or (isinstance(data, float) and isinstance(value, int)):
        yield place, f"expected {_expected(annotation)}, found {_show(data)}"


def _unknown_key(cls: type, location: Sequence[str | int]) -> str:
    place, owner = _follow(cls, location[:-1])
    key = str(location[-1])
    allowed = list(_hints(_specs(owner)[0]))
    rows = list(_rows(cls))
    elsewhere = dict.fromkeys(row[0] for row in rows if row[0].rpartition(".")[2] == key)
    near = [*difflib.get_close_matches(key, allowed), *elsewhere]
    conditions = [row[4] for row in rows if row[0] == dotted((*place, key))]
    if conditions:
        hint = f"known only when {' or '.join(conditions)}; "
    else:
        hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown key; {hint}allowed: {', '.join(allowed)}"


def _expected(annotation: Any) -> str:
    """Describes what a value must be: `an integer >= 1`, `one of zca, meanstd, none`."""
    base, metadata = _strip(annotation)
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    members = _specs(annotation)
    text = tail = ""
    if len(members) > 1:
        text = f"a section whose {TAG} is one of {', '.join(_tags(members))}"
        text += " or null" if types.NoneType in arguments else ""
    elif _is_union(base):
        text = " or ".join(dict.fromkeys(_expected(part) for part in arguments))
    elif members:
        text = f"a section with the keys {', '.join(_hints(members[0]))}"
    elif origin is Literal:
        choices = [value if isinstance(value, str) and value else _show(value) for value in arguments]
        text = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    elif origin in (tuple, list) and (origin is list or Ellipsis in arguments):
        text, tail = "a list", f", each {_expected(arguments[0])}"
    elif origin is tuple:
        text = f"a list of {len(arguments)} ({', '.join(_expected(argument) for argument in arguments)})"
    else:
        text = str(_KINDS.get(origin or base) or getattr(base, "__name__", base))
    return text + _limits(metadata) + tail


def _limits(metadata: Sequence[Any]) -> str:
    limits = []
    sized = ""
    for item in metadata:
        if type(item) in _SIGNS:
            sign, attribute = _SIGNS[type(item)]
            limits.append(f"{sign} {_show(getattr(item, attribute))}")
        elif isinstance(item, annotated_types.MultipleOf):
            limits.append(f"divisible by {_show(item.multiple_of)}")
        if isinstance(item, (annotated_types.MinLen, annotated_types.MaxLen)):
            sized = "of length "
    return f" {sized}{' and '.join(limits)}" if limits else ""


def _rows(cls: type, prefix: str = "", default: Any = None, condition: str = "") -> Iterator[tuple[str, ...]]:
    """Yields key, type, default, sentence and condition of every field."""
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        annotation = _hints(cls)[field.name]
        key = prefix + field.name
        value = getattr(default, field.name) if default is not None else _default(field)
        members = _specs(annotation)
        sentence = next((item.documentation for item in _strip(annotation)[1] if isinstance(item, Doc)), "")
        if not members:
            kind = _expected(annotation).removeprefix("an ").removeprefix("a ")
            shown = "required" if value is dataclasses.MISSING else yaml12.inline(plain(value))
            yield key, kind, shown, sentence, condition
        elif len(members) == 1:
            yield from _rows(members[0], f"{key}.", _instance(value, members[0]), condition)
        else:
            chosen = "required" if value is dataclasses.MISSING else getattr(value, TAG, "null")
            yield f"{key}.{TAG}", f"one of {', '.join(_tags(members))}", chosen, sentence, condition
            for tag, member in _tags(members).items():
                for row in _rows(member, f"{key}.", _instance(value, member), f"{key}.{TAG} is {tag}"):
                    if row[0] != f"{key}.{TAG}":
                        yield row


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _instance(value: Any, cls: type) -> Any:
    return value if isinstance(value, cls) else None


def _position(data: Any, place: Place) -> list[int]:
    """Orders places as they are written; a missing key comes after those of its section that are there."""
    position = []
    for part in place:
        if isinstance(data, dict):
            keys = list(data)
            position.append(keys.index(part) if part in data else len(keys))
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            position.append(part)
            data = data[part] if part < len(data) else None
    return position


def _at(data: Any, place: Place) -> Any:
    for part in place:
        data = data[part]
    return data


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else yaml12.inline(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
