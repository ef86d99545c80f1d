"""Linear maps of every model's groups: what matchers beyond permutations return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vfjax.network import Network

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Maps:
    """Merge and unmerge matrices of K models; the mean of the mapped models is their merge.

    Attributes:
        maps: Per model and group, `(M [m, n], U [n, m])`: what writes the group takes M, what reads
            it takes U.
        sizes: By group, how many features of all models each merged feature is made of, int `[m]`.
    """

    maps: tuple[Mapping[str, tuple[np.ndarray, np.ndarray]], ...]
    sizes: Mapping[str, np.ndarray]

    @classmethod
    def of_labels(cls, labels: Mapping[str, np.ndarray], models: int) -> Maps:
        """Maps that merge features of equal label to their mean.

        Args:
            labels: By group, int `[models * n]`: of the features of all models, one model after
                another, which merged feature they go to.
            models: K.
        """
        maps: list[dict[str, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(models)]
        sizes = {}
        for group, found in labels.items():
            member = np.eye(found.max() + 1)[found]
            sizes[group] = member.sum(0).astype(int)
            # Times K: the models are averaged after, which divides by as much.
            shares = models * member / sizes[group]
            for model, (merge, unmerge) in enumerate(
                zip(np.split(shares, models), np.split(member, models), strict=True)
            ):
                maps[model][group] = merge.T.astype(np.float32), unmerge.astype(np.float32)
        return cls(tuple(maps), sizes)

    def apply(self, net: Network, trees: Sequence[PyTree]) -> list[PyTree]:
        """The mapped models, of which the merge is the mean.

        Args:
            net: The traced network.
            trees: The K models, in the order in which they were matched.

        Returns:
            K trees.

        Raises:
            ValueError: If there are not K trees, or they do not fit the network.
        """
        if len(trees) != len(self.maps):
            raise ValueError(f"trees must be the {len(self.maps)} models matched, got {len(trees)}")
        return [net.spec.apply(tree, found) for tree, found in zip(trees, self.maps, strict=True)]

    def __repr__(self) -> str:
        """How many features are merges of how many, in one line."""
        sizes = np.concatenate([*self.sizes.values(), np.zeros(0, int)])
        return (
            f"Maps({len(self.maps)} models, {len(self.sizes)} groups, {len(sizes)} features of "
            f"{int(sizes.sum())}, at most {int(sizes.max(initial=0))} in one)"
        )
