"""What the experiments on pruning share: networks before, pruned, and renormalised."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from kit import cli, edges
from vfjax import data, merge, prune, renorm, stats, train

PyTree = Any

METHODS = ("magnitude", "magnitude-layer", "fisher", "woodfisher", "wanda", "wanda-layer")
# What weights compare with; all others, with all weights.
SCOPES = {"magnitude-layer": "layer", "wanda": "row", "wanda-layer": "layer"}
REMEDIES = ("reset", "repair", "rescale")
# Of networks that are not the digits'.
DEFAULT = "vgg16-bn"
# What the paper prunes of a family of networks, where that is not all but shortcuts.
LAYERS: dict[str, dict[str, Any]] = {
    "resnet50": {"first": False},
    "convnext": {"kinds": ("dense",), "first": False, "last": False},
}
# Images that are augmented at once.
CHUNK = 5_000


# fmt: off
@dataclasses.dataclass(frozen=True)
class RemedyOptions(edges.EdgeOptions):
    plain: bool = cli.option(
        False, "take statistics of training images as they are, not cropped and mirrored at random "
        "as in training", part="plain")
    renorm: str = cli.option(
        "auto", "how pruned networks are renormalised; auto is RESET where there is BatchNorm, "
        "RESCALE for VGGs without any norm, as in the paper's code, and REPAIR for all others",
        choices=("auto", *REMEDIES), part="{}")
# fmt: on


# The type of `--sparsities`: per cent, whole numbers as such.
sparsity_of = cli.typed(
    lambda text: int(value) if (value := float(text)).is_integer() else value,
    lambda percentage: 1 <= percentage <= 100,
    "is not a percentage from 1 to 100: say 90 for 0.9 of the weights",
)


def remedy_of(config: RemedyOptions, net: vfjax.Network, name: str) -> str:
    """What `--renorm` comes to for a network of that name; refuses to reset what has no norms."""
    if config.renorm == "reset" and not net.norms:
        wrong = f"is for networks with BatchNorm, which {name} has not; take repair or rescale."
        raise cli.UserError(f"--renorm reset {wrong}")
    plain = "rescale" if name.startswith("vgg") and not name.endswith("-ln") else "repair"
    return ("reset" if net.norms else plain) if config.renorm == "auto" else config.renorm


def check_memory(
    net: vfjax.Network, layers: Sequence[str], gradients: int, gigabytes: float
) -> None:
    needed = prune.memory(net, count=gradients, names=layers) / 1e9
    if needed > gigabytes:
        raise cli.UserError(
            f"WoodFisher takes {needed:.1f} GB for {gradients} gradients, more than --memory "
            f"{gigabytes:g}: allow more, take fewer --gradients, or leave it out of --methods."
        )


def augmented(config: RemedyOptions, models: edges.Edges) -> bool:
    """Whether statistics are of images that are cropped or mirrored."""
    recipe = models.cards[0]["recipe"]
    return not config.plain and bool(recipe["crop"] or recipe["flip"])


def statistics_of(config: RemedyOptions, models: edges.Edges) -> data.Batches:
    """The training images that were read, augmented once as in training unless `--plain`."""
    found, recipe = models.batches("train", None), models.cards[0]["recipe"]
    if not augmented(config, models):
        return found
    parts = []
    for start in range(0, len(found.images), CHUNK):
        images = jnp.asarray(found.images[start : start + CHUNK])
        key = jax.random.key(start)
        parts.append(train.augment(images, key, crop=recipe["crop"], flip=recipe["flip"]))
    images = np.concatenate([np.asarray(part) for part in parts])
    return data.Batches(images, found.labels, found.mean, found.std, edges.BATCH)


def layers_of(net: vfjax.Network, name: str) -> tuple[str, ...]:
    return prune.prunable(net, **LAYERS.get(name.partition("-")[0], {"shortcuts": False}))


def pruner(
    method: str,
    net: vfjax.Network,
    tree: PyTree,
    layers: Sequence[str],
    *,
    statistics: Any = (),  # Batches for Wanda.
    gradients: Any = (),  # Images, each of which gives a gradient for Fisher matrices.
    gigabytes: float = 2,  # Of WoodFisher, which updates what stays.
) -> Callable[[float], PyTree]:
    """Scores a network's weights once; what is returned prunes it to any sparsity, 0 to 1."""
    if method == "woodfisher":
        options = {"count": len(gradients.images), "max_memory": round(1e9 * gigabytes)}
        inverse = prune.inverse_fisher(net, tree, gradients, names=layers, **options)
        return lambda sparsity: inverse.prune(tree, prune.masks(inverse.scores, sparsity))
    if method == "fisher":
        scores = prune.fisher(net, tree, gradients, names=layers)
    elif method.startswith("wanda"):
        scores = prune.wanda(net, tree, statistics, names=layers)
    else:
        scores = prune.magnitude(net, tree, names=layers)
    scope = SCOPES.get(method, "global")
    return lambda sparsity: prune.apply(tree, prune.masks(scores, sparsity, scope=scope))


class Renormaliser:
    """Renormalises what a network is pruned to, by images that serve its reference once, too."""

    def __init__(self, net: vfjax.Network, tree: PyTree, remedy: str, statistics: Any) -> None:
        self.net, self.remedy, self.statistics = net, remedy, statistics
        self.goals: dict[str, Any] = {}
        if remedy != "reset":
            self.goals["references"] = stats.moments(net, [tree], statistics, sites="paper")

    def __call__(self, pruned: PyTree) -> merge.Merged:
        remedy = getattr(renorm, self.remedy)
        return as_network(self.net, remedy(self.net, pruned, self.statistics, **self.goals))


def as_network(net: vfjax.Network, tree: Any) -> merge.Merged:
    return tree if isinstance(tree, merge.Merged) else merge.as_merged(net, tree)


@jax.jit
def right(network: merge.Merged, x: jax.Array, label: jax.Array) -> jax.Array:
    """Whether a network is right on each of some images, bool `[n]`."""
    return edges.forward(network, x).argmax(-1) == label


def answers(network: merge.Merged, test: Any) -> np.ndarray:
    """Whether it is right on each image of batches, bool `[N]`."""
    found = [right(network, x, label) for x, label in test]
    return np.concatenate([np.asarray(part) for part in found])


def paired(plain: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Accuracies of two networks on the same images, and the standard error of their difference.

    Example:
      >>> [round(n, 3) for n in paired(np.array([True, False] * 8), np.array([True] * 16))]
      [0.5, 1.0, 0.129]
    """
    difference = other.astype(float) - plain
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return float(plain.mean()), float(other.mean()), float(error)
