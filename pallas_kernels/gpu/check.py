"""Are the kernels right and fast? ``python -m pallas_kernels.gpu.check``, on a Hopper.

First every case, shortened, against dense float32 attention with JAX's own gradient;
then times, as a share of the rate of a dense matrix product. Names of cases choose
some. ``--tiny`` runs a small case in the interpreter, anywhere, and times nothing.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.cases import CASES, Case, arrays, kernels, lists, pattern
from pallas_kernels.gpu.interpreter import interpreted
from pallas_kernels.gpu.rule import LOG2E

__all__ = ["errors", "main"]

# Root mean square errors as parts of the result's own size.
BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3}
# Products of length c for each visible pair, and for each multiply and add.
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradients": 4}


def dense(case: Case, x: dict[str, jax.Array], names: tuple[str, ...]) -> Callable:
    """Attention by definition, as a function of the arrays ``names``."""
    i, j = jnp.ogrid[: case.length, : case.length]
    visible = pattern(case)(i, j)[None, None]
    if case.extras:
        other = ((i - j) % 3 == 0)[None, None]
        visible = jnp.where((x["choice"] == 0)[None, :, None, None], visible, other)
        listed = pattern(case)(i | (case.block_q - 1), j & -case.block_kv)[None, None]
        grants = jnp.repeat(x["grants"].mT, case.block_kv, axis=3)
        same = x["q_segments"][:, None, :, None] == x["kv_segments"][:, None, None]
        visible = visible & listed & (x["elements"] != 0) & (grants != 0) & same

    def attend(*given: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = {n: a.astype("float32") for n, a in x.items()}
        y |= dict(zip(names, given, strict=True))
        group = case.heads // case.key_heads
        k, v = (jnp.repeat(y[name], group, axis=2) for name in ("k", "v"))
        s = jnp.einsum("bthc,bshc->bhts", y["q"], k) * case.width**-0.5
        if case.softcap is not None:
            s = case.softcap * jnp.tanh(s / case.softcap)
        if case.extras:
            s = s + jnp.repeat(y["bias"] / LOG2E, group, axis=1)[:, :, None]
        s = jnp.where(visible, s, -jnp.inf)
        top = jnp.maximum(s.max(-1, keepdims=True), -1e30)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)[..., 0] * LOG2E
        return jnp.einsum("bhts,bshc->bthc", p / jnp.maximum(total, 0.5), v), lse

    return attend


def ready(case: Case) -> tuple[dict, dict[str, Callable[[], dict]]]:
    """The operands of a case, and its kernels bound to them and compiled."""
    x, run = arrays(case, jax.random.key(0)), kernels(case)
    of_queries, of_keys = lists(case), lists(case, by_keys=True)
    found = jax.jit(run["forward"])(x, of_queries)
    delta = found["out"].astype("float32") * x["do"].astype("float32")
    x["delta"] = delta.sum(-1).mT
    x["lse"] = jnp.where(jnp.isinf(found["lse"]), jnp.inf, found["lse"])
    by_keys = x | ({"elements": x["elements"].mT} if case.extras else {})
    operands = dict.fromkeys(run, (x, of_queries))
    operands["key_gradients"] = by_keys, of_keys
    bind = functools.partial
    return x, {name: bind(jax.jit(f), *operands[name]) for name, f in run.items()}


@jax.default_matmul_precision("highest")
def errors(case: Case) -> dict[str, float]:
    """Relative errors of every result of every kernel."""
    x, run = ready(case)
    found = {name: a for kernel in run.values() for name, a in kernel().items()}
    names = ("q", "k", "v", "bias") if case.extras else ("q", "k", "v")
    given = [x[n].astype("float32") for n in names]
    (out, lse), back = jax.vjp(jax.jit(dense(case, x, names)), *given)
    slopes = back((x["do"].astype("float32"), jnp.zeros_like(lse)))
    expected = {"out": out, "lse": lse}
    expected |= {f"d{n}": a for n, a in zip(names, slopes, strict=True)}
    if case.extras:
        expected["dbias"] = expected["dbias"] * LOG2E  # found is by natural logits

    def error(a: jax.Array, b: jax.Array) -> float:
        a, seen = a.astype("float32"), ~jnp.isinf(b)
        miss = jnp.where(seen, a - b, jnp.where(a == b, 0, jnp.inf))
        size = jnp.square(jnp.where(seen, b, 0)).mean()
        return float(jnp.sqrt(jnp.square(miss).mean() / size))

    return {name: error(found[name], b) for name, b in expected.items()}


def seconds(f: Callable[[], Any], *, calls: int = 20) -> float:
    """Median time of a call, from batches of calls."""
    jax.block_until_ready(f())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([f() for _ in range(calls)][-1])
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def main(args: list[str] | None = None) -> None:
    """Print errors and times of every case, and raise if an error is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("names", nargs="*", default=list(CASES), help="of cases")
    given = parser.parse_args(args)
    small = Case(length=128, heads=2, key_heads=1, width=32, block_q=64, block_kv=64)
    cases = {n: CASES[n] for n in given.names} if not given.tiny else {"tiny": small}
    wrong = []
    for name, case in cases.items():
        print(name, end=" ", flush=True)  # noqa: T201  if it hangs, this is the case
        short = dataclasses.replace(case, length=min(case.length, 2048))
        with interpreted() if given.tiny else contextlib.nullcontext():
            found = errors(short)
        wrong += [name] * (not max(found.values()) < BOUNDS[case.dtype])
        print({k: f"{e:.1e}" for k, e in found.items()}, flush=True)  # noqa: T201
    if not given.tiny:
        print_times(cases)
    if wrong:
        raise SystemExit(f"too far from dense float32 attention: {wrong}")


def print_times(cases: dict[str, Case]) -> None:
    """Print rates over live blocks, absolute and as shares of a dense product's."""
    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), "bfloat16")
    rate = 2 * 8192**3 / seconds(functools.partial(jax.jit(jnp.matmul), a, b))
    print(f"dense product {rate / 1e12:.0f} TFLOP/s")  # noqa: T201
    for name, case in cases.items():
        blocks = int(lists(case).count.sum()) * case.batch * case.heads
        pairs = blocks * case.block_q * case.block_kv
        for kernel, f in ready(case)[1].items():
            speed = 2 * PRODUCTS[kernel] * pairs * case.width / seconds(f)
            print(name, kernel, f"{speed / 1e12:.0f} {speed / rate:.0%}")  # noqa: T201


if __name__ == "__main__":
    main()
