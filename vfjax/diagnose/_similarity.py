"""Similarity of two networks: linear CKA between layers, and the distance of parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vfjax._passes import Mask, batch_size, batches, keep, masked
from vfjax._passes.masking import examples
from vfjax._trees import check_finite, check_like, flatten_named, some
from vfjax._trees.concrete import check_host
from vfjax._types import PyTree
from vfjax.diagnose._sites import resolve_sites
from vfjax.merge._arguments import evaluable
from vfjax.merge._merged import Merged
from vfjax.network._arguments import check_fits, check_net
from vfjax.network._checks import check_batch
from vfjax.network._network import Network
from vfjax.network._sites import Sites
from vfjax.stats import _hsic

Model = tuple[Network, PyTree] | Merged


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["matrix"],
    meta_fields=["first", "second", "examples", "estimator"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CKA:
    """Linear CKA between the sites of two networks; made by `cka`.

    Attributes:
        matrix: `[S, T]`, float64 NumPy; NaN where a site does not vary on the data.
        first: Names of the S sites of the first network.
        second: Names of the T sites of the second.
        examples: Number of examples that it was measured on.
        estimator: `"exact"` or `"minibatch"`.

    Example:
        >>> CKA(np.array([[1.0, 0.25]]), ("a",), ("a", "b"), 100, "exact")
        CKA(1 x 2 sites, exact over 100 examples, from 0.25 to 1)
    """

    matrix: np.ndarray
    first: tuple[str, ...]
    second: tuple[str, ...]
    examples: int
    estimator: str

    def __repr__(self) -> str:
        """Size and range, in one line."""
        known = self.matrix[np.isfinite(self.matrix)]
        span = f"from {known.min():.4g} to {known.max():.4g}" if known.size else "undefined"
        return (
            f"CKA({len(self.first)} x {len(self.second)} sites, {self.estimator} over "
            f"{self.examples} examples, {span})"
        )


def cka(
    first: Model,
    second: Model,
    data: Iterable[Any],
    *,
    sites: Sites = "taps",
    second_sites: Sites | None = None,
    estimator: Literal["exact", "minibatch"] = "exact",
    memory: int = 2 << 30,
    progress: bool = True,
    mask: Mask | None = None,
) -> CKA:
    """Linear centred kernel alignment between every two layers of two networks.

    With features `X` `[n, p]` and `Y` `[n, q]` of two sites (rows are examples, columns are all
    channels at all positions) less their means over the examples, it is
    `||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`: in [0, 1], 1 for features that are equal up to an
    orthogonal map and a scale, so permuting a network's units does not change it. Every site is
    scaled separately, whatever the size of its values.

    `"exact"` takes all of the data as one sample, however it is split into batches. It holds either
    the covariances of all pairs of sites, twice (`2 p q` numbers of 4 bytes for each pair), or the
    Gram matrices `X X^T` of all sites (`n^2` numbers each) and the features of at least one site
    (`2 n p`), whichever is less: for 1,000 examples and two networks of 20 sites at most 160 MB
    beside the features. With Gram matrices, features that do not fit at once take several passes.

    `"minibatch"` averages unbiased estimates of the three terms over batches, and so holds only one
    batch at a time. It needs batches of 4 examples or more. The terms are unbiased whatever the
    size of batches, and by noise the result may leave [0, 1].

    Args:
        first: A traced network and its variables, `(net, variables)`, or a `vfjax.merge.Merged`.
        second: The other network, in the same form; the two may be of different architectures that
            take the same input.
        data: Re-iterable of `x` or `(x, label)`; kept on the device up to 1 GiB.
        sites: Sites of both networks, as in `vfjax.stats.resolve_sites`, whole values only. Words
            such as `"taps"` leave out sites inside stems and heads of a `Merged`, which have
            several values.
        second_sites: Sites of the second network, if they are different.
        estimator: `"exact"` or `"minibatch"`.
        memory: Bytes that `"exact"` may take for its matrices and features.
        progress: Whether a progress bar appears after two seconds.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`. A column of X
            is then centred over the examples in which it counts, and 0 in the others; examples
            without a valid position do not count. Takes one more pass.

    Returns:
        The matrix with the names of its rows and columns.

    Raises:
        TypeError: If a network is neither a pair nor a `Merged`, a leaf is not an array, the value
            of a site is not an array of real numbers, or data has another structure or dtype than
            was traced.
        ValueError: If variables do not fit or hold NaN or infinite values; if the networks take
            different inputs; if a named site does not exist, lies inside stems or heads, or has no
            axis of examples; if the estimator is unknown; if data is empty, exhausted or too small,
            or makes a site NaN or infinite; or if `"exact"` needs more than `memory`.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.eye(3), "b": jnp.array([[1.0], [0.0], [0.0]])}
        >>> x = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a"]) @ v["b"], v, x)
        >>> permuted = net.spec.permute(v, {"a": np.array([2, 0, 1])})
        >>> similarity = cka((net, v), (net, permuted), [x])
        >>> similarity.first, similarity.matrix.round(3).tolist()
        (('a:act', 'b:act'), [[1.0, 0.577], [0.577, 1.0]])

    Source: Kornblith et al. (2019), "Similarity of Neural Network Representations Revisited",
    section 3; `"minibatch"`: Nguyen et al. (2021), "Do Wide and Deep Networks Learn the Same
    Things?", eq. 2 and 3, with batches weighted by their size.
    """
    if estimator not in ("exact", "minibatch"):
        raise ValueError(f'estimator must be "exact" or "minibatch", got {estimator!r}')
    models = _model(first, "first"), _model(second, "second")
    _check_inputs(*models)
    for model in models:
        check_batch(model.net)
    other = sites if second_sites is None else second_sites
    names = _names(models[0], sites), _names(models[1], other)
    rows = len(names[0])
    if _same(*models) and names[0] == names[1]:
        models, columns = models[:1], slice(0, rows)  # features of one network, computed once
    else:
        columns = slice(rows, rows + len(names[1]))
    job = _hsic.job_of(models, names[: len(models)])
    like = models[0].net.x
    if estimator == "exact":
        data = keep(batches(data, like=like), data)

    def read() -> Iterable[PyTree]:
        return tqdm(batches(data, like=like), "CKA", delay=2, leave=False, disable=not progress)

    means = None if mask is None else _hsic.means_of(job, models, read(), mask)
    if estimator == "minibatch":
        inner, count = _hsic.by_minibatches(job, models, read(), mask=mask, means=means)
    else:
        sizes = [
            (batch_size(x), int(examples(x, valid))) for x, valid in masked(data, mask, like=like)
        ]
        size, count = map(sum, zip(*sizes, strict=True))
        if count < 2:
            raise ValueError("data must hold at least 2 examples, since features are centred")
        inner = _exact(job, models, read, size, columns, rows, memory, mask=mask, means=means)
    if not np.isfinite(inner).all():
        bad = np.flatnonzero(~np.isfinite(np.diagonal(inner)))
        site = [name for own in job.sites for name in own][bad[0]] if len(bad) else "some site"
        raise ValueError(
            f"data gives NaN or infinite values at '{site}': look for them in the batches, or for "
            "values that overflow the network"
        )
    own = np.diagonal(inner)
    scale = np.sqrt(np.outer(np.maximum(own[:rows], 0), np.maximum(own[columns], 0)))
    matrix = np.full(scale.shape, np.nan)
    np.divide(inner[:rows, columns], scale, out=matrix, where=scale > 0)
    if estimator == "exact":
        np.clip(matrix, 0, 1, out=matrix)  # rounding may leave the interval
    return CKA(matrix, *names, int(count), estimator)


def _exact(
    job: _hsic.Job,
    models: tuple[Merged, ...],
    read: Any,
    count: int,
    columns: slice,
    rows: int,
    memory: int,
    **masked: Any,
) -> np.ndarray:
    widths = job.widths
    own = {(k, k) for k in range(len(widths))}
    cross = {(i, j) for i in range(rows) for j in range(columns.start, columns.stop)}
    pairs = tuple(sorted(own | {(min(pair), max(pair)) for pair in cross}))
    blocks, grams = _hsic.covariance_bytes(widths, pairs), _hsic.gram_bytes(widths, count)
    if min(blocks, grams) > memory:
        raise ValueError(
            f"exact CKA of {len(widths)} sites over {count} examples takes {_size(blocks)} for "
            f"covariances or {_size(grams)} for Gram matrices, more than memory={_size(memory)}; "
            'give fewer examples or sites, raise memory, or estimator="minibatch"'
        )
    if blocks <= grams:
        return _hsic.by_covariances(job, models, read(), pairs, **masked)
    return _hsic.by_grams(job, models, read, count, memory, **masked)


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**27 else f"{count / 2**20:.3g} MiB"


def _model(given: Any, name: str) -> Merged:
    """Checks one network, and returns it as a `Merged`."""
    net, variables = (given.net, given) if isinstance(given, Merged) else (None, None)
    if isinstance(given, (tuple, list)) and len(given) == 2:
        net, variables = given
    if not isinstance(net, Network):
        raise TypeError(
            f"{name} must be a pair (net, variables) of a traced network, or a Merged, got "
            + (type(given).__name__ if net is None else f"a pair with a {type(net).__name__} first")
        )
    check_host("features are measured", **{name: variables})
    networks = evaluable((net,), variables, name, several=False)
    if len(networks) != 1:
        raise ValueError(f"{name} must be one network, got variables of {len(networks)}")
    return networks[0].model


def _check_inputs(first: Merged, second: Merged) -> None:
    def kind(x: PyTree) -> Any:
        leaves, tree = jax.tree.flatten(x)
        return tree, [(a.shape[1:], a.dtype) for a in leaves]

    if kind(first.net.x) != kind(second.net.x):
        raise ValueError(
            f"first and second must take the same input, got {first.net.x} and {second.net.x} "
            "(all but the batch axis must agree)"
        )


def _same(first: Merged, second: Merged) -> bool:
    """Whether two networks are the same object, wrapped or not."""
    parts = ("trunk", "stems", "heads", "merge", "unmerge", "corrections")
    pairs = [(getattr(first, part), getattr(second, part)) for part in parts]
    return (
        first.frame == second.frame
        and first.weights == second.weights
        and all(one is other or not (one or other) for one, other in pairs)
    )


def _names(model: Merged, sites: Sites) -> tuple[str, ...]:
    """Names of sites; a word stands only for sites that have a single value."""
    names = resolve_sites(model.net, sites)
    apart = [name for name in names if model.apart(name)]
    if apart and not isinstance(sites, str):
        raise ValueError(
            f"the sites {some(apart)} lie inside the stems or heads, where each model has a "
            "separate value; compare the models themselves there"
        )
    kept = tuple(name for name in names if name not in apart)
    if not kept:
        raise ValueError(
            f"all sites of {sites!r} lie inside the stems or heads; name sites of the trunk"
        )
    return kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Distance:
    """How far two parameter trees are apart; made by `distance`.

    Attributes:
        total: L2 distance over all leaves that count, in the unit of the parameters, or relative.
        by_leaf: L2 distance of each leaf, by path, in the same unit.
        cosine: Cosine of the angle between the trees as vectors; NaN if one is zero.
    """

    total: float
    by_leaf: dict[str, float]
    cosine: float


def distance(
    a: PyTree, b: PyTree, *, relative: bool = False, net: Network | None = None
) -> Distance:
    """L2 distance between two parameter trees, in total and by leaf.

    Trees are compared as they are: align them first (`vfjax.align`) for a distance that does not
    depend on the order of units. Only leaves of floating-point numbers count.

    Args:
        a: Parameter tree.
        b: Parameter tree of equal structure, shapes and dtypes.
        relative: Whether distances are divided by the mean of the two norms (of the whole trees,
            and of each leaf); they then range from 0 to 2.
        net: The traced network. If it is given, stored statistics of norms do not count, since they
            are not parameters.

    Returns:
        The distances; 0 where both are zero. Sums are float64.

    Raises:
        TypeError: If a leaf is not an array, or `net` is not a traced network.
        ValueError: If the trees differ in structure, shape or dtype, hold NaN or infinite values,
            or do not fit the network.

    Example:
        >>> import jax.numpy as jnp
        >>> distance({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([0.0, 4.0])})
        Distance(total=5.0, by_leaf={'w': 5.0}, cosine=0.0)
        >>> distance({"w": jnp.ones(4)}, {"w": 3 * jnp.ones(4)}, relative=True).total
        1.0

    Source: the l2 distance of models of "Vanishing Feature: Diagnosing Model Merging and Beyond",
    appendix on initialisation.
    """
    check_host("distances are measured", a=a, b=b)
    left, right = flatten_named(a, name="a").leaves, flatten_named(b, name="b").leaves
    check_like(right, left, name="b", other="a")
    check_finite(left, name="a")
    check_finite(right, name="b")
    if net is not None:
        check_net(net)
        check_fits(net, left, "a")
    ignored = frozenset() if net is None else net.statistics
    squares = {}
    for path, leaf in left.items():
        if path in ignored or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        x, y = _vector(leaf), _vector(right[path])
        squares[path] = np.array([np.vdot(v, v) for v in (x - y, x, y)] + [np.vdot(x, y)])
    by_leaf = {path: _length(each, relative) for path, each in squares.items()}
    total = np.sum(list(squares.values()), axis=0) if squares else np.zeros(4)
    norms = float(np.sqrt(total[1] * total[2]))
    cosine = float(np.clip(total[3] / norms, -1, 1)) if norms else float("nan")
    return Distance(_length(total, relative), by_leaf, cosine)


def _vector(leaf: Any) -> np.ndarray:
    """A leaf as a float64 vector, with real and imaginary parts as separate entries."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
        return np.ravel(np.asarray(leaf, np.complex128)).view(np.float64)
    return np.ravel(np.asarray(leaf)).astype(np.float64)


def _length(squares: np.ndarray, relative: bool) -> float:
    """Distance from the squared norms of the difference and of both."""
    length, first, second = np.sqrt(squares[:3])
    norm = (first + second) / 2 if relative else 1.0
    return float(length / norm) if length else 0.0
