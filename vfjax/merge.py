"""Merging parameter trees: averages, soups, ensembles and Preserve-First Merging.

Several models are a sequence of trees of one structure. They are expected to be aligned already
(`vfjax.align`); nothing here permutes anything.

`interpolate` averages whole trees. `preserve_first` keeps the first `l` layers of every model apart
and merges the rest: every model runs its own *stem*, their results are averaged, and one averaged
*trunk* finishes. `l = 0` is the merged model, `l = L` the logit ensemble. What it returns,
`Merged`, is a pytree that can be called, jitted, differentiated, saved, and handed to
`vfjax.renorm`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vfjax import _tree
from vfjax._merged import Merged, as_merged, check_fits
from vfjax._weights import resolve_weights, weighted_mean
from vfjax.network import Layer, Network, check_net

__all__ = [
    "Merged",
    "Soup",
    "as_merged",
    "ensemble",
    "greedy_soup",
    "interpolate",
    "preserve_first",
    "uniform_soup",
]

Array = jax.Array
PyTree = Any


def interpolate(
    trees: Sequence[PyTree],
    weights: Sequence[float] | None = None,
    *,
    alpha: float | None = None,
) -> PyTree:
    """Averages trees leaf by leaf, `theta = sum_k w_k theta_k`.

    Floating-point leaves are averaged in float32 or better and cast back. Running statistics are
    averaged like any other leaf, so a network that has them wants `vfjax.renorm.reset` next.

    Args:
        trees: K trees of equal structure, shapes and dtypes.
        weights: K numbers that sum to one; None for 1/K each.
        alpha: For two trees, short for the weights `(1 - alpha, alpha)`.

    Returns:
        The averaged tree. With one weight of 1 and the others 0, that very tree.

    Raises:
        TypeError: If `trees` is no sequence of trees, or a leaf is no array.
        ValueError: If trees differ in structure, shape or dtype, hold NaN or infinite values, or
            integer leaves that disagree; or if the weights do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = {"kernel": jnp.zeros(2)}, {"kernel": jnp.ones(2)}
        >>> print(interpolate([a, b], alpha=0.25)["kernel"])
        [0.25 0.25]
    """
    trees = as_trees(trees)
    if alpha is not None:
        if weights is not None:
            raise ValueError("give either weights or alpha, not both")
        if len(trees) != 2:
            raise ValueError(f"alpha is for two trees, got {len(trees)}; give weights")
        weights = (1 - alpha, alpha)
    return _average(trees, resolve_weights(weights, len(trees)))


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
        >>> uniform_soup([{"bias": jnp.array([0.0])}, {"bias": jnp.array([2.0])}])
        {'bias': Array([1.], dtype=float32)}
    """
    return interpolate(trees)


class Soup(NamedTuple):
    """What `greedy_soup` found.

    Attributes:
        tree: The average of the trees that were kept.
        kept: Their indices, in the order in which they were added.
        score: The score of `tree`.
    """

    tree: PyTree
    kept: tuple[int, ...]
    score: float


def greedy_soup(trees: Sequence[PyTree], score: Callable[[PyTree], float]) -> Soup:
    """Adds trees to an average as long as it gets no worse (Wortsman et al. 2022, Recipe 1).

    Trees are tried from the best one on its own to the worst, and kept if the uniform average of
    all kept so far scores no less than before.

    Args:
        trees: K trees of equal structure, shapes and dtypes.
        score: Held-out score of a tree, larger is better. Called at most 2K - 1 times.

    Returns:
        The soup, which trees are in it, and its score.

    Raises:
        TypeError: As `interpolate`.
        ValueError: As `interpolate`, or if a score is NaN.

    Example:
        >>> trees = [{"bias": jnp.array(v)} for v in (1.0, 5.0, -2.0)]
        >>> soup = greedy_soup(trees, lambda tree: -abs(float(tree["bias"])))
        >>> soup.kept, float(soup.tree["bias"])
        ((0, 2), -0.5)
    """
    trees = as_trees(trees)

    def scored(tree: PyTree) -> float:
        value = float(score(tree))
        if value != value:
            raise ValueError("score returned NaN, which ranks nothing")
        return value

    alone = [scored(tree) for tree in trees]
    first, *others = sorted(range(len(trees)), key=lambda k: -alone[k])
    kept, soup, best = (first,), trees[first], alone[first]
    for k in others:
        candidate = uniform_soup([trees[i] for i in (*kept, k)])
        value = scored(candidate)
        if value >= best:
            kept, soup, best = (*kept, k), candidate, value
    return Soup(soup, kept, best)


