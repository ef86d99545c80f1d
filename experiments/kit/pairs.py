"""Two edge models: measured once, matched in any way, merged in part, renormalised, tested."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import vfjax
from kit import cli, edges, figures, tables, timing
from kit.experiment import Run
from kit.records import Record, Row
from vfjax import align, data, merge, renorm, stats, train
from vfjax.align import Maps

PyTree = Any

EDGES = ("model 1", "model 2", "ensemble")
# Matchings that may mix units.
MIXING = {"zipit": align.zip_moments, "cca": align.cca_moments}
MIXING["transport"] = align.transport_moments
# All matchings, and what titles call them.
MATCHES = {name: figures.label(name) for name in ("activation", "weight", "none", *MIXING)}
MATCHES["none"] = "no matching"
# Options that are settings of matchings.
SETTINGS = {"zipit": ("zip_alpha", "zip_beta"), "cca": ("regularization", "relative")}
# l by L, from tables 1 and 7 of the paper; other depths take the fractions of L = 14.
LAYERS = {14: (0, 3, 6, 8, 12), 20: (0, 6, 10, 13, 19)}
# Images wait at a cut for what is tried behind it, up to so many bytes.
STORE = 1 << 29


# fmt: off
@dataclasses.dataclass(frozen=True)
class MatchingOptions(edges.EdgeOptions):
    zip_alpha: float = cli.option(
        0.3, "with ZipIt!, discount on the correlations of units that are merges already",
        type=cli.number_of(0, 1), metavar="A", part="a{:g}")
    zip_beta: float = cli.option(
        0.125, "with ZipIt!, share of the merges that may be of units of one network",
        type=cli.number_of(0, 1), metavar="B", part="b{:g}")
    regularization: float = cli.option(
        0.1, "with CCA, what is added to the diagonal of the covariances: as it is, whatever their "
        "size, like in the paper's code; the library's own default is 1 with --relative",
        type=cli.number_of(0), metavar="R", part="r{:g}")
    relative: bool = cli.option(
        False, "with CCA, take --regularization times the mean variance of a network's features",
        part="relative")
# fmt: on


def changed(match: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a matching that are not the defaults, those of the paper's code."""
    usual = {option: getattr(MatchingOptions, option) for option in SETTINGS.get(match, ())}
    return {name: config[name] for name, value in usual.items() if config.get(name, value) != value}


def check(config: Any) -> None:
    """Refuses settings of matchings that are not asked for: they would do nothing."""
    asked = (config.match,) if isinstance(config.match, str) else config.match
    for match in [name for name in SETTINGS if name not in asked]:
        for option in changed(match, vars(config)):
            name = option.replace("_", "-")
            raise cli.UserError(f"--{name} does nothing here: it is for --match {match}.")


def title_of(match: str, config: Mapping[str, Any]) -> str:
    """A matching in titles, with its settings.

    Example:
      >>> title_of("cca", {"regularization": 0.1}), title_of("cca", {"regularization": 1.0})
      ('CCA', 'CCA (regularization 1.0)')
    """
    words = [f"{name.replace('_', ' ')} {value}" for name, value in changed(match, config).items()]
    return MATCHES[match] + (f" ({', '.join(words)})" if words else "")


def default_layers(depth: int) -> list[int]:
    """The numbers of preserved layers that a table has a row for, below L."""
    nearest = {min(int(layers / 14 * depth + 0.5), depth - 1) for layers in LAYERS[14]}
    return list(LAYERS.get(depth, sorted(nearest)))


def counts(option: str, given: Sequence[int] | None, usual: Sequence[int], most: int) -> tuple:
    """What an option gives (else `usual`) of the numbers from 0 to `most`, each once, in order."""
    found = sorted({*(usual if given is None else given)})
    if found[-1] > most:
        raise cli.UserError(f"--{option} must be from 0 to {most}, got {found[-1]}.")
    return tuple(found)


