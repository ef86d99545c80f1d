"""Alignment: finding the maps that bring one network's features next to another's."""

from vfjax._maps.maps import Maps as Maps
from vfjax.align._activations import match_activations as match_activations
from vfjax.align._activations import match_moments as match_moments
from vfjax.align._assignment import Alignment as Alignment
from vfjax.align._cca import canonical_correlations as canonical_correlations
from vfjax.align._cca import cca as cca
from vfjax.align._cca import cca_moments as cca_moments
from vfjax.align._taps import with_spreads as with_spreads
from vfjax.align._transport import transport as transport
from vfjax.align._transport import transport_moments as transport_moments
from vfjax.align._universe import Universe as Universe
from vfjax.align._universe import match_universe as match_universe
from vfjax.align._universe import match_universe_moments as match_universe_moments
from vfjax.align._weights import match_weights as match_weights
from vfjax.align._zip import merged_correlation as merged_correlation
from vfjax.align._zip import zip_features as zip_features
from vfjax.align._zip import zip_moments as zip_moments

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
