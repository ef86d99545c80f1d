"""Trees and models on disk.

`save(path, tree, meta)` writes a parameter tree or a `vfjax.merge.Merged`. `load(path)` reads a
tree back, `load(path, net)` a `Merged`, and `card(path)` the metadata. A checkpoint is a folder
with

    tree/            the arrays, an ordinary orbax checkpoint of nested dictionaries
    structure.json   which containers were lists, tuples or None; shapes, dtypes and checksums,
                     of itself and the card too
    card.json        recipe, seed, accuracy, command ...

It is written next to its destination under a random name, read back and renamed, so a reader never
sees half a checkpoint, and a save that is killed leaves the previous one readable. Several threads,
processes and hosts may save and load one checkpoint.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(f"{folder}/a", {"w": np.arange(3.0)}, {"seed": 0})
    ...     load(f"{folder}/a")["w"].tolist(), card(f"{folder}/a")["seed"]
    ([0.0, 1.0, 2.0], 0)

`from_torch(file, model)` reads weights published for PyTorch (`.npz`, or `.safetensors`
with the extra `torch-io`) into the networks of `vfjax.models`.
"""

from __future__ import annotations

from vfjax.checkpoint._checkpoint import card as card
from vfjax.checkpoint._checkpoint import load as load
from vfjax.checkpoint._checkpoint import save as save
from vfjax.checkpoint._checkpoint import write_json as write_json
from vfjax.checkpoint._packed import CheckpointError as CheckpointError
from vfjax.checkpoint._torch import from_torch as from_torch

__all__ = [
    "CheckpointError",
    "card",
    "from_torch",
    "load",
    "save",
    "write_json",
]
