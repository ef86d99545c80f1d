"""Alignment: finding the maps that match one network's features with another's.

- Two networks, and data: `match_activations`. Without data: `match_weights`. Both return
  permutations, applied by `net.spec.permute(b, found.permutations)`. A permuted copy is
  recovered, but for what `help(Alignment)` lists.
- Three networks or more, none of which is the reference: `match_universe`.
- Where units may be mixed: `zip_features` (ZipIt!: merges units that correlate, even within one
  network), `cca` (linear combinations of units) and `transport` (optimal transport, also between
  networks of different widths). These return `Maps`, two matrices per network and group of units.
  `Maps.apply` maps the networks, whose mean is the merge; `vfjax.merge.partial` takes the maps
  directly.
- The `..._moments` variants start from `vfjax.stats.moments`: one pass over the data serves all.

    >>> import jax, numpy as np, vfjax
    >>> def forward(v, x):
    ...     return jax.nn.relu(x @ v["w"]) @ v["v"]
    >>> draw = np.random.default_rng(0).normal
    >>> a, x = {"w": draw(size=(4, 3)), "v": draw(size=(3, 2))}, np.float32(draw(size=(50, 4)))
    >>> net = vfjax.trace(forward, a, x)
    >>> b = net.spec.permute(a, {"w": [2, 0, 1]})
    >>> match_activations(net, a, b, [x]).permutations["w"].tolist()
    [1, 2, 0]

Mixing units makes the variances stored by a BatchNorm unknown; `vfjax.renorm.reset` measures them
again. Groups in `net.spec.rigid` are only ever permuted. All matchers warn, once per network, if a
primitive fixes the channels of a whole layer, so that nothing can match them. The private module of
each matcher states what its paper maximises: `_weights`, `_activations`, `_universe`, `_zip`,
`_cca`, `_transport`.
"""

from vfjax._maps import Maps
from vfjax.align._activations import match_activations, match_moments
from vfjax.align._assignment import Alignment
from vfjax.align._cca import canonical_correlations, cca, cca_moments
from vfjax.align._taps import with_spreads
from vfjax.align._transport import transport, transport_moments
from vfjax.align._universe import Universe, match_universe, match_universe_moments
from vfjax.align._weights import match_weights
from vfjax.align._zip import merged_correlation, zip_features, zip_moments

__all__ = [
    "Alignment",
    "Maps",
    "Universe",
    "canonical_correlations",
    "cca",
    "cca_moments",
    "match_activations",
    "match_moments",
    "match_universe",
    "match_universe_moments",
    "match_weights",
    "merged_correlation",
    "transport",
    "transport_moments",
    "with_spreads",
    "zip_features",
    "zip_moments",
]
