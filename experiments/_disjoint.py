"""What `zipit_disjoint.py` measures of a pair of networks that were trained on disjoint classes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import _common
import _heads
import jax
import numpy as np
from tqdm import tqdm

import vfjax
from vfjax import align, data, merge, renorm, stats

PyTree = Any

ALPHAS = (0.01, 0.1, 0.3, 1.0)
BETAS = (0.0, 0.0375, 0.075, 0.125, 0.25, 1.0)
IMAGES = (10, 30, 100, 300, 1_000)
MATCHERS = ("identity", "permutation", "kmeans", "greedy", "optimal")
# Where partial zips end, by L: the ends of stages; at others each layer, or thirds.
STOPS = {20: (7, 13, 19, 20)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all pairs share.

    Attributes:
        net: The traced network, whose outputs are embeddings.
        head: What makes logits of them, for all classes.
        statistics: Batches to measure statistics on.
        test: Batches to test on.
    """

    net: vfjax.Network
    head: _heads.Head
    statistics: data.Batches
    test: data.Batches


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
        self.setting, self.net, self.trees, self.watch = setting, setting.net, list(trees), watch
        self.heads = _heads.Heads(setting.head, tuple(map(tuple, tasks)))
        self.args = args
        with watch("statistics"):
            self.moments = self.measure(None)
        self.zip = align.zip_moments(self.net, self.moments, alpha=args.alpha, beta=args.beta)

    def measure(self, images: int | None) -> stats.Moments:
        """Correlations of all features, over so many of the statistics images."""
        batches = _common.Watched(self.setting.statistics.samples(images), "statistics")
        return stats.moments(self.net, self.trees, batches, sites="taps", covariance=True)

    def accuracy(self, model: Any, what: str) -> dict[str, Any]:
        """Joint and per task, once BatchNorm has statistics of its own.

        Args:
            model: A tree, a partial merge, or a tuple of trees: one head each.
            what: For the progress bar.
        """
        if self.net.norms:
            with self.watch("RESET"):
                model = self.reset(model, what)
        with self.watch("test"):
            batches = _common.Watched(self.setting.test, f"testing {what}")
            return _heads.accuracy(self.heads, _runnable(self.net, model), batches)

    def reset(self, model: Any, what: str) -> Any:
        """The same with the statistics of its norms measured."""
        if type(model) is tuple:
            return tuple(self.reset(tree, what) for tree in model)
        batches = _common.Watched(self.setting.statistics, f"RESET of {what}")
        return renorm.reset(self.net, model, batches)

    def merged(self, maps: Any, what: str) -> dict[str, Any]:
        """Accuracy of the average of the mapped networks."""
        return self.accuracy(merge.interpolate(maps.apply(self.net, self.trees)), what)

    def partial(self, maps: Any, layers: int, what: str) -> dict[str, Any]:
        """Accuracy with the first layers merged, a head per network after them."""
        if layers == self.net.depth:
            return self.merged(maps, what)
        model = merge.partial(self.net, self.trees, maps, merged=slice(None, layers))
        return self.accuracy(model, f"{what} {layers}/{self.net.depth}")

    def found(self, bar: tqdm) -> dict[str, Any]:
        """Everything."""
        parts: dict[str, Callable[[], Any]] = {
            "networks": self.networks,
            "methods": self.methods,
            "partial": self.partials,
            "sweep": self.sweep,
            "matchers": self.matchers,
            "images": self.images,
            "layers": self.layers,
        }
        record: dict[str, Any] = {"tasks": [list(task) for task in self.heads.tasks]}
        for name, part in parts.items():
            bar.set_description(name)
            record[name] = part()
            bar.update()
        # Computed once, shown twice.
        record["methods"]["zip"] = record["partial"]["zip"][str(self.net.depth)]
        record["methods"]["permutation"] = record["partial"]["permutation"][str(self.net.depth)]
        record["methods"]["ensemble"] = record["partial"]["ensemble"]
        del record["partial"]["ensemble"]
        return record

    def networks(self) -> dict[str, Any]:
        """Each by itself."""
        names = zip("AB", self.trees, strict=True)
        return {f"network {name}": self.accuracy(tree, f"network {name}") for name, tree in names}

    def methods(self) -> dict[str, Any]:
        """What is merged whole and without these statistics."""
        by_weights = align.match_weights(self.net, *self.trees, key=jax.random.key(0))
        return {
            "average": self.accuracy(merge.interpolate(self.trees), "the weight average"),
            "weights": self.merged(_permuted(by_weights), "weights matched"),
        }

    @functools.cached_property
    def permutation(self) -> Any:
        """The maps that permute the second network's units."""
        return _permuted(align.match_moments(self.net, self.moments))

    def partials(self) -> dict[str, Any]:
        """The first layers merged, none (the ensemble) to all."""
        found: dict[str, Any] = {"ensemble": self.accuracy(tuple(self.trees), "ensemble")}
        for name, maps in (("zip", self.zip), ("permutation", self.permutation)):
            found[name] = {
                str(layers): self.partial(maps, layers, name) for layers in stops_of(self.net.depth)
            }
        return found

    def sweep(self) -> list[dict[str, Any]]:
        """Sweeps alpha at the beta asked for, and beta at the alpha asked for."""
        args, found = self.args, []
        grid = [(alpha, args.beta) for alpha in (*ALPHAS, args.alpha)]
        grid += [(args.alpha, beta) for beta in (*BETAS, args.beta)]
        for alpha, beta in sorted(set(grid)):
            maps = align.zip_moments(self.net, self.moments, alpha=alpha, beta=beta)
            accuracy = self.merged(maps, f"alpha {alpha:g}, beta {beta:g}")
            found.append({"alpha": alpha, "beta": beta, **accuracy})
        return found

    def matchers(self) -> dict[str, Any]:
        """Ways to match, with the seconds from correlations to maps."""
        found = {}
        for name in MATCHERS:
            start = time.perf_counter()
            maps = self.matched(name)
            seconds = time.perf_counter() - start
            found[name] = {"seconds": seconds, **self.merged(maps, f"{name} matching")}
        return found

    def matched(self, name: str) -> Any:
        """The maps that a way to match finds."""
        if name == "permutation":
            return _permuted(align.match_moments(self.net, self.moments))
        if name == "greedy":
            args = self.args
            return align.zip_moments(self.net, self.moments, alpha=args.alpha, beta=args.beta)
        return align.match_pairs(self.net, self.moments, matcher=name)

    def images(self) -> dict[str, Any]:
        """ZipIt! with the statistics of few images."""
        found, args = {}, self.args
        for count in (*(n for n in IMAGES if n < args.samples), args.samples):
            maps = self.zip
            if count < args.samples:
                with self.watch("statistics of few images"):
                    moments = self.measure(count)
                maps = align.zip_moments(self.net, moments, alpha=args.alpha, beta=args.beta)
            found[str(count)] = self.merged(maps, f"{count} statistics images")
        return found

    def layers(self) -> list[dict[str, Any]]:
        """By group, what ZipIt! merged: correlation, and the share within a network."""
        found = []
        depths = {layer.group: layer.depth for layer in reversed(self.net.layers) if layer.group}
        for group, similarity in align.correlations(self.net, self.moments).items():
            member = np.concatenate([maps[group][1] for maps in self.zip.maps])
            features = len(member) // len(self.trees)
            model = np.repeat(np.arange(len(self.trees)), features)
            first, second = np.nonzero(np.triu(member @ member.T, 1))
            within = model[first] == model[second]
            order = np.nonzero(self.permutation.maps[1][group][0])[1]
            across = similarity[:features, features:][np.arange(features), order]
            found.append(
                {
                    "group": group,
                    "depth": depths[group],
                    "features": features,
                    "correlation": float(similarity[first, second].mean()),
                    "within": float(within.mean()),
                    "largest": int(member.sum(0).max()),
                    "permutation": float(across.mean()),
                }
            )
        return sorted(found, key=lambda row: row["depth"])


def _permuted(found: align.Alignment) -> Any:
    """A matching of the second network's units to the first's, as maps of both."""
    return align.Maps.of_permutations([{}, found.permutations])


def _runnable(net: vfjax.Network, model: Any) -> Any:
    """What can be called: trees become merged networks of one."""
    if type(model) is tuple:
        return tuple(_runnable(net, tree) for tree in model)
    return model if callable(model) else merge.as_merged(net, model)


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
