"""``config.json`` of a checkpoint to our ``ModelConfig``, and back.

A family lists its fields: what each is called there, which of ours it is, and what the
family takes where the file is silent. What it does not list changes the forward pass
in a way that nobody here knows, and is refused by name. Back is the same list read the
other way; a model is what a family can say exactly if there and back gives it again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsejax.config import ConfigError, convert, to_dict
from sparsejax.interop.positions import (
    Windows,
    read_rope,
    read_windows,
    write_rope,
    write_windows,
)
from sparsejax.nn.config import ModelConfig

__all__ = [
    "NEEDED",
    "WORDS",
    "Described",
    "Field",
    "Fields",
    "check_kinds",
    "describe",
    "document",
    "only",
]

NEEDED = object()
WORDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
# What a file says besides, for training, for text, or for other programs.
IDLE = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "dtype"),
        *("torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("initializer_range", "router_aux_loss_coef", "output_router_logits"),
        *("router_jitter_noise", "is_llama_config", "_name_or_path"),
        "transformers.js_config",
        # Read apart from the list.
        *("vocab_size", "max_position_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters"),
    }
)
# What is read apart from the list, or before it, must be of these kinds.
KINDS: dict[str, type] = {
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), dict),
    **dict.fromkeys(("architectures", "layer_types"), list),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), int),
    **dict.fromkeys(("num_hidden_layers", "max_window_layers", "sliding_window"), int),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), int),
    "n_shared_experts": int,
    "model_type": str,
    "use_sliding_window": bool,
}
# Fields of ours that change speed, precision or training, and no exact output.
FREE = frozenset(
    {
        *("remat", "dtype"),
        *(f"attention.{x}" for x in ("block_q", "block_kv", "implementation")),
        *(f"ffn.{x}" for x in ("dispatcher", "exchange", "router_width", "bias_rate")),
        *("ffn.capacity_rounding", "ffn.capacity_priority", "ffn.implementation"),
        *("ffn.balance_weight", "ffn.z_weight"),
    }
)


class Field(NamedTuple):
    """A field of ``config.json``.

    With ``paths`` it is those of ours; without, ``taken`` has the only values under
    which the forward pass is the one described, all if there are none.
    """

    names: tuple[str, ...]  # the first is written
    paths: tuple[str, ...] = ()
    default: Any = NEEDED
    taken: tuple[Any, ...] = ()
    words: Mapping[Any, Any] = {}  # theirs to ours
    times: str | None = None  # a path of ours that multiplies it
    when: str | None = None  # a path of ours without which it means nothing
    under: tuple[str, Any] | None = None  # a field of theirs that makes it count


class Fields(NamedTuple):
    """All that a family's ``config.json`` says, and what needs no saying."""

    listed: tuple[Field, ...]
    facts: Mapping[str, Any]  # of ours, by path: true of every model of the family
    windows: Windows = Windows()
    theta: float = 10_000.0  # where the file is silent
    scaling: Mapping[str, Any] | None = None  # likewise
    context: int = 2048  # likewise
    idle: tuple[str, ...] = ()  # names that mean nothing here, and are not written


class Described(NamedTuple):
    """What a ``config.json`` describes."""

    model: ModelConfig
    vocabulary: int


def only(name: str, *values: Any) -> Field:
    """Take these values alone; the first where the file is silent."""
    return Field((name,), default=values[0], taken=values)


def check_kinds(there: Mapping[str, Any], *, source: str) -> None:
    """Raise ``ConfigError`` naming every field that is, say, a number for a list."""
    faults = [
        f"{name}={there[name]!r}: expected {kind.__name__}"
        for name, kind in KINDS.items()
        if there.get(name) is not None and type(there[name]) is not kind
    ]
    if faults:
        raise ConfigError(f"{source}: " + "; ".join(faults))


def describe(fields: Fields, there: Mapping[str, Any], *, source: str) -> Described:
    """Read a ``config.json``.

    Raises:
        ConfigError: naming every field that is missing, unknown or of a value under
            which the forward pass would be another.
    """
    faults = _unknown(fields, there)
    values = dict(fields.facts)
    for field in fields.listed:
        try:
            values |= _ours(field, there, values)
        except ConfigError as error:
            faults.append(str(error))
    try:
        values |= read_rope(there, fields.theta, fields.scaling, fields.context)
        values |= read_windows(there, fields.windows, values.get("depth") or 0)
    except ConfigError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError(f"{source}: " + "; ".join(faults))
    values["context_length"] = there.get("max_position_embeddings", fields.context)
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    if there.get("dtype", there.get("torch_dtype")) == "bfloat16":
        values["dtype"] = "bfloat16"
    model = convert(ModelConfig, _nested(values), f"{source}: model")
    return Described(_explicit(model), there["vocab_size"])


