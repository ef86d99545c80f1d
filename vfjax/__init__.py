"""vfjax: align, merge, repair and diagnose trained networks, straight from their jaxprs."""

from vfjax.network import Crossing as Crossing
from vfjax.network import FoldError as FoldError
from vfjax.network import Layer as Layer
from vfjax.network import Network as Network
from vfjax.network import Norm as Norm
from vfjax.network import Tap as Tap
from vfjax.network import trace as trace
from vfjax.symmetry import PermutationSpec as PermutationSpec
from vfjax.symmetry import check_spec as check_spec

__version__ = "0.1.0"