def preserve_first(
    net: Network,
    trees: Sequence[PyTree],
    *,
    layers: int,
    weights: Sequence[float] | None = None,
) -> Merged:
    """Merges all but the first `layers` layers (Preserve-First Merging, PFM_{l/L}).

    Layers count by depth along the main path, shortcuts and norms apart: VGG16 has L = 14, ResNet20
    has L = 20. Every model runs its own stem, up to the pre-activations of its first `layers`
    layers; the values that cross are averaged with the weights; the averaged trunk, beginning with
    the norm or activation after layer l, finishes. Between 0 and L the model grows from the merged
    one, in size and cost that of one model, to the logit ensemble. In a chain 1 equals 0: averaging
    an affine map or its result is the same.

    Args:
        net: The traced network.
        trees: K >= 2 aligned trees of its variables.
        layers: l, from 0 to `net.depth`.
        weights: K numbers that sum to one; None for 1/K each.

    Returns:
        The merged model.

    Raises:
        TypeError: If `net` is no traced network, `layers` no integer, `trees` no sequence of trees
            or `weights` no sequence of numbers.
        ValueError: If `layers` is out of range, if fewer than two trees are given, if they do not
            fit the network or each other, hold NaN or infinite values, or integer leaves that
            disagree, or if weights do not fit.

    Warns:
        UserWarning: Once per network, if the channels of a merged layer cannot be permuted, since
            no alignment can then have matched them.

    Example:
        >>> import vfjax
        >>> def apply_fn(v, x):
        ...     return jax.nn.relu(x @ v["w1"]) @ v["w2"]
        >>> a = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> b = {"w1": -jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> x = jnp.ones((5, 3))
        >>> net = vfjax.trace(apply_fn, a, x)
        >>> print(preserve_first(net, [a, b], layers=0)(x)[0])  # the weights cancel
        [0. 0.]
        >>> print(preserve_first(net, [a, b], layers=2)(x)[0])  # the logits do not
        [6. 6.]

    Source: Preserve-First Merging of "Vanishing Feature: Diagnosing Model Merging and Beyond" (Qu
    and Horvath). Inside residual blocks exactly `layers` layers are kept, by the rule of the cut of
    `Network.run`, where the reference code averages the weights of the last one.
    """
    check_net(net)
    trees = as_trees(trees)
    net.check_depth(layers, "layers")
    if len(trees) < 2:
        raise ValueError(f"trees must be at least two, got {len(trees)}")
    check_fits(net, trees[0], "trees[0]")
    weights = resolve_weights(weights, len(trees))
    if any(isinstance(w, Tracer) for w in weights):
        raise TypeError("weights must be numbers, since a Merged keeps them static; got a tracer")
    _warn_of_fixed(net, layers)
    cut = int(layers)
    if cut == 0:
        return Merged((), _average(trees, weights), {}, net, cut, weights)
    trunk_leaves, stem_leaves = net.trunk_leaves(cut), net.stem_leaves(cut)
    return Merged(
        stems=tuple(_keep(tree, stem_leaves) for tree in trees),
        trunk=_average([_keep(tree, trunk_leaves) for tree in trees], weights),
        corrections={},
        net=net,
        cut=cut,
        weights=weights,
    )


