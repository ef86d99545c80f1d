"""What `zipit_disjoint.py` measures of a pair of networks that were trained on disjoint classes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import _common
import _heads
import jax
import numpy as np
from kit import edges as kit_edges
from tqdm import tqdm

import vfjax
from vfjax import align, merge, renorm, stats

PyTree = Any

_log = logging.getLogger(__name__)

ALPHAS = (0.01, 0.1, 0.3, 1.0)
BETAS = (0.0, 0.0375, 0.075, 0.125, 0.25, 0.5, 1.0)
IMAGES = (10, 30, 100, 300, 1_000)
# Optimal pairs know no budget of merges within a network: greedy ones are tried without one, too.
MATCHERS = ("identity", "permute", "kmeans", "greedy", "unbounded", "optimal")
# Where partial zips end, by L: the ends of stages; at others each layer, or thirds.
STOPS = {20: (7, 13, 19, 20)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all pairs share.

    Attributes:
        net: The traced network, whose outputs are embeddings.
        head: What makes logits of them, for all classes.
        images: To measure statistics on, to choose alpha and beta on, to test on.
    """

    net: vfjax.Network
    head: _heads.Head
    images: kit_edges.Images


def tasks_of(classes: int, pair: int) -> tuple[tuple[int, ...], ...]:
    """The two halves of the classes: in their order for the first pair, else at random.

    Example:
      >>> tasks_of(4, 0)
      ((0, 1), (2, 3))
    """
    order = np.arange(classes)
    if pair:
        order = np.random.default_rng(pair).permutation(classes)
    return tuple(tuple(sorted(map(int, part))) for part in np.array_split(order, 2))


