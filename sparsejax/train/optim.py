"""Optimisers: a config in, one ``optax.GradientTransformation`` out.

``make_optimizer`` chains, in this order: clipping by the global norm, the optimiser of
``OPTIMIZERS`` at rate 1, decoupled weight decay, the rates of single parameters, the
schedule. Decay and rates are chosen by regular expressions on tree paths, searched as
``re.search`` does. Parameters and moments are float32; a tree of ``nnx.Variable`` and a
plain dict work alike. The result may be called under strict dtype promotion. Tables
that have a rule of their own (``OptimConfig.tables``) only share in the norm. With
``OptimConfig.lora`` the chain moves thin factors of matrices instead, both by the path
of their matrix.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sparsejax import tree
from sparsejax.config import ConfigError, choose, near, require
from sparsejax.memory import lazy
from sparsejax.train.clip import clip_all
from sparsejax.train.lora import LoraConfig, low_rank, matrix_of
from sparsejax.train.matrices import Split, last_two, matrix_axes
from sparsejax.typing import Array, Float, PyTree

__all__ = ["OPTIMIZERS", "OptimConfig", "make_optimizer", "make_schedule"]

Factor = Callable[["OptimConfig", int, Float[Array, ""]], Float[Array, ""]]

OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
    "adafactor": optax.adafactor,
    "sgd": optax.sgd,
}

# What a constructor is called with where ``arguments`` say nothing: decay and rate are
# applied outside it; Muon's updates get AdamW's size, so one rate serves both.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"learning_rate": 1.0, "weight_decay": 0.0},
    "lion": {"learning_rate": 1.0, "weight_decay": 0.0},
    "muon": {"learning_rate": 1.0, "weight_decay": 0.0, "consistent_rms": 0.2},
    "adafactor": {"learning_rate": 1.0},
    "sgd": {"learning_rate": 1.0},
}

# Arguments of the constructors that are not the user's, and what to use instead.
_OWNED: Mapping[str, str] = {
    "learning_rate": "set optim.learning_rate",
    "adam_learning_rate": "set optim.rates",
    "weight_decay": "set optim.weight_decay",
    "weight_decay_rate": "set optim.weight_decay",
    "adam_weight_decay": "set optim.weight_decay",
    "mask": "set optim.no_decay",
    "weight_decay_mask": "set optim.no_decay",
    "mu_dtype": "moments are float32",
    "dtype_momentum": "moments are float32",
    "accumulator_dtype": "moments are float32",
    "ns_coeffs": "optax's default is used",
    "muon_weight_dimension_numbers": "they come from the parameters' axes",
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters follow their gradients."""

    learning_rate: float  # the peak of the schedule
    name: str = "adamw"  # a key of OPTIMIZERS
    # passed to the optax constructor
    arguments: dict[str, int | float | bool | str] = field(default_factory=dict)
    schedule: Literal["cosine", "wsd", "inverse_sqrt", "constant"] = "cosine"
    warmup: int = 0  # steps of linear rise before the peak
    decay: float = 0.2  # fraction of all steps in which wsd falls
    final: float = 0.1  # fraction of the peak that cosine and wsd end at
    clip: float | None = 1.0  # global norm of the gradients; none: off
    weight_decay: float = 0.0  # a step removes learning rate x this x the weight
    no_decay: tuple[str, ...] = ("norm", "bias", "embedding")  # regexes of paths
    # Regex: factor of the rate. Where several match, the longest counts.
    rates: dict[str, float] = field(default_factory=dict)
    lora: LoraConfig | None = None  # move thin factors of matrices, and nothing else
    accumulate: int = 1  # micro-batches in a step
    # how tables that are read by rows follow theirs: as all else does, or by rows
    tables: str | None = None  # none, or a key of sparsejax.memory.lazy.RULES
    table_arguments: dict[str, float] = field(default_factory=dict)  # of that rule
    # rows of each layer that a step may move, the most specific; none: all it has read
    table_rows: int | None = None

    def __post_init__(self) -> None:
        choose("name", self.name, OPTIMIZERS)
        _check_arguments(self.name, self.arguments)
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, name, value, "must not be negative")
        for name in ("decay", "final"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "must be a fraction, in [0, 1]")
        require(
            self.schedule == "wsd" or self.decay == OptimConfig.decay,
            "decay",
            self.decay,
            f"the fall of schedule='wsd', which schedule={self.schedule!r} has not;"
            " leave it out (that of weights is weight_decay)",
        )
        require(self.accumulate > 0, "accumulate", self.accumulate, "must be positive")
        for pattern in self.no_decay:
            _check_pattern("no_decay", pattern)
        for pattern, rate in self.rates.items():
            _check_pattern("rates", pattern)
            require(rate >= 0, f"rates[{pattern!r}]", rate, "must not be negative")
        _check_tables(self)
        require(
            self.lora is None or self.tables is None,
            "tables",
            self.tables,
            "moves rows, and lora lets nothing move but its factors; set one of them to"
            " none",
        )

    @property
    def frozen(self) -> bool:
        """Whether all but a chosen few parameters, and all that is none, must rest."""
        return self.table_rows is not None or self.lora is not None


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Make the learning rate a function of the number of steps already taken.

    It rises linearly and reaches the peak after ``warmup`` steps, never being 0; at
    ``steps`` and later it is what the schedule ends at.

    Raises:
        ConfigError: if the warm-up, or warm-up and decay, do not fit into the steps.
    """
    if steps <= config.warmup:
        raise ConfigError(
            f"config.optim.warmup={config.warmup}: must be less than the {steps} steps"
            " of the run"
        )
    falling = config.decay * steps if config.schedule == "wsd" else 0
    if config.warmup + falling > steps:
        raise ConfigError(
            f"config.optim.decay={config.decay}: warm-up ({config.warmup} steps) and"
            f" decay ({falling:g} steps) must fit into the {steps} steps of the run"
        )
    factor = _FACTORS[config.schedule]

    def schedule(step: ArrayLike) -> Float[Array, ""]:
        now = jnp.asarray(step).astype(jnp.float32)
        rise = (now + 1.0) / (config.warmup + 1.0)
        fall = factor(config, steps, jnp.clip(now, config.warmup, steps))
        return config.learning_rate * jnp.minimum(rise, 1.0) * fall

    return schedule


def make_optimizer(
    config: OptimConfig, steps: int, params: PyTree, rest: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """Build the optimiser of a config for one tree of parameters.

    Args:
        config: what to build.
        steps: of the whole run; the schedule ends there.
        params: the parameters, or a tree of ``jax.ShapeDtypeStruct`` like them. Muon
            reads their ``axes`` metadata and takes the hidden matrices; see
            ``sparsejax.train.matrices``.
        rest: those of them that it moves, if tables have a rule of their own.

    Raises:
        ConfigError: if the schedule does not fit, a parameter is not float32, or a
            pattern of ``rates`` matches no parameter.
    """
    leaves = tree.leaves(params)
    for path, leaf in leaves.items():
        if leaf.dtype != jnp.float32:
            raise ConfigError(
                f"{path}: parameters are float32, this one is {leaf.dtype}; cast it to"
                " float32 (layers cast to their compute dtype at use)"
            )
    for pattern in config.rates:
        if not any(re.search(pattern, path) for path in leaves):
            some = near(pattern, leaves)
            raise ConfigError(f"config.optim.rates[{pattern!r}]: matches no path{some}")
    moved = params if rest is None else rest
    if config.lora is None:
        chain = _chain(config, steps, _dimension_numbers(moved, matrix_axes))
    else:
        chain = low_rank(
            lambda thin: _chain(
                config, steps, _dimension_numbers(thin, last_two), matrix_of
            ),
            config.lora,
            moved,
        )
    return _under_standard_promotion(chain)


def _chain(
    config: OptimConfig,
    steps: int,
    matrices: PyTree,
    named: Callable[[str], str] = str,
) -> optax.GradientTransformationExtraArgs:
    """Clip, precondition, decay, scale; ``named`` says which path a pattern is for."""
    arguments = {**_DEFAULTS[config.name], **config.arguments}
    constructor = OPTIMIZERS[config.name]
    if "muon_weight_dimension_numbers" in inspect.signature(constructor).parameters:
        arguments["muon_weight_dimension_numbers"] = matrices
    return optax.chain(
        _clipping(config),
        constructor(**arguments),
        _decay(config, named),
        _scale_by_path(config.rates, named),
        optax.scale_by_learning_rate(make_schedule(config, steps), flip_sign=False),
    )


def _cosine(config: OptimConfig, steps: int, now: Array) -> Array:
    """Half a cosine from the peak to the end.

    Source: Loshchilov & Hutter 2016, arXiv:1608.03983, Eq. 5. Departure: no restarts.
    """
    done = (now - config.warmup) / (steps - config.warmup)
    half = 0.5 * (1.0 + jnp.cos(math.pi * done))
    return config.final + (1.0 - config.final) * half


def _wsd(config: OptimConfig, steps: int, now: Array) -> Array:
    """Stay at the peak, then fall; before the fall, nothing depends on ``steps``.

    Source: Hu et al. 2024, arXiv:2404.06395, Sec. 4. Departure: the fall is linear.
    """
    left = (steps - now) / max(config.decay * steps, 1.0)
    return config.final + (1.0 - config.final) * jnp.minimum(left, 1.0)


def _inverse_sqrt(config: OptimConfig, steps: int, now: Array) -> Array:
    """Fall with the square root of the steps; the end does not matter.

    Source: Vaswani et al. 2017, arXiv:1706.03762, Eq. 3.
    """
    del steps
    return jnp.sqrt((config.warmup + 1.0) / (now + 1.0))


def _constant(config: OptimConfig, steps: int, now: Array) -> Array:
    del config, steps
    return jnp.ones_like(now)


_FACTORS: Mapping[str, Factor] = MappingProxyType(
    {
        "cosine": _cosine,
        "wsd": _wsd,
        "inverse_sqrt": _inverse_sqrt,
        "constant": _constant,
    }
)


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse what the constructor would not take, or would take amiss."""
    known = inspect.signature(OPTIMIZERS[name]).parameters
    legal = [n for n in known if n not in _OWNED]
    for argument, value in arguments.items():
        where = f"arguments.{argument}"
        rule = f"not an argument of {name} here; {_OWNED.get(argument)}"
        require(argument not in _OWNED, where, value, rule)
        rule = f"no argument of {name}{near(argument, legal)}"
        require(argument in legal, where, value, rule)
        default = known[argument].default
        kind = bool if isinstance(default, bool) else str
        if not isinstance(default, bool | str):
            kind = int if type(default) is int else float
        fits = type(value) is kind or (kind is float and type(value) is int)
        require(fits, where, value, f"must be of type {kind.__name__}")


