"""The state of a training run on disk, from which a killed run resumes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from vfjax import checkpoint
from vfjax._types import PyTree
from vfjax.checkpoint._checkpoint import card, load, save

_log = logging.getLogger(__name__)


class Saved:
    """The saved states of one run: folders ``epoch-0001``, ..., of which the newest is kept.

    Args:
        folder: The folder of this run only.
        identity: JSON values that distinguish this run from others.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]):
        self.folder = Path(folder).expanduser().absolute()
        # JSON turns tuples into lists; after this round trip it can be compared with a stored one.
        self.identity = json.loads(json.dumps(identity))

    def _epochs(self) -> list[Path]:
        folders = {path.name.removeprefix("epoch-"): path for path in self.folder.glob("epoch-*")}
        # Sorted by number: as strings, "10000" would come before "9999".
        return [folders[number] for number in sorted(filter(str.isdecimal, folders), key=int)]

    def clear(self) -> None:
        """Removes all saved states."""
        for path in self._epochs():
            shutil.rmtree(path)

    def write(self, state: PyTree, epoch: int, history: Sequence[dict[str, float]]) -> None:
        """Saves the state after `epoch` epochs; only then removes the older ones."""
        older = self._epochs()
        path = self.folder / f"epoch-{epoch:04d}"
        meta = {"run": self.identity, "epoch": epoch, "history": list(history)}
        save(path, {"leaves": jax.tree.leaves(state)}, meta)
        for other in older:
            if other != path:
                shutil.rmtree(other, ignore_errors=True)

    def read(self, like: PyTree) -> tuple[PyTree, int, list[dict[str, float]]] | None:
        """Returns the newest readable (state, epochs done, history), or None."""
        for path in reversed(self._epochs()):
            try:
                meta = card(path)
                leaves = load(path)["leaves"] if meta["run"] == self.identity else []
            except checkpoint.CheckpointError as error:
                _log.warning("skipping %s: %s", path, error)
                continue
            if meta["run"] != self.identity:
                keys = dict.fromkeys((*self.identity, *meta["run"]))
                differ = [k for k in keys if self.identity.get(k) != meta["run"].get(k)]
                raise ValueError(
                    f"work_dir {self.folder} holds the state of another run: its "
                    f"{' and '.join(differ)} {'differs' if len(differ) == 1 else 'differ'}. Choose "
                    "another folder, or empty this one, as resume=False does, to begin afresh."
                )
            state = jax.tree.unflatten(jax.tree.structure(like), leaves)
            return state, meta["epoch"], meta["history"]
        return None