class Pair:
    """Two networks; merges them in every way and measures what comes out."""

    def __init__(
        self,
        setting: Setting,
        trees: Sequence[PyTree],
        tasks: Sequence[Sequence[int]],
        args: argparse.Namespace,
        watch: _common.Stopwatch,
    ) -> None:
        self.net, self.images, self.watch, self.args = setting.net, setting.images, watch, args
        self.heads, self.trees = _heads.Heads(setting.head, tuple(map(tuple, tasks))), list(trees)
        with watch("statistics"):
            self.moments = self.measure(None)
        self.zip = align.zip_moments(self.net, self.moments, alpha=args.alpha, beta=args.beta)
        self.permutation = _permuted(align.match_moments(self.net, self.moments))

    def measure(self, count: int | None) -> stats.Moments:
        """Correlations of all features, over so many of the statistics images."""
        batches = _common.Watched(self.images.statistics.samples(count), "statistics")
        return stats.moments(self.net, self.trees, batches, sites="taps", covariance=True)

    def accuracy(self, model: Any, what: str) -> dict[str, Any]:
        """Joint and per task, and cost relative to one network's.

        Args:
            model: A tree, a partial merge, or a tuple of trees: one head each. Statistics of norms
                are measured first.
            what: For the progress bar.
        """
        with self.watch("RESET"):
            model = self.reset(model, what)
        parts = model if type(model) is tuple else (model,)
        with self.watch("test"):
            found = _heads.accuracy(self.heads, model, self.images.test)
            held_out = _heads.accuracy(self.heads, model, self.images.held_out)
        return {
            **found,
            "held_out": held_out["joint"],
            "params_ratio": sum(part.params for part in parts) / self.net.parameters,
            "flops_ratio": sum(part.flops for part in parts) / self.net.flops,
        }

    def reset(self, model: Any, what: str) -> Any:
        """What can be called, with the statistics of its norms measured."""
        if type(model) is tuple:
            return tuple(self.reset(tree, what) for tree in model)
        if self.net.norms:
            images = _common.Watched(self.images.statistics, f"RESET of {what}")
            model = renorm.reset(self.net, model, images)
        return model if isinstance(model, merge.Merged) else merge.as_merged(self.net, model)

    def merged(self, maps: align.Maps, what: str) -> dict[str, Any]:
        """Accuracy of the average of the mapped networks."""
        return self.accuracy(merge.interpolate(maps.apply(self.net, self.trees)), what)

    @functools.cached_property
    def whole(self) -> dict[str, dict[str, Any]]:
        """Accuracy with all layers merged, by the two ways that return in several places."""
        both = {"zip": self.zip, "permutation": self.permutation}
        return {name: self.merged(maps, name) for name, maps in both.items()}

    def found(self, bar: tqdm) -> dict[str, Any]:
        """Everything."""
        parts: dict[str, Callable[[], Any]] = {
            "networks": self.networks,
            "methods": self.methods,
            "partial": self.partials,
            "sweep": self.sweep,
            "matchers": self.matchers,
            "images": self.few,
            "layers": self.layers,
        }
        record: dict[str, Any] = {"tasks": [list(task) for task in self.heads.tasks]}
        for name, part in parts.items():
            bar.set_description(name)
            record[name] = part()
            bar.update()
        return record

    def networks(self) -> dict[str, Any]:
        """Each by itself."""
        names = zip("AB", self.trees, strict=True)
        return {f"network {name}": self.accuracy(tree, f"network {name}") for name, tree in names}

    def methods(self) -> dict[str, Any]:
        """What is merged whole, and the ensemble."""
        by_weights = align.match_weights(self.net, *self.trees, key=jax.random.key(0))
        return {
            "average": self.accuracy(merge.interpolate(self.trees), "weight average"),
            "weights": self.merged(_permuted(by_weights), "networks matched by weights"),
            **self.whole,
            "ensemble": self.accuracy(tuple(self.trees), "ensemble"),
        }

    def partials(self) -> dict[str, Any]:
        """The first layers merged, then a head for each network."""
        found: dict[str, Any] = {}
        for name, maps in (("zip", self.zip), ("permutation", self.permutation)):
            found[name] = {}
            for stop in stops_of(self.net.depth)[:-1]:
                model = merge.partial(self.net, self.trees, maps, merged=slice(None, stop))
                found[name][str(stop)] = self.accuracy(model, f"{name} {stop}/{self.net.depth}")
            found[name][str(self.net.depth)] = self.whole[name]
        return found

    def sweep(self) -> list[dict[str, Any]]:
        """Sweeps alpha at the beta asked for, and beta at the alpha asked for."""
        asked, found = (self.args.alpha, self.args.beta), []
        grid = {asked} | {(alpha, asked[1]) for alpha in ALPHAS}
        for alpha, beta in sorted(grid | {(asked[0], beta) for beta in BETAS}):
            accuracy = self.whole["zip"]
            if (alpha, beta) != asked:
                maps = align.zip_moments(self.net, self.moments, alpha=alpha, beta=beta)
                accuracy = self.merged(maps, f"alpha {alpha:g}, beta {beta:g}")
            found.append({"alpha": alpha, "beta": beta, **accuracy})
        return found

    def matchers(self) -> dict[str, Any]:
        """Ways to match, with the seconds from statistics to maps."""
        known, found = {"permute": "permutation", "greedy": "zip"}, {}
        for name in MATCHERS:
            if name == "optimal" and importlib.util.find_spec("networkx") is None:
                _log.warning(
                    'the optimal matching is left out: it needs networkx, pip install ".[matching]"'
                )
                continue
            start = time.perf_counter()
            maps = self.matched(name)
            seconds = time.perf_counter() - start
            accuracy = self.whole[known[name]] if name in known else self.merged(maps, name)
            found[name] = {"seconds": seconds, **accuracy}
        return found

    def matched(self, matcher: Any) -> align.Maps:
        """The maps that a way to match finds."""
        alpha, beta = self.args.alpha, self.args.beta
        if matcher == "unbounded":
            matcher, beta = "greedy", 1.0
        options = {"alpha": alpha, "beta": beta, "key": jax.random.key(0)}
        return align.zip_moments(self.net, self.moments, matcher=matcher, **options)

    def few(self) -> dict[str, Any]:
        """ZipIt! with the statistics of few images, and of all."""
        found, args, most = {}, self.args, len(self.images.statistics.images)
        for count in (count for count in IMAGES if count < most):
            with self.watch("statistics of few images"):
                moments = self.measure(count)
            maps = align.zip_moments(self.net, moments, alpha=args.alpha, beta=args.beta)
            found[str(count)] = self.merged(maps, f"{count} statistics images")
        return {**found, str(most): self.whole["zip"]}

    def layers(self) -> list[dict[str, Any]]:
        """By group, what was merged: mean correlation, and the share of it within a network."""
        maps = {"correlation": self.zip, "permutation": self.permutation}
        totals = {
            name: align.merged_correlation(self.net, self.moments, found)
            for name, found in maps.items()
        }
        depths = {layer.group: layer.depth for layer in reversed(self.net.layers)}
        found = []
        for group, sizes in self.zip.sizes.items():
            # By merged feature, how many of each network's features it is made of.
            parts = np.stack([of[group][1].sum(0) for of in self.zip.maps])
            pairs, within = (n * (n - 1) / 2 for n in (parts.sum(0), parts))
            found.append(
                {
                    "group": group,
                    "depth": depths[group],
                    "features": len(sizes),
                    "largest": int(sizes.max()),
                    "within": float(within.sum() / pairs.sum()),
                    **{name: total[group] / len(sizes) for name, total in totals.items()},
                }
            )
        return sorted(found, key=lambda row: row["depth"])


def _permuted(found: align.Alignment) -> align.Maps:
    """A matching of the second network's units to the first's, as maps of both."""
    return align.Maps.of_permutations([{}, found.permutations])


def stops_of(depth: int) -> list[int]:
    """How many layers partial zips merge, up to all.

    Example:
      >>> stops_of(5), stops_of(14)
      ([1, 2, 3, 4, 5], [5, 9, 13, 14])
    """
    if depth in STOPS:
        return list(STOPS[depth])
    if depth <= 8:
        return list(range(1, depth + 1))
    return sorted({math.ceil(depth / 3), round(0.65 * depth), depth - 1, depth})


def middle_of(depth: int) -> int:
    """The partial zip that is compared with the whole one: what 13 is of 20."""
    return min(stops_of(depth), key=lambda layers: abs(layers - 0.65 * depth))