def prepare(usual: Callable[[int], Sequence[int]], fewest: int = 0, **options: Any) -> Any:
    """The `prepare` of experiments with `--layers`, at least `fewest` of which are merged."""

    def settled(config: Any, net: vfjax.Network, name: str) -> Any:
        layers = counts("layers", config.layers, usual(net.depth), net.depth - fewest)
        return dataclasses.replace(config, layers=layers)

    return edges.loaded(settled=settled, checked=check, seeds=seeds, **options)


def seeds(config: Any) -> dict[str, int]:
    return {"matching": 0}


def remedies_of(net: vfjax.Network) -> list[str]:
    """What merged networks of a kind are renormalised with, in the paper's tables."""
    return ["reset"] if net.norms else ["repair", "rescale", "bias_calibration"]


def only(maps: Maps, groups: Iterable[str]) -> Maps:
    """The maps of some groups; the others stay in place."""
    kept = tuple({group: of[group] for group in groups if group in of} for of in maps.maps)
    return dataclasses.replace(maps, maps=kept)


@dataclasses.dataclass(eq=False)
class Pair:
    """Two edge models of a run; what cells share is made once, when the first of them needs it."""

    run: Run
    config: Any
    matches: Sequence[str]  # All that will be asked for.
    weights: Sequence[float] = (0.5, 0.5)
    models: Sequence[int] = (0, 1)

    def __post_init__(self) -> None:
        self.net, self.images = self.run.setup.net, self.run.setup.images
        self.trees = [self.run.setup.trees[model] for model in self.models]
        self.maps = functools.cache(self._maps)
        # What waits at a cut is large.
        self.cut = functools.lru_cache(maxsize=1)(self._cut)
        # What is merged alike under two names is measured once.
        self.measured = functools.cache(self._measured)
        # With BatchNorm only matchings need any.
        needed = not self.net.norms or {"activation", *MIXING} & {*self.matches}
        self.moments = self._moments() if needed else None

    def _moments(self) -> stats.Moments:
        """In one pass, for all matchings and for the goals of every REPAIR and RESCALE."""
        net, normed = self.net, bool(self.net.norms)
        covariance: Any = "cross" if "activation" in self.matches else False
        if MIXING.keys() & {*self.matches}:
            # Moments go through matrices by the covariances within each network.
            corrected = () if normed else stats.resolve_sites(net, "paper")
            covariance = [*stats.resolve_sites(net, "taps"), *corrected]
        stage, sites = "statistics of edge models", "taps" if normed else "paper"
        with self.run.watch(stage):
            watched = timing.Watched(self.images.statistics, stage)
            return stats.moments(net, self.trees, watched, sites=sites, covariance=covariance)

    def _maps(self, match: str) -> Maps:
        """What matches the second network to the first, or both to each other."""
        if match == "none":
            return Maps.of_permutations([None, None])
        net, moments = self.net, self.moments
        with self.run.watch("matching"):
            if match in MIXING:
                own = {name: getattr(self.config, name) for name in SETTINGS.get(match, ())}
                told = {name.removeprefix("zip_"): value for name, value in own.items()}
                maps = MIXING[match](net, moments, **told)
            else:
                if match == "weight":
                    found = align.match_weights(net, *self.trees, key=jax.random.key(0))
                else:
                    found = align.match_moments(net, moments)
                told = {key: getattr(found, key) for key in ("objective", "converged", "moved")}
                maps = Maps.of_permutations([None, found.permutations])
        self.run.note("matching", method=match, models=list(self.models), **told)
        return maps

    def _cut(self, match: str, start: int = 0, stop: int | None = None, groups: Any = None) -> Any:
        """Both merged from layer `start` to `stop`; of `groups` alone units are matched."""
        maps = self.maps(match)
        return Cut(self, maps if groups is None else only(maps, groups), slice(start, stop))

    def _measured(self, stage: str, remedy: str, *cut: Any) -> Row:
        """Accuracy, loss and costs; the first two None of a network that lacks statistics."""
        behind = self.cut(*cut)
        merged = behind.merged
        # Of mixed units a BatchNorm does not know the variances.
        read = self.net.trunk_leaves(merged.cut, merged.end)
        if remedy == "none" and behind.maps.unknown(self.net) & read:
            return {"accuracy": None, "loss": None} | cost_of(merged)
        with self.run.watch(stage):
            done = behind.renormalised(remedy)
            # What is stored at the cut serves all that have the very same stems.
            batches = behind.test if done.stems is merged.stems else self.images.test
            return evaluated(done, batches, stage)

    def edge(self, name: str, stage: str = "edge models and ensemble") -> Row:
        """Accuracy, loss and costs of `model 1`, `model 2` or the `ensemble`."""
        if name == "ensemble":
            merged = merge.ensemble(self.net, self.trees, self.weights)
        else:
            merged = merge.as_merged(self.net, self.trees[EDGES.index(name)], weights=self.weights)
        with self.run.watch(stage):
            return evaluated(merged, self.images.test, name)


