"""Alignment: finding the maps that bring one network's features next to another's."""

from vfjax.align._maps import Maps as Maps
from vfjax.align._record import Alignment as Alignment
from vfjax.align.activations import match_activations as match_activations
from vfjax.align.activations import match_moments as match_moments
from vfjax.align.cca import canonical_correlations as canonical_correlations
from vfjax.align.cca import cca as cca
from vfjax.align.cca import cca_moments as cca_moments
from vfjax.align.transport import transport as transport
from vfjax.align.transport import transport_moments as transport_moments
