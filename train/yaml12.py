"""YAML 1.2 for configs: `1e-3` is a number, `no`, `12:30` and dates are text, `010` is ten, a key stands once."""

import io
import json
from typing import Any

from ruamel.yaml import YAML, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from train.errors import ConfigError

_TAG = "tag:yaml.org,2002:"


class _Constructor(SafeConstructor):
    pass


for _name in ("timestamp", "merge", "value"):  # `2024-01-01`, `<<` and `=` are text
    _Constructor.add_constructor(_TAG + _name, _Constructor.construct_yaml_str)


def parse(text: str, *, source: str) -> Any:
    """Reads one YAML document as plain data with text keys, in which no object stands in two places; '' is None.

    Raises:
        ConfigError: malformed YAML, a key that appears twice, or a value of another type; names the `source`.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return json.loads(json.dumps(yaml.load(text)))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{place}: {problem}") from None
    except (YAMLError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None


def dump(data: Any) -> str:
    """Writes plain data as YAML that `parse` reads back to equal data; keys keep their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()
