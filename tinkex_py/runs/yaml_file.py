"""Reads YAML: the settings of a run, and values that replace some of them."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from tinkex_py.errors import ConfigError

_FLOAT_TAG = "tag:yaml.org,2002:float"
# YAML 1.2, section 10.3.2, where `1e-3` is a number; in YAML 1.1 it is a text.
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


def read_yaml(path: Path) -> object:
    """Reads a YAML file, with the numbers of YAML 1.2.

    Raises:
        ConfigError: it cannot be read, or is not valid YAML.
    """
    try:
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def with_overrides(content: object, overrides: Sequence[str]) -> object:
    """Returns the content of a file with some settings replaced.

    Args:
        content: nested mappings and lists.
        overrides: `KEY=VALUE`, where the key has dots between its parts, such as `loss.regularizers.0.weight`, and the
            value is YAML.

    Raises:
        ConfigError: an override is not `KEY=VALUE`, its value is not valid YAML, or its key leads into a value that
            has no settings.
    """
    changed: object = {} if content is None else copy.deepcopy(content)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set must be KEY=VALUE, such as optimizer.learning_rate=1e-3, got {override!r}")
        _replace(changed, parts, _parsed(text, f"--set {override}"), key)
    return changed


def _replace(at: object, parts: Sequence[str], value: object, key: str) -> None:
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        if isinstance(at, dict):
            section = cast("dict[str, object]", at)
            if is_last:
                section[part] = value
            elif section.get(part) is None:
                section[part] = {}
            at = section.get(part)
        elif isinstance(at, list):
            items = cast("list[object]", at)
            if not part.isdecimal() or int(part) >= len(items):
                where = ".".join(parts[:depth])
                raise ConfigError(f"--set {key}: {where} is a list of {len(items)}; name one by its number, from 0")
            if is_last:
                items[int(part)] = value
            at = items[int(part)]
        else:
            where = ".".join(parts[:depth]) or "the file"
            raise ConfigError(f"--set {key}: {where} is {at!r}, which has no settings: replace it as a whole")


def _parsed(text: str, where: str) -> object:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads numbers as YAML 1.2 does."""

        yaml_implicit_resolvers: ClassVar[Any] = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag != _FLOAT_TAG]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))  # pyright: ignore[reportUnknownMemberType]
    try:
        loader: Any = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None
