"""YAML as people expect it: the core schema of YAML 1.2, which PyYAML does not implement.

PyYAML follows YAML 1.1, where `1e-3` is text, `no` is a boolean, `010` is eight and `12:30` is 750, where a date is an
object and where the second of two equal keys silently wins. Each of these turns a typing slip in a config into another
experiment. Here `true`, `false` and `null` are the only special words, numbers are decimal (or `0x`, `0o`), keys are
text and unique, merge keys and tags of other types do not exist.
"""

import re
from typing import Any

import yaml

from train.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2 (core schema): tag, pattern of a plain scalar, characters it can start with.
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[str, Any]:
        """Builds a mapping, refusing keys that are not text or that appear twice."""
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"keys must be words, found {inline(key)}", key_node.start_mark
                )
            if key in result:
                problem = f"the key '{key}' appears twice, first in line {lines[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[key] = line
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def construct_sequence(self, node: yaml.SequenceNode, deep: bool = True) -> list[Any]:
        return [self.construct_object(child, deep=True) for child in node.value]

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_unknown_tag(self, node: yaml.Node) -> None:
        problem = f"the tag {node.tag.replace(_TAG, '!!')} is not allowed"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    pass


for _name, _pattern, _first in _CORE_SCHEMA:
    _regexp = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _regexp, _first)
    # On top of the 1.1 rules: text that either version would take for something else is written in quotes.
    _Dumper.add_implicit_resolver(_TAG + _name, _regexp, _first)

_Loader.add_constructor(_TAG + "null", _Loader.construct_yaml_null)
_Loader.add_constructor(_TAG + "bool", _Loader.construct_yaml_bool)
_Loader.add_constructor(_TAG + "int", _Loader.construct_int)
_Loader.add_constructor(_TAG + "float", _Loader.construct_float)
_Loader.add_constructor(_TAG + "str", _Loader.construct_scalar)
_Loader.add_constructor(_TAG + "seq", _Loader.construct_sequence)
_Loader.add_constructor(_TAG + "map", _Loader.construct_mapping)
_Loader.add_constructor(None, _Loader.construct_unknown_tag)


def parse(text: str, *, source: str) -> Any:
    """Reads one YAML document.

    Args:
        text: the document; empty text is null.
        source: where it comes from, for messages.

    Returns:
        Plain data: dict with text keys, list, str, int, float, bool or None.

    Raises:
        ConfigError: malformed YAML, a key that is not text or appears twice, or a tag of another type.
    """
    try:
        # A subclass of SafeLoader: it builds plain data only.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{place}: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}") from None


def dump(data: Any) -> str:
    """Writes plain data as YAML that `parse` reads back to equal data; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def inline(value: Any) -> str:
    """Writes plain data in one line, as it would stand in a config."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _represent_list(dumper: _Dumper, data: list) -> yaml.Node:
    scalars = not any(isinstance(item, (list, dict)) for item in data)
    return dumper.represent_sequence(_TAG + "seq", data, flow_style=True if scalars else None)


_Dumper.add_representer(list, _represent_list)
