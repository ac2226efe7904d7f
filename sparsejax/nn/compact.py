"""A masked model made smaller: what masks have emptied is taken out of the weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.masked import FanIn
from sparsejax.masked.compact import kept, silent, without
from sparsejax.moe import MoEConfig
from sparsejax.moe.experts import HIDDEN
from sparsejax.nn.config import ModelConfig
from sparsejax.nn.transformer import Transformer
from sparsejax.tree import map_with_path, variables
from sparsejax.typing import Array

__all__ = ["by_fan_in", "compact"]

SPARSE = 0.3  # share of the inputs below which gathering them pays
INPUTS = ("gate", "up")
# What each letter of a parameter, given by the end of its path, is cut to.
Cuts = dict[str, dict[str, Array]]


def compact(model: Transformer) -> Transformer:
    """Remove dead hidden channels and heads; the outputs stay, up to rounding.

    A channel is dead if what it is computed from, or what it adds, is exactly 0; a head
    if its values or its output are. Layers of one kind keep equally many, as many as
    the fullest needs, and each group of key-value heads equally many query heads. The
    width of the residual stream stays, and so do experts, for a token that chose an
    empty one would choose another; their channels go. Heads stay where a selector
    chooses by them, where one norm is taken over all of them, and where their keys come
    of one latent vector.
    """
    found = variables(nnx.state(model))
    config, cuts = model.config, {}
    for shrink in (_channels, _heads):
        config, more = shrink(config, found)
        cuts |= more
    smaller = nnx.eval_shape(
        lambda: Transformer(config, model.vocabulary, rngs=nnx.Rngs(0))
    )

    def cut(path: str, value: Array) -> Array:
        for letter, ids in cuts.get(path, {}).items():
            value = without(value, found[path].get_metadata()["axes"], letter, ids)
        return value

    return nnx.merge(nnx.graphdef(smaller), map_with_path(cut, nnx.state(model)))


def by_fan_in(model: Transformer) -> Transformer:
    """Store feed-forward weights as the inputs of each output, to decode faster.

    Of a weight whose fullest output has more than three tenths of the inputs, gathering
    would save nothing: it stays. The outputs of the model stay, up to rounding. It is
    for use, not for training: what is 0 has no gradient.
    """
    graph, state = nnx.split(model)

    def one(variable: Any) -> Any:
        weight = variable.get_value()
        if "multiplies" not in variable.get_metadata():
            return variable
        most = int(jnp.max(jnp.sum(weight != 0, axis=-2)))
        if most > SPARSE * weight.shape[-2]:
            return variable
        return variable.replace(FanIn.from_dense(weight, k=most))

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(one, state, is_leaf=is_variable))


def _channels(
    config: ModelConfig, found: Mapping[str, Any]
) -> tuple[ModelConfig, Cuts]:
    """Cut the hidden width of every feed-forward, of experts, and of shared ones."""
    cuts: Cuts = {}
    for kind, prefix in (("ffn", ""), ("moe", ""), ("moe", "shared_")):
        parents = _parents(found, f"/{kind}/{prefix}", "down")
        if not parents:
            continue
        live = [_live(found, p, config.ffn.activation) for p in parents]
        count = max(1, *(int(x.sum(-1).max()) for x in live))
        for parent, units in zip(parents, live, strict=True):
            names = [f"{parent}{n}{b}" for n in INPUTS for b in ("", "_bias")]
            own = {"f": kept(units, count)}
            cuts |= {n: own for n in (*names, f"{parent}down") if n in found}
        if kind == "ffn" and isinstance(config.ffn, MoEConfig):
            config = replace(config, dense_hidden=count)
        else:
            field = "shared" if prefix else "hidden"
            config = replace(config, ffn=replace(config.ffn, **{field: count}))
    return config, cuts


def _live(found: Mapping[str, Any], parent: str, activation: str) -> Array:
    """Which hidden channels are computed from something, and read."""
    dead = _silent(found[f"{parent}down"], "f")
    gated = f"{parent}gate" in found
    for name in INPUTS[not gated :]:
        one = {n: jnp.ones(1) for n in INPUTS} | {name: jnp.zeros(1)}
        if HIDDEN[activation](one["gate"] if gated else None, one["up"]).any():
            continue  # something comes of nothing
        empty = _silent(found[f"{parent}{name}"], "f")
        if f"{parent}{name}_bias" in found:
            empty &= _silent(found[f"{parent}{name}_bias"], "f")
        dead |= empty
    return ~dead


def _heads(config: ModelConfig, found: Mapping[str, Any]) -> tuple[ModelConfig, Cuts]:
    """Cut key-value heads, and the query heads of each of those that stay."""
    attention = config.attention
    wide = attention.qk_norm_over != "head" or attention.latent is not None
    if attention.selector is not None or wide:
        return config, {}
    width, each = config.width // config.heads, config.heads // config.kv_heads
    parents = _parents(found, "/attention/", "out")
    live = []
    for parent in parents:
        empty = _silent(found[f"{parent}value"], "g")
        if f"{parent}value_bias" in found:
            empty &= _silent(found[f"{parent}value_bias"], "g")
        read = ~_silent(found[f"{parent}out"], "h")
        live.append(read.reshape(*empty.shape, each) & ~empty[..., None])
    groups = max(1, *(int(x.any(-1).sum(-1).max()) for x in live))
    heads = max(1, *(int(x.sum(-1).max()) for x in live))
    cuts: Cuts = {}
    for parent, units in zip(parents, live, strict=True):
        group = kept(units.any(-1), groups)
        inner = kept(jnp.take_along_axis(units, group[..., None], 1), heads)
        head = (group[..., None] * each + inner).reshape(group.shape[0], -1)
        for path in (p for p in found if p.startswith(parent)):
            letters = found[path].get_metadata().get("axes", "").split()
            own = {"h": head, "g": group}
            cuts[path] = {k: ids for k, ids in own.items() if k in letters}
    attention = replace(attention, head_width=attention.head_width or width)
    sizes = {"heads": groups * heads, "kv_heads": groups}
    return replace(config, attention=attention, **sizes), cuts


def _parents(found: Mapping[str, Any], end: str, name: str) -> list[str]:
    """Paths of layers that have a parameter of that name, ending so."""
    return [p.removesuffix(name) for p in found if p.endswith(f"{end}{name}")]


def _silent(variable: Any, letter: str) -> Array:
    return silent(variable[...], variable.get_metadata()["axes"], letter)