def _check_tables(config: OptimConfig) -> None:
    """Refuse a rule that moves rows which nobody has read."""
    name, rules = config.tables, sorted(lazy.RULES)
    rule = (
        "cannot be done by rows: it moves rows that nobody has read; take one of"
        f" {', '.join(rules)}, or none, for gradients of all rows"
    )
    eager = name in {*OPTIMIZERS, "momentum"} - {*rules}
    require(not eager, "tables", name, rule)
    if name is not None:
        choose("tables", name, lazy.RULES)
    rows = config.table_rows
    require(
        rows is None or (rows > 0 and name is not None),
        "table_rows",
        rows,
        "must be positive, and is for tables that follow by rows: set optim.tables",
    )
    known = inspect.signature(lazy.RULES[name]).parameters if name else {}
    legal = [n for n, x in known.items() if x.kind is x.KEYWORD_ONLY]
    for argument, value in config.table_arguments.items():
        where = f"table_arguments.{argument}"
        rule = f"no argument of {name} for rows{near(argument, legal)}"
        require(argument in legal, where, value, rule)
        fits = 0 <= value < 1 if argument in ("b1", "b2", "initial") else value > 0
        rule = "b1, b2 and initial must be in [0, 1), eps positive"
        require(fits, where, value, rule)


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        require(False, name, pattern, f"not a regular expression: {error}")


