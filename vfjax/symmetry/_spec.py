"""Permutation specs: which axes of which leaves move together, and applying maps to them."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees import flatten_named, on_host, some
from vfjax._trees.concrete import check_one_device, check_values
from vfjax._types import Array, PyTree
from vfjax.symmetry._also import Also, extended, warn_of_unread
from vfjax.symmetry._entries import bare, by_piece, divided
from vfjax.symmetry._group_maps import (
    as_array,
    as_permutation,
    check_by_group,
    check_matrices,
    check_permutations,
    contract,
)
from vfjax.symmetry._places import (
    Axis,
    FixedAxis,
    absent_paths,
    as_axis,
    map_axis,
    map_within,
    moved,
    overlap,
    owners,
    permute_at,
    size_at,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PermutationSpec:
    """Which axes of a parameter tree can be permuted together.

    Two specs are equal if they partition the same places (path, axis, block) with the same roles
    into the same groups. The names and order of groups and all other attributes do not count, so a
    spec written by hand can equal an inferred one.

    Attributes:
        groups: Places by name of the group, in order. A tuple of the first fields of an `Axis`, at
            least `(path, axis)`, is converted to an `Axis`.
        sizes: Number of entries by group; empty in a spec written by hand, whose sizes are read off
            the tree on use (`validate` returns them).
        fixed: Axes without symmetry, and why.
        within: By group, its owner: the group inside each entry of which it may move independently.
            Wherever it has a place, the owner has one in the same leaf, around it or on another
            axis.
        scaling: Paths of leaves with "elementwise" places that multiply features, as the scale of
            a norm does; other such leaves are added to features.
        rigid: For groups that can only be permuted, the leaf that forbids other maps, and why: a
            kernel that one layer writes with and another reads with, or a leaf under a root.

    Raises:
        TypeError: If a place is not such a tuple.
        ValueError: If a role is unknown, an axis is negative, a place is listed twice, or `within`
            names unknown groups or an owner that itself has an owner.

    Example:
        >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("b", 0), ("v", 0, "in")]})
        >>> spec
        PermutationSpec(1 group)
          h: w[1] out, b[0], v[0] in
        >>> spec == PermutationSpec({"hidden": [("v", 0, "in"), ("w", 1, "out"), ("b", 0)]})
        True
    """

    groups: Mapping[str, Sequence[Axis]]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fixed: Sequence[FixedAxis] = ()
    within: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scaling: Collection[str] = frozenset()
    rigid: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
        object.__setattr__(self, "within", dict(self.within))
        object.__setattr__(self, "scaling", frozenset(self.scaling))
        object.__setattr__(self, "rigid", dict(self.rigid))
        self.check_known("within", [*self.within, *self.within.values()])
        self.check_known("rigid", self.rigid)
        for name, around in self.within.items():
            if around in self.within:
                raise ValueError(
                    f"within puts {name!r} inside {around!r}, which is inside another group itself."
                )

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
            size += f" in each of {self.within[name]}" if name in self.within else ""
            size += " only permuted" if name in self.rigid else ""
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
        """Checks that the spec fits a parameter tree, and that permutations fit the spec.

        Args:
            variables: A parameter tree, or a mask of one; None may stand in place of absent leaves,
                and a single bool in place of leaves that are masked as a whole.
            permutations: Permutations by group to check as well.

        Returns:
            The sizes of the groups that have a leaf in the tree.

        Raises:
            ValueError: If a path or a group is unknown, an axis is out of range, the sizes of a
                group differ between its leaves, blocks overlap, or an array of integers is not a
                permutation.
            TypeError: If a permutation does not hold integers.

        Example:
            >>> PermutationSpec({"h": [("w", 1, "out")]}).validate({"w": np.ones((2, 3))})
            {'h': 3}
        """
        flat = flatten_named(variables).leaves
        given, whole = _apart(flat)
        return self.check_leaves(given, [*absent_paths(variables), *whole], permutations)

    def check_leaves(
        self,
        flat: Mapping[str, Any],
        absent: Collection[str],
        permutations: Mapping[str, Any] | None = None,
    ) -> dict[str, int]:
        """Does the checks of `validate` on a flattened tree.

        Args:
            flat: Its leaves by path.
            absent: Paths at which the tree has None.
            permutations: As in `validate`.
        """
        sizes: dict[str, int] = {}
        along: dict[tuple[str, int], list[tuple[Axis, str]]] = {}
        for name, axes in self.groups.items():
            for a in axes:
                if a.path in flat:
                    size = size_at(name, a, np.shape(flat[a.path]))
                    self._check_size(name, a, size, sizes)
                    along.setdefault((a.path, a.axis), []).append((a, name))
                    self.owner(name, a)
                elif not any(a.path == p or a.path.startswith(p + "/") for p in absent):
                    raise ValueError(
                        f"variables has no leaf '{a.path}', which group {name!r} of the spec "
                        f"lists; it has {some(flat)}."
                    )
        for (path, axis), places in along.items():
            shape = np.shape(flat[path])
            for _, inside in divided(shape, places, lambda pair: pair[0]):
                pair = overlap(tuple(bare(a) for a, _ in inside), shape[axis])
                if pair is not None:
                    one, other = (inside[k][1] for k in pair)
                    raise ValueError(
                        f"groups {one!r} and {other!r} overlap on axis {axis} of '{path}'; check "
                        "their outer, inner, windows and entries."
                    )
        if permutations is not None:
            self._check_permutations(permutations, {**self.sizes, **sizes})
        return sizes

    def permute(
        self,
        variables: PyTree,
        permutations: Mapping[str, Any],
        *,
        also: Also | None = None,
    ) -> PyTree:
        """Permutes the axes of every group by `new = take(old, permutation)`.

        Leaves that the network does not read have no group: state that only training reads, such as
        a second copy of a running average, the moments of an optimiser, or a head of its own. They
        keep their order unless `also` says what they follow.

        Args:
            variables: A parameter tree, or a mask of one (`vfjax.prune.masks`); None may stand in
                place of absent leaves, and a single bool for a leaf that is masked as a whole.
            permutations: By group, an integer array `[n]`, or `[h, n]` for a group within one of h
                entries: inside the i-th of these, in their new order, `new = take(old,
                permutation[i])`. Groups left out keep their order. May be traced (under `jit` or
                `vmap`).
            also: Which leaves that are not read move too. `{"hidden": "average"}`: each with the
                component (or `/`-joined components) `hidden` in its path follows the leaf with
                `average` there, so that `{"opt/mu": "params"}` moves a whole tree of moments.
                `{"head/kernel": {0: "h"}}`: axis 0 of this leaf holds the group `h`. `{}`: none,
                and without a warning.

        Returns:
            A tree like `variables`, of the same dtypes; numpy leaves stay numpy unless a
            permutation is a JAX array, and those of a dtype that JAX would narrow unless it is
            traced.

        Raises:
            TypeError: As `validate`, or if `also` is not such a mapping.
            ValueError: As `validate`, or if an entry of `also` fits no leaf, or a leaf of another
                shape than the one that it would follow.

        Warns:
            UserWarning: If leaves that are not read have an axis as long as one that is permuted,
                and `also` is not given.

        Example:
            >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
            >>> tree = {"w": np.array([[1, 2]]), "v": np.array([[3], [4]])}
            >>> tree |= {"momentum": {"w": np.array([[5, 6]])}}
            >>> new = spec.permute(tree, {"h": [1, 0]}, also={"momentum/w": "w"})
            >>> new["w"].tolist(), new["momentum"]["w"].tolist()
            ([[2, 1]], [[6, 5]])
        """
        check_by_group("permutations", permutations)
        self.validate(variables, permutations)
        check_values("permuting works", variables=variables)
        indices = {name: as_array(p) for name, p in permutations.items()}
        more = self._extended(variables, indices, also)
        try:
            return (self if more is None else more)._map(variables, indices, permute_at)
        except ValueError:
            check_one_device(variables=variables, permutations=permutations)
            raise

    def apply(
        self,
        variables: PyTree,
        maps: Mapping[str, tuple[Any, Any]],
        *,
        also: Also | None = None,
    ) -> PyTree:
        """Maps the axes of every group linearly, in float32 or better.

        With features `h' = M h` and `h = U h'`, leaves that write the group take `M` and leaves
        that read it take `U`: along "out" and "elementwise" axes `new[i] = sum_j M[i, j] old[j]`,
        along "in" axes `new[i] = sum_j old[j] U[j, i]`. A permutation `p` is `M[i, p[i]] = 1, U =
        M^T`.

        A leaf that multiplies features entry by entry (`scaling`) would have to become the matrix
        `M diag(old) U`. Where a row of M averages (no entry is negative and they sum to one), the
        average `M old` replaces it; elsewhere the diagonal of that matrix does, which keeps a
        scale of ones in any basis.

        Args:
            variables: A parameter tree; None may stand in place of absent leaves.
            maps: By group, a pair of a merge matrix `M [m, n]` and an unmerge matrix `U [n, m]`;
                for a group within one of h entries also `[h, m, n]` and `[h, n, m]`, a map for each
                of these in their new order. Groups left out stay as they are.
            also: Which leaves that are not read are mapped too, as in `permute`.

        Returns:
            A tree like `variables`, of the same dtypes, with m entries in place of n.

        Raises:
            TypeError: If a mapped leaf holds integers, or a map is not a pair.
            ValueError: If a group is unknown or `rigid`, a matrix has the wrong shape, or the spec
                or `also` does not fit the tree.

        Example:
            >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
            >>> tree = {"w": np.float32([[1, 3]]), "v": np.float32([[1], [2]])}
            >>> merge, unmerge = np.float32([[0.5, 0.5]]), np.float32([[1], [1]])
            >>> new = spec.apply(tree, {"h": (merge, unmerge)})
            >>> new["w"].tolist(), new["v"].tolist()
            ([[2.0]], [[3.0]])

        Source: the merge and unmerge matrices of "ZipIt! Merging Models from Different Tasks
        without Training" (Stoica et al., 2024, section 4). Its code maps scales as it does biases.
        """
        sizes = {**self.sizes, **self.validate(variables)}
        self.check_known("maps", maps)
        # No warning: what a mixture of features means to a leaf that is not read is not known.
        more = self._extended(variables, maps, {} if also is None else also)
        if more is not None:
            return more.apply(variables, maps, also={})
        for name, pair in maps.items():
            check_matrices(name, pair, sizes.get(name), within=name in self.within)
        self._check_owners(maps, sizes)
        self._check_rigid(maps)

        def transform(leaf: Any, a: Axis, owner: Axis | None, pair: tuple[Any, Any]) -> Any:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise TypeError(
                    f"variables holds {jnp.result_type(leaf)} at '{a.path}', and a matrix cannot "
                    "map integers; leave its group out of `maps`, or the leaf out of the spec."
                )
            library: Any = np if on_host(leaf, *pair) else jnp
            merge, unmerge = library.asarray(pair[0]), library.asarray(pair[1]).mT
            matrix = unmerge if a.role == "in" else merge
            if a.path in self.scaling and a.role == "elementwise":
                average = (merge >= 0).all(-1) & (abs(merge.sum(-1) - 1) < 1e-3)
                matrix = library.where(average[..., None], merge, merge * unmerge)
            if owner is None or matrix.ndim == 2:
                return map_axis(leaf, a, lambda view, k: contract(matrix, view, k))
            return map_within(leaf, a, owner, lambda view, k, i: contract(matrix[i], view, k))

        grown = {name: np.shape(pair[0])[-2] for name, pair in maps.items()}
        return self._map(variables, maps, transform, grown)

    def random(self, key: Array, variables: PyTree | None = None) -> dict[str, Array]:
        """Random permutations of all groups.

        Args:
            key: A random key.
            variables: A parameter tree, needed if the spec was written by hand.

        Returns:
            By group, a permutation, int32 `[n]`, or `[h, n]` for a group within one of h entries.

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
        drawn = {}
        for key, name in zip(keys, self.groups, strict=False):
            draw = functools.partial(jax.random.permutation, x=sizes[name])
            if name in self.within:
                each = jax.random.split(key, sizes[self.within[name]])
                drawn[name] = jnp.stack([draw(k) for k in each])
            else:
                drawn[name] = draw(key)
        return drawn

    def owner(self, name: str, a: Axis) -> Axis | None:
        """The place of a group's owner around one of the group's places.

        Args:
            name: A group.
            a: One of its places.

        Returns:
            The owner's place in the same leaf, or None if the group is not within another.

        Raises:
            ValueError: If the owner has no such place, or more than one.
        """
        if name not in self.within:
            return None
        around = owners(a, self.groups[self.within[name]])
        if len(around) != 1:
            raise ValueError(
                f"within: at {a}, {name!r} must be inside one place of {self.within[name]!r}, "
                f"which has {len(around)} in that leaf around it or on another axis."
            )
        return around[0]

    def _extended(
        self, variables: PyTree, by_group: Mapping[str, Any], also: Also | None
    ) -> PermutationSpec | None:
        """The spec with the places that `also` adds, or None; warns of leaves left out."""
        if also is None:
            warn_of_unread(self.groups, self.fixed, variables, by_group)
        if not also:
            return None
        more = extended(self.groups, self.fixed, flatten_named(variables).leaves, also)
        spec = dataclasses.replace(self, groups=more)
        spec.validate(variables)
        return spec

    def _partition(self) -> frozenset[frozenset[Axis]]:
        return frozenset(frozenset(axes) for axes in self.groups.values() if axes)

    def _map(
        self,
        variables: PyTree,
        by_group: Mapping[str, Any],
        fn: Callable,
        sizes: Mapping[str, int] | None = None,
    ) -> PyTree:
        """Replaces a leaf by `fn(leaf, a, owner, by_group[name])` at each place of each group.

        `sizes` is the number of entries of each group afterwards, if `fn` changes it.
        """
        flat, treedef = flatten_named(variables)
        given, _ = _apart(flat)
        places: dict[str, list[tuple[str, Axis, Axis | None]]] = {}
        # Owners first: maps within them are given in the owners' new order.
        for name in sorted(self.groups, key=self.within.__contains__):
            for a in self.groups[name] if name in by_group else ():
                if a.path in given:
                    places.setdefault(a.path, []).append((name, a, self.owner(name, a)))

        def mapped(leaf: Any, todo: Sequence[tuple[str, Axis, Axis | None]]) -> Any:
            todo = [(name, bare(a), owner and bare(owner)) for name, a, owner in todo]
            while todo:
                (name, a, owner), *todo = todo
                length = np.shape(leaf)[a.axis]
                leaf = fn(leaf, a, owner, by_group[name])
                if sizes is not None and np.shape(leaf)[a.axis] != length:
                    move = functools.partial(moved, mapped=a, length=length, m=sizes[name])
                    todo = [(other, move(b), c and move(c)) for other, b, c in todo]
            return leaf

        for path, todo in places.items():
            flat[path] = by_piece(flat[path], todo, lambda each: each[1], mapped)
        return jax.tree.unflatten(treedef, list(flat.values()))

    def _check_size(self, name: str, a: Axis, size: int, sizes: dict[str, int]) -> None:
        """Checks the size of a group at one place against the others; records the first."""
        known = sizes.setdefault(name, self.sizes.get(name, size))
        if size != known:
            raise ValueError(
                f"group {name!r} has {size} entries on axis {a.axis} of '{a.path}' but {known} "
                f"before ({', '.join(map(str, self.groups[name][:3]))}); a group has one size."
            )

    def check_known(self, argument: str, given: Iterable[str]) -> None:
        """Checks that names are groups of this spec.

        Args:
            argument: The caller's name for them.
            given: Names of groups, or a mapping from them.

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
        check_by_group("permutations", given)
        self.check_known("permutations", given)
        check_permutations(given, sizes, self.within)

    def _check_owners(self, maps: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        """Checks that a stack of maps has one for each entry of the group's owner."""
        for name, owner in self.within.items():
            heads = np.shape(maps[owner][0])[0] if owner in maps else sizes.get(owner)
            shape = np.shape(maps[name][0]) if name in maps else ()
            if len(shape) == 3 and heads not in (None, shape[0]):
                raise ValueError(
                    f"maps[{name!r}] must hold one map for each of the {heads} entries of "
                    f"{owner!r}; it holds {shape[0]}."
                )

    def _check_rigid(self, maps: Mapping[str, Any]) -> None:
        """Checks that groups that can only be permuted are mapped by permutations."""
        for name in maps.keys() & self.rigid.keys():
            if as_permutation(*maps[name]) is None:
                raise ValueError(
                    f"maps[{name!r}] mixes features, and this group can only be permuted: "
                    f"{self.rigid[name]}. Leave it out of `maps`, or permute it, as matchers do."
                )


def _apart(flat: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The leaves that have axes, and the paths of those that a mask has as a single bool."""
    whole = {
        path
        for path, leaf in flat.items()
        if not np.ndim(leaf) and jnp.result_type(leaf) == np.bool_
    }
    return {path: leaf for path, leaf in flat.items() if path not in whole}, whole
