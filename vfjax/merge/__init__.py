"""Apart, one, apart again: averages, soups, ensembles and Preserve-First Merging.

Several models are a sequence of trees of one structure. They are expected to be aligned already
(`vfjax.align`); nothing here permutes anything.

`interpolate` averages whole trees. `partial` merges a range of layers: every model runs its own
*stem*, their results are averaged, one averaged *trunk* follows, and every model's own *head*
finishes. `preserve_first` is the case without heads: it keeps the first `l` layers apart, from
`l = 0`, the merged model, to `l = L`, the logit ensemble. What they return, `Merged`, is a pytree
that can be called, jitted, differentiated, saved, and handed to `vfjax.renorm`.
"""

from __future__ import annotations

from vfjax.merge._merged import Merged as Merged
from vfjax.merge._merged import as_merged as as_merged
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
