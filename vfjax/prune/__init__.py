"""One-shot pruning: scores of weights, masks of the lowest, and pruned trees.

    scores = prune.magnitude(net, tree)
    mask = prune.masks(scores, 0.9)
    pruned = prune.apply(tree, mask)
    pruned = renorm.repair(net, pruned, [batch], references=[tree])

Pruned networks lose their features layer by layer, as merged ones do; `vfjax.renorm` brings them
back with the unpruned network as the one reference, from as few as one batch.
"""

from vfjax.prune._fisher import fisher as fisher
from vfjax.prune._magnitude import magnitude as magnitude
from vfjax.prune._masks import apply as apply
from vfjax.prune._masks import keep as keep
from vfjax.prune._masks import masks as masks
from vfjax.prune._masks import sparsity as sparsity
from vfjax.prune._scores import Scores as Scores
from vfjax.prune._scores import prunable as prunable
from vfjax.prune._wanda import wanda as wanda
from vfjax.prune._woodfisher import InverseFisher as InverseFisher
from vfjax.prune._woodfisher import inverse_fisher as inverse_fisher
from vfjax.prune._woodfisher import memory as memory
from vfjax.prune._woodfisher import woodfisher as woodfisher

__all__ = [
    "InverseFisher",
    "Scores",
    "apply",
    "fisher",
    "inverse_fisher",
    "keep",
    "magnitude",
    "masks",
    "memory",
    "prunable",
    "sparsity",
    "wanda",
    "woodfisher",
]
