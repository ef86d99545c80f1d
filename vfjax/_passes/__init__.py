"""One pass over data: batches are checked, placed on devices, streamed and pooled.

Whatever all passes share belongs here: checks of batches, meshes, the loop that measures a batch
and pools it, moments and their unions, accuracy. What a pass measures, and at which sites, is up to
`vfjax.stats`, `vfjax.renorm`, `vfjax.diagnose` and `vfjax.prune`.

Read `streaming` first, then `batching` and `masking`. Statistics are always merged by `moments`.
"""

from __future__ import annotations

from vfjax._passes import evaluation as evaluation
from vfjax._passes import masking as masking
from vfjax._passes import moments as moments
from vfjax._passes.batching import batch_size as batch_size
from vfjax._passes.batching import batches as batches
from vfjax._passes.batching import check_classes as check_classes
from vfjax._passes.batching import check_finite_means as check_finite_means
from vfjax._passes.batching import keep as keep
from vfjax._passes.batching import labelled as labelled
from vfjax._passes.devices import mesh_of as mesh_of
from vfjax._passes.devices import on_mesh as on_mesh
from vfjax._passes.devices import on_meshes as on_meshes
from vfjax._passes.devices import replicate as replicate
from vfjax._passes.masking import Mask as Mask
from vfjax._passes.masking import masked as masked
from vfjax._passes.programs import Owner as Owner
from vfjax._passes.programs import compiled as compiled
from vfjax._passes.streaming import by_pieces as by_pieces
from vfjax._passes.streaming import each as each
from vfjax._passes.streaming import each_piece as each_piece
from vfjax._passes.streaming import late as late
from vfjax._passes.streaming import stream as stream
from vfjax._passes.streaming import wide as wide

__all__ = [
    "Owner",
    "Mask",
    "batch_size",
    "batches",
    "by_pieces",
    "check_classes",
    "check_finite_means",
    "compiled",
    "each",
    "each_piece",
    "evaluation",
    "keep",
    "labelled",
    "late",
    "masked",
    "masking",
    "mesh_of",
    "moments",
    "on_mesh",
    "on_meshes",
    "replicate",
    "stream",
    "wide",
]
