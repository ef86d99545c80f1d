"""What the experiments on pruning share: networks before, pruned, and renormalised."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import _common
import _edges
import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from vfjax import data, merge, prune, renorm, stats, train

PyTree = Any

METHODS = {
    "magnitude": "global magnitude",
    "magnitude-layer": "layerwise magnitude",
    "fisher": "diagonal Fisher",
    "woodfisher": "WoodFisher",
    "wanda": "Wanda per row",
}
SCOPES = {"magnitude-layer": "layer", "wanda": "row"}
REMEDIES = {"reset": "RESET", "repair": "REPAIR", "rescale": "RESCALE"}
# Of networks that are not the digits'.
DEFAULT = "vgg16-bn"
# What the paper prunes of a family of networks, where that is not all but shortcuts.
LAYERS: dict[str, dict[str, Any]] = {
    "resnet50": {"first": False},
    "convnext": {"kinds": ("dense",), "first": False, "last": False},
}
# Images that are augmented at once.
CHUNK = 5_000


def remedy_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of how pruned networks are renormalised."""
    p.add_argument(
        "--plain",
        action="store_true",
        help="take statistics of training images as they are, not cropped and mirrored at random "
        "as in training",
    )
    p.add_argument(
        "--renorm",
        default="auto",
        choices=("auto", *REMEDIES),
        help="how pruned networks are renormalised; auto is RESET where there is BatchNorm, "
        "RESCALE for VGGs without any norm, as in the paper's code, and REPAIR for all others",
    )


def sparsity_of(text: str) -> int | float:
    """The type of `--sparsities`: per cent, whole numbers as such.

    Example:
      >>> sparsity_of("90"), sparsity_of("99.9")
      (90, 99.9)
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage above 0, up to 100")
    return int(value) if value == int(value) else value


def remedy_of(args: argparse.Namespace, models: _edges.Edges) -> str:
    """What `--renorm` comes to for a network.

    Raises:
      UserError: If the network has nothing to reset.
    """
    if args.renorm == "reset" and not models.net.norms:
        raise _common.UserError(
            f"--renorm reset is for networks with BatchNorm, which {models.arch.name} has not; "
            "take repair or rescale."
        )
    if args.renorm != "auto":
        return args.renorm
    if models.net.norms:
        return "reset"
    plain = models.arch.name.startswith("vgg") and not models.arch.name.endswith("-ln")
    return "rescale" if plain else "repair"


def augmented(args: argparse.Namespace, models: _edges.Edges) -> bool:
    """Whether statistics are of images that are cropped or mirrored."""
    recipe = models.cards[0]["recipe"]
    return not args.plain and bool(recipe["crop"] or recipe["flip"])


def statistics_of(args: argparse.Namespace, models: _edges.Edges) -> data.Batches:
    """The training images that were read, augmented once as in training unless `--plain`."""
    found, recipe = models.batches("train", None), models.cards[0]["recipe"]
    if not augmented(args, models):
        return found
    parts = []
    for start in range(0, len(found.images), CHUNK):
        images = jnp.asarray(found.images[start : start + CHUNK])
        key = jax.random.key(start)
        parts.append(train.augment(images, key, crop=recipe["crop"], flip=recipe["flip"]))
    images = np.concatenate([np.asarray(part) for part in parts])
    return data.Batches(images, found.labels, found.mean, found.std, _edges.BATCH)


def layers_of(net: vfjax.Network, name: str) -> tuple[str, ...]:
    """The layers that are pruned of a network of that name."""
    return prune.prunable(net, **LAYERS.get(name.partition("-")[0], {"shortcuts": False}))


def pruner(
    method: str,
    net: vfjax.Network,
    tree: PyTree,
    statistics: Any,
    layers: Sequence[str],
    gradients: int,
) -> Callable[[float], PyTree]:
    """Scores a network's weights once; what is returned prunes it to any sparsity.

    Args:
      method: One of `METHODS`.
      net: The traced network.
      tree: Its variables.
      statistics: Labelled batches for what goes by data.
      layers: Those to prune.
      gradients: How many examples' gradients Fisher matrices are of.

    Returns:
      From sparsity, 0 to 1, to the pruned tree; of WoodFisher with its update of what stays.
    """
    scope = SCOPES.get(method, "global")
    if method == "woodfisher":
        inverse = prune.inverse_fisher(net, tree, statistics, count=gradients, layers=layers)
        return lambda sparsity: inverse.prune(tree, prune.masks(inverse.scores, sparsity))
    if method == "fisher":
        scores = prune.fisher(net, tree, statistics, examples=gradients, layers=layers)
    elif method == "wanda":
        scores = prune.wanda(net, tree, statistics, layers=layers)
    else:
        scores = prune.magnitude(net, tree, layers=layers)
    return lambda sparsity: prune.apply(tree, prune.masks(scores, sparsity, scope=scope))


class Renormaliser:
    """Renormalises what one network is pruned to, by the same images for both.

    Args:
      net: The traced network.
      tree: The network before pruning, the only reference.
      remedy: One of `REMEDIES`.
      statistics: The images. Those of the reference are measured once.
    """

    def __init__(self, net: vfjax.Network, tree: PyTree, remedy: str, statistics: Any) -> None:
        self.net, self.remedy, self.statistics = net, remedy, statistics
        self.references: Any = None
        if remedy != "reset":
            self.references = stats.moments(net, [tree], statistics, sites="paper")

    def __call__(self, pruned: PyTree) -> merge.Merged:
        """The pruned network, renormalised."""
        if self.remedy == "reset":
            found = renorm.reset(self.net, pruned, self.statistics)
        else:
            function = renorm.repair if self.remedy == "repair" else renorm.rescale
            found = function(self.net, pruned, self.statistics, references=self.references)
        return as_network(self.net, found)


def as_network(net: vfjax.Network, tree: Any) -> merge.Merged:
    """A network of one tree, whatever a renormalisation gave."""
    return tree if isinstance(tree, merge.Merged) else merge.as_merged(net, tree)


def accuracy(network: merge.Merged, test: Any) -> float:
    """On test images."""
    return train.evaluate(_edges.forward, network, test).accuracy


def rows_of(sparsities: Sequence[float], columns: Sequence[np.ndarray]) -> list[list[str]]:
    """Sparsities and columns of accuracies `[seeds, sparsities]` as rows of a table.

    Example:
      >>> rows_of([50, 90], [np.array([[0.8, 0.5], [0.82, 0.5]])])
      [['50', '81.00 ± 1.41'], ['90', '50.00 ± 0.00']]
    """
    return [
        [str(sparsity), *(_common.percent(column[:, place].tolist()) for column in columns)]
        for place, sparsity in enumerate(sparsities)
    ]
