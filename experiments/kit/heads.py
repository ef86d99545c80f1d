"""Heads that share a space: classes are fixed embeddings, and a network's output is one, too.

A network trained on some of the classes learns to point at their embeddings; where several such
networks have become one, its output is compared with the embeddings of all classes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kit import cli, records
from vfjax import data

Array = jax.Array
PyTree = Any
LOSSES = ("cosine", "cross-entropy")
# Cosines alone tell two classes apart by no more than e^2.
SCALE = 10.0
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

    def __call__(self, outputs: Array) -> Array:
        rows = jnp.asarray(self.embeddings, jnp.float32)
        if self.scale is None:
            return outputs @ rows.T
        # The rows have length one. An output of zero points nowhere: all cosines are zero.
        length = jnp.sqrt(jnp.sum(outputs**2, -1, keepdims=True) + 1e-12)
        return self.scale * (outputs / length) @ rows.T

    def of(self, classes: Sequence[int]) -> Head:
        return Head(tuple(self.embeddings[label] for label in classes), self.scale)


@dataclasses.dataclass(frozen=True)
class Headed:
    """A network with its head: `(variables, x) -> logits`; equal ones share compiled code."""

    fn: Callable[[PyTree, Array], Array]
    head: Head

    def __call__(self, variables: PyTree, x: Array) -> Array:
        return self.head(self.fn(variables, x))


@dataclasses.dataclass(frozen=True)
class Heads:
    """How classes are told by one network, or by several that know some of the classes each.

    `tasks` are the classes of each network; together all of them, each once.
    """

    head: Head
    tasks: tuple[tuple[int, ...], ...]

    def __call__(self, outputs: Array | tuple[Array, ...]) -> Array:
        """Scores `[n, classes]` of an output, or of one output for each task."""
        if isinstance(outputs, Array):
            if self.head.scale is not None:
                return self.head(outputs)
            outputs = (outputs,) * len(self.tasks)
        # Probabilities, within the classes of each: logits of two networks are not comparable.
        parts = zip(self.tasks, outputs, strict=True)
        scores = [jax.nn.softmax(self.head.of(task)(output)) for task, output in parts]
        order = np.argsort([label for task in self.tasks for label in task])
        return jnp.concatenate(scores, -1)[:, order]


@functools.partial(jax.jit, static_argnums=0)
def _scores(heads: Heads, model: Any, x: Array) -> Array:
    return heads(tuple(m(x) for m in model) if type(model) is tuple else model(x))


def accuracy(
    heads: Heads, model: Any, batches: Iterable[tuple[Array, Array]]
) -> dict[str, float | list[float]]:
    """Accuracy over all classes (joint), among those of each task, and the mean of the latter.

    The model is what is called with images: a pytree, or a tuple of one for each task.
    """
    scored = [(_scores(heads, model, x), label) for x, label in batches]
    scores, labels = (np.concatenate(part) for part in zip(*scored, strict=True))
    tasks = []
    for task in heads.tasks:
        own = np.isin(labels, task)
        tasks.append(float(np.mean(np.take(task, scores[own][:, task].argmax(1)) == labels[own])))
    joint = float(np.mean(scores.argmax(1) == labels))
    return {"joint": joint, "tasks": tasks, "average": float(np.mean(tasks))}


def orthonormal(classes: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Class embeddings that stand in for those of a text encoder: orthonormal, at random."""
    if dimensions < classes:
        raise ValueError(f"{classes} orthonormal rows need as many dimensions, got {dimensions}")
    gaussian = np.random.default_rng(seed).normal(size=(dimensions, classes))
    return np.linalg.qr(gaussian)[0].T.astype(np.float32)


