"""Are products with live blocks right?

    python -m pallas_kernels.gpu.block_sparse_check

On a Hopper: values and gradients of every case against float32 products by definition;
``python -m sparsejax.bench masked_gpu`` times them. ``--tiny`` runs a small case in the
interpreter, anywhere.
"""

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.block_sparse import fitting, rows_by_blocks, rows_by_rows
from pallas_kernels.gpu.interpreter import interpreted

__all__ = ["BOUNDS", "CASES", "PRODUCTS", "Case", "errors", "main", "operands"]

PRODUCTS = ("forward", "dx", "dw")
BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3}  # root mean square, of the result's size


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows, and a weight whose live blocks are drawn at random."""

    rows: int = 2048
    grid: tuple[int, int] = (16, 24)
    block: tuple[int, int] = (128, 128)
    density: float = 0.2
    dtype: str = "bfloat16"
    programs: int = 132

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight."""
        return self.grid[0] * self.block[0], self.grid[1] * self.block[1]

    def live(self) -> np.ndarray:
        """Draw the live blocks; the first row and column of blocks have none."""
        live = np.random.default_rng(0).random(self.grid) < self.density
        live[0] = live[:, 0] = False
        return live


CASES = {
    "blocks_of_128": Case(),
    "blocks_of_64": Case(block=(64, 64)),
    "blocks_of_256": Case(grid=(8, 12), block=(256, 256), dtype="float16"),
    "oblong": Case(block=(192, 64)),
    "dense": Case(rows=128, density=1.0),
    "nothing_live": Case(density=0.0),
    "few_rows": Case(rows=64, dtype="float16"),
    "large": Case(rows=8192, grid=(32, 32)),
}
TINY = Case(rows=64, grid=(2, 3), block=(64, 64), density=0.7, programs=2)


def products(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """The three kernels, each as a function of x, blocks, dy and ids."""
    (tall, wide), programs = case.block, case.programs

    def by_blocks(
        x: jax.Array, values: jax.Array, ids: jax.Array, at: int
    ) -> jax.Array:
        own, order = ids[at], jnp.argsort(ids[at], stable=True)
        ends = jnp.arange(case.grid[at] + 1)
        start = jnp.searchsorted(own[order], ends).astype("int32")
        return rows_by_blocks(
            x,
            values,
            ids[1 - at],
            (order.astype("int32"), start),
            tiling=fitting(case.rows, case.block[at], programs=programs),
            turned=at == 0,
        )

    return {
        "forward": lambda x, values, _, ids: by_blocks(x, values, ids, 1),
        "dx": lambda _, values, dy, ids: by_blocks(dy, values, ids, 0),
        "dw": lambda x, _, dy, ids: rows_by_rows(
            x,
            dy,
            (ids[0], ids[1]),
            sides=case.block,
            tiling=fitting(tall, wide, programs=programs),
        ),
    }


def operands(case: Case) -> tuple[jax.Array, ...]:
    """Random x, blocks and dy, and where blocks are: "2 live", with one dead entry.

    What nothing live reads is NaN.
    """
    live = case.live()
    ids = np.concatenate([np.argwhere(live).T, [[-1], [-1]]], axis=1)
    shapes = (case.rows, case.shape[0]), (ids.shape[1], *case.block)
    shapes = *shapes, (case.rows, case.shape[1])
    keys = jax.random.split(jax.random.key(0), 3)
    pairs = zip(keys, shapes, strict=True)
    x, values, dy = (jax.random.normal(k, s, case.dtype) for k, s in pairs)
    read = (live.any(1 - n).repeat(case.block[n])[None] for n in (0, 1))
    x, dy = (jnp.where(r, a, jnp.nan) for r, a in zip(read, (x, dy), strict=True))
    return x, values.at[-1].set(jnp.nan), dy, jnp.asarray(ids, "int32")


def expected(case: Case, *given: jax.Array) -> dict[str, jax.Array]:
    """Products by definition, in float32, with the weight written out."""
    x, values, dy, ids = given
    x, dy = (jnp.nan_to_num(a.astype("float32")) for a in (x, dy))
    (down, across), (tall, wide) = case.grid, case.block
    w = jnp.zeros((down + 1, across + 1, tall, wide))
    w = w.at[ids[0], ids[1]].set(jnp.nan_to_num(values.astype("float32")))
    w = w[:down, :across].swapaxes(1, 2).reshape(case.shape)
    with jax.default_matmul_precision("highest"):
        y, dx, dw = x @ w, dy @ w.T, x.T @ dy
    dw = dw.reshape(down, tall, across, wide).swapaxes(1, 2)[ids[0], ids[1]]
    return {"forward": y, "dx": dx, "dw": jnp.where((ids[0] < 0)[:, None, None], 0, dw)}


def errors(case: Case) -> dict[str, float]:
    """Relative errors of each product; infinite where 0 is not exactly 0."""
    given = operands(case)
    right = jax.jit(expected, static_argnums=0)(case, *given)
    found = {name: jax.jit(f)(*given) for name, f in products(case).items()}
    return {name: _error(found[name], right[name]) for name in PRODUCTS}


def _error(found: jax.Array, right: jax.Array) -> float:
    found = found.astype("float32")
    error = jnp.sqrt(jnp.square(found - right).mean())
    size = jnp.sqrt(jnp.square(right).mean())
    wrong = ((right == 0) & (found != 0)).any()
    return float(jnp.where(wrong, jnp.inf, error / jnp.maximum(size, 1e-30)))


def main(args: list[str] | None = None) -> None:
    """Print errors, and raise if one is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny, wrong = parser.parse_args(args).tiny, []
    for name, case in {"tiny": TINY}.items() if tiny else CASES.items():
        with interpreted() if tiny else contextlib.nullcontext():
            found = errors(case)
        words = {product: f"{error:.1e}" for product, error in found.items()}
        print(name, case.dtype, words, flush=True)  # noqa: T201
        wrong += [name] * (not max(found.values()) < BOUNDS[case.dtype])
    if wrong:
        raise SystemExit(f"too far from float32 products: {wrong}")


if __name__ == "__main__":
    main()
