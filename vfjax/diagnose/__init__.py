"""Diagnosis: seeing features vanish, in any traced network."""

from vfjax.diagnose._advice import Advice as Advice
from vfjax.diagnose._findings import LayerFinding as LayerFinding
from vfjax.diagnose._findings import NormFinding as NormFinding
from vfjax.diagnose._sites import FeatureSite as FeatureSite
from vfjax.diagnose.bounds import Bound as Bound
from vfjax.diagnose.bounds import Collapse as Collapse
from vfjax.diagnose.bounds import bound_sequence as bound_sequence
from vfjax.diagnose.bounds import resample as resample
from vfjax.diagnose.bounds import upper_bound as upper_bound
from vfjax.diagnose.bounds import variance_collapse as variance_collapse
from vfjax.diagnose.decomposition import Decomposition as Decomposition
from vfjax.diagnose.decomposition import decompose as decompose
from vfjax.diagnose.decomposition import decompose_matrices as decompose_matrices
from vfjax.diagnose.features import Features as Features
from vfjax.diagnose.features import features as features
from vfjax.diagnose.interpolation import Interpolation as Interpolation
from vfjax.diagnose.interpolation import barrier as barrier
from vfjax.diagnose.interpolation import interpolation as interpolation
from vfjax.diagnose.magnitude import rescale_product as rescale_product
from vfjax.diagnose.report import Report as Report
from vfjax.diagnose.report import report as report
from vfjax.diagnose.similarity import CKA as CKA
from vfjax.diagnose.similarity import Distance as Distance
from vfjax.diagnose.similarity import cka as cka
from vfjax.diagnose.similarity import distance as distance

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