def document(fields: Fields, model: ModelConfig, vocabulary: int) -> dict[str, Any]:
    """Write a ``config.json``, without the names of the architecture.

    Raises:
        ConfigError: if the family cannot say what the model is.
    """
    said = flat(to_dict(_explicit(model)))
    there: dict[str, Any] = {"vocab_size": vocabulary}
    for field in fields.listed:
        there[field.names[0]] = _theirs(field, said)
    there["max_position_embeddings"] = model.context_length or fields.context
    there |= write_rope(model.attention, there["max_position_embeddings"])
    there |= write_windows(model, fields.windows)
    try:
        wrong = differences(model, describe(fields, there, source="it").model)
    except ConfigError as error:
        raise ConfigError(
            f"this family of models has no such model: as it would be written, {error}"
        ) from None
    if wrong:
        raise ConfigError(
            "this family of models has no place for "
            + "; ".join(wrong)
            + ": export to another, or train with these values"
        )
    return there


def differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Spell every field that differs and changes what the model computes."""
    one, two = (flat(to_dict(_explicit(x))) for x in (model, other))
    free = FREE | ({"context_length"} if one["context_length"] is None else set())
    return [
        f"model.{path}={one.get(path)!r}, where it has {two.get(path)!r}"
        for path in sorted(one.keys() | two.keys())
        if path not in free and one.get(path) != two.get(path)
    ]


def _unknown(fields: Fields, there: Mapping[str, Any]) -> list[str]:
    if there.get("quantization_config") is not None:
        return [
            "its weights are quantized, and not as mxfp4; take a checkpoint in 16 or 32"
            " bits"
        ]
    known = {name for field in fields.listed for name in field.names}
    known |= IDLE | {*fields.windows.names, *fields.idle}
    odd = sorted(
        name for name, value in there.items() if name not in known and value is not None
    )
    if not isinstance(there.get("vocab_size"), int):
        return ["vocab_size is missing"]
    return [
        f"{name}={there[name]!r} is not supported here and may change what the model"
        " computes"
        for name in odd
    ]


def _ours(
    field: Field, there: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    name, value = _said(field, there)
    if not field.paths:
        if field.taken and value not in field.taken:
            legal = " or ".join(map(repr, field.taken))
            raise ConfigError(f"{name}={value!r} is not supported here; only {legal}")
        return {}
    if isinstance(value, list | dict):
        raise ConfigError(f"{name}={value!r}: expected a single value")
    if field.words:
        if value not in field.words:
            legal = ", ".join(map(str, field.words))
            raise ConfigError(f"{name}={value!r} is not supported here; only {legal}")
        value = field.words[value]
    if field.times:
        value = (value or 0) * (values.get(field.times) or 0)
    if field.when and not values.get(field.when):
        value = 0
    return dict.fromkeys(field.paths, value)


def _said(field: Field, there: Mapping[str, Any]) -> tuple[str, Any]:
    """Give a field's value, and the name under which it is there."""
    name = next((x for x in field.names if x in there), field.names[0])
    value = there.get(name, field.default)
    if value is NEEDED:
        raise ConfigError(f"{name} is missing")
    counts = field.under is None or there.get(field.under[0]) == field.under[1]
    return name, value if counts else field.default


def _theirs(field: Field, said: Mapping[str, Any]) -> Any:
    if not field.paths:
        return field.default
    value = said.get(field.paths[0], field.default)
    value = None if value is NEEDED else value
    if field.times:
        value = value // said[field.times]
    return next((there for there, x in field.words.items() if x == value), value)


def _explicit(model: ModelConfig) -> ModelConfig:
    """Write the head width out: files do, and two spellings would compare unequal."""
    values = to_dict(model)
    latent = values["attention"]["latent"] is not None
    if values["attention"]["head_width"] is None and not latent:
        values["attention"]["head_width"] = model.width // model.heads
    return convert(ModelConfig, values, "model")


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *sections, leaf = path.split(".")
        here = nested
        for name in sections:
            here = here.setdefault(name, {})
        here[leaf] = value
    return nested


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested values by dotted path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
