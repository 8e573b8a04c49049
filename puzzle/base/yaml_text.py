"""YAML that anybody may have written: what is none has one kind of error."""

from __future__ import annotations

from typing import Any

import yaml


class _EveryKeyOnce(yaml.SafeLoader):
    """YAML's last value of a key that stands twice would win without a word. Keys are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:  # as they are written: 8 and on are names of sizes, no numbers and no truths
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                key.tag = "tag:yaml.org,2002:str"
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} stands twice")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError for what is no YAML, has a key twice, a date that is none, or is nested too deeply; of it ConstructorError for tags that are not
    plain YAML's."""
    try:
        return yaml.load(text, _EveryKeyOnce)
    except ValueError as error:
        raise yaml.YAMLError(f"a value that is none: {error}") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