def ensemble(
    net: Network, trees: Sequence[PyTree], weights: Sequence[float] | None = None
) -> Merged:
    """Averages the last layers' outputs: the logit ensemble, `preserve_first` with all layers.

    Args:
        net: The traced network.
        trees: K >= 2 trees of its variables; they need no alignment.
        weights: K numbers that sum to one; None for 1/K each.

    Returns:
        The ensemble. What follows the last layer, a softmax say, acts on the averaged logits.

    Raises:
        TypeError: As `preserve_first`.
        ValueError: As `preserve_first`.

    Example:
        >>> import vfjax
        >>> x, tree = jnp.ones((4, 3)), {"kernel": jnp.ones((3, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["kernel"], tree, x)
        >>> ensemble(net, [tree, tree])(x).shape
        (4, 2)
    """
    check_net(net)
    return preserve_first(net, trees, layers=net.depth, weights=weights)


def as_trees(trees: Sequence[PyTree], *, name: str = "trees") -> tuple[PyTree, ...]:
    """Checks that an argument is a sequence of alike trees; returns it as a tuple.

    Args:
        trees: What the caller gave.
        name: How the caller calls it.

    Returns:
        The trees.

    Raises:
        TypeError: If it is no list or tuple, such as one tree by itself.
        ValueError: If it is empty, or the trees are not alike, or hold NaN or infinite values.
    """
    _tree.check_trees(trees, name=name)
    return tuple(trees)


def _keep(tree: PyTree, paths: Collection[str]) -> PyTree:
    """The tree with None in place of leaves that are not among `paths`."""
    leaves, treedef = _tree.flatten_named(tree)
    kept = [leaf if path in paths else None for path, leaf in leaves.items()]
    return jax.tree.unflatten(treedef, kept)


def _average(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    named = [_tree.flatten_named(tree) for tree in trees]
    treedef = named[0][1]
    leaves = [
        _average_leaf(path, [leaves[path] for leaves, _ in named], weights) for path in named[0][0]
    ]
    return jax.tree.unflatten(treedef, leaves)


def _average_leaf(path: str, leaves: Sequence[Array], weights: Sequence[float]) -> Array:
    if not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.inexact):
        return _agreed(path, leaves)
    return weighted_mean(leaves, weights)


def _agreed(path: str, leaves: Sequence[Array]) -> Array:
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return leaves[0]

    def plain(leaf: Array) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    for k, leaf in enumerate(leaves[1:], start=1):
        if not np.array_equal(plain(leaves[0]), plain(leaf)):
            raise ValueError(
                f"leaf {path!r} is of dtype {jnp.result_type(leaf)}, which cannot be averaged, and "
                f"differs between trees 0 and {k}; make them agree, or keep it out of the trees"
            )
    return leaves[0]


_WARNED: weakref.WeakSet[Network] = weakref.WeakSet()


def _warn_of_fixed(net: Network, cut: int) -> None:
    """Warns, once per network, of a merged layer whose channels no permutation can match."""
    if net in _WARNED:
        return
    for layer in net.layers:
        # Layers before the cut are not merged, and the last one's channels are the outputs.
        if layer.depth < cut or layer.depth == net.depth:
            continue
        if layer.group is not None or layer.channels == 1:
            continue
        cause = _cause(net, layer)
        if cause is None:
            continue
        _WARNED.add(net)
        warnings.warn(
            f"the channels of layer '{layer.name}' cannot be permuted, because of `{cause[0]}` at "
            f"{cause[1]}: no alignment can match them, so merging them may lose accuracy. "
            "net.spec.fixed lists all such axes.",
            UserWarning,
            stacklevel=3,
        )
        return


def _cause(net: Network, layer: Layer) -> tuple[str, str] | None:
    """Primitive and source line that fixed a layer's channels.

    None where they are tied to the network's input or output, by a skip connection for example: all
    models share that basis, so there is nothing to match.
    """
    path = layer.bias or layer.kernel
    found = [entry for entry in net.spec.fixed if entry.path == path]
    sizes = layer.channel_shape
    shape = net._avals[path].shape if path is not None else ()
    found = [f for f in found if shape[f.axis] in (*sizes, layer.channels)]
    if any(f.primitive in ("output", "unused") for f in found):
        return None
    # The other axis of a kernel may be the input's, and of the same size.
    found = [f for f in found if f.primitive != "input"]
    return (found[-1].primitive, found[-1].where) if found else None
