"""A linear map per model and group, which matchers return and merging applies.

Maps, and what they do to trees and moments, belong here, whichever matcher they come from. Matchers
belong in `vfjax.align`, which exports `Maps`; permuting and multiplying the axes of one group
belongs in `vfjax.symmetry`.

Read `maps` first. `labels` turns labels of merged features into maps, `norm_units` puts layers into
the units of the norm after them before they are mixed, and `parts` splits groups into what is
matched together.
"""

from __future__ import annotations

from vfjax._maps.maps import Maps as Maps
from vfjax._maps.maps import check_is_maps as check_is_maps
from vfjax._maps.norm_units import in_output_units as in_output_units
from vfjax._maps.norm_units import spread_of as spread_of
from vfjax._maps.parts import Part as Part
from vfjax._maps.parts import gather as gather
from vfjax._maps.parts import permuting as permuting

__all__ = [
    "Maps",
    "Part",
    "check_is_maps",
    "gather",
    "in_output_units",
    "permuting",
    "spread_of",
]
