"""Two edge models: measured once, matched in any way, merged in part, renormalised, tested."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import _common
import _edges
import jax
import jax.numpy as jnp

import vfjax
from vfjax import align, data, merge, renorm, stats, train
from vfjax.align import Maps

PyTree = Any

# Matchings, and what titles call them.
MATCHES = {
    "activation": "activation matching",
    "weight": "weight matching",
    "none": "no matching",
    "zipit": "ZipIt!",
    "cca": "CCA",
    "transport": "optimal transport",
}
# Those that go by activations, and of them those that may mix units.
MIXING = ("zipit", "cca", "transport")
FROM_DATA = ("activation", *MIXING)
# What the settings of a matching are called in titles and in names of files.
SETTINGS = {
    "zipit": {"zip_alpha": ("alpha {:g}", "a{:g}"), "zip_beta": ("beta {:g}", "b{:g}")},
    "cca": {
        "regularization": ("ridge {:g}", "r{:g}"),
        "relative": ("times the mean variance", "relative"),
    },
}
# Those of the paper's code.
DEFAULTS = {"zip_alpha": 0.3, "zip_beta": 0.125, "regularization": 0.1, "relative": False}

# -------------------------------------------------------------------------------------- options


def matching_options(p: argparse.ArgumentParser) -> None:
    """Adds the settings of matchings that have any; they are those of the paper's code."""
    p.add_argument(
        "--zip-alpha",
        type=_edges.alpha_of,
        default=DEFAULTS["zip_alpha"],
        metavar="A",
        help="with ZipIt!, discount on the correlations of units that are merges already",
    )
    p.add_argument(
        "--zip-beta",
        type=_edges.alpha_of,
        default=DEFAULTS["zip_beta"],
        metavar="B",
        help="with ZipIt!, share of the merges that may be of units of one network",
    )
    p.add_argument(
        "--regularization",
        type=_ridge,
        default=DEFAULTS["regularization"],
        metavar="R",
        help="with CCA, what is added to the diagonal of the covariances: as it is, whatever their "
        "size, like in the paper's code; the library's own default is 1 with --relative",
    )
    p.add_argument(
        "--relative",
        action="store_true",
        help="with CCA, take --regularization times the mean variance of a network's features",
    )


def check(args: argparse.Namespace, matches: Sequence[str]) -> None:
    """Refuses settings of matchings that are not asked for: they would do nothing.

    Raises:
      UserError: If there are some.
    """
    for match, settings in SETTINGS.items():
        for option in settings:
            if match not in matches and getattr(args, option) != DEFAULTS[option]:
                raise _common.UserError(
                    f"--{option.replace('_', '-')} does nothing here: it is for --match {match}."
                )


