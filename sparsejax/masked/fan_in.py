"""A weight of which every output has equally many inputs, for products with few rows.

``x @ w`` gathers the inputs of each output and reads nothing else: for one row, where a
dense product waits for its weight to come from memory, that is faster by about as much
as is saved. For many rows a dense product is faster, and is what is then computed.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from sparsejax.typing import Array, Float

__all__ = ["FanIn"]

FEW = 8  # rows up to which inputs are gathered
SHORT = 2**16  # inputs whose numbers fit 16 bits: half as many bytes to read


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "inputs"],
    meta_fields=["width"],
)
@dataclass(frozen=True, eq=False)
class FanIn:
    """A matrix "d f" as the ``k`` inputs of each output, or a stack of such.

    Outputs with fewer inputs are filled up with values of 0.

    Source: Lasby et al. 2023, arXiv:2305.02299, Sec. 4.4. Departure: inputs first, so
    that neighbouring outputs are computed together; numbers of 16 bits.

    >>> w = FanIn.from_dense(jnp.array([[0.0, 3.0], [2.0, 0.0], [1.0, 5.0]]))
    >>> w.inputs.tolist(), w.values.tolist()
    ([[1, 0], [2, 2]], [[2.0, 3.0], [1.0, 5.0]])
    >>> (jnp.array([[1.0, 10.0, 100.0]]) @ w).tolist()
    [[120.0, 503.0]]
    """

    values: Any  # [*stack k f]
    inputs: Any  # [*stack k f]
    width: int  # d
    __array_ufunc__ = None  # arrays of NumPy ask __rmatmul__ too

    @classmethod
    def from_dense(cls, w: Float[Array, "*stack d f"], *, k: int | None = None) -> Any:
        """Take what is not 0.

        Args:
            w: a matrix, or a stack of them.
            k: inputs of an output; by default as many as the fullest has.

        Raises:
            ValueError: if an output has more, or the weight is traced and ``k`` is not
                given.
        """
        live = w != 0
        counts = jnp.sum(live, axis=-2)
        if not isinstance(counts, Tracer):
            most = int(jnp.max(counts, initial=0))
            if k is not None and most > k:
                raise ValueError(f"k={k}: an output has {most} inputs; raise k")
            k = most if k is None else k
        if k is None:
            raise ValueError("k=None: inputs of a traced weight are not known; give k")
        first = jnp.argsort(~live, axis=-2, stable=True)[..., :k, :]
        values = jnp.take_along_axis(w, first, axis=-2)
        kind = jnp.uint16 if w.shape[-2] <= SHORT else jnp.int32
        return cls(values, first.astype(kind), w.shape[-2])

    def __getitem__(self, index: Any) -> "FanIn":
        """Give itself for ``w[...]``, as a parameter's value is asked for."""
        if index is not Ellipsis:
            raise TypeError(
                f"w[{index!r}] of a weight by fan-in, which only multiplies; use w[...]"
            )
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's, and its stack's."""
        *stack, _, outputs = self.values.shape
        return (*stack, self.width, outputs)

    @property
    def dtype(self) -> Any:
        """The dtype of the weights."""
        return self.values.dtype

    def astype(self, dtype: Any) -> "FanIn":
        """Cast the weights."""
        return replace(self, values=self.values.astype(dtype))

    def to_dense(self) -> Float[Array, "d f"]:
        """Write one matrix out."""
        zeros = jnp.zeros(self.shape, self.dtype)
        outputs = jnp.arange(self.shape[-1])[None]
        return zeros.at[self.inputs.astype("int32"), outputs].add(self.values)

    def __rmatmul__(self, x: Any) -> Float[Array, "*rows f"]:
        """Multiply rows; sums are those of float32."""
        rows = jnp.asarray(x).reshape(-1, self.width)
        if rows.shape[0] > FEW:
            y = rows @ self.to_dense()
        else:
            y = _gathered(rows, self.values, self.inputs)
        return y.reshape(*x.shape[:-1], self.shape[-1])


def _gathered(x: Array, values: Array, inputs: Array) -> Array:
    """Add up one input of every output after the other."""

    def one(total: Array, own: tuple[Array, Array]) -> tuple[Array, None]:
        value, index = own
        at = index.astype("int32")
        read = x.at[:, at].get(mode="promise_in_bounds")
        part = read.astype(jnp.float32) * value.astype(jnp.float32)[None]
        return total + part, None

    zeros = jnp.zeros((x.shape[0], values.shape[-1]), jnp.float32)
    return lax.scan(one, zeros, (values, inputs))[0].astype(x.dtype)
