"""Two edge models: measured once, matched in any way, merged in part, renormalised, tested."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import vfjax
from kit import cli, edges, figures, timing
from vfjax import align, data, merge, renorm, stats, train
from vfjax.align import Maps

PyTree = Any

# Matchings that may mix units.
MIXING = {"zipit": align.zip_moments, "cca": align.cca_moments}
MIXING["transport"] = align.transport_moments
# All matchings, and what titles call them.
MATCHES = {name: figures.label(name) for name in ("activation", "weight", "none", *MIXING)}
MATCHES["none"] = "no matching"
# Settings, as options and but for "zip_" arguments; what titles and names of files call them.
SETTINGS = {
    "zipit": {"zip_alpha": ("alpha {:g}", "a{:g}"), "zip_beta": ("beta {:g}", "b{:g}")},
    "cca": {"regularization": ("ridge {:g}", "r{:g}"),
            "relative": ("times the mean variance", "relative")},
}  # fmt: skip
# Those of the paper's code.
DEFAULTS = {"zip_alpha": 0.3, "zip_beta": 0.125, "regularization": 0.1, "relative": False}
# l by L, from tables 1 and 7 of the paper; other depths take the fractions of L = 14.
LAYERS = {14: (0, 3, 6, 8, 12), 20: (0, 6, 10, 13, 19)}
# Images wait at a cut for what is tried behind it, up to so many bytes.
STORE = 1 << 29


# fmt: off
@dataclasses.dataclass(frozen=True)
class MatchingOptions(edges.EdgeOptions):
    """The settings of matchings that have any; they are those of the paper's code."""

    zip_alpha: float = cli.option(
        DEFAULTS["zip_alpha"], "with ZipIt!, discount on the correlations of units that are merges "
        "already", type=cli.number_of(0, 1), metavar="A")
    zip_beta: float = cli.option(
        DEFAULTS["zip_beta"], "with ZipIt!, share of the merges that may be of units of one "
        "network", type=cli.number_of(0, 1), metavar="B")
    regularization: float = cli.option(
        DEFAULTS["regularization"], "with CCA, what is added to the diagonal of the covariances: "
        "as it is, whatever their size, like in the paper's code; the library's own default is 1 "
        "with --relative", type=cli.number_of(0), metavar="R")
    relative: bool = cli.option(
        False, "with CCA, take --regularization times the mean variance of a network's features")
# fmt: on


def check(config: MatchingOptions, matches: Iterable[str]) -> None:
    """Refuses settings of matchings that are not asked for: they would do nothing."""
    others = {match: settings for match, settings in SETTINGS.items() if match not in matches}
    for match, option in [(name, option) for name, of in others.items() for option in of]:
        if getattr(config, option) != DEFAULTS[option]:
            name = option.replace("_", "-")
            raise cli.UserError(f"--{name} does nothing here: it is for --match {match}.")


def title_of(match: str, config: Mapping[str, Any]) -> str:
    """A matching in titles, with those of its settings that are not the default.

    Example:
      >>> title_of("cca", DEFAULTS), title_of("cca", DEFAULTS | {"regularization": 1.0})
      ('CCA', 'CCA (ridge 1)')
    """
    changed = [label.format(value) for label, _, value in _changed(match, config)]
    return MATCHES[match] + (f" ({', '.join(changed)})" if changed else "")


def name_of(match: str, config: Mapping[str, Any]) -> str:
    """A matching in names of files.

    Example:
      >>> name_of("zipit", DEFAULTS), name_of("zipit", DEFAULTS | {"zip_beta": 0.0})
      ('zipit', 'zipit-b0')
    """
    return "-".join([match, *(short.format(value) for _, short, value in _changed(match, config))])


