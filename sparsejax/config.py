"""From a config file and command-line overrides to validated frozen dataclasses.

A config file returns an ``ml_collections.ConfigDict``; ``convert`` turns it into nested
frozen dataclasses and nothing past that line sees a ConfigDict. The dataclasses are the
only owners of names, types and defaults. Whatever a user can get wrong raises
``ConfigError``: one line with the full path, the value, the rule and, where one exists,
the nearest legal name.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from ml_collections import ConfigDict

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line, meant for the user."""


class FieldError(ValueError):
    """A broken rule, raised inside a dataclass that does not know its own path."""


def require(holds: bool, field: str, value: Any, rule: str) -> None:
    """Raise ``FieldError`` unless ``holds``; to be called in ``__post_init__``.

    Args:
        holds: whether the rule is met.
        field: name of the field, relative to the dataclass.
        value: what the user gave.
        rule: what must be true and, after a semicolon, the remedy.
    """
    if not holds:
        raise FieldError(f"{field}={value!r}: {rule}")


def near(name: str, legal: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` if a legal name is close, else the list of them."""
    legal = sorted(legal)
    match = difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; one of {', '.join(legal)}" if legal else ""


def choose(field: str, name: str, table: Mapping[str, Any]) -> None:
    """Raise ``FieldError`` unless ``name`` is a key of ``table``."""
    require(name in table, field, name, f"no such name{near(name, table)}")


def convert(
    kind: type[T], values: Mapping[str, Any] | ConfigDict, path: str = "config"
) -> T:
    """Build the dataclass ``kind`` from nested mappings, checking names and types.

    Raises:
        ConfigError: for an unknown, missing, mistyped or illegal field.
    """
    return _convert(kind, values, path)


def override(kind: type, values: dict[str, Any], path: str, text: str) -> None:
    """Set ``path`` (dotted, relative to the root) in ``values`` to the parsed ``text``.

    The type comes from the dataclass ``kind``, so ``none``, tuples and sections that
    are absent from the file all work.

    Raises:
        ConfigError: if the path names no field or the text does not parse.
    """
    *sections, leaf = path.split(".")
    here: Any = kind
    where = "config"
    for name in sections:
        section = _field_type(here, values, name, where)
        if values.get(name) is None:
            values[name] = _default_section(here, values, name, where)
        here, values, where = section, values[name], f"{where}.{name}"
        if not isinstance(values, dict):
            raise ConfigError(f"{where}={values!r}: not a section")
    values[leaf] = _parse(
        _field_type(here, values, leaf, where), text, f"{where}.{leaf}"
    )


def read(path: str | Path) -> dict[str, Any]:
    """Run ``get_config()`` of a config file; nested plain dicts.

    ``path:name`` runs ``get_config(name)``, of a file that has several. The
    ``config.json`` of a run is read as it is.

    Raises:
        ConfigError: if there is no such file, it fails, or it returns something else.
    """
    if (file := Path(path)).suffix == ".json" and file.is_file():
        try:
            return json.loads(file.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--config={path}: not the config.json of a run"
            ) from None

    def values(module: Any, *given: str) -> dict[str, Any] | None:
        config = module.get_config(*given)
        return config.to_dict() if isinstance(config, ConfigDict) else None

    if (found := run(path, values)) is None:
        raise ConfigError(f"--config={path}: get_config() must return a ConfigDict")
    return found


def run(path: str | Path, take: Callable[..., Any]) -> Any:
    """Run a Python file; give what is taken from the module that it makes.

    Args:
        path: of the file; ``path:name`` hands the name on to ``take``.
        take: called with the module.

    Raises:
        ConfigError: if there is no such file, or it or the taking fails.
    """
    text, *given = str(path).rsplit(":", 1) if ".py:" in str(path) else [str(path)]
    file = Path(text)
    if not file.is_file():
        known = [str(f) for f in file.parent.glob("*.py")]
        raise ConfigError(f"--config={file}: no such file{near(text, known)}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return take(module, *given)
    except ConfigError:
        raise
    except FieldError as error:
        raise ConfigError(f"--config={path}: {error}") from None
    except Exception as error:
        raise ConfigError(f"--config={path}: {type(error).__name__}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Give every field of a dataclass tree, defaults included, as JSON-able values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(config: Any) -> str:
    """Twelve hexadecimal digits that are equal for equal configs only.

    What has its default counts for nothing, so that a field added later changes no
    fingerprint of before.
    """
    text = json.dumps(_chosen(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chosen(value: Any) -> Any:
    """Give what differs from the defaults, with the names of the dataclasses."""
    if dataclasses.is_dataclass(value):
        found = {"": type(value).__name__}
        for field in dataclasses.fields(value):
            inside = getattr(value, field.name)
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            if inside != default:
                found[field.name] = _chosen(inside)
        return found
    if isinstance(value, Mapping):
        return {key: _chosen(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_chosen(inside) for inside in value]
    return value


def _options(kind: Any) -> tuple[Any, ...]:
    union = get_origin(kind) in (types.UnionType, typing.Union)
    return get_args(kind) if union else (kind,)


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(repr(x) for x in get_args(kind))
    names = [getattr(k, "__name__", str(k)) for k in _options(kind)]
    return " or ".join("none" if n == "NoneType" else n for n in names)


def _member(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    """The dataclass that a section means: of several, the one its ``kind`` names."""
    members: list[Any] = [k for k in _options(kind) if dataclasses.is_dataclass(k)]
    if len(members) < 2:
        return members[0] if members else None
    by_kind = {k.__dataclass_fields__["kind"].default: k for k in members}
    name = values.get("kind", next(iter(by_kind)))
    if not isinstance(name, str) or name not in by_kind:
        hint = near(str(name), by_kind)
        raise ConfigError(f"{path}.kind={name!r}: no such kind{hint}")
    return by_kind[name]


def _hints(kind: Any) -> dict[str, Any]:
    """Types of the fields that a caller may set."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def _field_type(kind: Any, values: Mapping[str, Any], name: str, path: str) -> Any:
    for option in _options(kind):
        if get_origin(option) is dict:
            return get_args(option)[1]
    member = _member(kind, values, path)
    if member is None:
        raise ConfigError(f"{path}: not a section, so it has no field {name!r}")
    hints = _hints(member)
    if name not in hints:
        raise ConfigError(f"{path}.{name}: no such field{near(name, hints)}")
    return hints[name]


def _default_section(
    kind: Any, values: Mapping[str, Any], name: str, path: str
) -> dict[str, Any]:
    """What a section that the file leaves out would be, as a dict to change."""
    member = _member(kind, values, path)
    field = member.__dataclass_fields__[name] if member else None
    if field is None or name in values:
        return {}
    made = field.default_factory is not dataclasses.MISSING
    default: Any = field.default_factory() if made else field.default
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return {}
    return dataclasses.asdict(default)


def _parse(kind: Any, text: str, path: str) -> Any:
    options = _options(kind)
    if type(None) in options and text.lower() == "none":
        return None
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    literals = [x for k in options if get_origin(k) is Literal for x in get_args(k)]
    if literals or set(options) <= {str, type(None)}:
        # A wrong name is left as it is: converting it lists the right ones.
        return next((x for x in literals if str(x) == text), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if str in options:
            return text
    names = [get_args(k)[0] for k in options if get_origin(k) is tuple]
    if not names:
        raise ConfigError(f"{path}={text}: expected {_name(kind)}") from None
    return tuple(_parse(names[0], part.strip(), path) for part in text.split(","))


def _convert(kind: Any, value: Any, path: str) -> Any:
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping) and get_origin(kind) is not dict:
        member = _member(kind, value, path)
        if member is not None:
            return _convert_section(member, value, path)
    for option in _options(kind):
        matched, result = _match(option, value, path)
        if matched:
            return result
    raise ConfigError(f"{path}={value!r}: expected {_name(kind)}")


def _convert_section(kind: type, values: Mapping[str, Any], path: str) -> Any:
    hints = _hints(kind)
    for name in values:
        if name not in hints:
            raise ConfigError(f"{path}.{name}: no such field{near(name, hints)}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{path}.{missing[0]}: missing; give it a value of type"
            f" {_name(hints[missing[0]])}"
        )
    fields = {n: _convert(hints[n], v, f"{path}.{n}") for n, v in values.items()}
    try:
        return kind(**fields)
    except FieldError as error:
        raise ConfigError(f"{path}.{error}") from None


def _match(kind: Any, value: Any, path: str) -> tuple[bool, Any]:
    """Whether ``value`` is a ``kind``, and the value in that type."""
    origin = get_origin(kind)
    if origin is Literal:
        return any(x == value and type(x) is type(value) for x in get_args(kind)), value
    if origin is tuple:
        return _match_tuple(kind, value, path)
    if origin is dict:
        return _match_dict(kind, value, path)
    if kind in (int, float) and isinstance(value, int | float):
        return _match_number(kind, value, path)
    return isinstance(kind, type) and isinstance(value, kind), value


def _match_number(kind: Any, value: int | float, path: str) -> tuple[bool, Any]:
    """An int is a float, a bool is neither."""
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return False, value
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = kind is int
    if not finite:
        raise ConfigError(f"{path}={value!r}: must be finite")
    return True, kind(value)


def _match_dict(kind: Any, value: Any, path: str) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, value
    item = get_args(kind)[1]
    return True, {k: _convert(item, v, f"{path}.{k}") for k, v in value.items()}


def _match_tuple(kind: Any, value: Any, path: str) -> tuple[bool, Any]:
    """A list or tuple; a single element stands for a tuple of one."""
    kinds = get_args(kind)
    if isinstance(value, Mapping) or value is None:
        return False, value
    if not isinstance(value, list | tuple):
        value = [value]
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ConfigError(f"{path}={value!r}: expected {len(kinds)} values")
    items = [
        _convert(k, x, f"{path}[{i}]")
        for i, (k, x) in enumerate(zip(kinds, value, strict=True))
    ]
    return True, tuple(items)
