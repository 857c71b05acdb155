"""YAML files to RunConfig and back, with `key=value` overrides and errors that name the key."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import RunConfig
from hetegen_rec.files import write_whole


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key that stands twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here a mapping is as it was written; later it may hold the keys of those that it takes in by `<<`.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise ConfigError(f"key {key.value!r} stands twice (line {key.start_mark.line + 1})")
            seen.add((key.tag, key.value))
        return node


_FLOAT = r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][-+]?\d+)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads one YAML file and applies overrides.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` strings; values are read as YAML.

    Raises:
        ConfigError: no such file, not YAML, or a key that is unknown, of the wrong type or in
            contradiction with another; the message names the key and the fix.
    """
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The nested mapping that a YAML file holds.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it so"
        ) from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    return values


def parse_config(values: dict[str, Any], where: str) -> RunConfig:
    """Validates a nested mapping; `where` names its origin in errors."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, where, RunConfig)) from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets `dotted.key=value` in a nested mapping; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form, or a part of the key is no section.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            outer = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {override!r}: `{outer}` is a value, not a section")
        node = child
    node[last] = parse_yaml(text, f"override {override!r}")


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes the resolved configuration, every default spelt out, so that it loads back equal.

    An earlier file stays whole where the new one cannot be written.
    """
    dumped = config.model_dump(mode="json")
    write_whole(Path(path), yaml.safe_dump(dumped, sort_keys=False))


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says, its numbers and repeated keys read strictly; `where` names it in errors."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def explain(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    """What is wrong with which key of `where`, whose content should have made a `root`."""
    lines = [_explain_one(dict(details), root) for details in error.errors()]
    return "\n".join([f"{where}: {len(lines)} problem(s) in the configuration", *lines])


def _explain_one(details: dict[str, Any], root: type[BaseModel]) -> str:
    location: tuple[str | int, ...] = details["loc"]
    key = ".".join(str(part) for part in location) or "(whole file)"
    kind, message, found = details["type"], details["msg"], details.get("input")
    if kind == "extra_forbidden":
        return f"  {key}: unknown key{_suggestion(location, root)}; remove or rename it"
    if kind == "missing":
        return f"  {key}: is missing; add it"
    if kind == "value_error":
        return f"  {key}: {message.removeprefix('Value error, ')}"
    return f"  {key}: {message} (found {found!r}, {type(found).__name__})"


def _suggestion(location: Iterable[str | int], root: type[BaseModel]) -> str:
    *parents, last = location
    section: Any = root
    for part in parents:
        if isinstance(part, str) and _is_section(section) and part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation)
    names = list(section.model_fields) if _is_section(section) else []
    close = difflib.get_close_matches(str(last), names, n=1)
    return f" (did you mean `{close[0]}`?)" if close else f"; known keys: {', '.join(names)}"


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _section_of(annotation: Any) -> Any:
    if _is_section(annotation):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if _is_section(found):
            return found
    return annotation
