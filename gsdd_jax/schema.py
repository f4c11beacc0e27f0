"""Plain data to frozen spec dataclasses, for any dataclass: configurations, manifests, settings of codecs.

Each setting is declared once, as an annotated field of a spec. Pydantic validates values strictly (text is no
number, `true` is no integer, an integer is a number); messages and `--help` come from the same annotations.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import Doc

from gsdd_jax.errors import InputError

T = TypeVar("T")
Place = tuple[str | int, ...]

# The key of a section that chooses one of several specs.
TAG = "name"

_KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_KINDS |= {tuple: "a list", dict: "a mapping", types.NoneType: "null"}
# By the attributes of annotated_types.
_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "divisible by"}
_LIMITS |= {"min_length": "of length >=", "max_length": "of length <="}


class Registered:
    """Marks a field that holds one of the specs of a registry, by its name: `codec: Annotated[Any, Registered(SPECS)]`.

    The registry may grow until a config is read; `forget` lets what was read before see what came later.
    """

    def __init__(self, specs: Mapping[str, type], default: str = ""):
        """Takes the specs, and the name that a section without one has; '' = it has to have one."""
        self.specs, self._default = specs, default

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Lets pydantic validate the union of the specs."""
        union: Any = typing.Union[tuple(self.specs.values())]  # noqa: UP007

        def named(section: Any) -> Any:
            return {TAG: self._default} | section if self._default and isinstance(section, dict) else section

        return handler.generate_schema(Annotated[union, Field(discriminator=TAG), BeforeValidator(named)])


def build(cls: type[T], data: Any, *, section: str = "") -> T:
    """Validates what a config or a manifest holds into a dataclass whose fields are plain types, specs or choices.

    For messages, `section` is the key of all of it.

    Raises:
        ValueError: the first failure, unknown keys before missing ones, and the number of further ones; one line.
    """
    try:
        # As JSON, because strict validation takes a list for a tuple and a mapping for a dataclass only there.
        return _adapter(typing.cast(type, cls)).validate_json(json.dumps([data]))[0]
    except ValidationError as error:
        failures = sorted(error.errors(include_url=False), key=lambda failure: failure["type"] == "missing")
    place, text = _explain(cls, failures[0])
    key = _dotted((section, *place) if section else place)
    # A spec that checks its fields against each other may name them itself: `data.path is needed with ...`.
    head = f"{key}: " if key and not text.startswith((f"{key}.", f"{key}:")) else ""
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    raise InputError(f"{head}{text}{more}")


def describe(cls: type) -> str:
    """Lists every setting of a spec, one a line: key, type and range, default, what it means."""
    lines = []
    group = ""
    for key, kind, default, sentence, condition in _rows(cls):
        if condition != group and condition:
            lines.append(f"when {condition}:")
        group = condition
        lines.append(f"{'  ' * bool(condition) + key:<40}  {kind:<34}  {default:<10}  {sentence}".rstrip())
    return "\n".join(lines)


