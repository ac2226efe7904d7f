"""Row-sparse training of a model's tables, beside the optimiser of all the rest.

A table is a parameter that is read by rows (see ``sparsejax.memory.table``). It is not
differentiated: a step gets what its reads would have added, sums that up by row, and
moves the rows that were read. Nothing of the table's size is computed.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import tree_map_with_path

from sparsejax.config import ConfigError
from sparsejax.masked import MaskedConfig
from sparsejax.memory import lazy
from sparsejax.memory.rows import Rows, row_gradient
from sparsejax.memory.specific import most_specific, read_counts
from sparsejax.memory.table import Sink, arm, is_table, reads, sink_of
from sparsejax.train.optim import OptimConfig, make_schedule
from sparsejax.tree import longest_match, path_name, variables
from sparsejax.typing import Array, Float, Int, PyTree

__all__ = ["BothStates", "TableState", "Tables", "split"]


MOST_DECAY = 60.0  # rows of a run shrink by e^-60 at most: float32 ends at e^-87


class TableState(NamedTuple):
    """What rows keep, all by the path of their table."""

    moments: dict[str, dict[str, nnx.Variable]]
    scale: dict[str, Float[Array, ""]]  # of tables that decay: times the stored rows
    rarity: dict[str, nnx.Variable]  # of rows, where only specific ones may move


class BothStates(NamedTuple):
    """The optimiser's state where tables have their own."""

    rest: PyTree
    tables: TableState


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Part the tables that are read by rows from all other parameters."""
    tables, rest = nnx.split_state(params, lambda _, x: is_table(x), ...)
    return tables, rest


class Tables:
    """The rule of a config, for the tables of one model."""

    def __init__(self, config: OptimConfig, steps: int, params: PyTree) -> None:
        assert config.tables is not None
        found = variables(split(params)[0])
        if not found:
            raise ConfigError(
                f"config.optim.tables={config.tables!r}: no parameter is read by rows"
                " only; set it to none"
            )
        self.name = config.tables
        self.rule = partial(lazy.RULES[config.tables], **config.table_arguments)
        self.schedule = make_schedule(config, steps)
        self.rows = config.table_rows
        self.rates = {path: longest_match(config.rates, path, 1.0) for path in found}
        self.decays = {path: _decay(config, path) for path in found}
        self._check_decay(steps)

    def _check_decay(self, steps: int) -> None:
        """Refuse decay of rows that may not move, or beyond what float32 holds."""
        if not any(self.decays.values()):
            return
        sample = np.linspace(0, steps - 1, min(steps, 1000))
        with jax.ensure_compile_time_eval():
            rates = np.asarray(jax.vmap(self.schedule)(jnp.asarray(sample)))
        for path, decay in self.decays.items():
            if decay and self.rows is not None:
                raise ConfigError(
                    f"config.optim.weight_decay={decay}: would move every row of"
                    f" {path}, and table_rows={self.rows} of a layer may move; set it"
                    " to 0, or name the path in optim.no_decay"
                )
            lost = np.minimum(rates * self.rates[path] * decay, 1)
            with np.errstate(divide="ignore"):  # all of it at once is e^-inf
                total = -np.log1p(-lost).mean() * steps
            if total > MOST_DECAY:
                raise ConfigError(
                    f"config.optim.weight_decay={decay}: {path} would shrink by"
                    f" e^-{total:.0f} in {steps} steps, and rows are stored for"
                    f" e^-{MOST_DECAY:.0f} at most; lower it or optim.rates, or name"
                    " the path in optim.no_decay"
                )

    def refuse_masks(self, plan: MaskedConfig, masked: Iterable[str]) -> None:
        """Refuse masks on tables, whose weights would have to be zero unread.

        Raises:
            ConfigError: naming the first table that has one; for a plan that rewinds,
                which tables cannot.
        """
        if plan.rewind is not None:
            raise ConfigError(
                f"config.masked.rewind={plan.rewind}: tables whose rows follow"
                f" {self.name!r} cannot go back to earlier weights; set it, or"
                " config.optim.tables, to none"
            )
        for path in masked:
            if path in self.rates:
                raise ConfigError(
                    f"config.masked: {path} is a table whose rows follow"
                    f" {self.name!r}, and has no masks; name it in"
                    " config.masked.exclude, or set config.optim.tables to none"
                )

    def init(self, params: PyTree) -> TableState:
        """Start with no moments, and all rows as they are stored."""
        found = variables(split(params)[0])
        moments = {p: lazy.moments_of(self.name, x) for p, x in found.items()}
        scale = {p: jnp.ones(()) for p in found if self.decays[p]}
        rarity = {}
        if self.rows is not None:
            rarity = {path: _rarity(table) for path, table in found.items()}
        return TableState(moments, scale, rarity)

    def sinks(self, params: PyTree, tokens: int) -> dict[str, Sink]:
        """Give what is differentiated in the place of the tables."""
        found = variables(split(params)[0])
        return {path: sink_of(x, tokens) for path, x in found.items()}

    def armed(
        self, params: PyTree, state: TableState, sinks: dict[str, Sink] | None
    ) -> PyTree:
        """Put ``Table``s in the place of the tables' arrays."""

        def one(path: str, variable: nnx.Variable) -> nnx.Variable:
            sink = None if sinks is None else sinks[path]
            return arm(variable, sink, state.scale.get(path))

        return _map(one, split(params)[0])

    def settled(self, params: PyTree, state: TableState) -> PyTree:
        """Give all tables as arrays; this does compute as much as they are large."""

        def one(path: str, variable: nnx.Variable) -> nnx.Variable:
            if path not in state.scale:
                return variable
            return variable.replace(variable.get_value() * state.scale[path])

        return _map(one, split(params)[0])

    def gradients(
        self, params: PyTree, state: TableState, told: dict[str, Sink]
    ) -> dict[str, Rows]:
        """Sum what the reads of a step add to each row that may move."""

        def one(path: str, variable: nnx.Variable) -> Rows:
            layers, slots = _size(variable)
            seen = reads(variable, told[path])
            if self.rows is not None:
                rare = state.rarity[path].get_value().reshape(layers, slots)
                seen = most_specific(seen, rare, top=self.rows)
            return row_gradient(seen, layers=layers, slots=slots)

        return {path: one(path, x) for path, x in variables(split(params)[0]).items()}

    def counts(self, params: PyTree, told: dict[str, Sink]) -> dict[str, Array]:
        """Count how often each row was read, by the path of its table."""

        def one(path: str, variable: nnx.Variable) -> Array:
            layers, slots = _size(variable)
            return read_counts(reads(variable, told[path]), layers=layers, slots=slots)

        return {path: one(path, x) for path, x in variables(split(params)[0]).items()}

    def clipped(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        grads: PyTree,
        opt: PyTree,
        rest: PyTree,
        rows: dict[str, Rows],
    ) -> tuple[PyTree, PyTree, Float[Array, ""]]:
        """Update all but the tables, clipped by the norm of all gradients.

        Returns:
            The updates, the optimiser's state, and the factor that clips the rows.
        """
        outside = square_of(rows)
        updates, opt = optimizer.update(grads, opt, rest, outside=outside)
        return updates, opt, optax.tree.get(opt, "clip_factor", jnp.ones(()))

    def update(
        self,
        params: PyTree,
        state: TableState,
        rows: dict[str, Rows],
        *,
        step: Int[Array, ""],
        factor: Float[Array, ""],
    ) -> tuple[PyTree, TableState, Float[Array, ""]]:
        """Move the rows that were read, in place.

        Args:
            step: updates done before this one.
            factor: that clipping multiplies gradients with.

        Returns:
            The tables, their state, and the sum of squares of what was added, without
            decay.
        """
        moments, scale, squares = {}, {}, []

        def one(path: str, table: nnx.Variable) -> nnx.Variable:
            rate = jnp.asarray(self.schedule(step)) * self.rates[path]
            stored = rate
            if self.decays[path]:
                scale[path] = state.scale[path] * (1 - rate * self.decays[path])
                stored = rate / scale[path]
            kept = {name: x.get_value() for name, x in state.moments[path].items()}
            move = lazy.Move(step + 1, stored, factor)
            value, new, square = lazy.apply(
                self.rule, table.get_value(), kept, rows[path], move
            )
            moments[path] = {
                name: x.replace(new[name]) for name, x in state.moments[path].items()
            }
            squares.append(square * rate * rate)
            return table.replace(value)

        tables = _map(one, split(params)[0])
        return (
            tables,
            TableState(moments, scale, state.rarity),
            jnp.sum(jnp.stack(squares)),
        )


def square_of(rows: dict[str, Rows]) -> Float[Array, ""]:
    """Sum the squares of all values."""
    parts = [jnp.sum(x.values * x.values) for x in rows.values()]
    return jnp.sum(jnp.stack(parts))


def _size(table: nnx.Variable) -> tuple[int, int]:
    """Layers of a table, and rows of each."""
    *layers, slots, _ = table.get_value().shape
    return (layers[0] if layers else 1), slots


def _rarity(table: nnx.Variable) -> nnx.Variable:
    """Start with rows that are all alike, cut over a mesh like the table."""
    shape = (*table.get_value().shape[:-1], 1)
    return nnx.Variable(jnp.ones(shape), axes=f"{table.axes.rpartition(' ')[0]} 1")


def _map(function: Callable[..., nnx.Variable], tables: PyTree) -> PyTree:
    return tree_map_with_path(
        lambda path, x: function(path_name(path), x),
        tables,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def _decay(config: OptimConfig, path: str) -> float:
    kept = any(re.search(pattern, path) for pattern in config.no_decay)
    return 0.0 if kept else config.weight_decay
