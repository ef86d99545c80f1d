"""Coordinate ascent over groups: each step assigns one group, with all others held fixed.

`_weights` runs the search between two models; `_universe` runs it, by way of `_cycles`, between one
model and the sum of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees.options import check_key
from vfjax._types import Array
from vfjax.align._assignment import Alignment, assign_within
from vfjax.symmetry._group_maps import compose
from vfjax.symmetry._places import Axis, grid, permute_at, rows
from vfjax.symmetry._spec import PermutationSpec


def generator_of(key: Array) -> np.random.Generator:
    """A NumPy generator seeded from a JAX key: the search runs on the host."""
    check_key(key)
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))


def counted_axes(
    spec: PermutationSpec, named: Mapping[str, Any], ignored: frozenset[str]
) -> dict[str, dict[str, tuple[Axis, ...]]]:
    """Which axes carry which group, by the path of every leaf that counts."""
    unknown = sorted(ignored - named.keys())
    if unknown:
        raise ValueError(f"`ignore` names leaves that the trees do not have: {unknown[:3]}")
    counted: dict[str, dict[str, tuple[Axis, ...]]] = {}
    for group, axes in spec.groups.items():
        for axis in axes:
            if axis.path not in named or axis.path in ignored:
                continue
            if jnp.issubdtype(jnp.result_type(named[axis.path]), jnp.inexact):
                leaf = counted.setdefault(axis.path, {})
                leaf[group] = (*leaf.get(group, ()), axis)
    return counted


def as_real(leaf: Any) -> np.ndarray:
    """A leaf on the host; complex numbers as pairs of real ones, along a new last axis.

    The inner product of the pairs is the real part of that of the numbers, and their distance is
    the same.
    """
    leaf = np.asarray(leaf)
    return np.stack([leaf.real, leaf.imag], -1) if np.iscomplexobj(leaf) else leaf


def on_host(leaf: Any) -> np.ndarray:
    """A leaf on the host, in float32 or better, with real numbers in place of complex ones."""
    leaf = as_real(leaf)
    return np.ascontiguousarray(leaf, np.float64 if leaf.dtype == np.float64 else np.float32)


def start_of(
    spec: PermutationSpec,
    sizes: Mapping[str, int],
    group: str,
    random: np.random.Generator,
    attempt: int,
) -> np.ndarray:
    """Where a search starts: at the identity on the first attempt, then at random."""
    n = sizes[group]
    shape = (sizes[spec.within[group]], n) if group in spec.within else (n,)
    start = np.broadcast_to(np.arange(n), shape)
    return (random.permuted(start, axis=-1) if attempt else start).astype(np.int32)


def _blocks(
    spec: PermutationSpec, counted: Mapping[str, Mapping[str, tuple[Axis, ...]]]
) -> dict[str, tuple[str, ...]]:
    """Groups that are assigned together, by owner: the owner itself, then those within it."""
    groups = [g for g in spec.groups if any(g in held for held in counted.values())]
    return {
        group: (group, *(g for g in groups if spec.within.get(g) == group))
        for group in groups
        if group not in spec.within
    }


def search_blocks(
    spec: PermutationSpec,
    left: Mapping[str, np.ndarray],
    right: Mapping[str, np.ndarray],
    counted: Mapping[str, Mapping[str, tuple[Axis, ...]]],
    start: Mapping[str, np.ndarray],
    random: np.random.Generator,
    max_sweeps: int,
    tol: float,
) -> Alignment:
    """Runs one coordinate ascent from given permutations."""
    permutations = dict(start)
    blocks = _blocks(spec, counted)
    # The leaves of b as currently permuted: gains below are relative to these, so assigning the
    # identity means that nothing changes.
    moved = dict(right)
    for block in blocks.values():
        moved = {path: permuted(spec, v, counted[path], block, start) for path, v in moved.items()}
    objective = sum(dot(left[path], moved[path]) for path in counted)
    norms = {path: np.sqrt(dot(left[path], left[path]) * dot(b, b)) for path, b in moved.items()}
    # Blocks whose gains may have changed since they were last assigned. The others are at their
    # optimum, so assigning them again would move nothing.
    stale, order = set(blocks), list(blocks)
    history: list[float] = []
    while not history or (stale and len(history) < max_sweeps):
        for group in (order[index] for index in random.permutation(len(order))):
            if group not in stale:
                continue
            stale.remove(group)
            block = blocks[group]
            held = {p: axes for p, axes in counted.items() if any(g in axes for g in block)}
            step = _assign(spec, left, moved, held, block)
            if all((p == np.arange(p.shape[-1])).all() for p in step.values()):
                continue
            new = {path: permuted(spec, moved[path], held[path], block, step) for path in held}
            # Summed again in float64: a gain in float32 may be mere rounding, and for a leaf with
            # the group on two axes it is only the linear part of the rise.
            places = {path: [a for g in block for a in held[path].get(g, ())] for path in held}
            rise = sum(
                _rise(left[path], moved[path], new[path], places[path], step[group])
                for path in held
            )
            if rise > tol * sum(norms[path] for path in held):
                moved.update(new)
                current = {g: permutations[g] for g in block}
                permutations.update(compose(current, step, within=spec.within))
                objective += rise
                touched = {spec.within.get(g, g) for axes in held.values() for g in axes}
                stale.update(touched - {group})
                if any(len(axes.get(g, ())) > 1 for axes in held.values() for g in block):
                    stale.add(group)
        history.append(float(objective))
    return Alignment(permutations, tuple(history), not stale)


def _assign(
    spec: PermutationSpec,
    left: Mapping[str, np.ndarray],
    moved: Mapping[str, np.ndarray],
    held: Mapping[str, Mapping[str, tuple[Axis, ...]]],
    block: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """The best permutations of a block's groups, the others held fixed."""
    group, *inside = block
    places = [(path, a) for path, axes in held.items() for a in axes.get(group, ())]
    gain = cast(np.ndarray, sum(products(left[path], moved[path], a) for path, a in places))
    inner = {}
    for name in inside:
        gains = 0
        for path, axes in held.items():
            for a in axes.get(name, ()):
                owner = cast(Axis, spec.owner(name, a))
                one, other = (grid(leaf, a, owner) for leaf in (left[path], moved[path]))
                h, n, _ = one.shape
                product = one.reshape(h * n, -1) @ other.reshape(h * n, -1).T
                gains = gains + product.reshape(h, n, h, n).swapaxes(1, 2)
        inner[name] = cast(np.ndarray, gains)
        # Inner products of whole owners include the dims in place (the diagonal); without these,
        # only the gain of the owner itself is left.
        gain = gain - np.einsum("ijkk->ij", inner[name])
    outer, within = assign_within(gain, inner)
    return {group: outer, **within}


