"""Diagnosis: seeing features vanish, in any traced network."""

from vfjax.diagnose.features import Features as Features
from vfjax.diagnose.features import FeatureSite as FeatureSite
from vfjax.diagnose.features import features as features
