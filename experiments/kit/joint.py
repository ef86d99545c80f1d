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

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def moments(self, images: int | None = None) -> stats.Moments:
        """Correlations of all features, over so many of the images."""
        batches = self.statistics if images is None else self.statistics.samples(images)
        with self.watch("statistics"):
            watched = timing.Watched(batches, "statistics")
            return stats.moments(self.net, self.trees, watched, sites="taps", covariance=True)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def maps(self, method: str, images: int | None = None, **how: Any) -> align.Maps | None:
        """How features are matched: not for `average`, else by `weights`, or to `permute` or `zip`.

        Permuted are all networks to a shared universe; of two networks, that is the assignment.
        """
        if method == "average":
            return None
        whole = images is None or images == len(self.statistics.images)
        known = self.moments(None if whole else images)
        with self.watch("matching"):
            if method == "zip":
                return align.zip_moments(self.net, known, key=jax.random.key(0), **how)
            if method == "permute":
                found = align.match_universe_moments(self.net, known)
                return align.Maps.of_permutations(found.permutations)
            found = align.match_weights(self.net, *self.trees, key=jax.random.key(0))
            return align.Maps.of_permutations([{}, found.permutations])

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
    """By head, what a model makes of all images, `[n, outputs]`.

    Example:
      >>> model = jax.tree_util.Partial(lambda x: (x, 2 * x))
      >>> [found.shape for found in outputs(model, np.ones((2, 3, 1)))]
      [(6, 1), (6, 1)]
    """
    found = [jax.device_get(_called(model, x)) for x in batches]
    heads = zip(*found, strict=True) if isinstance(found[0], tuple) else [found]
    return [np.concatenate(parts) for parts in heads]
