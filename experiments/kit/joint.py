"""Several networks made one: mapped, averaged in their first layers, tested by head."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

import vfjax
from kit import records, timing
from vfjax import align, merge, renorm, stats


class Networks:
    """Networks of one architecture, merged in any way; BatchNorm is then measured anew (RESET)."""

    def __init__(
        self, net: vfjax.Network, trees: Sequence[Any], statistics: Any, watch: timing.Stopwatch
    ) -> None:
        self.net, self.trees, self.statistics, self.watch = net, trees, statistics, watch

    def measured(self, batches: Iterable[Any]) -> stats.Moments:
        """Correlations of all features."""
        with self.watch("statistics"):
            watched = timing.Watched(batches, "statistics")
            return stats.moments(self.net, self.trees, watched, sites="taps", covariance=True)

    @functools.cached_property
    def moments(self) -> stats.Moments:
        return self.measured(self.statistics)

    def zip(self, images: int | None = None, **how: Any) -> align.Maps:
        """ZipIt!, or another matcher of its kind, from the statistics of so many images."""
        whole = images is None or images == len(self.statistics.images)
        known = self.moments if whole else self.measured(self.statistics.samples(images))
        with self.watch("matching"):
            return align.zip_moments(self.net, known, key=jax.random.key(0), **how)

    @functools.cached_property
    def permuted(self) -> align.Maps:
        """Permutations by activations to a shared universe; of two networks, the assignment."""
        known = self.moments
        with self.watch("matching"):
            found = align.match_universe_moments(self.net, known)
        return align.Maps.of_permutations(found.permutations)

    def merged(self, maps: align.Maps | None, layers: int) -> merge.Merged:
        """The average of the first layers, behind which each network goes on: of 0, an ensemble."""
        return self.reset(merge.partial(self.net, self.trees, maps, span=slice(layers)))

    def alone(self, place: int) -> merge.Merged:
        return self.reset(merge.as_merged(self.net, self.trees[place]))

    def reset(self, model: merge.Merged) -> merge.Merged:
        if not self.net.norms:
            return model
        with self.watch("RESET"):
            return renorm.reset(self.net, model, timing.Watched(self.statistics, "RESET"))

    def costs(self, model: merge.Merged) -> records.Row:
        """In parts of one network's."""
        costs = ("params", "flops")
        return {f"{k}_ratio": getattr(model, k) / getattr(self.net, k) for k in costs}


@jax.jit
def _called(model: Any, x: jax.Array) -> Any:
    return model(x)


def outputs(model: Any, batches: Iterable[Any]) -> list[np.ndarray]:
    """By head, what a model makes of all images, `[n, outputs]`."""
    found = [jax.device_get(_called(model, x)) for x in batches]
    heads = zip(*found, strict=True) if isinstance(found[0], tuple) else [found]
    return [np.concatenate(parts) for parts in heads]
