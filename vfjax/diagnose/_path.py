"""The merged models between two networks, as one program for all alphas.

A `Merged` keeps its weights static, so that each alpha would compile anew what it goes through.
Here they travel as arrays, with the parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax import merge
from vfjax._passes.evaluate import Evaluation, evaluate
from vfjax._types import Array, PyTree
from vfjax.merge._merged import Merged
from vfjax.merge._soups import interpolate
from vfjax.network._network import Network


@jax.jit
def _mix(trunks: tuple[PyTree, ...], weights: Array) -> PyTree:
    mix: tuple[Any, ...] = tuple(weights)
    return interpolate(trunks, mix)


@dataclasses.dataclass(frozen=True)
class Path:
    """The merged models of all alphas.

    Attributes:
        net: The traced network.
        start: The merged model of some alpha.
        trees: The two networks, aligned.
    """

    net: Network
    start: Merged
    trees: tuple[PyTree, ...]

    @functools.cached_property
    def _trunks(self) -> tuple[PyTree, ...]:
        """What each network has of the leaves that are averaged."""
        return tuple(
            jax.tree.map(
                lambda kept, leaf: None if kept is None else jnp.asarray(leaf),
                self.start.trunk,
                tree,
                is_leaf=lambda leaf: leaf is None,
            )
            for tree in self.trees
        )

    def at(self, alpha: float) -> Merged:
        """The merged model at an alpha."""
        weights = 1 - float(alpha), float(alpha)
        trunk = _mix(self._trunks, np.asarray(weights))
        return dataclasses.replace(self.start, trunk=trunk, weights=weights)

    def evaluate(self, model: PyTree | Merged, test: Iterable[Any]) -> Evaluation:
        """Accuracy and loss of a merged model, or of what a renormalisation made of it."""
        if not isinstance(model, Merged):
            model = merge.as_merged(self.net, model, weights=self.start.weights)
        elif model.net is not self.net:
            raise ValueError("renormalise must return a Merged of net, got one of another network")
        return evaluate(model.frame, model.arrays, test)
