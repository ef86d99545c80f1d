"""What a `Merged` consists of: which sites lie in which of its parts, and what these cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from vfjax._trees import paths
from vfjax._types import PyTree
from vfjax.network._network import Network

# By group, a matrix.
Matrices = Mapping[str, jax.Array]


class Composition:
    """The facts about a merged model: the part of `Merged` that only reads.

    It has no fields of its own; those below are the ones of `Merged` that it reads.
    """

    stems: tuple[PyTree, ...]
    trunk: PyTree
    corrections: Mapping[str, Any]
    net: Network
    cut: int
    weights: tuple[float, ...]
    heads: tuple[PyTree, ...]
    merge: tuple[Matrices, ...]
    unmerge: tuple[Matrices, ...]
    end: int | None
    nets: tuple[Network, ...]

    @property
    def merged(self) -> slice:
        """The layers that are merged, of a list of all by depth."""
        return slice(self.cut, self.net.depth if self.end is None else self.end)

    def net_of(self, model: int) -> Network:
        """The network of a model's stem and head.

        Args:
            model: Its number.

        Returns:
            Its own network where the models have their own, else the one of all.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> tree, x = {"w": jnp.eye(2), "v": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: abs(x @ v["w"]) @ v["v"], tree, x)
            >>> model = vfjax.merge.partial(net, [tree, tree], merged=slice(None, 1))
            >>> model.net_of(1) is net
            True
        """
        return self.nets[model] if self.nets else self.net

    def apart(self, site: str) -> bool:
        """Whether a site lies inside stems or heads, where it has a value per model.

        What crosses the cut is averaged, so the layers at the cut are not apart; nor is what
        crosses into the heads.

        Args:
            site: Name of a site, as in `Network.run`.

        Raises:
            ValueError: If the network has no such site.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> a = {"w0": jnp.eye(2), "w1": jnp.eye(2), "w2": jnp.eye(2)}
            >>> net = vfjax.trace(lambda v, x: x @ v["w0"] @ v["w1"] @ v["w2"], a, jnp.ones((1, 2)))
            >>> model = vfjax.merge.preserve_first(net, [a, a], layers=2)
            >>> [model.apart(site) for site in ("input", "w0", "w1", "w2")]
            [True, True, False, False]
        """
        return self.in_stems(site) or self.in_heads(site)

    def in_stems(self, site: str) -> bool:
        """Whether a site lies inside the stems, where it has a value per model.

        Args:
            site: Name of a site, as in `Network.run`.

        Returns:
            False for the layers at the cut, whose pre-activations are averaged.

        Raises:
            ValueError: If the network has no such site.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> tree, x = {"w": jnp.eye(2), "v": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: abs(x @ v["w"]) @ v["v"], tree, x)
            >>> model = vfjax.merge.partial(net, [tree, tree], merged=slice(None, 1))
            >>> [model.in_stems(site) for site in ("w", "v")]
            [False, False]
        """
        inside = self.net.in_stem(site, self.cut)  # which checks the name
        return self.cut > 0 and inside and not self.net.crosses(site, self.cut)

    def in_heads(self, site: str) -> bool:
        """Whether a site lies inside the heads, where it has a value per model.

        Args:
            site: Name of a site, as in `Network.run`.

        Returns:
            False without heads, and for the pre-activations of the last merged layers.

        Raises:
            ValueError: If there are heads, and the network has no such site.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> tree, x = {"w": jnp.eye(2), "v": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: abs(x @ v["w"]) @ v["v"], tree, x)
            >>> model = vfjax.merge.partial(net, [tree, tree], merged=slice(None, 1))
            >>> [model.in_heads(site) for site in ("w", "v")]
            [False, True]
        """
        return self.end is not None and not self.net.in_stem(site, self.end)

    @property
    def params(self) -> int:
        """Number of parameters: those of every stem, of the trunk, and of every head.

        Running statistics are none. Matrices at the cuts count, but for those that select.
        """
        parts = [(self.net_of(k), stem) for k, stem in enumerate(self.stems)]
        parts += [(self.net, self.trunk)]
        parts += [(self.net_of(k), head) for k, head in enumerate(self.heads)]
        matrices = [m for maps in (*self.merge, *self.unmerge) for m in maps.values()]
        return sum(net.count(paths.flatten_named(tree)[0]) for net, tree in parts) + sum(
            int(np.prod(np.shape(m))) for m in matrices if not _selects(m)
        )

    parameters = params

    @property
    def flops(self) -> int:
        """Multiply-accumulates per example: those of every stem, of the trunk, of every head.

        Matrices at the cuts count, but for those that select.
        """
        total = self.net.part_flops(paths.flatten_named(self.trunk)[0], self.cut or None, self.end)
        for k, stem in enumerate(self.stems):
            total += self.net_of(k).part_flops(paths.flatten_named(stem)[0], None, self.cut)
        for k, head in enumerate(self.heads):
            total += self.net_of(k).part_flops(paths.flatten_named(head)[0], self.end, None)
        for k, maps in enumerate(self.merge):
            total += self.net_of(k).map_flops(self.cut, _widths(maps))
        for maps in self.unmerge:
            assert self.end is not None  # there are heads
            total += self.net.map_flops(self.end, _widths(maps))
        return total

    def __repr__(self) -> str:
        """Says what it is in a line, without arrays."""
        heads = "" if self.end is None else f"heads after {self.end}, "
        maps = sorted({group for of in (*self.merge, *self.unmerge) for group in of})
        return (
            f"Merged(cut={self.cut} of {self.net.depth}, {heads}models={len(self.weights)}, "
            f"weights={self.weights}, params={self.params}, flops={self.flops}, "
            f"corrections={list(self.corrections)}{f', mapped={maps}' if maps else ''})"
        )


def _selects(matrix: Any) -> bool:
    """Whether a matrix only selects: each row is zero but for a one."""
    if isinstance(matrix, (Tracer, jax.ShapeDtypeStruct)):
        return False
    matrix = np.asarray(matrix)
    return bool(((matrix != 0).sum(1) == 1).all() and (matrix.sum(1) == 1).all())


def _widths(maps: Matrices) -> dict[str, int]:
    """How many entries the matrices make of their groups; those that select cost nothing."""
    return {group: len(m) for group, m in maps.items() if not _selects(m)}
