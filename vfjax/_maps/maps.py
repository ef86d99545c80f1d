"""`Maps`: linear maps of every model's groups, which matchers beyond permutations return."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vfjax._deprecated import renamed
from vfjax._maps.labels import check_labels, pairs_of, sizes_of
from vfjax._maps.norm_units import in_output_units, mixed_scales
from vfjax._maps.parts import permuting
from vfjax._trees import with_leaves, without
from vfjax._trees.options import whole
from vfjax._types import PyTree
from vfjax.network._arguments import networks
from vfjax.network._network import Network
from vfjax.symmetry._also import Also
from vfjax.symmetry._group_maps import as_permutation, check_by_group, check_maps, check_permutation

# Callers that only want the function need no leaf that it does not read.
_NOTHING: Also = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Maps:
    """Merge and unmerge matrices of K models; the mean of the mapped models is their merge.

    Maps that merge features within a model (`of_labels`) divide by the number of all merged
    features and include the factor K, so that the plain mean is the merge. Other weights do not
    give a merge: even the weights (1, 0) do not return a model, but one with its features merged
    and scaled.

    Attributes:
        maps: Per model and group, `(M [m, n], U [n, m])`: leaves that write the group take M,
            leaves that read it take U. A group that a model's mapping lacks is left unchanged. A
            group that moves within another of h entries (`net.spec.within`) may have `(M [h, m, n],
            U [h, n, m])`.
        sizes: By group, how many features of all models each merged feature is made of, int `[m]`
            (or `[h, m]`); empty if merged features are not plain means of features.
        spreads: Per model and group, the standard deviation of the mixed features M h, relative to
            `|M|` times that of h, `[m]`, for the scales of norms; 1 where unknown.
        by_weights: Groups that show in no activations and were matched by weights instead.
        unmatched: Groups that show in no activations and were left as they are.

    Example:
        >>> import vfjax
        >>> maps = Maps.of_permutations([None, {"w": [1, 0]}])
        >>> maps
        Maps(2 models, 1 group, of which 1 only permutes)
        >>> maps.maps[1]["w"][0].tolist(), maps.permutations[1]["w"].tolist()
        ([[0.0, 1.0], [1.0, 0.0]], [1, 0])

        Applied to the models that were matched:

        >>> tree = {"w": np.float32([[1, 2]]), "v": np.float32([[3], [4]])}
        >>> net = vfjax.trace(lambda v, x: abs(x @ v["w"]) @ v["v"], tree, np.ones((2, 1)))
        >>> maps.check([net, net], 2)
        >>> [mapped["v"].tolist() for mapped in maps.apply(net, [tree, tree])]
        [[[3.0], [4.0]], [[4.0], [3.0]]]
        >>> maps.map_tree(net, tree, 1)["v"].tolist(), maps.prepare(net, tree, 1)["w"].tolist()
        ([[4.0], [3.0]], [[2.0, 1.0]])
        >>> maps.unknown(net)
        frozenset()
        >>> half = np.full((2, 2), 0.5, np.float32)
        >>> Maps(({}, {"w": (half, half)})).mix(net, tree, 1)["w"].tolist()
        [[1.5, 1.5]]

        And to their moments:

        >>> moments = vfjax.stats.moments(net, [tree, tree], [np.ones((2, 1), np.float32)])
        >>> maps.carry(moments).mean["w"].tolist()
        [[1.0, 2.0], [2.0, 1.0]]
    """

    maps: tuple[Mapping[str, tuple[np.ndarray, np.ndarray]], ...]
    sizes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    spreads: tuple[Mapping[str, np.ndarray], ...] = ()
    by_weights: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()

    @classmethod
    def of_labels(cls, labels: Mapping[str, np.ndarray], models: int) -> Maps:
        """Maps that merge features of equal label to their mean.

        Args:
            labels: By group, int `[models * n]`: the merged feature that each feature goes to, for
                one model after another. For a group within another of h entries, `[h, models * n]`:
                for each of these in their merged order.
            models: K.

        Returns:
            Maps with `M = K U^T / sizes`, where `U` is one at the label of each feature.

        Raises:
            TypeError: If labels are not integers, or `models` is not a whole number.
            ValueError: If the number of labels differs by model, or labels are negative or leave
                out a number.

        Example:
            >>> maps = Maps.of_labels({"h": np.array([0, 0, 1, 1])}, 2)
            >>> maps
            Maps(2 models, 1 groups, 2 features of 4, at most 2 in one)
            >>> maps.maps[0]["h"][0].tolist()
            [[1.0, 1.0], [0.0, 0.0]]
        """
        if whole(models) < 1:
            raise TypeError(f"models must be a whole number of 1 or more, got {models!r}")
        checked = {group: check_labels(group, of, models) for group, of in labels.items()}
        pairs = {group: pairs_of(of, models) for group, of in checked.items()}
        maps = tuple({group: of[k] for group, of in pairs.items()} for k in range(models))
        return cls(maps, {group: sizes_of(of) for group, of in checked.items()})

    @classmethod
    def of_permutations(cls, permutations: Sequence[Mapping[str, Any] | None]) -> Maps:
        """The permutations of a matcher as maps.

        Args:
            permutations: One per model: by group an integer array `[n]`, new axis =
                `take(old, p)`, or `[h, n]` for a group within one of h entries; None or an empty
                mapping for a model that stays.

        Returns:
            Maps with `M[i, p[i]] = 1` and `U = M^T`; they are applied by indexing.

        Raises:
            TypeError: If a permutation does not hold integers, or `permutations` is one mapping.
            ValueError: If one is not a permutation, or two models' differ in size.
        """
        if isinstance(permutations, Mapping):
            raise TypeError(
                "permutations must be a sequence with a mapping (or None) per model, got one "
                "mapping; for two models of which the first stays, [None, found.permutations]"
            )
        maps: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        for k, of_model in enumerate(permutations):
            if of_model is not None:
                check_by_group(f"permutations[{k}]", of_model)
            for group, permutation in (of_model or {}).items():
                check_permutation(group, permutation, None, within=True)
            maps.append(permuting(of_model or {}))
        return cls(tuple(maps))

    @property
    def models(self) -> int:
        """The number of models, K."""
        return len(self.maps)

    @functools.cached_property
    def permutations(self) -> tuple[dict[str, np.ndarray], ...]:
        """Per model, the permutations of groups that are only permuted, int32 `[n]` or `[h, n]`."""
        return tuple(
            {group: p for group, pair in of.items() if (p := as_permutation(*pair)) is not None}
            for of in self.maps
        )

    @functools.cached_property
    def mixing(self) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], ...]:
        """Per model, the maps that are not permutations, by group."""
        return tuple(
            {group: pair for group, pair in of.items() if group not in permuted}
            for of, permuted in zip(self.maps, self.permutations, strict=True)
        )

    @property
    def merging(self) -> tuple[dict[str, np.ndarray], ...]:
        """Per model and group, the map of its features into the basis of the merge.

        A permutation `int[n]` or `int[h, n]` if it is one, else M `[m, n]` or `[h, m, n]`.
        """
        return tuple(
            permuted | {group: pair[0] for group, pair in mixed.items()}
            for permuted, mixed in zip(self.permutations, self.mixing, strict=True)
        )

    @property
    def mixed(self) -> frozenset[str]:
        """Groups that the map of some model mixes, so that variances along them are unknown."""
        return frozenset().union(*self.mixing)

    def check(self, nets: Sequence[Network], models: int) -> None:
        """Checks that the maps fit a number of models and the groups of their networks.

        Args:
            nets: One network per model.
            models: The number of trees.

        Raises:
            TypeError: If a map is not a pair.
            ValueError: If the number of models, a group, or the size of a matrix does not fit, or
                a matrix holds NaN or infinity.
        """
        if models != self.models:
            raise ValueError(f"trees must be the {self.models} models matched, got {models}")
        check_maps([net.spec for net in nets], self.maps)

    def apply(
        self,
        net: Network | Sequence[Network],
        trees: Sequence[PyTree],
        *,
        also: Also | None = None,
    ) -> list[PyTree]:
        """The mapped models, whose mean is the merge.

        Groups that are only permuted are indexed. If a model's features are mixed, layers are put
        into the units of the norm that follows (see `in_units`), whose scale becomes the standard
        deviation of the mixed features. The stored variances of such norms are then unknown: None
        replaces them in all models, and `vfjax.renorm.reset` measures those of the merge.

        Args:
            net: The traced network, or one per model.
            trees: The K models, in the order in which they were matched.
            also: Which leaves that the network does not read are mapped too, as in
                `vfjax.symmetry.PermutationSpec.permute`.

        Returns:
            K trees.

        Raises:
            TypeError: If a mapped leaf holds integers.
            ValueError: If there are not K trees, they do not fit the network, or maps hold NaN or
                infinity.
        """
        nets = networks(net, len(trees))
        self.check(nets, len(trees))
        return [self.map_tree(nets[k], tree, k, also=also) for k, tree in enumerate(trees)]

    def map_tree(
        self, net: Network, tree: PyTree, model: int, *, also: Also | None = _NOTHING
    ) -> PyTree:
        """One model mapped, as `apply` maps it, without its checks.

        Args:
            net: The model's network.
            tree: The model as it was matched.
            model: Its index.
            also: As in `apply`; by default nothing else moves.

        Returns:
            A tree, with None in place of unknown variances.
        """
        return self.mix(net, self.prepare(net, tree, model, also=also), model, also=also)

    def in_units(self, net: Network, tree: PyTree) -> PyTree:
        """The same function, with layers in the units in which the maps mix their features.

        Before a norm with stored statistics each channel of a layer has different units, in which
        mixing them has no meaning. Along the groups that the maps mix, the layer is rescaled
        to the units of the norm's output, and the norm to the identity but for its shift.

        Args:
            net: The traced network.
            tree: A model as it was matched.

        Returns:
            A tree of the same structure and function.

        Raises:
            ValueError: If the tree does not fit the network.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> rows = {"w": [1.0, 1.0], "m": [0.0, 1.0], "v": [4.0, 9.0], "s": [1.0, 6.0]}
            >>> tree = {name: jnp.array(row) for name, row in rows.items()}
            >>> def apply_fn(v, x):
            ...     z = x @ v["w"][None] - v["m"][None]
            ...     return abs(z * v["s"][None] / jnp.sqrt(v["v"][None])).sum(1)
            >>> net = vfjax.trace(apply_fn, tree, jnp.ones((2, 1)))
            >>> maps = Maps(({}, {"w": (np.full((2, 2), 0.5), np.full((2, 2), 0.5))}))
            >>> rescaled = maps.in_units(net, tree)
            >>> [rescaled[name].tolist() for name in "wvs"]
            [[0.5, 2.0], [1.0, 36.0], [1.0, 6.0]]

        Source: matchers see features after the norm. The reference code of "Vanishing Feature" and
        of ZipIt! instead mixes kernels, scales and variances separately.
        """
        return in_output_units(net, tree, self.unknown(net))

    def prepare(
        self, net: Network, tree: PyTree, model: int, *, also: Also | None = _NOTHING
    ) -> PyTree:
        """One model permuted and in the units for mixing, but not mixed: half of `map_tree`.

        Args:
            net: The model's network.
            tree: The model as it was matched.
            model: Its index.
            also: As in `apply`; by default nothing else moves.

        Returns:
            A tree of the same function.
        """
        moves = self.permutations[model]
        moved = net.spec.permute(tree, moves, also=also) if moves else tree
        return self.in_units(net, moved)

    def mix(
        self, net: Network, tree: PyTree, model: int, *, also: Also | None = _NOTHING
    ) -> PyTree:
        """Mixes the features of a model that `prepare` returned: the other half of `map_tree`.

        Args:
            net: The model's network.
            tree: The result of `prepare`, or some leaves of it, with None in place of the others.
            model: Its index.
            also: As in `apply`; by default nothing else is mixed.

        Returns:
            A tree, with None in place of unknown variances.
        """
        unknown, mixing = self.unknown(net), self.mixing[model]
        tree = without(tree, unknown) if unknown else tree
        if not mixing:
            return tree
        spreads = self.spreads[model] if self.spreads else {}
        scales = mixed_scales(net, tree, unknown, mixing, spreads)
        return with_leaves(net.spec.apply(tree, mixing, also=also), scales)

    def carry(self, moments: Any) -> Any:
        """The moments of the models in the basis of the merge, the goals of REPAIR and RESCALE.

        Args:
            moments: `vfjax.stats.moments(net, trees, data, ...)` of the original models (before
                norms with stored statistics, of the models after `in_units`), with `covariance` at
                the sites where features are mixed. Or, for networks that lay out their values
                differently, a sequence of the moments of one model each.

        Returns:
            Moments of the same kind, see `vfjax.stats.Moments.carried`, or a list of them.

        Raises:
            ValueError: If they are not of K models, or lack a covariance.
        """
        each = self.merging
        if isinstance(moments, (list, tuple)):
            if len(moments) != self.models:
                raise ValueError(f"moments must be of {self.models} models, got {len(moments)}")
            return [one.carried([of]) for one, of in zip(moments, each, strict=True)]
        return moments.carried(each)

    def with_spreads(self, net: Network, moments: Any) -> Maps:
        """Deprecated: the function `vfjax.align.with_spreads` of these maps."""
        renamed("Maps.with_spreads(...)", "vfjax.align.with_spreads(maps, ...)")
        # By name, as `align` stands on a floor above.
        return importlib.import_module("vfjax.align").with_spreads(self, net, moments)

    def unknown(self, net: Network) -> frozenset[str]:
        """Paths of stored variances along groups that are mixed.

        Args:
            net: The traced network.

        Returns:
            The paths of the variances that `apply` leaves unknown.
        """
        variances = {norm.var for norm in net.norms}
        paths = {axis.path for group in self.mixed for axis in net.spec.groups[group]}
        return frozenset(variances & paths)

    def __repr__(self) -> str:
        """How many features merge into how many, or how many groups are only permuted."""
        if not self.sizes:
            groups = {group for of in self.maps for group in of}
            permuted = len(groups - self.mixed)
            return (
                f"Maps({self.models} models, {len(groups)} group{'' if len(groups) == 1 else 's'}, "
                f"of which {permuted} only permute{'s' if permuted == 1 else ''})"
            )
        sizes = np.concatenate([*map(np.ravel, self.sizes.values()), np.zeros(0, int)])
        return (
            f"Maps({self.models} models, {len(self.sizes)} groups, {len(sizes)} features of "
            f"{int(sizes.sum())}, at most {int(sizes.max(initial=0))} in one)"
        )


def check_is_maps(maps: Any) -> None:
    """Raises a TypeError unless `maps` is a `Maps`."""
    if isinstance(maps, Maps):
        return
    hint = "permutations, one mapping per model, go into Maps.of_permutations"
    if isinstance(getattr(maps, "permutations", None), Mapping):  # an Alignment
        hint = "Maps.of_permutations([None, found.permutations]) makes one of an Alignment"
    elif hasattr(maps, "permutations"):  # a Universe
        hint = "Maps.of_permutations(universe.permutations) makes one of a Universe"
    raise TypeError(f"maps must be a vfjax.align.Maps, got a {type(maps).__name__}; {hint}")
