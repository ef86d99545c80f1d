"""One-shot pruning: scores of weights, masks of the lowest, and pruned trees.

    scores = prune.magnitude(net, tree)
    mask = prune.masks(scores, 0.9)
    pruned = prune.apply(tree, mask)
    pruned = renorm.repair(net, pruned, [batch], references=[tree])

Pruned networks lose their features layer by layer, as merged ones do; `vfjax.renorm` brings them
back with the unpruned network as the one reference, from as few as one batch.
"""

from vfjax.prune._kernels import Scores as Scores
from vfjax.prune._kernels import prunable as prunable
from vfjax.prune.fisher import fisher as fisher
from vfjax.prune.magnitude import magnitude as magnitude
from vfjax.prune.masks import apply as apply
from vfjax.prune.masks import keep as keep
from vfjax.prune.masks import masks as masks
from vfjax.prune.masks import sparsity as sparsity
from vfjax.prune.wanda import wanda as wanda
from vfjax.prune.woodfisher import InverseFisher as InverseFisher
from vfjax.prune.woodfisher import inverse_fisher as inverse_fisher
from vfjax.prune.woodfisher import memory as memory
from vfjax.prune.woodfisher import woodfisher as woodfisher

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
