"""Weight matching: the permutation of one network's weights that is closest to another's.

Coordinate ascent of "Git Re-Basin: Merging Models modulo Permutation Symmetries" (Ainsworth, Hayase
& Srinivasa, 2023, algorithm 1). With the permutations of all groups but one held fixed, the best
permutation of that group is a linear assignment: every leaf that the group touches adds its inner
products, unit by unit, to the gain matrix. Sweeps over the groups in random order end when none of
them can be improved. Heads of attention and the dims inside each form one block: the best
assignment of dims gives the value of each pair of heads in the assignment of heads.

That is one search, from the order in which the units lie. Where it ends below what a permuted copy
would reach, another begins at optimistic gains (`_optimistic`), if groups share leaves in ways that
trap the first one, or if b looks like a copy. The better of the two is returned.

Everything runs on the host: the gain matrices are products of unfolded leaves, for
which NumPy's BLAS needs no compilation and, with the views chosen there, no copies.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vfjax._trees import check_finite, check_like, flatten_named
from vfjax._trees.concrete import check_host
from vfjax._types import Array, PyTree
from vfjax.align._ascent import (
    counted_axes,
    dot,
    generator_of,
    on_host,
    search_blocks,
    start_of,
)
from vfjax.align._assignment import Alignment
from vfjax.align._optimistic import optimistic_start
from vfjax.network._arguments import check_net
from vfjax.network._network import Network
from vfjax.network._unaligned import warn_of_fixed
from vfjax.symmetry._entries import apart
from vfjax.symmetry._places import Axis, absent_paths
from vfjax.symmetry._spec import PermutationSpec

# The optimum of a permuted copy is its square norm, but for rounding.
_ROUNDING = 1e-6
# Kernels of networks that were trained apart agree less than this (0.2 to 0.6 in those shipped
# here, by the third), and those of a copy more, unless noise almost as large as they are was added.
_ALIKE = 0.7


def match_weights(
    net: Network | PermutationSpec,
    a: PyTree,
    b: PyTree,
    *,
    key: Array,
    restarts: int = 0,
    max_sweeps: int = 100,
    tol: float = 1e-12,
    optimistic: bool | None = None,
    norm_statistics: bool = False,
    ignore: Collection[str] = (),
) -> Alignment:
    """Finds permutations of `b` that maximise the inner product of its weights with those of `a`.

    Maximising `sum over leaves <a, permuted b>` minimises the distance of the weights. The search
    is a coordinate ascent, so it finds a local optimum: one in which no single group can be
    improved. A leaf with the same group on two axes (a recurrent or linear residual kernel) makes
    the problem of that group quadratic; the assignment is then linearised at the current
    permutation, and accepted only if the true objective rises. A permuted copy is recovered, but
    for what `Alignment` lists.

    Args:
        net: The traced network, or a `PermutationSpec` written by hand.
        a: Parameter tree to align to.
        b: Parameter tree to permute.
        key: Random key; decides the order of the groups in every sweep, and the restarts.
        restarts: Number of further searches, each from permutations drawn at random. The best of
            all is returned, so restarts never make the result worse.
        max_sweeps: The largest number of sweeps per search.
        tol: An assignment must raise the objective by more than this times the product of the norms
            of the leaves that it touches; smaller rises are rounding errors.
        optimistic: Whether to search from optimistic gains as well, unless b is found to be a
            permuted copy of a: from permutations of one group after another, with all that is still
            open taken at its best. Never makes the result worse. None for where groups nest or
            share leaves, or where the weights so far agree as those of a copy with noise do.
        norm_statistics: Whether stored means and variances of norms count. They are not weights,
            and their products would swamp those of the weights. Without effect for a spec.
        ignore: Paths of further leaves that do not count. All leaves are permuted, whether they
            count or not.

    Returns:
        The alignment. Its objective is the inner product over the leaves that count; its bound is
        half the sum of their squares in both models, which a permuted copy reaches.

    Raises:
        TypeError: If `net` is neither a network nor a spec, `key` is not a random key, `ignore` is
            a string, or a leaf is not an array.
        ValueError: If the trees differ in structure, shape or dtype, do not fit the spec, or hold
            NaN or infinity, or if an option is out of range.

    Example:
        >>> import jax, numpy as np
        >>> from vfjax import PermutationSpec
        >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
        >>> a = {"w": np.eye(3), "v": np.arange(6.0).reshape(3, 2)}
        >>> b = spec.permute(a, {"h": [2, 0, 1]})
        >>> alignment = match_weights(spec, a, b, key=jax.random.key(0))
        >>> alignment.permutations["h"].tolist(), alignment.converged
        ([1, 2, 0], True)
    """
    spec, ignored = _spec(net, norm_statistics, ignore)
    for name, value, least in (("restarts", restarts, 0), ("max_sweeps", max_sweeps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}")
    if not tol >= 0:
        raise ValueError(f"`tol` must be a number >= 0, got {tol!r}")
    check_host("weights are matched", a=a, b=b, key=key)
    random = generator_of(key)
    flat, other = flatten_named(a, name="a"), flatten_named(b, name="b")
    check_like(other.leaves, flat.leaves, name="b", other="a")
    check_finite(flat.leaves, name="a")
    check_finite(other.leaves, name="b")
    sizes = spec.check_leaves(flat.leaves, absent_paths(a))
    counted = counted_axes(spec, flat.leaves, ignored)
    left, right = ({p: on_host(of.leaves[p]) for p in counted} for of in (flat, other))
    (spec, left), (_, right) = apart(spec, left), apart(spec, right)
    counted = counted_axes(spec, left, frozenset())
    return best_match(
        spec,
        sizes,
        left,
        right,
        counted,
        random,
        restarts=restarts,
        max_sweeps=max_sweeps,
        tol=tol,
        optimistic=optimistic,
    )


def best_match(
    spec: PermutationSpec,
    sizes: Mapping[str, int],
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    counted: Any,
    random: Any,
    *,
    restarts: int = 0,
    max_sweeps: int = 100,
    tol: float = 1e-12,
    optimistic: bool | None = None,
    bound: float | None = None,
) -> Alignment:
    """The best of several searches, on leaves that have been checked; see `match_weights`.

    Args:
        spec: The groups.
        sizes: Their sizes.
        left: The leaves that count of the model to align to, on the host.
        right: The leaves that count of the model to permute, on the host.
        counted: Which leaves count, by path, as `counted_axes` returns them.
        random: Generator that decides the order of groups and where further searches start.
        restarts: As in `match_weights`.
        max_sweeps: As in `match_weights`.
        tol: As in `match_weights`.
        optimistic: As in `match_weights`.
        bound: What no permutations exceed, if known; by default what a copy reaches.
    """
    own = random.spawn(1)[0]  # so that restarts draw what they would without it
    if bound is None:
        bound = sum(dot(v, v) for of in (left, right) for v in of.values()) / 2

    def search(start: Mapping[str, np.ndarray], random: np.random.Generator) -> Alignment:
        return search_blocks(spec, left, right, counted, start, random, max_sweeps, tol)

    best: Alignment | None = None
    for attempt in range(restarts + 1):
        start = {group: start_of(spec, sizes, group, random, attempt) for group in sizes}
        alignment = search(start, random)
        if best is None or alignment.objective[-1] > best.objective[-1]:
            best = alignment
    assert best is not None  # range(restarts + 1) is not empty
    if optimistic is not False and best.objective[-1] < (1 - _ROUNDING) * bound:
        least = 0.0 if optimistic or _entangled(spec, counted) else _ALIKE
        start = optimistic_start(spec, sizes, left, right, counted, least)
        if start is not None:
            alignment = search(start, own)
            if alignment.objective[-1] > best.objective[-1]:
                best = alignment
    return dataclasses.replace(best, bound=float(bound))


def _entangled(
    spec: PermutationSpec, counted: Mapping[str, Mapping[str, tuple[Axis, ...]]]
) -> bool:
    """Whether groups nest, or some leaf has several on the side that it reads or writes."""
    for axes in counted.values():
        roles = [{axis.role for axis in places} for places in axes.values()]
        if any(one & other for one, other in itertools.combinations(roles, 2)):
            return True
    return bool(spec.within)


def _spec(
    net: Network | PermutationSpec, norm_statistics: bool, ignore: Collection[str]
) -> tuple[PermutationSpec, frozenset[str]]:
    """The spec, and the paths of leaves that do not count."""
    if isinstance(ignore, str):
        raise TypeError(f'`ignore` must be a collection of leaf paths, got a string: ["{ignore}"]?')
    ignored = frozenset(ignore)
    if isinstance(net, PermutationSpec):
        return net, ignored
    check_net(net, other="or a PermutationSpec")
    warn_of_fixed(net)
    return net.spec, ignored if norm_statistics else ignored | net.statistics
