"""Averages of whole trees: interpolation, uniform and greedy soups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vfjax._trees import average_flats, check_trees, resolve_mix
from vfjax._types import PyTree


def interpolate(
    trees: Sequence[PyTree],
    weights: Sequence[float] | None = None,
    *,
    alpha: float | None = None,
) -> PyTree:
    """Averages trees leaf by leaf, `theta = sum_k w_k theta_k`.

    Floating-point leaves are averaged in float32 or better and cast back: a Python number stays
    one, and NumPy leaves that JAX would narrow, such as float64 by default, are averaged in NumPy,
    unless they or the weights are traced. Other leaves must agree. Running statistics are averaged
    like any other leaf, so a network with running statistics needs `vfjax.renorm.reset` afterwards.

    Args:
        trees: K trees of equal structure, shapes and dtypes.
        weights: K numbers that sum to one; None for 1/K each. Models mapped by maps that merge
            features within a model (`vfjax.align.zip_features`) need 1/K each: see `Maps`.
        alpha: For two trees, short for the weights `(1 - alpha, alpha)`.

    Returns:
        The averaged tree. With one weight of 1 and the others 0, the tree of weight 1 itself.

    Raises:
        TypeError: If `trees` is not a sequence of trees, or a leaf is not an array.
        ValueError: If trees differ in structure, shape or dtype, hold NaN or infinite values, or
            have integer leaves that disagree; or if the weights do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = {"kernel": jnp.zeros(2)}, {"kernel": jnp.ones(2)}
        >>> print(interpolate([a, b], alpha=0.25)["kernel"])
        [0.25 0.25]
    """
    flats = check_trees(trees)
    return average_flats(flats, resolve_mix(weights, alpha, len(trees)))


def uniform_soup(trees: Sequence[PyTree]) -> PyTree:
    """Averages trees with equal weights (Wortsman et al. 2022, "Model soups").

    Args:
        trees: K trees of equal structure, shapes and dtypes.

    Returns:
        The averaged tree.

    Raises:
        TypeError: As `interpolate`.
        ValueError: As `interpolate`.

    Example:
        >>> import jax.numpy as jnp
        >>> uniform_soup([{"bias": jnp.array([0.0])}, {"bias": jnp.array([2.0])}])
        {'bias': Array([1.], dtype=float32)}
    """
    return interpolate(trees)


class Soup(NamedTuple):
    """The result of `greedy_soup`.

    Attributes:
        tree: The average of the trees that were kept.
        kept: Their indices, in the order in which they were added.
        score: The score of `tree`.
    """

    tree: PyTree
    kept: tuple[int, ...]
    score: float


def greedy_soup(trees: Sequence[PyTree], score: Callable[[PyTree], float]) -> Soup:
    """Adds trees to an average while its score does not fall (Wortsman et al. 2022, Recipe 1).

    Trees are tried from the best single one to the worst, and a tree is kept if the uniform average
    of all trees kept so far scores no less with it.

    Args:
        trees: K trees of equal structure, shapes and dtypes.
        score: Held-out score of a tree; larger is better. Called at most 2K - 1 times.

    Returns:
        The soup, which trees are in it, and its score.

    Raises:
        TypeError: As `interpolate`.
        ValueError: As `interpolate`, or if a score is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> trees = [{"bias": jnp.array(v)} for v in (1.0, 5.0, -2.0)]
        >>> soup = greedy_soup(trees, lambda tree: -abs(float(tree["bias"])))
        >>> soup.kept, float(soup.tree["bias"])
        ((0, 2), -0.5)
    """
    flats = check_trees(trees)

    if not callable(score):
        raise TypeError(f"score must be a function of a tree that returns a number, got {score!r}")

    def scored(tree: PyTree) -> float:
        value = score(tree)
        try:
            if isinstance(value, str):
                raise TypeError
            value = float(value)
        except TypeError as error:
            raise TypeError(
                "score must return one number, such as an accuracy on held-out data; it returned "
                f"{value!r}"
            ) from error
        if value != value:
            raise ValueError("score returned NaN, which ranks nothing")
        return value

    alone = [scored(tree) for tree in trees]
    first, *others = sorted(range(len(trees)), key=lambda k: -alone[k])
    kept, soup, best = (first,), trees[first], alone[first]
    for k in others:
        chosen = [flats[i] for i in (*kept, k)]
        candidate = average_flats(chosen, resolve_mix(None, None, len(chosen)))
        value = scored(candidate)
        if value >= best:
            kept, soup, best = (*kept, k), candidate, value
    return Soup(soup, kept, best)