def _changed(match: str, config: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    # Older records lack what was added since, and have its default.
    changed = {k: config[k] for k, usual in DEFAULTS.items() if config.get(k, usual) != usual}
    settings = SETTINGS.get(match, {}).items()
    return [(*texts, changed[option]) for option, texts in settings if option in changed]


def default_layers(depth: int) -> list[int]:
    """The numbers of preserved layers that a table has a row for."""
    nearest = {min(int(layers / 14 * depth + 0.5), depth - 1) for layers in LAYERS[14]}
    return list(LAYERS.get(depth, sorted(nearest)))


def remedies_of(net: vfjax.Network) -> list[str]:
    """What merged networks of a kind are renormalised with, in the paper's tables."""
    return ["reset"] if net.norms else ["repair", "rescale", "bias_calibration"]


def methods_of(net: vfjax.Network, match: str) -> list[tuple[str, str]]:
    """Matchings and remedies: the columns of the paper's table 1, or 7 and 8 with BatchNorm."""
    remedies = ["none", *remedies_of(net)]
    found = [("none", "none"), *((match, remedy) for remedy in remedies)]
    if match in MIXING:
        found += [("activation", how) for how in remedies if how != "bias_calibration"]
    return list(dict.fromkeys(found))


def columns_of(own: str, methods: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Matchings and remedies by their names in tables; `own` is the matching of the run.

    Example:
      >>> columns_of("cca", [("activation", "reset"), ("cca", "none"), ("none", "none")]).keys()
      dict_keys(['direct', 'matched', 'AM + RESET'])
    """
    names = {}
    ordered = sorted(dict.fromkeys(methods), key=lambda m: (m != ("none", "none"), m[0] != own))
    for match, remedy in ordered:
        name = "matched" if remedy == "none" else figures.label(remedy)
        if match != own:
            name = "AM" if remedy == "none" else f"AM + {name}"
        names["direct" if (match, remedy) == ("none", "none") else name] = match, remedy
    return names


@dataclasses.dataclass(frozen=True, eq=False)
class Matching:
    """How the units of two networks were brought together, and what records say of it."""

    maps: Maps
    # Moments of both after the maps, the goals of REPAIR and RESCALE; None with RESET.
    references: stats.Moments | None
    # Both after the maps: where their biases are read.
    mapped: Sequence[PyTree]
    record: Mapping[str, Any]


@dataclasses.dataclass(eq=False)
class Pair:
    """Two edge models, with their weights in averages, on statistics and test images.

    Moments are measured in one pass, which serves all `matches` that will be asked for, and the
    goals of every REPAIR and RESCALE.
    """

    net: vfjax.Network
    trees: Sequence[PyTree]
    weights: tuple[float, float]
    statistics: data.Batches
    test: data.Batches
    matches: Sequence[str]
    # With BatchNorm only matchings need any.
    moments: stats.Moments | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        net = self.net
        covariance: bool | str | Sequence[str] = "cross" if "activation" in self.matches else False
        if MIXING.keys() & {*self.matches}:
            # Moments go through matrices by the covariances within each network.
            corrected = () if net.norms else stats.resolve_sites(net, "paper")
            covariance = [*stats.resolve_sites(net, "taps"), *corrected]
        if covariance or not net.norms:
            watched = timing.Watched(self.statistics, "statistics of edge models")
            wanted = {"sites": "taps" if net.norms else "paper", "covariance": covariance}
            self.moments = stats.moments(net, self.trees, watched, **wanted)

    def matching(self, match: str, config: Mapping[str, Any] = DEFAULTS) -> Matching:
        """Matches the second network to the first, or both to each other; with their settings."""
        net, record, maps = self.net, {"method": match}, Maps.of_permutations([None, None])
        # There are some wherever the matching was asked for.
        moments: Any = self.moments
        if match in MIXING:
            settings = {key.removeprefix("zip_"): config[key] for key in SETTINGS.get(match, ())}
            maps, record = MIXING[match](net, moments, **settings), record | settings
        elif match != "none":
            if match == "activation":
                found = align.match_moments(net, moments)
            else:
                found = align.match_weights(net, *self.trees, key=jax.random.key(0))
            maps = Maps.of_permutations([None, found.permutations])
            record["objective"] = [float(value) for value in found.objective]
            record |= {"converged": found.converged, "moved": found.moved}
        references = None if moments is None or net.norms else maps.carry(moments)
        return Matching(maps, references, maps.apply(net, self.trees), record)

    def merged(self, matching: Matching, layers: slice) -> merge.Merged:
        options = {"span": layers, "weights": self.weights}
        return merge.partial(self.net, self.trees, matching.maps, **options)

    def renormalised(
        self, remedy: str | None, matching: Matching, merged: merge.Merged, statistics: Any
    ) -> merge.Merged:
        """What the remedy's name says; `statistics` are images, or what they are at the cut."""
        if remedy is None:
            return merged
        if remedy == "bias_calibration":
            return renorm.calibrate_bias(self.net, merged, references=matching.mapped)
        goals = {} if remedy == "reset" else {"references": matching.references}
        return getattr(renorm, remedy)(self.net, merged, statistics, **goals)

    def evaluate(self, merged: merge.Merged, batches: Any, description: str) -> dict[str, float]:
        """Accuracy and loss on the test images, or on what they are at the cut."""
        found = train.evaluate(_logits, merged, timing.Watched(batches, description))
        return {"accuracy": found.accuracy, "loss": found.loss}

    def edge(self, name: str) -> dict[str, float]:
        """Accuracy and loss of `model 1`, `model 2` or the `ensemble`."""
        if name == "ensemble":
            merged = merge.ensemble(self.net, self.trees, self.weights)
        else:
            tree = self.trees[int(name.removeprefix("model ")) - 1]
            merged = merge.as_merged(self.net, tree, weights=self.weights)
        return self.evaluate(merged, self.test, name)


class Cut:
    """A pair merged from some layer on or in a range (`merged`), and what is tried behind it."""

    def __init__(self, pair: Pair, matching: Matching, layers: int | slice) -> None:
        self.pair, self.matching = pair, matching
        span = layers if isinstance(layers, slice) else slice(layers, None)
        self.merged = pair.merged(matching, span)

    @functools.cached_property
    def test(self) -> Any:
        return at_cut(self.merged, self.pair.test)

    @functools.cached_property
    def statistics(self) -> Any:
        return at_cut(self.merged, self.pair.statistics, labelled=False)

    def cost(self) -> dict[str, float]:
        return cost_of(self.pair.net, self.merged.params, self.merged.flops)

    def measured(self, remedy: str | None, description: str) -> dict[str, float | None]:
        """Accuracy and loss; None of a network that lacks statistics it needs."""
        pair, merged = self.pair, self.merged
        remedy = None if remedy == "none" else remedy
        # Of mixed units a BatchNorm does not know the variances.
        read = pair.net.trunk_leaves(merged.cut, merged.end)
        if remedy is None and self.matching.maps.unknown(pair.net) & read:
            return {"accuracy": None, "loss": None}
        statistics = self.statistics if remedy in ("repair", "rescale") else pair.statistics
        found = pair.renormalised(remedy, self.matching, merged, statistics)
        # What is stored at the cut serves all that have the very same stems.
        batches = self.test if found.stems is merged.stems else pair.test
        return pair.evaluate(found, batches, description)


def cost_of(net: vfjax.Network, params: int, flops: int) -> dict[str, float]:
    """Parameters and FLOPs of a network, and relative to one model's."""
    ratios = params / net.params, flops / net.flops
    return {"params": params, "params_ratio": ratios[0], "flops": flops, "flops_ratio": ratios[1]}


def at_cut(merged: merge.Merged, batches: data.Batches, *, labelled: bool = True) -> Any:
    """The batches as they cross the cut, if there is one and memory allows; else as given."""
    if merged.cut == 0:
        return batches
    x, _ = next(iter(batches))
    crossing = jax.eval_shape(merged.crossing, x)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(crossing))
    if size * len(batches) > STORE:
        return batches
    watched = timing.Watched(batches, f"first {merged.cut} layers")
    stored = [(_crossing(merged, x), label) for x, label in watched]
    return stored if labelled else [crossing for crossing, _ in stored]


_crossing = jax.jit(merge.Merged.crossing)


def _logits(merged: merge.Merged, x: PyTree) -> jax.Array:
    """The output; of heads, which all know the same classes, the average."""
    out = edges.forward(merged, x)
    if not merged.heads:
        return out
    parts = (weight * logits for weight, logits in zip(merged.weights, out, strict=True))
    return sum(parts, start=jnp.zeros(()))