def _clipping(config: OptimConfig) -> optax.GradientTransformation:
    if config.clip is None:
        return optax.identity()
    if config.tables is None:
        return optax.clip_by_global_norm(config.clip)
    return clip_all(config.clip)


def _decay(
    config: OptimConfig, named: Callable[[str], str]
) -> optax.GradientTransformation:
    def decays(path: str, _: Any) -> bool:
        return not any(re.search(pattern, named(path)) for pattern in config.no_decay)

    return optax.add_decayed_weights(
        -config.weight_decay, mask=lambda params: tree.map_with_path(decays, params)
    )


def _scale_by_path(
    rates: Mapping[str, float], named: Callable[[str], str]
) -> optax.GradientTransformation:
    """Multiply each update by the rate of its path."""

    def scaled(path: str, update: Array) -> Array:
        return update * tree.longest_match(rates, named(path), 1.0)

    return optax.stateless(lambda updates, _: tree.map_with_path(scaled, updates))


def _dimension_numbers(params: PyTree, matrix: Callable[[str], Split | None]) -> PyTree:
    """Muon's view of every parameter; a plain array is a matrix if its rank is two."""
    axes = tree.axes_of(params)

    def one(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        plain = "d f" if leaf.ndim == 2 and "embedding" not in path else ""
        split = matrix(axes.get(path, plain))
        return split and optax.contrib.MuonDimensionNumbers(*split)

    return tree.map_with_path(one, params)


def _under_standard_promotion(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Relax dtype promotion for optax, which mixes int32 counts and floats."""

    def init(params: PyTree) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)
