"""Apart, one, apart again: averages, soups, ensembles and Preserve-First Merging.

Models are given as a sequence of trees of one structure that are already aligned (`vfjax.align`).

- `interpolate` averages whole trees; `uniform_soup` and `greedy_soup` average many.
- `preserve_first(net, trees, layers=l)` keeps the first l layers of each model apart (its *stem*)
  and averages the rest (the *trunk*): l = 0 is the merged model, l = L the logit ensemble.
- `partial(net, trees, maps, span=slice(i, j))` merges any range of layers; the layers after it stay
  apart as each model's *head*. `slice(l, None)` is Preserve-First Merging, `slice(None, l)` the
  partial zip of ZipIt!. Heads may have different numbers of classes, and maps may mix units.

    >>> import jax, numpy as np, vfjax
    >>> def forward(v, x):
    ...     return jax.nn.relu(x @ v["w"]) @ v["v"]
    >>> a = {"w": np.ones((3, 4)), "v": np.ones((4, 2))}
    >>> b, x = a | {"w": -a["w"]}, np.ones((5, 3))
    >>> net = vfjax.trace(forward, a, x)
    >>> [float(preserve_first(net, [a, b], layers=l)(x)[0, 0]) for l in (0, 2)]
    [0.0, 6.0]

`preserve_first` and `partial` return a `Merged`, which is a pytree: call it, jit it, differentiate
it, save it with `vfjax.checkpoint`, pass it to `vfjax.renorm`. Their docstrings name the sources.
"""

from __future__ import annotations

from vfjax.merge._arguments import as_merged as as_merged
from vfjax.merge._merged import Merged as Merged
from vfjax.merge._partial import ensemble as ensemble
from vfjax.merge._partial import partial as partial
from vfjax.merge._partial import preserve_first as preserve_first
from vfjax.merge._soups import Soup as Soup
from vfjax.merge._soups import greedy_soup as greedy_soup
from vfjax.merge._soups import interpolate as interpolate
from vfjax.merge._soups import uniform_soup as uniform_soup

__all__ = [
    "Merged",
    "Soup",
    "as_merged",
    "ensemble",
    "greedy_soup",
    "interpolate",
    "partial",
    "preserve_first",
    "uniform_soup",
]
