"""Which parameters are matrices, from one hidden vector to another, by their axes."""

__all__ = ["Split", "last_two", "matrix_axes"]

Split = tuple[tuple[int, ...], tuple[int, ...]]

# Axes whose matrices map one hidden vector to another. Rows of tables and classes
# (vocabulary, memory slots, a router's experts) are looked up one by one instead.
_HIDDEN = frozenset("dfhgcz")


def matrix_axes(axes: str) -> Split | None:
    """Which axes of a parameter are a matrix's inputs and outputs; None: no matrix.

    Leading ``l`` and ``e`` stack matrices. The rest must be two hidden axes, ``d`` or
    ``f`` among them (``h c`` is a bias), or the model width, or a latent one, before or
    after the two axes of all heads: ``d h c``, ``z h c``, ``h c d``.
    """
    letters = axes.split()
    first = next((i for i, x in enumerate(letters) if x not in "le"), len(letters))
    rest = letters[first:]
    index = tuple(range(first, len(letters)))
    if not _HIDDEN.issuperset(rest):
        return None
    if len(rest) == 2 and not {"d", "f"}.isdisjoint(rest):
        return index[:1], index[1:]
    if len(rest) == 3 and rest[0] in "dz":
        return index[:1], index[1:]
    if len(rest) == 3 and rest[-1] == "d":
        return index[:2], index[2:]
    return None


def last_two(axes: str) -> Split:
    """Take a parameter for a stack of matrices, whatever its axes are called."""
    rank = len(axes.split())
    return (rank - 2,), (rank - 1,)