class Cut:
    """A pair merged in some layers, and what is tried behind the cut before them."""

    def __init__(self, pair: Pair, maps: Maps, span: slice) -> None:
        self.pair, self.maps, self.net, self.images = pair, maps, pair.net, pair.images
        self.merged = merge.partial(pair.net, pair.trees, maps, span=span, weights=pair.weights)

    @functools.cached_property
    def mapped(self) -> list[PyTree]:
        """Both networks after the maps."""
        return self.maps.apply(self.net, self.pair.trees)

    @functools.cached_property
    def goals(self) -> stats.Moments:
        """Moments of both after the maps, the goals of REPAIR and RESCALE."""
        moments = self.pair.moments
        # Permutations are faster without covariances.
        plain = moments if self.maps.mixed else dataclasses.replace(moments, covariance=None)
        return self.maps.carry(plain)

    @functools.cached_property
    def test(self) -> Any:
        return self.crossing(self.images.test)

    @functools.cached_property
    def statistics(self) -> Any:
        found = self.crossing(self.images.statistics)
        return [crossing for crossing, _ in found] if isinstance(found, list) else found

    def crossing(self, batches: data.Batches) -> Any:
        """The batches as they cross the cut, if there is one and memory allows; else as given."""
        merged = self.merged
        if merged.cut == 0:
            return batches
        leaves = jax.tree.leaves(jax.eval_shape(merged.crossing, next(iter(batches))[0]))
        if sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) * len(batches) > STORE:
            return batches
        watched = timing.Watched(batches, f"first {merged.cut} layers")
        return [(_crossing(merged, x), label) for x, label in watched]

    def renormalised(self, remedy: str) -> merge.Merged:
        net, merged = self.net, self.merged
        if remedy == "none":
            return merged
        if remedy == "bias_calibration":
            return renorm.calibrate_bias(net, merged, references=self.mapped)
        if remedy == "reset":
            return renorm.reset(net, merged, self.images.statistics)
        correct = {"repair": renorm.repair, "rescale": renorm.rescale}[remedy]
        return correct(net, merged, self.statistics, references=self.goals)


_crossing = jax.jit(merge.Merged.crossing)


def cost_of(merged: merge.Merged) -> Row:
    """Parameters and FLOPs, and relative to one model's."""
    found = {key: getattr(merged, key) for key in ("params", "flops")}
    return found | {f"{key}_ratio": n / getattr(merged.net, key) for key, n in found.items()}


def evaluated(merged: merge.Merged, batches: Any, description: str) -> Row:
    """Accuracy and loss on test images, or on what these are at the cut; costs."""
    found = train.evaluate(_logits, merged, timing.Watched(batches, description))
    return {"accuracy": found.accuracy, "loss": found.loss} | cost_of(merged)


