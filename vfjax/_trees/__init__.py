"""Parameter trees by path, and means of trees.

Whatever needs a pytree but not a network belongs here: names of leaves, their types, checks that
trees fit each other, their weighted mean, and checks of options. Code that must know which leaf is
a kernel or a statistic belongs in `vfjax.network`. Read `paths` first.
"""

from __future__ import annotations

from vfjax._trees import concrete as concrete
from vfjax._trees import options as options
from vfjax._trees.leaves import as_numpy as as_numpy
from vfjax._trees.leaves import changed as changed
from vfjax._trees.leaves import like_leaf as like_leaf
from vfjax._trees.leaves import native as native
from vfjax._trees.leaves import on_host as on_host
from vfjax._trees.leaves import sum_type as sum_type
from vfjax._trees.mean import average_flats as average_flats
from vfjax._trees.mean import resolve_mix as resolve_mix
from vfjax._trees.mean import resolve_weights as resolve_weights
from vfjax._trees.mean import weighted_mean as weighted_mean
from vfjax._trees.paths import Flat as Flat
from vfjax._trees.paths import check_alike as check_alike
from vfjax._trees.paths import check_finite as check_finite
from vfjax._trees.paths import check_like as check_like
from vfjax._trees.paths import check_sequence as check_sequence
from vfjax._trees.paths import check_trees as check_trees
from vfjax._trees.paths import flatten_named as flatten_named
from vfjax._trees.paths import leaf_paths as leaf_paths
from vfjax._trees.paths import some as some
from vfjax._trees.paths import structure_hint as structure_hint
from vfjax._trees.paths import with_leaves as with_leaves
from vfjax._trees.paths import without as without

__all__ = [
    "as_numpy",
    "Flat",
    "average_flats",
    "changed",
    "check_alike",
    "check_finite",
    "check_like",
    "check_sequence",
    "check_trees",
    "concrete",
    "flatten_named",
    "leaf_paths",
    "like_leaf",
    "native",
    "on_host",
    "options",
    "resolve_mix",
    "resolve_weights",
    "some",
    "structure_hint",
    "sum_type",
    "weighted_mean",
    "with_leaves",
    "without",
]
