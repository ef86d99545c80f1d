"""Diagnosis: measuring where features vanish, in any traced network.

- Start with `report`. It says from which layer on the features f(x) - f(0) vanish, whether biases
  decide the output, and which repair the numbers suggest. `print` it, or write its `page`.
- The numbers behind it: `features`, `bound_sequence`, `variance_collapse`.
- Exactly, for linear networks: `decompose`, `decompose_matrices`; and `rescale_product`.
- For two networks: `interpolation` and `barrier`, `cka` of features, `distance` of parameters.

    >>> import jax, numpy as np, vfjax
    >>> def forward(v, x):
    ...     return jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"] + 0.1) @ v["c"]
    >>> v, x = dict.fromkeys("abc", np.eye(2)), np.float32([[1, 0], [0, 3]])
    >>> net = vfjax.trace(forward, v, x)
    >>> report(net, v | {"b": v["b"] / 10}, [x], references=[v]).vanishes.site
    'b'

Each function's docstring names its definitions and sections of papers, under Source.
"""

from vfjax.diagnose._bounds import Bound, Collapse, bound_sequence, resample
from vfjax.diagnose._bounds import upper_bound as upper_bound
from vfjax.diagnose._bounds import variance_collapse as variance_collapse
from vfjax.diagnose._decomposition import Decomposition, decompose, decompose_matrices
from vfjax.diagnose._features import Features, features
from vfjax.diagnose._interpolation import Interpolation, barrier, interpolation
from vfjax.diagnose._magnitude import rescale_product
from vfjax.diagnose._report.advice import Advice
from vfjax.diagnose._report.compose import Report, report
from vfjax.diagnose._report.findings import LayerFinding, NormFinding
from vfjax.diagnose._similarity import CKA, Distance, cka, distance
from vfjax.diagnose._sites import FeatureSite

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
