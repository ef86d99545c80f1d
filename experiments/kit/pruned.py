"""What the experiments on pruning share: networks before, pruned, and renormalised."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from kit import cli, edges, figures, tables
from kit.experiment import Setup
from kit.figures import label
from kit.records import Record, Row, Rows
from kit.timing import Stopwatch
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


def layers_of(net: vfjax.Network, name: str) -> tuple[str, ...]:
    return prune.prunable(net, **LAYERS.get(name.partition("-")[0], {"shortcuts": False}))


def statistics_of(config: RemedyOptions, models: edges.Edges) -> tuple[data.Batches, bool]:
    """The training images that were read, and whether they are cropped or mirrored, once."""
    found, recipe = models.batches("train", None), models.cards[0]["recipe"]
    if config.plain or not (recipe["crop"] or recipe["flip"]):
        return found, False
    parts = []
    for start in range(0, len(found.images), CHUNK):
        images, key = jnp.asarray(found.images[start : start + CHUNK]), jax.random.key(start)
        parts.append(train.augment(images, key, crop=recipe["crop"], flip=recipe["flip"]))
    norm = found.labels, found.mean, found.std, edges.BATCH
    return data.Batches(np.concatenate(parts), *norm), True


class Subjects(NamedTuple):
    """What is pruned, and by which images it is renormalised: `run.setup`."""

    net: vfjax.Network
    trees: Mapping[int, PyTree]  # By seed.
    layers: Sequence[str]
    remedy: str
    statistics: Any  # Batches for renormalisation and Wanda.
    test: Any


def prepare(config: RemedyOptions, watch: Stopwatch, **options: Any) -> Setup:
    """Edge models and what is done with them; options as of `edges.loaded`."""
    setup = edges.loaded(statistics="statistics", cifar=DEFAULT, **options)(config, watch)
    models, net, name = setup.value, setup.value.net, setup.value.arch.name
    layers, remedy = layers_of(net, name), remedy_of(config, net, name)
    with watch("augmentation"):
        statistics, augmented = statistics_of(config, models)
    data = setup.record["data"] | {"augmented": augmented}
    record = setup.record | {"data": data, "remedy": remedy, "layers": layers}
    trees = dict(zip(models.seeds, models.trees, strict=True))
    value = Subjects(net, trees, layers, remedy, statistics, models.images.test)
    return Setup(setup.config, value, record, setup.identity)


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
    kind, scope = method.partition("-")[0], SCOPES.get(method, "global")
    batches = {"fisher": [gradients], "wanda": [statistics]}.get(kind, [])
    scores = getattr(prune, kind)(net, tree, *batches, names=layers)
    return lambda sparsity: prune.apply(tree, prune.masks(scores, sparsity, scope=scope))


def renormaliser(
    net: vfjax.Network, tree: PyTree, remedy: str, statistics: Any
) -> Callable[[PyTree], merge.Merged]:
    """Renormalises what a network is pruned to, by images that serve its reference once, too."""
    goals: dict[str, Any] = {}
    if remedy != "reset":
        goals["references"] = stats.moments(net, [tree], statistics, sites="paper")
    done = getattr(renorm, remedy)
    return lambda pruned: as_network(net, done(net, pruned, statistics, **goals))


def as_network(net: vfjax.Network, tree: Any) -> merge.Merged:
    return tree if isinstance(tree, merge.Merged) else merge.as_merged(net, tree)


@jax.jit
def right(network: merge.Merged, x: jax.Array, label: jax.Array) -> jax.Array:
    """Whether a network is right on each of some images, bool `[n]`."""
    return edges.forward(network, x).argmax(-1) == label


def answers(networks: Sequence[merge.Merged], test: Any) -> np.ndarray:
    """Whether each is right on each image of batches, bool `[networks, N]`, by one pass."""
    found = [[np.asarray(right(one, x, label)) for one in networks] for x, label in test]
    return np.concatenate(found, axis=1)


def rows_of(
    cell: Row, remedy: str, better: np.ndarray, plain: np.ndarray | None = None, **about: Any
) -> Iterator[Row]:
    """Accuracies of answers to images, of what is renormalised and, if given, as pruned.

    `error` is the standard error of their difference, small because the images are the same.
    """
    row = cell | {"remedy": remedy} | about | {"accuracy": float(better.mean())}
    if plain is not None:
        yield cell | {"remedy": "none", "accuracy": float(plain.mean())}
        row["error"] = float((better.astype(float) - plain).std(ddof=1) / len(plain) ** 0.5)
    yield row


class Case(NamedTuple):
    """Accuracies in the mean over seeds, and the standard error of their difference."""

    method: str | None
    sparsity: float | None
    plain: float
    renormalised: float
    gain: float
    error: float


def cases(record: Record, method: str | None) -> list[Case]:
    """All of a method by sparsity; of None that of nothing pruned."""
    rows, found = record.rows.where(samples=None, method=method), []
    for sparsity in sorted(rows.distinct("sparsity")) or [None] * bool(rows):
        here = rows.where(sparsity=sparsity)
        plain, better = (here.mean(remedy=remedy) for remedy in ("none", record["remedy"]))
        errors = here.values("error")
        error = math.hypot(*errors) / len(errors)
        found.append(Case(method, sparsity, plain, better, better - plain, error))
    return found


def finding_of(record: Record) -> str:
    """Where most comes back, and what pruning alone left there."""
    found = [case for method in record.rows.distinct("method") for case in cases(record, method)]
    most, (unpruned,) = max(found, key=lambda case: case.gain), cases(record, None)
    before, after, whole = (100 * n for n in (most.plain, most.renormalised, unpruned.plain))
    return (
        f"{label(record['remedy'])} brings back most with {label(most.method)} at "
        f"{most.sparsity}%, from {before:.0f}% to {after:.0f}% (unpruned {whole:.0f}%)"
    )


def table_of(rows: Rows, title: str, columns: Mapping[str, Mapping[str, Any]]) -> tables.Table:
    """Accuracies by sparsity; by columns, what their rows have."""
    lines = {"unpruned": {"method": None}} if rows.where(method=None) else {}
    lines |= {str(s): {"sparsity": s} for s in sorted(rows.distinct("sparsity"))}
    shown = [tables.Column(text, where) for text, where in columns.items()]
    return tables.pivot(rows, lines, shown, title=title, corner="sparsity, %")


def tables_of(record: Record) -> list[tables.Table]:
    """Accuracies by sparsity and method, as pruned and renormalised."""
    rows, remedy = record.rows.where(samples=None), record["remedy"]
    columns = {label(method): {"method": method} for method in rows.distinct("method")}
    titles = {"none": f"{record['title']}: as pruned", remedy: f"with {label(remedy)}"}
    return [table_of(rows.where(remedy=how), titles[how], columns) for how in titles]


def panels_of(record: Record) -> list[Any]:
    """Accuracy against sparsity as pruned and renormalised, and what is gained."""
    rows, remedy, x = record.rows.where(samples=None), record["remedy"], "sparsity (%)"
    plain, better = rows.where(remedy="none"), rows.where(remedy=remedy)
    both = zip(plain, better, strict=True)
    gained = Rows(b | {"accuracy": b["accuracy"] - a["accuracy"]} for a, b in both)
    unpruned = figures.Line("unpruned", None, 100 * plain.mean(method=None), method="edges")

    def lines(of: Rows) -> list[figures.Line]:
        methods = of.distinct("method")
        return [figures.line(of.where(method=m), "sparsity", method=m) for m in methods]

    title = f"with {label(remedy)}, {record['data']['statistics_images']:,} images"
    whole = [("as pruned", plain), (title, better)]
    return [
        *(figures.Panel(title, x, figures.ACCURACY, [*lines(of), unpruned], y_limits=(0, 101))
          for title, of in whole),
        figures.Panel("gained", x, "points of test accuracy", lines(gained)),
    ]  # fmt: skip
