"""Heads that share a space: classes are fixed embeddings, and a network's output is one, too.

A network trained on some of the classes learns to point at their embeddings; where several such
networks have become one, its output is compared with the embeddings of all classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import string
import zipfile
import zlib
from collections.abc import Mapping, Sequence
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


def scores(
    head: Head, tasks: Sequence[Sequence[int]], outputs: Sequence[jax.Array | np.ndarray]
) -> jax.Array:
    """How much speaks for each class `[n, classes]`, by the head of all classes.

    `outputs` are of one network, or of one for each of the tasks, which are all classes, each once.
    """
    if len(outputs) == 1 and head.scale is not None:
        return head(outputs[0])
    # Probabilities, within the classes of each: logits of two networks are not comparable.
    outputs = outputs if len(outputs) == len(tasks) else [outputs[0]] * len(tasks)
    parts = [jax.nn.softmax(head.of(task)(x)) for task, x in zip(tasks, outputs, strict=True)]
    return jnp.concatenate(parts, -1)[:, np.argsort(np.concatenate(tasks))]


def accuracies(
    head: Head, tasks: Sequence[Sequence[int]], outputs: Sequence[Any], labels: np.ndarray
) -> records.Row:
    """Accuracy over all classes, among those of task A, B, ..., and the mean of the latter."""
    found, row = np.asarray(scores(head, tasks, outputs)), {}
    for name, task in zip(string.ascii_lowercase, tasks, strict=False):
        own = np.isin(labels, task)
        best = np.take(task, found[own][:, task].argmax(1))
        row[f"task_{name}"] = float(np.mean(best == labels[own]))
    joint = float(np.mean(found.argmax(1) == labels))
    return {"accuracy": joint, "average": statistics.fmean(row.values())} | row


def orthonormal(classes: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Class embeddings that stand in for those of a text encoder: orthonormal, at random."""
    if dimensions < classes:
        raise cli.UserError(
            f"--dimensions: {classes} orthonormal rows need as many dimensions, got {dimensions}"
        )
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
    rows = found.astype(np.float64) if found.dtype.kind in "fiu" else np.zeros(0)
    length = np.sqrt(np.sum(np.atleast_1d(rows) ** 2, -1, keepdims=True))
    if rows.ndim != 2 or len(rows) != classes or not ((length > 0) & np.isfinite(length)).all():
        raise cli.UserError(
            f"--embeddings {path}: must hold {classes} finite rows of numbers other than zero, one "
            f"for each class {ORDER}, got {found.dtype} of shape {list(found.shape)}."
        )
    return (rows / length).astype(np.float32)


def of_embeddings(rows: np.ndarray, scale: float | None) -> Head:
    return Head(tuple(map(tuple, np.asarray(rows, float).tolist())), scale)


def only(dataset: data.Dataset, classes: Sequence[int]) -> data.Dataset:
    """The images of some classes, whose labels become 0, 1, ... in the order given."""
    place = np.full(dataset.classes, -1, np.int32)
    place[list(classes)] = np.arange(len(classes))
    arrays = {}
    for split in ("train", "test"):
        labels = place[getattr(dataset, f"{split}_labels")]
        arrays[f"{split}_images"] = getattr(dataset, f"{split}_images")[labels >= 0]
        arrays[f"{split}_labels"] = labels[labels >= 0]
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
    own = args.embeddings and read(args.embeddings, classes)
    rows = orthonormal(classes, args.dimensions or classes) if own is None else own
    return of_embeddings(rows, args.scale)


def described(args: EmbeddingOptions, head: Head) -> dict[str, Any]:
    """What a card or record says of the head of all classes.

    Rows from a file are told by their digest: another file may have the same name. Orthonormal ones
    follow from their seed, but for rounding.
    """
    if args.loss == "cross-entropy":
        return {"loss": args.loss}
    kind = "orthonormal, seed 0"
    if args.embeddings:
        rows = np.asarray(head.embeddings, np.float32)
        kind = f"{Path(args.embeddings).name}, {hashlib.sha256(rows.tobytes()).hexdigest()}"
    told = {"kind": kind, "dimensions": head.dimensions, "scale": args.scale}
    return {"loss": args.loss, "embeddings": told}


def different(card: Mapping[str, Any], asked: Mapping[str, Any], of: str = "") -> list[str]:
    """What a network is unlike what is asked for in, by its card: as "recipe epochs 10, not 20"."""
    found = []
    # What only one of two knows belongs to another loss, or to another version's recipe.
    for key in [key for key in asked if key in card]:
        if isinstance(asked[key], Mapping):
            found += different(card[key], asked[key], f"{key} ")
        elif card[key] != asked[key]:
            found.append(f"{of}{key} {card[key]}, not {asked[key]}")
    return found
