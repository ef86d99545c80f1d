"""Trees and models on disk.

A checkpoint is a folder with

    tree/            the arrays, an ordinary orbax checkpoint of nested dictionaries
    structure.json   which containers were lists, tuples or None; shapes, dtypes and a checksum
    card.json        what the author has to say: recipe, seed, accuracy, command ...

It is written under a temporary name beside its place and renamed when complete, so that a reader
never sees half of one, and a save that is killed leaves the previous checkpoint readable.

Weights that others published for PyTorch are read by `from_torch`.
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
