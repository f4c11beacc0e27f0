"""Plain data to frozen spec dataclasses, for any dataclass: configurations, manifests, settings of codecs.

Each setting is declared once, as an annotated field of a spec. Pydantic validates values strictly (text is no
number, `true` is no integer, an integer is a number) and writes the JSON schema that messages and `--help` come from.
"""

import difflib
import functools
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import Doc

from gsdd_jax.errors import InputError

T = TypeVar("T")
Place = tuple[str | int, ...]
Node = dict[str, Any]  # a JSON schema, its references filled in

TAG = "name"
# Marks a field that holds one of several specs, told apart by their `name`: `codec: Tagged[GaussianSpec | PixelSpec]`.
Tagged = Annotated[T, Field(discriminator=TAG)]

_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
}
_LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "divisible by",
    "minItems": "of length >=",
    "maxItems": "of length <=",
}


class Registered:
    """Marks a field that holds one of the specs of a registry, by its name: `codec: Annotated[Any, Registered(SPECS)]`.

    The registry may grow until a config is read; `forget` lets what was read before see what came later.
    """

    def __init__(self, specs: Mapping[str, type], default: str = ""):
        """Takes the specs, and the name that a section without one has; '' = it has to have one."""
        self._specs, self._default = specs, default

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Lets pydantic validate the union of the specs."""
        union: Any = Tagged[typing.Union[tuple(self._specs.values())]]  # type: ignore[misc]  # noqa: UP007

        def named(section: Any) -> Any:
            return {TAG: self._default} | section if self._default and isinstance(section, dict) else section

        return handler.generate_schema(Annotated[union, BeforeValidator(named)])


class _Documented(GenerateJsonSchema):
    """Adds what `Doc` says of the fields, and keeps their order and that of choices."""

    def sort(self, value: Any, parent_key: str | None = None) -> Any:
        return value

    def dataclass_schema(self, schema: Any) -> Node:
        node = super().dataclass_schema(schema)
        for name, hint in typing.get_type_hints(schema["cls"], include_extras=True).items():
            for item in getattr(hint, "__metadata__", ()):
                if isinstance(item, Doc):
                    node["properties"][name]["description"] = item.documentation
        return node


def build(cls: type[T], data: Any, *, section: str = "", where: Callable[[Place], str] | None = None) -> T:
    """Validates plain data into a spec.

    Args:
        cls: a dataclass whose fields are plain types, `Annotated` ones, other dataclasses or `Tagged` unions.
        data: what a config or a manifest holds; keys are text.
        section: the key of all of it, for messages.
        where: names the origin of the value at a place, for messages.

    Returns:
        The instance, defaults filled in.

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
    raise InputError(f"{head}{text}{f' (in {where(place)})' if where else ''}{more}")


def describe(cls: type) -> str:
    """Lists every setting of a spec, one a line: key, type and range, default, what it means."""
    lines = []
    group = ""
    for key, kind, default, sentence, condition in _rows(_schema(cls)):
        if condition != group and condition:
            lines.append(f"when {condition}:")
        group = condition
        lines.append(f"{'  ' * bool(condition) + key:<40}  {kind:<34}  {default:<10}  {sentence}".rstrip())
    return "\n".join(lines)


def has_tag(cls: type, place: Sequence[str | int]) -> bool:
    """Says whether the section at a place, with list positions as numbers or text, is of one of several specs."""
    return bool(_tags(_follow(cls, place)[1]))