def has_tag(cls: type, place: Sequence[str | int]) -> bool:
    """Says whether the section at a place, with list positions as numbers or text, is of one of several specs."""
    return bool(_tags(_follow(cls, place)[1]))


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    # Pydantic takes settings for a foreign dataclass only from what surrounds it; nested ones inherit them.
    return TypeAdapter(tuple[cls], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # type: ignore[valid-type]


# Forgets what was derived from the registries of specs, which have grown.
forget = _adapter.cache_clear


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _parts(hint: Any) -> tuple[Any, list[Any]]:
    """Splits a hint into the type and what is annotated to it."""
    if typing.get_origin(hint) is not Annotated:
        return hint, []
    base, *notes = typing.get_args(hint)
    inner, more = _parts(base)
    return inner, [*more, *notes]


def _members(hint: Any) -> tuple[Any, ...]:
    """Returns what a union is of; a hint alone is one of itself."""
    base, _ = _parts(hint)
    return typing.get_args(base) if typing.get_origin(base) in (typing.Union, types.UnionType) else (hint,)


def _tags(hint: Any) -> Mapping[str, type]:
    """Returns the specs that a value may be, by their names; none where there is no choice."""
    notes = [note for one in _members(hint) for note in _parts(one)[1]]
    return {name: spec for note in notes if isinstance(note, Registered) for name, spec in note.specs.items()}


def _section(hint: Any) -> type | None:
    """Returns the one dataclass that a value may be, besides null."""
    found = [base for base, _ in map(_parts, _members(hint)) if dataclasses.is_dataclass(base)]
    return found[0] if len(found) == 1 else None  # type: ignore[return-value]


def _follow(cls: type, location: Sequence[str | int]) -> tuple[Place, Any]:
    """Turns pydantic's location, which also names union members, into keys as written and the hint there."""
    place: list[str | int] = []
    hint: Any = cls
    for part in location:
        items = typing.get_args(_parts(hint)[0])
        if (spec := _section(hint)) is not None:
            hint = _hints(spec).get(str(part), Any)
        elif part in _tags(hint):
            hint = _tags(hint)[str(part)]
            continue
        elif typing.get_origin(_parts(hint)[0]) is tuple:
            hint = items[0] if items[-1] is ... else items[int(part)]
        else:
            break
        place.append(part)
    return tuple(place), hint


def _explain(cls: type, failure: Any) -> tuple[Place, str]:
    """Says what is wrong at which place, in the words of the config."""
    kind, location, found = failure["type"], failure["loc"][1:], failure["input"]
    place, hint = _follow(cls, location)
    if kind == "unexpected_keyword_argument":
        return place, _unknown_key(cls, location)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        place, expected = (*place, TAG), f"expected one of {', '.join(_tags(hint))}"
        return place, f"{expected}, found {show(found[TAG])}" if TAG in found else f"missing; {expected}"
    if kind == "missing":
        return place, f"missing; expected {_kind(hint)}"
    if kind in ("value_error", "assertion_error"):
        return place, str(failure["ctx"]["error"])
    expected = _kind(hint).replace("a number", "a finite number", kind == "finite_number")
    # A failure that the type and the range do not explain carries the validator's own words as well.
    words = "" if failure["msg"].startswith("Input should be") else f" ({failure['msg']})"
    return place, f"expected {expected}, found {show(found)}{words}"


def _unknown_key(cls: type, location: Sequence[str | int]) -> str:
    place, section = _follow(cls, location[:-1])
    key, allowed, rows = str(location[-1]), list(_hints(_section(section) or cls)), list(_rows(cls))
    if conditions := [row[4] for row in rows if row[0] == _dotted((*place, key))]:
        hint = f"known only when {' or '.join(conditions)}; "
    else:
        elsewhere = dict.fromkeys(row[0] for row in rows if row[0].rpartition(".")[2] == key)
        near = [*difflib.get_close_matches(key, allowed), *elsewhere]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown key; {hint}allowed: {', '.join(allowed)}"


def _kind(hint: Any) -> str:
    """Describes what a value must be: `an integer >= 1`, `one of zca, meanstd, none`."""
    base, notes = _parts(hint)
    if base is not types.NoneType and types.NoneType in _members(base):
        return " or ".join(map(_kind, _members(base)))
    if tags := _tags(hint):
        return f"a section whose {TAG} is one of {', '.join(tags)}"
    if dataclasses.is_dataclass(base):
        return f"a section with the keys {', '.join(_hints(base))}"  # type: ignore[arg-type]
    if typing.get_origin(base) is Literal:
        words = list(map(_word, typing.get_args(base)))
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    values = [(sign, getattr(note, name, None)) for note in notes for name, sign in _LIMITS.items()]
    limits = " and ".join(f"{sign} {show(value)}" for sign, value in values if value is not None)
    items = typing.get_args(base)
    each = f", each {_kind(items[0])}" if items[1:] == (...,) else ""
    return f"{_KINDS.get(typing.get_origin(base) or base, 'any value')} {limits}".rstrip() + each


def _rows(hint: Any, key: str = "", default: Any = dataclasses.MISSING, condition: str = "") -> Iterator[list[str]]:
    """Yields key, type, default, sentence and condition of every setting; without a default it is required."""
    sentence = next((note.documentation for note in _parts(hint)[1] if isinstance(note, Doc)), "")
    shown = "required" if default is dataclasses.MISSING else _word(default)
    if (spec := _section(hint)) is not None:
        for field in dataclasses.fields(spec):
            value = getattr(default, field.name) if isinstance(default, spec) else field.default
            yield from _rows(_hints(spec)[field.name], f"{key}.{field.name}".removeprefix("."), value, condition)
    elif tags := _tags(hint):
        tag = f"{key}.{TAG}"
        yield [tag, f"one of {', '.join(tags)}", getattr(default, TAG, shown), sentence, condition]
        for name, spec in tags.items():
            yield from (row for row in _rows(spec, key, default, f"{tag} is {name}") if row[0] != tag)
    else:
        yield [key, _kind(hint).removeprefix("an ").removeprefix("a "), shown, sentence, condition]


def _dotted(place: Place) -> str:
    return ".".join(key_text(str(part)) for part in place)


def key_text(key: str) -> str:
    """Writes a key as it is, if that fits a part of a line."""
    return key if key.isprintable() and 0 < len(key) <= 60 else show(key)


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value else show(value)


def show(value: Any) -> str:
    """Writes a value as it stands in a config, cut to a part of a line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
