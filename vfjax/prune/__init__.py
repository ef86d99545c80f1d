"""One-shot pruning: scoring weights, masking those of lowest score, and pruning trees.

1. Scores: `magnitude(net, tree)`; `wanda(net, tree, data)`, made for `scope="row"`; and, with
   labelled data, `fisher` and `woodfisher`, of the cross-entropy or of `loss=`. `prunable` lists
   the layers to choose from.
2. `masks(scores, sparsity, scope=...)`: masks the lowest scores of all weights, of each layer or
   row, or n:m.
3. `apply(tree, mask)`; then `vfjax.renorm` with the unpruned network as the only reference, since
   features vanish in pruned networks as in merged ones: `reset` with BatchNorm, else `repair`.

    >>> import jax, numpy as np, vfjax
    >>> v, x = {"w": np.array([[1.0, -3.0], [2.0, 0.5]])}, np.eye(2)
    >>> net = vfjax.trace(lambda v, x: x @ v["w"], v, x)
    >>> pruned = apply(v, masks(magnitude(net, v), 0.5))
    >>> pruned["w"].tolist()
    [[0.0, -3.0], [2.0, 0.0]]

`inverse_fisher(...).prune(tree, mask)` also changes the weights that stay, to make up for those
that go: for each pruned weight separately, as WoodFisher does, or with `jointly=True` for all of
them together, which has a lower loss on the measured data, though not always on other data.
`memory` says how many bytes it takes. To retrain, chain the optimiser with `keep(mask)`, or
`keep(mask["params"])` for Flax `params`. A kernel that layers share is scored once, over all its
uses; a kernel that is computed from several leaves raises an error. Each function names its
source.
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
