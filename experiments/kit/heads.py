"""Heads that share a space: classes are fixed embeddings, and a network's output is one, too.

A network trained on some of the classes learns to point at their embeddings; where several such
networks have become one, its output is compared with the embeddings of all classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import statistics
import string
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kit import cli, records
from vfjax import data

# Labels have this order; the first ones of CIFAR-10 as an example.
ORDER = "in the order of the labels (CIFAR-10: airplane, automobile, bird, ...)"


@dataclasses.dataclass(frozen=True)
class Head:
    """What makes logits of a network's output.

    Cosines are multiplied with `scale`; None takes inner products as they are, with which the rows
    of an identity matrix are a plain classifier.
    """

    embeddings: tuple[tuple[float, ...], ...]  # One row for each class to tell apart.
    scale: float | None

    @property
    def dimensions(self) -> int:
        return len(self.embeddings[0])

    def __call__(self, outputs: jax.Array) -> jax.Array:
        rows = jnp.asarray(self.embeddings, jnp.float32)
        if self.scale is None:
            return outputs @ rows.T
        # The rows have length one. An output of zero points nowhere: all cosines are zero.
        length = jnp.sqrt(jnp.sum(outputs**2, -1, keepdims=True) + 1e-12)
        return self.scale * (outputs / length) @ rows.T

    def of(self, classes: Sequence[int]) -> Head:
        return Head(tuple(self.embeddings[label] for label in classes), self.scale)


def accuracies(
    head: Head, tasks: Sequence[Sequence[int]], outputs: Sequence[Any], labels: np.ndarray
) -> records.Row:
    """Accuracy over all classes, among those of task A, B, ..., and the mean of the latter.

    `head` is that of all classes; `outputs` are of one network, or of one for each of the tasks.
    """
    scores, row = np.zeros((len(labels), len(head.embeddings))), {}
    if len(outputs) == 1 and head.scale is not None:
        scores[:] = head(outputs[0])
    else:
        # Probabilities, within the classes of each: logits of two networks are not comparable.
        for task, output in zip(tasks, itertools.cycle(outputs), strict=False):
            scores[:, task] = jax.nn.softmax(head.of(task)(output))
    for name, task in zip(string.ascii_lowercase, tasks, strict=False):
        own = np.isin(labels, task)
        best = np.take(task, scores[own][:, task].argmax(1))
        row[f"task_{name}"] = float(np.mean(best == labels[own]))
    joint = float(np.mean(scores.argmax(1) == labels))
    return {"accuracy": joint, "average": statistics.fmean(row.values())} | row


def orthonormal(classes: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Class embeddings that stand in for those of a text encoder: orthonormal, at random.

    Example:
      >>> rows = orthonormal(3, 4)
      >>> bool(np.allclose(rows @ rows.T, np.eye(3), atol=1e-6))
      True
    """
    if dimensions < classes:
        raise cli.UserError(f"--dimensions must be {classes} or more, one for each class.")
    gaussian = np.random.default_rng(seed).normal(size=(dimensions, classes))
    return np.linalg.qr(gaussian)[0].T.astype(np.float32)


def read(path: str, classes: int) -> np.ndarray:
    """Class embeddings of a `.npy` file, or an `.npz` one with one array, made of length one."""
    try:
        # Opened here: NumPy leaves damaged archives open.
        with Path(path).expanduser().open("rb") as file:
            found = np.load(file)
            if not isinstance(found, np.ndarray):
                (name,) = found.files
                found = found[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise cli.UserError(f"--embeddings {path}: no array could be read: {error}") from error
    numbers = found.dtype.kind in "fiu" and found.ndim == 2 and len(found) == classes
    length = np.linalg.norm(found.astype(float), axis=1, keepdims=True) if numbers else np.nan
    if not np.all((length > 0) & np.isfinite(length)):
        raise cli.UserError(
            f"--embeddings {path}: must hold {classes} finite rows of numbers other than zero, one "
            f"for each class {ORDER}, got {found.dtype} of shape {list(found.shape)}."
        )
    return (found / length).astype(np.float32)


def of_embeddings(rows: np.ndarray, scale: float | None) -> Head:
    return Head(tuple(map(tuple, np.asarray(rows, float).tolist())), scale)


def only(dataset: data.Dataset, classes: Sequence[int]) -> data.Dataset:
    """The images of some classes, whose labels become 0, 1, ... in the order given."""
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        images, labels = (getattr(dataset, f"{split}_{what}") for what in ("images", "labels"))
        place, label = np.nonzero(labels[:, None] == np.asarray(classes))
        arrays |= {f"{split}_images": images[place], f"{split}_labels": label.astype(np.int32)}
    return dataclasses.replace(dataset, **arrays, classes=len(classes))


# fmt: off
@dataclasses.dataclass(frozen=True)
class EmbeddingOptions:
    """The options that say towards which embeddings networks are trained."""

    loss: str = cli.option(
        "cosine", "for networks on some of the classes: cosine is the cross-entropy of the cosines "
        "with the class embeddings, cross-entropy that of the plain outputs for these classes",
        choices=("cosine", "cross-entropy"), part="{}")
    embeddings: str | None = cli.option(
        None, "class embeddings, such as CLIP's of the names: a .npy or .npz file with a row for "
        f"each class, {ORDER} (default: orthonormal ones at random)", metavar="FILE",
        part=lambda record: Path(record["config"]["embeddings"] or "").stem or None)
    dimensions: int | None = cli.option(
        None, "of the orthonormal embeddings; at least as many as classes", type=int, metavar="N")
    # Cosines alone tell two classes apart by no more than e^2.
    scale: float = cli.option(
        10.0, "of the cosines, above 0", type=cli.positive, metavar="S", part="scale{:g}")
# fmt: on


def check(args: EmbeddingOptions) -> None:
    """Refuses options that would do nothing."""
    # Only `train_edges.py` can train on all classes.
    whole = getattr(args, "classes", ()) is None
    for idle, names, what in (
        (whole, ("loss", "embeddings", "dimensions", "scale"), "some of the --classes"),
        (args.loss == "cross-entropy", ("embeddings", "dimensions", "scale"), "--loss cosine"),
        (args.embeddings is not None, ("dimensions",), "embeddings that are orthonormal"),
    ):
        for name in names:
            if idle and getattr(args, name) != getattr(EmbeddingOptions, name):
                raise cli.UserError(f"--{name} does nothing here: it is for {what}.")


def head_of(args: EmbeddingOptions, classes: int) -> Head:
    """The head of all classes."""
    if args.loss == "cross-entropy":
        return of_embeddings(np.eye(classes), None)
    if args.embeddings:
        return of_embeddings(read(args.embeddings, classes), args.scale)
    return of_embeddings(orthonormal(classes, args.dimensions or classes), args.scale)


def described(args: EmbeddingOptions, head: Head) -> dict[str, Any]:
    """What a card or record says of the head of all classes."""
    # Orthonormal rows follow from their seed, but for rounding; other files may have one name.
    kind = "orthonormal, seed 0"
    if args.embeddings:
        rows = np.asarray(head.embeddings, np.float32)
        kind = f"{Path(args.embeddings).name}, {hashlib.sha256(rows.tobytes()).hexdigest()}"
    told = {"kind": kind, "dimensions": head.dimensions, "scale": head.scale}
    return {"loss": args.loss} | ({} if head.scale is None else {"embeddings": told})