def _logits(merged: merge.Merged, x: PyTree) -> jax.Array:
    """The output; of heads, which all know the same classes, the average."""
    out = edges.forward(merged, x)
    if not merged.heads:
        return out
    parts = (weight * logits for weight, logits in zip(merged.weights, out, strict=True))
    return sum(parts, start=jnp.zeros(()))


def grid(**values: Iterable[Any]) -> list[Row]:
    """Cells with every combination of values, the last of which change first."""
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


def plan(merged: Sequence[Row], edge_models: Sequence[str] = EDGES) -> list[Row]:
    """Cells of merged networks, and before them those of edge models."""
    nothing = dict.fromkeys(merged[0])
    return [*(nothing | {"network": name} for name in edge_models), *merged]


Columns = Mapping[str, Mapping[str, Any]]  # By names of columns and curves, what their rows have.


def summary(record: Record, columns: Columns, alpha: float = 0.5, x: str = "layers") -> Row:
    """Edge models' mean, ensemble, and the first x at which each column reaches that mean."""
    rows = record.rows
    first, second, ensemble = (rows.mean(network=name) for name in EDGES)
    edge = (1 - alpha) * first + alpha * second
    reached = {}
    for name, where in columns.items():
        if rows.values(**where):
            curve = zip(*rows.curve(x, **where)[:2], strict=True)
            reached[name] = next((at for at, mean in curve if mean >= edge), None)
    return {"edge_mean": edge, "ensemble": ensemble, "reaches_edges_at": reached}


def reaches(record: Record, name: str) -> str:
    """Where a column reaches the edge models, in a sentence."""
    at, edge = record["summary"]["reaches_edges_at"].get(name), record["summary"]["edge_mean"]
    where = "at none of these l" if at is None else f"from l = {at} on"
    return f"reaches the edge models' {100 * edge:.1f}% {where}"


def table(
    record: Record, columns: Columns, more: Sequence[tables.Column] = (), *, x: str = "layers",
    line: str = "PFM {}/{}", about: str = "",
) -> tables.Table:  # fmt: skip
    """Accuracies by x; what reaches the edge models' mean is marked."""
    edge, rows = record["summary"]["edge_mean"], record.rows
    total = record["model"]["depth" if x == "layers" else x]
    lines: dict[str, Any] = {n: {"network": n} for n in EDGES if rows.where(network=n)}
    lines |= {line.format(at, total): {x: at} for at in sorted(rows.distinct(x))}
    shown = [tables.Column(name, where) for name, where in columns.items()]
    return tables.pivot(
        rows, lines, [*shown, *more], title=record["title"] + about, corner="test accuracy, %",
        caption=f"*: at or above the mean of the edge models, {100 * edge:.2f}",
        mark=lambda name, mean: name not in EDGES and mean >= edge)  # fmt: skip


def by_remedy(name: str, where: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": name if name in figures.METHODS else where["remedy"]}


def panel(
    record: Record, title: str, x_label: str, columns: Columns, look: Any = by_remedy,
    x: str = "layers", **options: Any,
) -> figures.Panel:  # fmt: skip
    """Accuracies against x, where there are any, with edge models and ensemble as levels."""
    rows, summary = record.rows, record["summary"]
    lines = [
        figures.line(rows, x, name=name, **look(name, where), **where)
        for name, where in columns.items()
        if rows.values(**where)
    ]
    found = {"edge models' mean": summary["edge_mean"], "ensemble": summary.get("ensemble")}
    lines += figures.levels({name: level for name, level in found.items() if level is not None})
    return figures.Panel(title, x_label, figures.ACCURACY, lines, **options)


def statistics(cpu: int) -> Any:
    """The option of how many training images there are."""
    return cli.images("statistics", "training images, the first N, not augmented, for matching and "
                      "renormalisation", cpu)  # fmt: skip