def forget() -> None:
    """Forgets what was derived from the registries of specs, which have grown."""
    _adapter.cache_clear()
    _schema.cache_clear()


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    # Pydantic takes settings for a foreign dataclass only from what surrounds it; nested ones inherit them.
    return TypeAdapter(tuple[cls], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # type: ignore[valid-type]


@functools.cache
def _schema(cls: type) -> Node:
    whole = _adapter(cls).json_schema(schema_generator=_Documented)

    def filled(node: Any) -> Any:
        if isinstance(node, str) and node.startswith("#/$defs/"):
            return filled(whole["$defs"][node.removeprefix("#/$defs/")])
        if isinstance(node, list):
            return [filled(item) for item in node]
        if isinstance(node, dict):
            below = {key: filled(item) for key, item in node.items()}
            # A section or null is described as the section.
            sections = [part for part in below.get("anyOf", ()) if "properties" in part]
            return (sections or [below.pop("$ref", {})])[0] | below
        return node

    return filled(whole["prefixItems"][0])


def _tags(node: Node) -> dict[str, Node]:
    """Returns the sections that a value may be, by their tags; none where there is no choice."""
    tags = dict(node.get("discriminator", {}).get("mapping", {}))
    for part in node.get("anyOf", ()):
        tags |= _tags(part)
    return tags


def _follow(cls: type, location: Sequence[str | int]) -> tuple[Place, Node]:
    """Turns pydantic's location, which also names union members, into keys as written and the schema there."""
    place: list[str | int] = []
    node = _schema(cls)
    for part in location:
        if "properties" in node:
            node = node["properties"].get(part, {})
        elif part in _tags(node):
            node = _tags(node)[str(part)]
            continue
        elif "items" in node:
            node = node["items"]
        elif "prefixItems" in node and isinstance(part, int):
            node = node["prefixItems"][part]
        else:
            break
        place.append(part)
    return tuple(place), node


def _explain(cls: type, failure: Any) -> tuple[Place, str]:
    """Says what is wrong at which place, in the words of the config."""
    kind, location, found = failure["type"], failure["loc"][1:], failure["input"]
    place, node = _follow(cls, location)
    if kind == "unexpected_keyword_argument":
        return place, _unknown_key(cls, location)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        place, expected = (*place, TAG), f"expected one of {', '.join(_tags(node))}"
        return place, f"{expected}, found {show(found[TAG])}" if TAG in found else f"missing; {expected}"
    if kind == "missing":
        return place, f"missing; expected {_kind(node)}"
    if kind in ("value_error", "assertion_error"):
        return place, str(failure["ctx"]["error"])
    expected = _kind(node).replace("a number", "a finite number", kind == "finite_number")
    # A failure that the type and the range do not explain carries the validator's own words as well.
    words = "" if failure["msg"].startswith("Input should be") else f" ({failure['msg']})"
    return place, f"expected {expected}, found {show(found)}{words}"


def _unknown_key(cls: type, location: Sequence[str | int]) -> str:
    place, section = _follow(cls, location[:-1])
    key, allowed, rows = str(location[-1]), list(section["properties"]), list(_rows(_schema(cls)))
    if conditions := [row[4] for row in rows if row[0] == _dotted((*place, key))]:
        hint = f"known only when {' or '.join(conditions)}; "
    else:
        elsewhere = dict.fromkeys(row[0] for row in rows if row[0].rpartition(".")[2] == key)
        near = [*difflib.get_close_matches(key, allowed), *elsewhere]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown key; {hint}allowed: {', '.join(allowed)}"


def _kind(node: Node) -> str:
    """Describes what a value must be: `an integer >= 1`, `one of zca, meanstd, none`."""
    if "anyOf" in node and "properties" not in node:
        return " or ".join(_kind(part) for part in node["anyOf"])
    if tags := _tags(node):
        return f"a section whose {TAG} is one of {', '.join(tags)}"
    if "properties" in node:
        return f"a section with the keys {', '.join(node['properties'])}"
    if "enum" in node:
        return f"one of {', '.join(map(_word, node['enum']))}"
    if "const" in node:
        return _word(node["const"])
    text = _KINDS.get(node.get("type", ""), node.get("type", "any value"))
    limits = " and ".join(f"{sign} {show(node[word])}" for word, sign in _LIMITS.items() if word in node)
    each = f", each {_kind(node['items'])}" if node.get("items") else ""
    return f"{text} {limits}".rstrip() + each


def _rows(node: Node, key: str = "", default: Any = ..., condition: str = "") -> Iterator[tuple[str, ...]]:
    """Yields key, type, default, sentence and condition of every setting; without a default it is required."""
    shown = "required" if default is ... else _word(default)
    sentence, tags, tag = node.get("description", ""), _tags(node), f"{key}.{TAG}"
    if "properties" in node:
        for name, below in node["properties"].items():
            value = default[name] if isinstance(default, dict) else below.get("default", ...)
            yield from _rows(below, f"{key}.{name}".removeprefix("."), value, condition)
    elif tags:
        chosen = default[TAG] if isinstance(default, dict) else shown
        yield tag, f"one of {', '.join(tags)}", chosen, sentence, condition
        for name, section in tags.items():
            rows = _rows(section, key, default if name == chosen else ..., f"{tag} is {name}")
            yield from (row for row in rows if row[0] != tag)
    else:
        yield key, _kind(node).removeprefix("an ").removeprefix("a "), shown, sentence, condition


def _dotted(place: Place) -> str:
    return ".".join(key_text(str(part)) for part in place)


def key_text(key: str) -> str:
    """Writes a key as it is, if that fits a part of a line."""
    return key if key.isprintable() and 0 < len(key) <= 60 else show(key)


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value else show(value)


def show(value: Any) -> str:
    """Writes a value as it stands in a config, cut to a part of a line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
