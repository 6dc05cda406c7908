"""YAML without surprises: a key that is given twice, of which YAML would silently take the last, is refused."""

from __future__ import annotations

from typing import Any

import yaml


def load_yaml(text: str) -> Any:
    """What a YAML document says.

    Raises:
        yaml.YAMLError: it is none; has `problem` and, where it is known, `problem_mark`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="brackets in brackets without end") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError):
            # What looks like a date, or is said to be a number, and is none: yaml lets such errors through.
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}; put text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Before `<<` is resolved, which puts the keys of another mapping in front of those that are given here.
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                # Such as an unfilled `{{ NAME }}` of a template.
                problem = "a mapping or a list cannot be a key; put text with braces in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
