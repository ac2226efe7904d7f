"""How a checkpoint says what its attention sees of positions: rotation, and windows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsejax.attention import AttentionConfig
from sparsejax.config import ConfigError
from sparsejax.nn.config import ModelConfig

__all__ = ["Windows", "read_rope", "read_windows", "write_rope", "write_windows"]

# Their names of each kind of scaling's arguments, ours, and what silence means.
SCALINGS: dict[str, dict[str, tuple[str, Any]]] = {
    "linear": {"factor": ("factor", None)},
    "llama3": {
        "factor": ("factor", None),
        "low_freq_factor": ("low", None),
        "high_freq_factor": ("high", None),
        "original_max_position_embeddings": ("trained", None),
    },
    "yarn": {
        "factor": ("factor", None),
        "beta_slow": ("slow", 1.0),
        "beta_fast": ("fast", 32.0),
        "original_max_position_embeddings": ("trained", None),
        "truncate": ("truncate", True),
        "attention_factor": ("gain", None),
        "mscale": ("mscale", None),
        "mscale_all_dim": ("mscale_all", None),
    },
}
FULL, SLIDING = "full_attention", "sliding_attention"


class Windows(NamedTuple):
    """Which layers of a family see a sliding window only.

    ``where`` is ``never``, ``every`` layer, or ``listed`` in ``layer_types``. Where
    those are not given, the layers from ``max_window_layers`` on have windows, or, if
    ``alternate``, every other one.
    """

    where: str = "never"
    size: int | None = None  # where the file is silent
    first: int = 0  # ``max_window_layers``, likewise
    switched: bool = False  # whether ``use_sliding_window`` turns it on
    alternate: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that say so."""
        if self.where == "never":
            return ()
        listed = ("layer_types", "max_window_layers") if self.where == "listed" else ()
        switch = ("use_sliding_window", "max_window_layers") if self.switched else ()
        return ("sliding_window", *listed, *switch)


def read_rope(
    there: Mapping[str, Any],
    theta: float,
    silent: Mapping[str, Any] | None,
    context: int,
) -> dict[str, Any]:
    """Give ``rope_theta`` and ``rope_scaling``, from the older or newer spelling.

    Raises:
        ConfigError: for a scaling that is not one of ``SCALINGS``, and for two
            spellings that say different things.
    """
    spelled = {x: there.get(x) for x in ("rope_scaling", "rope_parameters")}
    given = {name: value for name, value in spelled.items() if value}
    told = [_rope(x, there, theta, context) for x in given.values()]
    if told[1:] and told[0] != told[1]:
        both = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(
            f"{both} say different things, with rope_theta={there.get('rope_theta')!r};"
            " remove the wrong one"
        )
    return told[0] if told else _rope(silent or {}, there, theta, context)


def _rope(
    told: Mapping[str, Any], there: Mapping[str, Any], theta: float, context: int
) -> dict[str, Any]:
    """Read one of the spellings."""
    given = dict(told)
    theta = given.pop("rope_theta", None) or there.get("rope_theta") or theta
    if not isinstance(theta, int | float):
        raise ConfigError(f"rope_theta={theta!r}: expected a number")
    found = {"attention.rope_theta": float(theta)}
    kind = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    if given.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ConfigError("partial_rotary_factor: rotations of all channels only")
    if kind not in ("default", *SCALINGS):
        legal = ", ".join(SCALINGS)
        raise ConfigError(f"rope_type={kind!r} is not supported here; only {legal}")
    names = SCALINGS.get(kind, {})
    trained = there.get("max_position_embeddings", context)
    given.setdefault("original_max_position_embeddings", trained)
    if "original_max_position_embeddings" not in names:
        del given["original_max_position_embeddings"]
    odd = sorted(k for k, v in given.items() if k not in names and v is not None)
    if odd:
        raise ConfigError(f"rope: {', '.join(odd)} of {kind!r} is not supported here")
    if kind == "default":
        return found
    values = {ours: given.get(name, silent) for name, (ours, silent) in names.items()}
    values = {ours: value for ours, value in values.items() if value is not None}
    return found | {"attention.rope_scaling": {"kind": kind, **values}}


def write_rope(attention: AttentionConfig, context: int) -> dict[str, Any]:
    """Write both spellings."""
    del context
    theta, scaling = attention.rope_theta, attention.rope_scaling
    if scaling is None:
        newer = {"rope_type": "default", "rope_theta": theta}
        return {"rope_theta": theta, "rope_scaling": None, "rope_parameters": newer}
    names = SCALINGS[scaling.kind]
    values = {name: getattr(scaling, ours) for name, (ours, _) in names.items()}
    values = {name: value for name, value in values.items() if value is not None}
    older = {"rope_type": scaling.kind, **values}
    newer = {**older, "rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": older, "rope_parameters": newer}


def read_windows(
    there: Mapping[str, Any], windows: Windows, depth: int
) -> dict[str, Any]:
    """Give pattern, arguments and ``dense_every``.

    Raises:
        ConfigError: if windows come and go without a period, or layers see something
            else.
    """
    listed = there.get("layer_types") or [FULL] * depth
    if len(listed) != depth or any(kind not in (FULL, SLIDING) for kind in listed):
        raise ConfigError(
            f"layer_types={listed!r}: must be {FULL!r} or {SLIDING!r} for each of"
            f" {depth} layers"
        )
    size = there.get("sliding_window", windows.size)
    if windows.switched and not there.get("use_sliding_window", False):
        size = None
    if windows.where == "never" or size is None:
        if SLIDING in listed:
            raise ConfigError("layer_types: windows, but no sliding_window")
        return {"attention.pattern": "causal"}
    kinds = _kinds(there, windows, depth)
    full = [index for index, kind in enumerate(kinds) if kind == FULL]
    every = full[0] + 1 if full else 0
    if full != (list(range(every - 1, depth, every)) if full else []):
        raise ConfigError(
            f"layer_types={kinds!r}: only windows in all layers, or in all but every"
            " n-th"
        )
    if every == 1:
        return {"attention.pattern": "causal"}
    return {
        "attention.pattern": "sliding_window",
        "attention.arguments": {"window": size},
        "attention.dense_every": every,
    }


def _kinds(there: Mapping[str, Any], windows: Windows, depth: int) -> list[str]:
    if windows.where == "every":
        return [SLIDING] * depth
    if there.get("layer_types"):
        return list(there["layer_types"])
    if windows.alternate:
        return [FULL if index % 2 else SLIDING for index in range(depth)]
    first = there.get("max_window_layers")
    first = windows.first if first is None else first
    return [SLIDING if index >= first else FULL for index in range(depth)]


def write_windows(model: ModelConfig, windows: Windows) -> dict[str, Any]:
    """Say which layers have windows, and how large."""
    if windows.where == "never":
        return {}
    window = model.attention.arguments.get("window")
    found: dict[str, Any] = {"sliding_window": window}
    if windows.switched:
        found |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    if windows.where == "listed":
        layers = [model.layer(index).attention for index in range(model.depth)]
        found["layer_types"] = [SLIDING if x.arguments else FULL for x in layers]
        found["max_window_layers"] = 0 if window else model.depth
    return found
