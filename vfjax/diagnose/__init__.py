"""Diagnosis: seeing features vanish, in any traced network."""

from vfjax.diagnose._bounds import Bound as Bound
from vfjax.diagnose._bounds import Collapse as Collapse
from vfjax.diagnose._bounds import bound_sequence as bound_sequence
from vfjax.diagnose._bounds import resample as resample
from vfjax.diagnose._bounds import upper_bound as upper_bound
from vfjax.diagnose._bounds import variance_collapse as variance_collapse
from vfjax.diagnose._decomposition import Decomposition as Decomposition
from vfjax.diagnose._decomposition import decompose as decompose
from vfjax.diagnose._decomposition import decompose_matrices as decompose_matrices
from vfjax.diagnose._features import Features as Features
from vfjax.diagnose._features import features as features
from vfjax.diagnose._interpolation import Interpolation as Interpolation
from vfjax.diagnose._interpolation import barrier as barrier
from vfjax.diagnose._interpolation import interpolation as interpolation
from vfjax.diagnose._magnitude import rescale_product as rescale_product
from vfjax.diagnose._report.advice import Advice as Advice
from vfjax.diagnose._report.compose import Report as Report
from vfjax.diagnose._report.compose import report as report
from vfjax.diagnose._report.findings import LayerFinding as LayerFinding
from vfjax.diagnose._report.findings import NormFinding as NormFinding
from vfjax.diagnose._similarity import CKA as CKA
from vfjax.diagnose._similarity import Distance as Distance
from vfjax.diagnose._similarity import cka as cka
from vfjax.diagnose._similarity import distance as distance
from vfjax.diagnose._sites import FeatureSite as FeatureSite

__all__ = [
    "CKA",
    "Advice",
    "Bound",
    "Collapse",
    "Decomposition",
    "Distance",
    "FeatureSite",
    "Features",
    "Interpolation",
    "LayerFinding",
    "NormFinding",
    "Report",
    "barrier",
    "bound_sequence",
    "cka",
    "decompose",
    "decompose_matrices",
    "distance",
    "features",
    "interpolation",
    "report",
    "resample",
    "rescale_product",
    "upper_bound",
    "variance_collapse",
]
