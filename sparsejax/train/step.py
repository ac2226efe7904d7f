"""The step: a pure function from a state and a batch to a state and metrics.

Everything that a run changes is in ``State``; everything else is fixed when the
``Step`` is built. Randomness, where there is any, is a function of the seed and the
step, so a resumed run is the same run.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsejax import masked
from sparsejax.data import Batch
from sparsejax.masked import MaskedConfig
from sparsejax.masked.plan import targets
from sparsejax.memory import rest_moments
from sparsejax.nn import Transformer, refreshed
from sparsejax.train.config import Config
from sparsejax.train.losses import Losses, predicts, token_losses
from sparsejax.train.optim import make_optimizer, make_schedule
from sparsejax.train.parts import measured, micro_batches
from sparsejax.train.routes import Visits, no_visits, unvisited, visits_of
from sparsejax.train.tables import BothStates, Tables, split, square_of
from sparsejax.tree import leaves
from sparsejax.typing import Array, Float, Int, PyTree

__all__ = ["Losses", "State", "Step", "compiled", "statistics"]


FLIPS = "masked/flip_rate"  # in the names of what counts them


class State(NamedTuple):
    """All that a run changes."""

    step: Int[Array, ""]
    params: PyTree  # nnx.Param
    variables: PyTree  # every other nnx.Variable: router biases, centroids
    opt: PyTree  # the optimiser's moments, the masks, and what rows keep
    fault: Int[Array, "2"]  # step and statistic that first were not finite, or -1
    since: dict[str, Array]  # flips and visits, summed since a line was logged


def statistics(names: Iterable[str]) -> list[str]:
    """List what ``State.fault`` counts, in the order of its making."""
    losses = sorted(name for name in names if name.startswith("loss/"))
    return ["loss", *losses, "gradient_norm", "update_norm"]


class Step:
    """The functions of a run, closed over what stays fixed.

    ``init(key) -> State``, ``train(state, batch) -> (State, metrics)`` and
    ``evaluate(state, batch) -> (Losses, Visits)`` are pure and not yet compiled.
    """

    def __init__(self, config: Config, vocabulary: int, token_bytes: Any) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.token_bytes = np.asarray(token_bytes, np.int32)
        model = nnx.eval_shape(lambda: self._model(jax.random.key(0)))
        if config.optim.frozen:
            rest_moments(model)
        self.graph, self.params, self.variables = nnx.split(model, nnx.Param, ...)
        steps = masked.horizon(config.masked, config.train.steps)
        self.schedule = make_schedule(config.optim, steps)
        self.rest, self.tables, self.plan = self.params, None, config.masked
        if config.optim.tables is not None:
            self.tables = Tables(config.optim, steps, self.params)
            self.rest = split(self.params)[1]
            self.plan = _plan_without_tables(config.masked, self.rest)
        self.bare = make_optimizer(config.optim, steps, self.params, self.rest)
        self.measures = set() if self.plan is None else masked.measures(self.plan)
        self.optimizer = self.bare
        if self.plan is not None:
            self.optimizer = masked.sparse(self.bare, self.plan)

    def _model(self, key: Array) -> Transformer:
        return Transformer(self.config.model, self.vocabulary, rngs=nnx.Rngs(key))

    def init(self, key: Array, batch: Batch | None = None) -> State:
        """Draw the parameters and start the optimiser."""
        _, params, variables = nnx.split(self._model(key), nnx.Param, ...)
        return self.begin(params, variables, batch)

    def begin(
        self, params: PyTree, variables: PyTree, batch: Batch | None = None
    ) -> State:
        """Start the optimiser on parameters that were made elsewhere.

        What it ``measures``, for first masks, is of a batch.
        """
        optimizer = self.optimizer
        if self.plan is not None and self.measures and batch is not None:
            found = self._measured(params, variables, batch)
            optimizer = masked.sparse(self.bare, self.plan, measured=found)
        if self.tables is None:
            opt = optimizer.init(params)
        else:
            if self.config.masked is not None:
                plan = self.config.masked
                self.tables.refuse_masks(plan, targets(params, plan))
            rest = optimizer.init(split(params)[1])
            opt = BothStates(rest, self.tables.init(params))
        fault, since = jnp.full(2, -1, jnp.int32), no_visits(self.config.model)
        if self.config.masked is not None:
            masks = masked.masks_of(opt)
            found = masked.metrics(masks, masks)
            since |= {k: jnp.zeros_like(x) for k, x in found.items() if FLIPS in k}
        return State(jnp.zeros((), jnp.int32), params, variables, opt, fault, since)

    def _measured(self, params: PyTree, variables: PyTree, batch: Batch) -> Any:
        """Differentiate the loss of a batch by what is trained."""

        def loss(trained: PyTree, part: Batch) -> Array:
            whole = nnx.merge_state(params, trained)
            model = nnx.merge(self.graph, whole, variables, copy=True)
            return self._losses(model, part)[0].nll

        parts = micro_batches(batch, self.config.optim.accumulate)
        trained = params if self.tables is None else split(params)[1]
        return measured(loss, trained, parts, curvature="curvature" in self.measures)

    def model(self, state: State) -> Transformer:
        """Build the model that the state describes, masks and decay applied."""
        params = self._trained(state)
        if self.plan is not None:
            plan = replace(self.plan, products="dense")
            params = masked.effective(params, state.opt, plan, training=False)
        if self.tables is not None:
            tables = self.tables.settled(state.params, state.opt.tables)
            params = nnx.merge_state(tables, params)
        return self._merged(params, state)

    def _merged(self, params: PyTree, state: State) -> Transformer:
        return nnx.merge(self.graph, params, state.variables, copy=True)

    def _clock(self, state: State) -> Int[Array, ""]:
        """Count the steps as the optimiser does, which masks may send back."""
        plan = self.config.masked
        return state.step if plan is None else masked.clock(state.step, plan)

    def _effective(
        self, params: PyTree, state: State, training: bool = False
    ) -> PyTree:
        if self.plan is None:
            return params
        return masked.effective(params, state.opt, self.plan, training=training)

    def _armed(
        self, trained: PyTree, sinks: Any, state: State, training: bool = False
    ) -> Transformer:
        """Build the model from what is differentiated, and from tables if they rest."""
        params = self._effective(trained, state, training)
        if self.tables is not None:
            tables = self.tables.armed(state.params, state.opt.tables, sinks)
            params = nnx.merge_state(tables, params)
        return self._merged(params, state)

    def _trained(self, state: State) -> PyTree:
        return state.params if self.tables is None else split(state.params)[1]

    def _losses(
        self, model: Transformer, batch: Batch, key: Array | None = None
    ) -> tuple[Losses, Any]:
        tokens, segments, positions = map(jnp.asarray, batch)
        hidden = model(
            tokens[:, :-1],
            positions=positions[:, :-1],
            segments=segments[:, :-1],
            key=key,
        )
        losses = token_losses(
            model,
            hidden.value,
            tokens[:, 1:],
            predicts(segments),
            token_bytes=self.token_bytes,
            chunk=self.config.train.loss_chunk,
        )
        return losses, hidden

    def evaluate(self, state: State, batch: Batch) -> tuple[Losses, Visits | None]:
        """Sum the losses of a batch, without changing anything; say who went where."""
        model = self._armed(self._trained(state), None, state)
        losses, hidden = self._losses(model, batch)
        return losses, visits_of(hidden.metrics, batch)

    def reads(self, state: State, batch: Batch) -> dict[str, Float[Array, "l m"]]:
        """Count how often a batch reads each row of each table, by its path.

        Raises:
            ValueError: if no table is trained by rows.
        """
        if self.tables is None:
            raise ValueError("optim.tables=None: reads are not counted; name a rule")
        _, _, (_, told) = self._gradients(state, batch)
        return self.tables.counts(state.params, told)

    def train(self, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        """Take one optimiser step."""
        losses, aside, grads = self._gradients(state, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
            params, opt, norms = self._moved(state, *grads)
        scalars = {"loss": losses.nll / losses.tokens}
        scalars |= {f"loss/{name}": value for name, value in aside[0].items()}
        scalars |= {"gradient_norm": norms[0], "update_norm": norms[1]}
        resting = self.config.optim.frozen
        moving = {} if resting else state.variables
        moved, said = refreshed(self.config.model, moving, aside[1])
        variables = state.variables if resting else moved
        step = state.step + 1
        values = jnp.stack([scalars[name] for name in statistics(scalars)])
        fault = _first_fault(state.fault, step, values)
        metrics = scalars | said | {"learning_rate": self.schedule(self._clock(state))}
        metrics |= {"batch_tokens": losses.tokens}
        since, changes = self._since(state, opt, said)
        return State(step, params, variables, opt, fault, since), metrics | changes

    def _since(self, state: State, opt: Any, said: Any) -> tuple[dict[str, Array], Any]:
        """Give what has added up since the last line, and metrics with it.

        Masks move at some steps and lines are logged at others, so a line has the mean
        flips of the steps since the one before, and the experts that none visited.
        """
        found = {}
        if self.config.masked is not None:
            masks, before = masked.masks_of(opt), masked.masks_of(state.opt)
            found = masked.metrics(masks, before, **masked.tracked_of(opt))
        every = self.config.train
        past = jnp.minimum(state.step % every.log_every, state.step % every.eval_every)
        since = {
            name: (said | found)[name] + jnp.where(past == 0, 0.0, known)
            for name, known in state.since.items()
        }
        steps = (past + 1).astype(jnp.float32)
        found |= {name: x / steps for name, x in since.items() if FLIPS in name}
        if self.config.masked is not None:
            found["masked/sad"] = found[FLIPS] / found["masked/density"]
        return since, found | unvisited(since)

    def _moved(self, state: State, grads: PyTree, told: Any) -> tuple[PyTree, Any, Any]:
        """Apply the gradients; also give the norms of all of them and of the updates.

        Args:
            state: before the step.
            grads: of all parameters but the tables that are read by rows.
            told: of those tables' sinks, by path.
        """
        if self.tables is None:
            updates, opt = self.optimizer.update(grads, state.opt, state.params)
            params = optax.apply_updates(state.params, updates)
            return params, opt, (optax.tree.norm(grads), optax.tree.norm(updates))
        rest, before = split(state.params)[1], state.opt
        rows = self.tables.gradients(state.params, before.tables, told)
        updates, opt, factor = self.tables.clipped(
            self.optimizer, grads, before.rest, rest, rows
        )
        moved: PyTree = optax.apply_updates(rest, updates)
        tables, about, square = self.tables.update(
            state.params,
            before.tables,
            rows,
            step=state.step,
            factor=factor,
        )
        params = nnx.merge_state(tables, moved)
        both = (grads, square_of(rows)), (updates, square)
        norms = tuple(jnp.sqrt(optax.tree.norm(x) ** 2 + y) for x, y in both)
        return params, BothStates(opt, about), norms

    def _gradients(self, state: State, batch: Batch) -> tuple[Losses, Any, PyTree]:
        """Sum over the micro-batches, as if they were one batch.

        What sinks of tables are told is not summed: it is that of all micro-batches.
        """
        count = self.config.optim.accumulate
        segments = jnp.asarray(batch.segments)
        total = jnp.sum(predicts(segments))

        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

        def objective(trained: PyTree, sinks: Any, batch: Batch, key: Array) -> Any:
            model = self._armed(trained, sinks, state, training=True)
            losses, hidden = self._losses(model, batch, key)
            extra = sum(hidden.losses.values(), start=jnp.zeros(()))
            z = self.config.train.z_loss * losses.z
            value = (losses.nll + z) / total + extra / count
            return value, (losses, (hidden.losses, hidden.metrics))

        gradient = jax.grad(objective, (0, 1), has_aux=True)
        trained, sinks = self._trained(state), {}
        if self.tables is not None:
            tokens = segments[:, 1:].size // count
            sinks = self.tables.sinks(state.params, tokens)
        if count == 1:
            grads, (losses, aside) = gradient(trained, sinks, batch, key)
            return losses, aside, grads

        def body(grads: PyTree, part: tuple[Batch, Array]) -> Any:
            (more, told), asides = gradient(trained, sinks, *part)
            return jax.tree.map(jnp.add, grads, more), (told, asides)

        zeros = jax.tree.map(jnp.zeros_like, trained)
        parts = micro_batches(batch, count), jax.random.split(key, count)
        grads, (told, (losses, aside)) = jax.lax.scan(body, zeros, parts)
        losses = jax.tree.map(jnp.sum, losses)
        aside = jax.tree.map(lambda x: jnp.mean(x, axis=0), aside)
        return losses, aside, (grads, told)


def _plan_without_tables(
    plan: MaskedConfig | None, rest: PyTree
) -> MaskedConfig | None:
    """Leave out patterns that exclude tables only: masks never see those.

    ``begin`` checks the whole plan, so that a wrong pattern is still found.
    """
    if plan is None:
        return None
    known = list(leaves(rest))
    found = [x for x in plan.exclude if any(re.search(x, path) for path in known)]
    return replace(plan, exclude=tuple(found))


def _first_fault(
    fault: Int[Array, "2"], step: Int[Array, ""], values: Float[Array, " s"]
) -> Int[Array, "2"]:
    bad = ~jnp.isfinite(values)
    now = jnp.stack([step, jnp.argmax(bad).astype(jnp.int32)])
    return jnp.where((fault[0] < 0) & bad.any(), now, fault)


def compiled(
    step: Step, shardings: State, batch: Any, replicated: Any
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Jit ``init``, ``train`` (its state donated) and ``evaluate`` for a mesh."""
    init = jax.jit(step.init, out_shardings=shardings)
    train = jax.jit(
        step.train,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    evaluate = jax.jit(
        step.evaluate, in_shardings=(shardings, batch), out_shardings=replicated
    )
    return init, train, evaluate