def read(path: str, classes: int) -> np.ndarray:
    """Class embeddings from a file, made to have length one.

    It is a `.npy` file, or an `.npz` one with one array of real numbers: a row for each class, in
    the order of the labels.
    """
    try:
        # Opened here: NumPy leaves damaged archives open.
        with Path(path).expanduser().open("rb") as file:
            found = np.load(file)
            if not isinstance(found, np.ndarray):
                if len(found.files) != 1:
                    raise ValueError(f"it holds {len(found.files)} arrays, not one")
                found = found[found.files[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise cli.UserError(f"--embeddings {path}: no array could be read: {error}") from error
    wanted = f"--embeddings {path}: must hold {classes} finite rows other than zero, one for each "
    wanted += f"class {ORDER}, got"
    if found.ndim != 2 or len(found) != classes:
        raise cli.UserError(f"{wanted} shape {list(found.shape)}.")
    if found.dtype.kind not in "fiu":
        raise cli.UserError(f"{wanted} {found.dtype}, which are no real numbers.")
    rows = found.astype(np.float64)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(wrong):
        raise cli.UserError(f"{wanted} others: row {wrong[0]}, counted from 0.")
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
        choices=LOSSES, part="{}")
    embeddings: str | None = cli.option(
        None, "class embeddings, such as CLIP's of the names: a .npy or .npz file with a row for "
        f"each class, {ORDER} (default: orthonormal ones at random)", metavar="FILE",
        part=lambda record: Path(record["config"]["embeddings"] or "").stem or None)
    dimensions: int | None = cli.option(
        None, "of the orthonormal embeddings; at least as many as classes", type=int, metavar="N")
    scale: float = cli.option(
        SCALE, "of the cosines, above 0", type=cli.positive, metavar="S", part="scale{:g}")
# fmt: on


def check(args: EmbeddingOptions, *, parts: bool = True) -> None:
    """Refuses options that would do nothing; `parts`: networks are trained on some classes."""
    usual = {"embeddings": None, "dimensions": None, "scale": SCALE}
    usual |= {} if parts else {"loss": "cosine"}
    given = [f"--{name}" for name, value in usual.items() if getattr(args, name) != value]
    why = "--loss cross-entropy has no embeddings; leave out one or the other."
    why = why if parts else "for networks on some of the classes, so give --classes."
    if given and (not parts or args.loss == "cross-entropy"):
        raise cli.UserError(f"{records.joined(given)}: {why}")
    if {"--embeddings", "--dimensions"} <= set(given):
        why = "--dimensions is for orthonormal embeddings; those of --embeddings have their own."
        raise cli.UserError(why)


def head_of(args: EmbeddingOptions, classes: int) -> Head:
    if args.loss == "cross-entropy":
        return of_embeddings(np.eye(classes), None)
    if args.embeddings:
        return of_embeddings(read(args.embeddings, classes), args.scale)
    try:
        return of_embeddings(orthonormal(classes, args.dimensions or classes), args.scale)
    except ValueError as error:
        raise cli.UserError(f"--dimensions: {error}") from error


def checked(found: Sequence[int], classes: int) -> Sequence[int]:
    """The classes to train on, once they are found to be different ones of the data set."""
    if len(set(found)) < max(2, len(found)) or not set(found) <= set(range(classes)):
        wanted = f"--classes must be two or more different ones from 0 to {classes - 1}"
        raise cli.UserError(f"{wanted}, got {' '.join(map(str, found))}")
    return found


def words(args: EmbeddingOptions, head: Head, classes: Sequence[int]) -> list[str]:
    """The options as words of a command line; `head` is that of all classes."""
    found = ["--classes", *map(str, classes)]
    if args.loss != "cosine":
        return [*found, "--loss", args.loss]
    if args.embeddings:
        found += ["--embeddings", str(args.embeddings)]
    else:
        found += ["--dimensions", str(head.dimensions)]
    return found if args.scale == SCALE else [*found, "--scale", f"{args.scale:g}"]


def named(classes: Sequence[int]) -> str:
    """Classes in few letters, for the name of a folder.

    Example:
      >>> named(range(5)), named((0, 3, 4))
      ('0to4', '0-3-4')
    """
    first, last = classes[0], classes[-1]
    run = list(classes) == list(range(first, last + 1)) and first < last
    return f"{first}to{last}" if run else "-".join(map(str, classes))


def described(args: EmbeddingOptions, head: Head, classes: Sequence[int]) -> dict[str, Any]:
    """What a card or record says of the head of all classes, and of those that are trained on.

    Rows from a file are told by their digest: another file may have the same name. Orthonormal ones
    follow from their seed, but for rounding.
    """
    found: dict[str, Any] = {"classes": list(classes), "loss": args.loss}
    if args.loss == "cross-entropy":
        return found
    told = {"kind": "orthonormal, seed 0", "dimensions": head.dimensions, "scale": args.scale}
    if args.embeddings:
        rows = np.asarray(head.embeddings, np.float32)
        told["kind"] = Path(args.embeddings).name
        told["sha256"] = hashlib.sha256(rows.tobytes()).hexdigest()
    return {**found, "embeddings": told}


def different(
    card: Mapping[str, Any], asked: Mapping[str, Any], recipe: Mapping[str, Any] | None = None
) -> list[str]:
    """What a trained network is unlike what is asked for in, as "epochs 10, not 20".

    Its card is held against what it should say of the head, as of `described`, and of the recipe,
    where None stands for any.
    """
    digest = "embeddings' sha256"

    def parts(card: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: card.get(name) for name in ("classes", "loss")} | {digest: None}
        found |= {f"embeddings' {key}": value for key, value in card.get("embeddings", {}).items()}
        found |= {key.replace("_", " "): value for key, value in card.get("recipe", {}).items()}
        # With lists for the tuples that cards do not have.
        return json.loads(json.dumps(found))

    def told(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    has, wants = parts(card), parts({**asked, "recipe": recipe or {}})
    # What only one of two knows belongs to another loss, or to another version's recipe.
    others = [name for name in wants if name in has and has[name] != wants[name]]
    # Digests tell that rows are others, not in what.
    return [
        "other rows of embeddings"
        if name == digest
        else f"{name} {told(has[name])}, not {told(wants[name])}"
        for name in others
    ]
