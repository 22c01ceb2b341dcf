"""YAML read strictly: scalars as in YAML 1.2, no aliases, no duplicate keys."""

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from utils.command import InputError
from utils.files import require_regular_file


class StrictLoader(yaml.SafeLoader):
    """Loads YAML with null, true, false and decimal numbers as in YAML 1.2.

    No aliases, no duplicate keys.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases, with which a short file can expand to a very large value."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not taken", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is given twice."""
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else str(key.start_mark)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), _first
    )


def _construct_int(loader: StrictLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 010 is 10, as in YAML 1.2


class StrictDumper(yaml.SafeDumper):
    """Writes YAML for StrictLoader: quotes strings that YAML 1.1 or 1.2 would not read as one."""


for _first, _resolvers in StrictLoader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        StrictDumper.add_implicit_resolver(_tag, _regexp, [_first])


StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str) -> Any:
    """Returns the YAML document in the text. Raises InputError with the line of an error."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{where}: {line}{error.problem}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except Exception as error:  # constructors of tags such as !!timestamp raise anything
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None


def write_yaml(values: dict[str, Any]) -> str:
    """Returns the values as YAML text in block style."""
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, width=10**6).rstrip("\n")


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in the file. Raises InputError with the file and the line."""
    try:
        require_regular_file(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such config file{hint}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, where a YAML file is asked for") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    values = parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a mapping of keys to values")
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of nested values with each a.b=value set, the value read as YAML."""
    values = copy.deepcopy(values)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"--set {item}: not of the form KEY=VALUE, e.g. model.channels=32")
        *sections, last = key.split(".")
        inner: Any = values
        for section in sections:
            if inner.setdefault(section, {}) is None:
                inner[section] = {}
            inner = inner[section]
            if not isinstance(inner, dict):
                raise InputError(f"--set {item}: {section} holds no keys")
        inner[last] = parse_yaml(text, f"--set {item}")
    return values
