"""Which weights can be pruned, where they lie in their leaves, and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees import flatten_named, native
from vfjax._trees.concrete import check_host
from vfjax._types import PyTree
from vfjax.network._arguments import check_fits, check_net
from vfjax.network._kernels import kernel_rows, loop_kernels
from vfjax.network._network import Network
from vfjax.network._sites import WORDS, select

KINDS = ("dense", "conv")


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the weights that can be pruned: the lowest go first.

    Attributes:
        values: By path of a kernel's leaf, float32 or better, of the leaf's shape; zero for weights
            that are not scored.
        rows: By layer, the places of its weights in the flattened leaf, int `[outputs, inputs]`.
        paths: By layer, the path of its leaf.
        like: The tree's structure and shapes, `jax.ShapeDtypeStruct`s.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, jnp.ones((1, 2)))
        >>> scores = vfjax.prune.magnitude(net, tree)
        >>> scores
        Scores(1 layer, 4 weights)
        >>> scores.values["w"].tolist(), scores.rows["w"].tolist()
        ([[1.0, 3.0], [2.0, 0.5]], [[0, 2], [1, 3]])
    """

    values: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    paths: Mapping[str, str]
    like: PyTree

    def __repr__(self) -> str:
        weights = sum(rows.size for rows in self.rows.values())
        layers = len(self.rows)
        return f"Scores({layers} layer{'' if layers == 1 else 's'}, {weights:,} weights)"

    def of(self, layer: str) -> np.ndarray:
        """The scores of one layer's weights, `[outputs, inputs]`.

        Args:
            layer: Name of the layer.

        Returns:
            Its scores, in the order of `rows`.
        """
        return self.values[self.paths[layer]].reshape(-1)[self.rows[layer]]


def prunable(
    net: Network,
    *,
    shortcuts: bool = True,
    first: bool = True,
    last: bool = True,
    kinds: Sequence[str] = KINDS,
) -> tuple[str, ...]:
    """Lists the layers whose kernels can be pruned.

    A layer inside a loop that is kept whole, such as a recurrent cell, has the name of its kernel;
    it has no depth, and counts as neither first nor last.

    Args:
        net: The traced network.
        shortcuts: Whether to include layers beside the longest path, such as the 1x1 convolutions
            of a ResNet's shortcuts.
        first: Whether to include layers of depth 1.
        last: Whether to include layers of the largest depth.
        kinds: `"dense"`, `"conv"` or both.

    Returns:
        Names of layers, in the order of evaluation; layers that share a leaf are all listed. Those
        inside loops come last.

    Raises:
        TypeError: If `net` is not a traced network.
        ValueError: If a kind is unknown.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.eye(2), "v": jnp.eye(2)}
        >>> net = vfjax.trace(lambda v, x: x @ v["w"] @ v["v"], tree, jnp.ones((1, 2)))
        >>> prunable(net), prunable(net, first=False)
        (('w', 'v'), ('v',))

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", settings of pruning: all
    convolutions and linear layers, in ResNet20 without shortcuts (`shortcuts=False`), in ResNet50
    without the first (`first=False`), in ConvNeXt linear layers alone (`kinds=["dense"]`).
    """
    check_net(net)
    return _prunable(net, shortcuts, first, last, kinds)


def _prunable(
    net: Network, shortcuts: bool, first: bool, last: bool, kinds: Sequence[str]
) -> tuple[str, ...]:
    """As `prunable`, for a network that has been checked."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown:
        raise ValueError(f"kinds must be a sequence of {' and '.join(KINDS)}, got {kinds!r}")
    names = [
        layer.name
        for layer in net.layers
        if layer.kernel is not None
        and layer.kind in kinds
        and (shortcuts or layer.main)
        and (first or layer.depth > 1)
        and (last or layer.depth < net.depth)
    ]
    return (*names, *(name for name, of in loop_kernels(net).items() if of.kind in kinds))


def rows_of(
    net: Network, names: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Finds where the weights of layers to prune lie.

    Args:
        net: The traced network.
        names: Names of layers, or a word for some ("paper"); None for all that can be pruned.

    Returns:
        By layer, the places of its weights in the flattened leaf, int `[outputs, inputs]`; and the
        leaf's path. Of layers that use the same weights only the first is listed.

    Raises:
        TypeError: If `names` is not a sequence.
        ValueError: If `names` is empty, or a layer is unknown or has a kernel that is computed from
            several leaves.
    """
    if isinstance(names, str) and names in WORDS:
        names = select(net, names)
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of layers' names, got the string {names!r}")
    if names is None:
        names = _prunable(net, True, True, True, KINDS)
    names = tuple(dict.fromkeys(names))
    if not names:
        raise ValueError("names is empty: there is nothing to prune")
    rows: dict[str, np.ndarray] = {}
    paths: dict[str, str] = {}
    taken: dict[str, np.ndarray] = {}
    loops = loop_kernels(net)
    for name in names:
        if name in loops:
            rows[name], paths[name] = loops[name].rows, name
            continue
        path = net.layer(name).kernel
        if path is None:
            raise ValueError(
                f"names has '{name}', whose kernel is computed from several leaves; prune the "
                "network without what computes it, such as a mask"
            )
        places = kernel_rows(net, name)
        used = taken.setdefault(path, np.zeros(net.leaves([path])[path].size, bool))
        if not used[places].any():
            rows[name], paths[name] = places, path
            used[places] = True
    return rows, paths


def weights_of(
    net: Network, tree: PyTree, names: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """The leaves of layers to prune, by path, and the results of `rows_of`.

    Raises:
        TypeError: As `rows_of`, or if `net` is not a traced network, or a leaf is not an array.
        ValueError: As `rows_of`, or if the tree does not fit.
    """
    check_net(net)
    check_host("scores are computed", tree=tree)
    leaves = flatten_named(tree, name="tree").leaves
    check_fits(net, leaves, "tree")
    rows, paths = rows_of(net, names)
    return {path: leaves[path] for path in dict.fromkeys(paths.values())}, rows, paths


def scores_of(
    tree: PyTree,
    values: Mapping[str, Any],
    rows: Mapping[str, np.ndarray],
    paths: Mapping[str, str],
) -> Scores:
    """Makes `Scores` from values by leaf: checks them, and sets those of other weights to zero.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    kept: dict[str, np.ndarray] = {}
    for path, value in values.items():
        value = widened(value)
        if not np.isfinite(value).all():
            raise ValueError(
                f"the scores of '{path}' hold NaN or infinite values: look for them in the model "
                "and the data, or for a loss that is not finite"
            )
        scored = np.zeros(value.size, bool)
        for name, places in rows.items():
            if paths[name] == path:
                scored[places] = True
        kept[path] = np.where(scored.reshape(value.shape), value, 0)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(native(leaf))), tree
    )
    return Scores(kept, dict(rows), dict(paths), like)


def widened(value: Any) -> np.ndarray:
    """An array in NumPy, in float32 or better."""
    value = np.asarray(value)
    return value.astype(np.promote_types(value.dtype, np.float32), copy=False)