def _ridge(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value


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
    return [
        (label, short, config[option])
        for option, (label, short) in SETTINGS.get(match, {}).items()
        # Older records lack what was added since, and have its default.
        if config.get(option, DEFAULTS[option]) != DEFAULTS[option]
    ]


# Images wait at a cut for what is tried behind it, up to so many bytes.
STORE = 1 << 29


# ---------------------------------------------------------------------------------------- pairs


@dataclasses.dataclass(frozen=True, eq=False)
class Matching:
    """How the units of two networks were brought together.

    Attributes:
      maps: Of both networks.
      references: Moments of both after the maps, the goals of REPAIR and RESCALE; None with RESET,
        which has none.
      mapped: Both networks after the maps: where their biases are read.
      record: What records say of it.
    """

    maps: Maps
    references: stats.Moments | None
    mapped: Sequence[PyTree]
    record: Mapping[str, Any]


class Pair:
    """Two edge models on one set of statistics and test images.

    Args:
      net: The traced network.
      trees: The two models.
      weights: Their weights in averages.
      statistics: Batches that moments are measured on.
      test: Batches to test on.
      matches: Matchings that will be asked for.
    """

    def __init__(
        self,
        net: vfjax.Network,
        trees: Sequence[PyTree],
        weights: tuple[float, float],
        statistics: data.Batches,
        test: data.Batches,
        matches: Sequence[str],
    ) -> None:
        self.net, self.trees, self.weights = net, tuple(trees), weights
        self.statistics, self.test = statistics, test
        self.moments = self._measured(matches)

    def _measured(self, matches: Sequence[str]) -> stats.Moments | None:
        """One pass, which serves all matchings and the goals of every REPAIR and RESCALE."""
        net = self.net
        covariance: bool | str | Sequence[str] = False
        if any(match in MIXING for match in matches):
            # Moments go through matrices by the covariances within each network.
            corrected = () if net.norms else stats.resolve_sites(net, "paper")
            covariance = [*stats.resolve_sites(net, "taps"), *corrected]
        elif any(match in FROM_DATA for match in matches):
            covariance = "cross"
        if net.norms and not covariance:
            return None
        return stats.moments(
            net,
            self.trees,
            _common.Watched(self.statistics, "statistics of edge models"),
            sites="taps" if net.norms else "paper",
            covariance=covariance,
        )

    def matching(self, match: str, config: Mapping[str, Any] = DEFAULTS) -> Matching:
        """Matches the second network to the first, or both to each other; with their settings."""
        net, record = self.net, {"method": match}
        # There are some wherever the matching was asked for.
        moments: Any = self.moments
        if match in ("activation", "weight"):
            if match == "activation":
                found = align.match_moments(net, moments)
            else:
                found = align.match_weights(net, *self.trees, key=jax.random.key(0))
            maps = Maps.of_permutations([None, found.permutations])
            record |= {
                "objective": [float(value) for value in found.objective],
                "converged": found.converged,
                "moved": found.moved,
            }
        elif match == "zipit":
            alpha, beta = config["zip_alpha"], config["zip_beta"]
            maps = align.zip_moments(net, moments, alpha=alpha, beta=beta)
            record |= {"alpha": alpha, "beta": beta}
        elif match == "cca":
            ridge = {name: config[name] for name in ("regularization", "relative")}
            maps = align.cca_moments(net, moments, **ridge)
            record |= ridge
        elif match == "transport":
            maps = align.transport_moments(net, moments)
        else:
            maps = Maps.of_permutations([None, None])
        references = None if moments is None or net.norms else maps.carry(moments)
        return Matching(maps, references, maps.apply(net, self.trees), record)

    def merged(self, matching: Matching, layers: slice) -> merge.Merged:
        """The two models merged in a range of layers, before any renormalisation."""
        return merge.partial(
            self.net, self.trees, matching.maps, merged=layers, weights=self.weights
        )

    def lacks_variances(self, matching: Matching, merged: merge.Merged) -> bool:
        """Whether merging left variances unknown that the merged layers need."""
        read = self.net.trunk_leaves(merged.cut, merged.end)
        return bool(matching.maps.unknown(self.net) & read)

    def renormalised(
        self, remedy: str | None, matching: Matching, merged: merge.Merged, statistics: Any
    ) -> merge.Merged:
        """What the remedy's name says; `statistics` are images, or what they are at the cut."""
        net = self.net
        if remedy is None:
            return merged
        if remedy == "bias_calibration":
            return renorm.calibrate_bias(net, merged, references=matching.mapped)
        if remedy == "reset":
            return renorm.reset(net, merged, statistics)
        function = renorm.repair if remedy == "repair" else renorm.rescale
        goals: Any = matching.references
        return function(net, merged, statistics, references=goals)

    def evaluate(self, merged: merge.Merged, batches: Any, description: str) -> dict[str, float]:
        """Accuracy and loss on the test images, or on what they are at the cut."""
        found = train.evaluate(_logits, merged, _common.Watched(batches, description))
        return {"accuracy": found.accuracy, "loss": found.loss}

    def edges(self) -> dict[str, dict[str, float]]:
        """Both models and their ensemble."""
        found = {}
        for index, tree in enumerate(self.trees, start=1):
            merged = merge.as_merged(self.net, tree, weights=self.weights)
            found[f"model {index}"] = self.evaluate(merged, self.test, f"model {index}")
        merged = merge.ensemble(self.net, self.trees, self.weights)
        found["ensemble"] = self.evaluate(merged, self.test, "ensemble")
        return found


def at_cut(merged: merge.Merged, batches: data.Batches, *, labelled: bool = True) -> Any:
    """The batches as they cross the cut, if there is one and memory allows; else as given."""
    if merged.cut == 0:
        return batches
    x, _ = next(iter(batches))
    crossing = jax.eval_shape(merged.crossing, x)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(crossing))
    if size * len(batches) > STORE:
        return batches
    watched = _common.Watched(batches, f"first {merged.cut} layers")
    stored = [(_crossing(merged, x), label) for x, label in watched]
    return stored if labelled else [crossing for crossing, _ in stored]


@jax.jit
def _crossing(merged: merge.Merged, x: jax.Array) -> vfjax.Crossing:
    """What the stems hand to the trunk."""
    return merged.crossing(x)


def _logits(merged: merge.Merged, x: PyTree) -> jax.Array:
    """The output; of heads, which all know the same classes, the average."""
    out = _edges.forward(merged, x)
    if not merged.heads:
        return out
    parts = (weight * logits for weight, logits in zip(merged.weights, out, strict=True))
    return sum(parts, start=jnp.zeros(()))
