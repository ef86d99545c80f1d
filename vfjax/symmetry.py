"""Permutation symmetries of a network's parameters, as values: write, print, compare, apply.

Permuting the output channels of one layer, and the input channels of whatever reads them, leaves
the network's function unchanged. A `PermutationSpec` lists which axes of which leaves move
together. `vfjax.trace` reads it off the network (`net.spec`); it can also be written by hand:

    PermutationSpec({
        "hidden": [("dense_0/kernel", 1, "out"), ("dense_0/bias", 0), ("dense_1/kernel", 0, "in")],
    })

More general maps of a group, such as the merge and unmerge matrices of ZipIt! or transport plans,
go through the same description: see `PermutationSpec.apply`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._axes import Axis, FixedAxis, absent_paths, as_axis, map_axis, size_at
from vfjax._maps import (
    as_array,
    check_matrices,
    check_permutation,
    compose,
    contract,
    invert,
    take,
)
from vfjax._propagate import Propagation
from vfjax._propagate.groups import named_groups
from vfjax._tree import check_finite, flatten_named, some

__all__ = [
    "Axis",
    "FixedAxis",
    "PermutationSpec",
    "check_spec",
    "compose",
    "from_propagation",
    "invert",
]

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PermutationSpec:
    """Which axes of a parameter tree can be permuted together.

    Two specs are equal if they partition the same places (path, axis, block) with the same roles
    into the same groups. Names of groups, their order, sizes and `fixed` do not count, so that a
    spec written by hand equals an inferred one.

    Attributes:
        groups: Places by name of the group, in order. Tuples `(path, axis)`, `(path, axis, role)`
            and `(path, axis, role, outer, inner)` are turned into `Axis`.
        sizes: Number of entries by group; empty in a spec written by hand, whose sizes are found
            on use (`validate` returns them).
        fixed: Axes without symmetry, and why.

    Raises:
        TypeError: If a place is no such tuple.
        ValueError: If a role is unknown, an axis negative, or a place listed twice.

    Example:
        >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("b", 0), ("v", 0, "in")]})
        >>> spec
        PermutationSpec(1 group)
          h: w[1] out, b[0], v[0] in
        >>> tree = {"w": np.array([[1, 2]]), "b": np.array([3, 4]), "v": np.array([[5], [6]])}
        >>> spec.permute(tree, {"h": [1, 0]})["b"]
        array([4, 3])
    """

    groups: Mapping[str, Sequence[Axis]]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fixed: Sequence[FixedAxis] = ()

    def __post_init__(self) -> None:
        groups = {name: tuple(as_axis(name, a) for a in axes) for name, axes in self.groups.items()}
        owner: dict[Axis, str] = {}
        for name, axes in groups.items():
            for a in axes:
                place = a._replace(role="")
                if place in owner:
                    raise ValueError(
                        f"groups: axis {a.axis} of '{a.path}' is listed twice, in "
                        f"{owner[place]!r} and in {name!r}; it can follow one permutation only."
                    )
                owner[place] = name
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "sizes", {name: int(n) for name, n in self.sizes.items()})
        object.__setattr__(self, "fixed", tuple(FixedAxis(*entry) for entry in self.fixed))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PermutationSpec):
            return NotImplemented
        return self._partition() == other._partition()

    def __hash__(self) -> int:
        return hash(self._partition())

    def __repr__(self) -> str:
        count = len(self.groups)
        lines = [f"PermutationSpec({count} group{'' if count == 1 else 's'})"]
        for name, axes in self.groups.items():
            size = f" ({self.sizes[name]})" if name in self.sizes else ""
            shown = ", ".join(str(a) for a in axes[:6])
            more = f", and {len(axes) - 6} more" if len(axes) > 6 else ""
            lines.append(f"  {name}{size}: {shown}{more}")
        if self.fixed:
            causes = Counter(entry.primitive for entry in self.fixed)
            summary = ", ".join(f"{n} by {cause}" for cause, n in causes.most_common())
            lines.append(f"  fixed axes: {summary}")
        return "\n".join(lines)

    def validate(
        self, variables: PyTree, permutations: Mapping[str, Any] | None = None
    ) -> dict[str, int]:
        """Checks that the spec fits a parameter tree, and permutations the spec.

        Args:
            variables: A parameter tree; None may stand in place of absent leaves.
            permutations: Permutations by group, to check too.

        Returns:
            Sizes of the groups of which a leaf is present.

        Raises:
            ValueError: If a path is unknown, an axis out of range, the sizes of a group differ
                between its leaves, blocks overlap, a group is unknown, or a permutation is not one.
            TypeError: If a permutation is not of integers.

        Example:
            >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
            >>> spec.validate({"w": np.ones((2, 3)), "v": np.ones((3, 1))})
            {'h': 3}
        """
        flat, absent = flatten_named(variables)[0], absent_paths(variables)
        sizes: dict[str, int] = {}
        spans: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        for name, axes in self.groups.items():
            for a in axes:
                if a.path in flat:
                    size = size_at(name, a, np.shape(flat[a.path]))
                    self._check_size(name, a, size, sizes)
                    span = (a.inner, a.inner * size, name)
                    spans.setdefault((a.path, a.axis), []).append(span)
                elif not any(a.path == p or a.path.startswith(p + "/") for p in absent):
                    raise ValueError(
                        f"variables has no leaf '{a.path}', which group {name!r} of the spec "
                        f"lists; it has {some(flat)}."
                    )
        for (path, axis), along in spans.items():
            along.sort()
            for (_, end, one), (start, _, other) in zip(along, along[1:], strict=False):
                if end and start % end:
                    raise ValueError(
                        f"groups {one!r} and {other!r} overlap on axis {axis} of '{path}'; check "
                        "their outer and inner."
                    )
        if permutations is not None:
            self._check_permutations(permutations, {**self.sizes, **sizes})
        return sizes

    def permute(self, variables: PyTree, permutations: Mapping[str, Any]) -> PyTree:
        """Permutes the axes of every group: along them, `new = take(old, permutation)`.

        Args:
            variables: A parameter tree; None may stand in place of absent leaves.
            permutations: By group, an integer array `[n]`. Groups left out keep their order. May
                be traced (under `jit` or `vmap`).

        Returns:
            A tree like `variables`, of the same dtypes; numpy leaves stay numpy unless a
            permutation is a JAX array.

        Raises:
            TypeError: As `validate`.
            ValueError: As `validate`.

        Example:
            >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
            >>> tree = {"w": np.array([[1, 2, 3]]), "v": np.array([[4], [5], [6]])}
            >>> new = spec.permute(tree, {"h": [2, 0, 1]})
            >>> new["w"].tolist(), new["v"].tolist()
            ([[3, 1, 2]], [[6], [4], [5]])
        """
        self.validate(variables, permutations)
        indices = {name: as_array(p) for name, p in permutations.items()}

        def reorder(leaf: Any, a: Axis, permutation: Any) -> Any:
            return map_axis(leaf, a, lambda view, k: take(view, permutation, k))

        return self._map(variables, indices, reorder)

    def apply(self, variables: PyTree, maps: Mapping[str, tuple[Any, Any]]) -> PyTree:
        """Maps the axes of every group linearly, in float32 or better.

        With features `h' = M h` and `h = U h'`, what writes the group takes `M` and what reads it
        takes `U`: along "out" and "elementwise" axes `new[i] = sum_j M[i, j] old[j]`, along "in"
        axes `new[i] = sum_j old[j] U[j, i]`. A permutation `p` is `M[i, p[i]] = 1, U = M^T`.

        Args:
            variables: A parameter tree; None may stand in place of absent leaves.
            maps: By group, a pair of a merge matrix `M [m, n]` and an unmerge matrix `U [n, m]`.
                Groups left out stay as they are.

        Returns:
            A tree like `variables`, of the same dtypes, with m entries in place of n.

        Raises:
            TypeError: If a mapped leaf holds integers, or a map is no pair.
            ValueError: If a group is unknown, a matrix has the wrong shape, or the spec does not
                fit the tree.

        Example:
            >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
            >>> tree = {"w": np.float32([[1, 3]]), "v": np.float32([[1], [2]])}
            >>> merge, unmerge = np.float32([[0.5, 0.5]]), np.float32([[1], [1]])
            >>> new = spec.apply(tree, {"h": (merge, unmerge)})
            >>> new["w"].tolist(), new["v"].tolist()
            ([[2.0]], [[3.0]])

        Source: the merge and unmerge matrices of "ZipIt! Merging Models from Different Tasks
        without Training" (Stoica et al., 2024, section 4).
        """
        sizes = {**self.sizes, **self.validate(variables)}
        self.check_known("maps", maps)
        for name, pair in maps.items():
            check_matrices(name, pair, sizes.get(name))

        def transform(leaf: Any, a: Axis, pair: tuple[Any, Any]) -> Any:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise TypeError(
                    f"variables holds {jnp.result_type(leaf)} at '{a.path}', and a matrix cannot "
                    "map integers; leave its group out of `maps`, or the leaf out of the spec."
                )
            matrix = jnp.asarray(pair[1]).T if a.role == "in" else pair[0]
            return map_axis(leaf, a, lambda view, k: contract(matrix, view, k))

        return self._map(variables, maps, transform)

    def random(self, key: Array, variables: PyTree | None = None) -> dict[str, Array]:
        """Random permutations of all groups.

        Args:
            key: A random key.
            variables: A parameter tree, needed where the spec was written by hand.

        Returns:
            By group, a permutation, int32 `[n]`.

        Raises:
            ValueError: If sizes are unknown.

        Example:
            >>> spec = PermutationSpec({"h": [("w", 1, "out")]}, sizes={"h": 5})
            >>> sorted(spec.random(jax.random.key(0))["h"].tolist())
            [0, 1, 2, 3, 4]
        """
        sizes = {**self.sizes, **({} if variables is None else self.validate(variables))}
        unknown = [name for name in self.groups if name not in sizes]
        if unknown:
            raise ValueError(
                f"the spec does not know the sizes of {some(unknown)}; give `variables` that hold "
                "leaves of these groups."
            )
        keys = jax.random.split(key, max(len(self.groups), 1))
        return {
            name: jax.random.permutation(keys[k], sizes[name]) for k, name in enumerate(self.groups)
        }

    def _partition(self) -> frozenset[frozenset[Axis]]:
        return frozenset(frozenset(axes) for axes in self.groups.values() if axes)

    def _map(self, variables: PyTree, by_group: Mapping[str, Any], fn: Callable) -> PyTree:
        """Replaces a leaf by `fn(leaf, axis, by_group[name])`, for each place of a given group."""
        flat, treedef = flatten_named(variables)
        for name, axes in self.groups.items():
            for a in axes if name in by_group else ():
                if a.path in flat:
                    flat[a.path] = fn(flat[a.path], a, by_group[name])
        return jax.tree.unflatten(treedef, list(flat.values()))

    def _check_size(self, name: str, a: Axis, size: int, sizes: dict[str, int]) -> None:
        """Checks the size of a group at one place against the others; records the first."""
        known = sizes.setdefault(name, self.sizes.get(name, size))
        if size != known:
            raise ValueError(
                f"group {name!r} has {size} entries on axis {a.axis} of '{a.path}' but {known} "
                f"before ({', '.join(map(str, self.groups[name][:3]))}); a group has one size."
            )

    def check_known(self, argument: str, given: Mapping[str, Any]) -> None:
        """Checks that maps by group are of groups of this spec.

        Args:
            argument: The caller's name for them.
            given: Anything by group.

        Raises:
            ValueError: If a group is unknown.
        """
        for name in given:
            if name not in self.groups:
                raise ValueError(
                    f"{argument} has the group {name!r}, which the spec does not; it has "
                    f"{some(self.groups)}."
                )

    def _check_permutations(self, given: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        self.check_known("permutations", given)
        for name, permutation in given.items():
            check_permutation(name, permutation, sizes.get(name))


def check_spec(net: Any, variables: PyTree, x: PyTree, *, key: Array | None = None) -> float:
    """Permutes every group at random and returns how much the output changes.

    Args:
        net: A `Network`, or anything with `spec` and `run(variables, x)`.
        variables: A parameter tree.
        x: An input.
        key: A random key; by default a fixed one.

    Returns:
        The largest absolute change of an entry of the output. Compare it with the size of the
        output: float32 rounding accounts for about 1e-6 of it. NaN if the output holds NaN.

    Raises:
        TypeError: If `net` has no spec or cannot be run.
        ValueError: If `variables` does not fit the spec, or holds NaN or infinite values.

    Example:
        >>> import types
        >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
        >>> net = types.SimpleNamespace(spec=spec, run=lambda p, x: x @ p["w"] @ p["v"])
        >>> tree = {"w": np.eye(3, dtype=np.float32), "v": np.ones((3, 2), np.float32)}
        >>> check_spec(net, tree, np.ones((1, 3), np.float32))
        0.0
    """
    if not hasattr(net, "spec") or not hasattr(net, "run"):
        raise TypeError(
            f"net must be a Network, or have spec and run(variables, x); it was a "
            f"{type(net).__name__}. Trace the function that applies the model: "
            "net = vfjax.trace(apply_fn, variables, x)."
        )
    key = jax.random.key(0) if key is None else key
    # Infinities that stay infinite would hide any change.
    check_finite(flatten_named(variables)[0], name="variables")
    permutations = net.spec.random(key, variables)
    before = jax.tree.leaves(net.run(variables, x))
    after = jax.tree.leaves(net.run(net.spec.permute(variables, permutations), x))
    worst = np.float64(0)
    for a, b in zip(before, after, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        kind = np.complex128 if np.iscomplexobj(a) else np.float64
        with np.errstate(invalid="ignore"):  # a masked logit is -inf before and after
            change = np.where(a == b, 0, np.abs(a.astype(kind) - b.astype(kind)))
        worst = np.maximum(worst, change.max(initial=0))  # np.maximum keeps NaN
    return float(worst)


def from_propagation(
    propagation: Propagation, paths: Sequence[str]
) -> tuple[PermutationSpec, dict[int, str]]:
    """The spec of a network whose axes have been followed.

    Args:
        propagation: What `_propagate.propagate` found.
        paths: Paths of the variables' leaves, in their order.

    Returns:
        The spec, and the name of every group by its id in `propagation.axes`.
    """
    groups, sizes, names = named_groups(propagation, paths)
    path_of = dict(zip(propagation.leaves, paths, strict=True))
    fixed = [FixedAxis(path_of[f.leaf], f.axis, f.primitive, f.where) for f in propagation.fixed]
    places = {name: tuple(Axis(*entry) for entry in entries) for name, entries in groups.items()}
    return PermutationSpec(places, sizes, fixed), names