def permuted(
    spec: PermutationSpec,
    leaf: np.ndarray,
    axes: Mapping[str, tuple[Axis, ...]],
    block: tuple[str, ...],
    permutations: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Permutes the axes of a block's groups in a leaf, owners first."""
    for group in block:
        for a in axes.get(group, ()):
            leaf = permute_at(leaf, a, spec.owner(group, a), permutations[group])
    return leaf


def products(a: np.ndarray, b: np.ndarray, axis: Axis) -> np.ndarray:
    """Inner products `[n, n]` of the slices of two leaves along one group's axis."""
    a, b = rows(a, axis), rows(b, axis)
    before, _, after = a.shape
    if after == 1:
        return a[..., 0].T @ b[..., 0]
    if before <= after:
        out = a[0] @ b[0].T
        for x, y in zip(a[1:], b[1:], strict=True):
            out += x @ y.T
        return out
    return np.tensordot(a, b, axes=((0, 2), (0, 2)))


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """Inner product of two leaves, summed in float64."""
    return float(np.vdot(a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)))


def _rise(
    a: np.ndarray, old: np.ndarray, new: np.ndarray, axes: Sequence[Axis], step: np.ndarray
) -> float:
    """How much the inner product with `a` rises from `old` to `new`, in float64."""
    if len(axes) == 1:
        # Only units that move can differ, and towards the end of a search few do.
        units = np.flatnonzero(step != np.arange(len(step)))
        a, old, new = (np.take(rows(v, axes[0]), units, axis=1) for v in (a, old, new))
    return float(np.vdot(a.astype(np.float64, copy=False), new.astype(np.float64) - old))
