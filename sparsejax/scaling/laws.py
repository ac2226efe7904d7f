"""Laws: coefficients and a point in, the loss that is expected there out.

Every law has the signature ``(coefficients, point) -> loss``. Both are mappings from
names to numbers or arrays of one length; a point's names are those of the columns that
the law reads. Powers are of raw counts, in units of one parameter and one token, so a
coefficient can be compared with a paper's. What a law means by ``parameters`` differs
and is said in its docstring; ``joint`` names each kind apart.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Law",
    "Start",
    "average_parameters",
    "chinchilla",
    "fine_grained",
    "joint",
    "kaplan",
    "routed",
    "sparse_attention",
    "sparsely_connected",
]

Numbers = Mapping[str, Any]


class Start(NamedTuple):
    """Where a fit draws the first guess of a coefficient."""

    low: float
    high: float
    positive: bool = True  # then it stays so, and is drawn evenly over its logarithm


class Law(NamedTuple):
    """A formula, the columns that it reads, and where to look for its coefficients."""

    formula: Callable[[Numbers, Numbers], Any]
    variables: tuple[str, ...]
    starts: Mapping[str, Start]

    def __call__(self, coefficients: Numbers, point: Numbers) -> Any:
        """Give the expected loss in float64.

        Raises:
            ValueError: if a coefficient or a column is missing.
        """
        known, columns = tuple(self.starts), self.variables
        given = {name: coefficients.get(name) for name in known}
        seen = {name: point.get(name) for name in columns}
        for what, names in (("coefficient", given), ("column", seen)):
            missing = [name for name, value in names.items() if value is None]
            if missing:
                raise ValueError(
                    f"no {what} {missing[0]!r}: this law reads {', '.join(names)}"
                )
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            to = {k: jnp.asarray(v, jnp.float64) for k, v in given.items()}
            at = {k: jnp.asarray(v, jnp.float64) for k, v in seen.items()}
            return np.asarray(self.formula(to, at))[()]


def chinchilla(c: Numbers, p: Numbers) -> Any:
    """``E + A / N^alpha + B / D^beta``, of N parameters and D tokens.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, Sec. 3.3; Besiroglu et al. 2024,
    arXiv:2404.10102, Sec. 3.
    """
    size, data = p["parameters"], p["tokens"]
    return c["E"] + c["A"] * size ** -c["alpha"] + c["B"] * data ** -c["beta"]


def kaplan(c: Numbers, p: Numbers) -> Any:
    """``((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D``; N without embeddings.

    Source: Kaplan et al. 2020, arXiv:2001.08361, Eq. 1.5.
    """
    size = (c["N_c"] / p["parameters"]) ** (c["alpha_N"] / c["alpha_D"])
    return (size + c["D_c"] / p["tokens"]) ** c["alpha_D"]


def saturated(experts: Any, first: Any, last_inverse: Any) -> Any:
    """Count experts so that one is ``first`` and infinitely many ``1 / last_inverse``.

    Source: Clark et al. 2022, arXiv:2202.01169, Sec. 4.
    """
    gap = 1 / (1 / first - last_inverse)
    return 1 / (1 / (experts - 1 + gap) + last_inverse)


def routed(c: Numbers, p: Numbers) -> Any:
    """Loss of routed models after equally many tokens: bilinear in two logarithms.

    ``log L = a log N + b log E + c log N log E + d``, logarithms of base ten, E
    saturated; N parameters of the dense model with as many active.

    Source: Clark et al. 2022, arXiv:2202.01169, Sec. 4.
    """
    experts = saturated(p["experts"], c["E_start"], 1 / c["E_max"])
    size, many = jnp.log10(p["parameters"]), jnp.log10(experts)
    return 10 ** (c["a"] * size + c["b"] * many + c["c"] * size * many + c["d"])


def fine_grained(c: Numbers, p: Numbers) -> Any:
    """``c + (g / G^gamma + a) / N^alpha + b / D^beta`` at granularity G.

    N counts every parameter but embeddings; G is a dense layer's hidden width over an
    expert's, at constant active parameters.

    Source: Krajewski et al. 2024, arXiv:2402.07871, Sec. 5.
    """
    worth = c["g"] * p["granularity"] ** -c["gamma"] + c["a"]
    size, data = p["parameters"] ** -c["alpha"], p["tokens"] ** -c["beta"]
    return c["c"] + worth * size + c["b"] * data


def sparsely_connected(c: Numbers, p: Numbers) -> Any:
    """``(a_S density^b_S + c_S) / N^b_N + (a_D / D)^b_D + c``, N non-zero parameters.

    Source: Frantar et al. 2023, arXiv:2309.08520, Eq. 1.
    """
    worth = c["a_S"] * p["density"] ** c["b_S"] + c["c_S"]
    data = (c["a_D"] / p["tokens"]) ** c["b_D"]
    return worth * p["parameters"] ** -c["b_N"] + data + c["c"]


def average_parameters(c: Numbers, p: Numbers) -> Any:
    """Chinchilla's law with the mean, over training, of the non-zero parameters.

    Source: Jin et al. 2025, arXiv:2501.12486, Sec. 4.
    """
    return chinchilla(c, {"parameters": p["average"], "tokens": p["tokens"]})


def sparse_attention(c: Numbers, p: Numbers) -> Any:
    """``d N^a L^b / density^c``: log-linear in size, context length and compression.

    Density is that of the attention; what is predicted may be any positive score.

    Source: Nawrot et al. 2025, arXiv:2504.17768, Sec. 5.
    """
    grown = p["parameters"] ** c["a"] * p["length"] ** c["b"]
    return c["d"] * grown * p["density"] ** -c["c"]


def joint(c: Numbers, p: Numbers) -> Any:
    """One law over active and total parameters, densities, granularity and data.

    ``E + (S^(1/shape) + (B / D^beta)^(1/shape))^shape``, where S is
    ``A N^-alpha X^(mixed ln N - routing) (1 + fine / G^gamma) (1 + masked density^mu)
    length^context attention^reading``; N active parameters, X total over active,
    saturated as Clark's experts are. With a ``shape`` of one it adds, as Chinchilla's
    law does; each of the other laws is this one with some coefficients held.
    """
    worth = c["A"] * p["active"] ** -c["alpha"]
    many = saturated(p["total"] / p["active"], c["first"], c["last_inverse"])
    worth *= many ** (c["mixed"] * jnp.log(p["active"]) - c["routing"])
    worth *= 1 + c["fine"] * p["granularity"] ** -c["gamma"]
    worth *= 1 + c["masked"] * p["density"] ** c["mu"]
    worth *= p["length"] ** c["context"] * p["attention"] ** c["reading"]
    data = c["B"] * p["tokens"] ** -c["beta"]
    ends = 1 / c["shape"]
    return c["E"] + (worth**ends + data**ends) ** c["shape"]
