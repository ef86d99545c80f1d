"""The training loop: one compiled scan per epoch, or on CPU one compiled call per step."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tqdm import tqdm

from vfjax._jaxpr import routed
from vfjax._trees import check_finite, flatten_named
from vfjax._types import Array, PyTree
from vfjax.data._data import Dataset, normalise
from vfjax.train._identity import digest, identity_of
from vfjax.train._recipes import Recipe
from vfjax.train._state import Saved

_log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """The result of training.

    Attributes:
        variables: ``{"params": ...}``, with ``"batch_stats"`` if the model has BatchNorm.
        history: One record per epoch: epoch, training loss and accuracy (on augmented images,
            during the epoch), last learning rate, seconds.
        seconds: Wall time of all epochs, including those before a resumption.
    """

    variables: PyTree
    history: tuple[dict[str, float], ...]
    seconds: float


def augment(images: Array, key: Array, *, crop: int, flip: bool) -> Array:
    """Crops images at random after zero padding and mirrors half of them, as `fit` does.

    BatchNorm stores statistics of such images, which differ from those of the original images.

    Args:
        images: uint8 ``[N, H, W, C]``.
        key: Random key.
        crop: Pixels of padding on each side; 0 does not crop.
        flip: Whether to mirror each image left to right with probability 1/2.

    Returns:
        uint8 ``[N, H, W, C]``.

    Example:
        >>> images = jnp.arange(4, dtype=jnp.uint8).reshape(1, 2, 2, 1)
        >>> augment(images, jax.random.key(0), crop=0, flip=False).ravel().tolist()
        [0, 1, 2, 3]
    """
    crop_key, flip_key = jax.random.split(key)
    count, *shape = images.shape
    if crop:
        padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
        corners = jax.random.randint(crop_key, (count, 2), 0, 2 * crop + 1)

        def cut(image: Array, corner: Array) -> Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

        images = jax.vmap(cut)(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def fit(
    model: nn.Module,
    recipe: Recipe,
    dataset: Dataset,
    *,
    seed: int = 0,
    start: PyTree | None = None,
    logits: Callable[[Array], Array] | None = None,
    on_epoch: Callable[[int, PyTree], None] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Trained:
    """Trains a model from scratch, from given variables, or from where a killed run stopped.

    Args:
        model: A model of `vfjax.models`, called as ``model.apply(variables, x, train=...)``.
        recipe: How to train it.
        dataset: Only its training split is used; it lies on the device as uint8 and is gathered,
            augmented and normalised inside the compiled step.
        seed: Seed of the initial parameters, the order of the images and their augmentation.
        start: Variables to start from instead of the model's initial ones, for instance those of a
            `Trained`; they are copied. Momentum and learning rate start afresh.
        logits: Function from the model's output to logits ``[N, dataset.classes]``, such as cosines
            with class embeddings; it must be hashable, and equal to itself between calls. A run is
            resumed with the same code that closes over the same values. None if the model returns
            logits.
        on_epoch: Called after every epoch, before its state is saved, with the number of epochs
            done (from 1 on) and a copy of the variables, which may be kept. Not called for epochs
            of an earlier call that is resumed.
        work_dir: Folder, used by this run only, in which the state is saved after each epoch; None
            saves nothing. With it, the training split is hashed, so that a run is never resumed on
            other images, labels or normalisation.
        resume: Whether to continue from the state in `work_dir`; if False, that state is removed.
        progress: Whether to show a progress bar after two seconds.

    Returns:
        The `Trained` variables with their history.

    Raises:
        ValueError: If `work_dir` holds the state of another run (also one with another `start`, or
            on other data), the data set has more classes than the model, or `start` does not fit
            the model or holds NaN or infinity.
        FloatingPointError: If the loss is no longer finite; the last finite state stays saved.

    Example:
        >>> from vfjax import data, models
        >>> recipe = Recipe(epochs=2, learning_rate=0.05, batch_size=50)
        >>> trained = fit(models.MLP((8,)), recipe, data.load("digits", train=200))
        >>> trained.history[-1]["loss"] < trained.history[0]["loss"]
        True
    """
    if logits is None and dataset.classes > getattr(model, "classes", dataset.classes):
        raise ValueError(
            f"model has {model.classes} classes, {dataset.name} has {dataset.classes}: create it "
            f"with classes={dataset.classes}."
        )
    task = _Task(model, recipe, dataset.mean, dataset.std, len(dataset.train_images), logits)
    state, epoch, history = task.init(seed, dataset.train_images.shape[1:], start), 0, []
    saved = None
    if work_dir is not None:
        identity = {
            "model": identity_of(model),
            "recipe": dataclasses.asdict(recipe),
            "data": {
                "name": dataset.name,
                "images": digest(dataset.train_images),
                "labels": digest(dataset.train_labels),
                "mean": list(map(float, dataset.mean)),
                "std": list(map(float, dataset.std)),
            },
            "seed": seed,
        }
        if start is not None:
            identity["start"] = digest(start)
        if logits is not None:
            identity["logits"] = identity_of(logits)
        saved = Saved(work_dir, identity)
        if not resume:
            saved.clear()
        elif (earlier := saved.read(state)) is not None:
            state, epoch, history = earlier
            _log.info("resuming %s after epoch %d", work_dir, epoch)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    rate = recipe.rate(task.steps_per_epoch)
    with tqdm(
        total=recipe.epochs * task.steps_per_epoch,
        initial=epoch * task.steps_per_epoch,
        desc=f"training, seed {seed}",
        unit="step",
        delay=2,
        disable=not progress,
    ) as bar:
        while epoch < recipe.epochs:
            start = time.perf_counter()
            state = _run_epoch(task, state, seed, images, labels, epoch, bar)
            epoch += 1
            record = {
                "epoch": epoch,
                "loss": float(state["loss"]) / task.steps_per_epoch,
                "accuracy": int(state["correct"]) / (task.steps_per_epoch * recipe.batch_size),
                "learning_rate": float(rate(epoch * task.steps_per_epoch - 1)),
                "seconds": round(time.perf_counter() - start, 3),
            }
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(
                    f"training diverged in epoch {epoch}: the loss is {record['loss']}. Lower "
                    f"learning_rate ({recipe.learning_rate}) or raise warmup_epochs "
                    f"({recipe.warmup_epochs})."
                )
            history.append(record)
            bar.set_postfix(epoch=epoch, loss=record["loss"], accuracy=record["accuracy"])
            _log.info("seed %d: %s", seed, record)
            zeros = {name: jnp.zeros_like(state[name]) for name in ("loss", "correct")}
            state = {**state, **zeros}
            if on_epoch is not None:
                on_epoch(epoch, jax.tree.map(_copy, state["variables"]))
            if saved is not None:
                saved.write(state, epoch, history)
    seconds = sum(record["seconds"] for record in history)
    return Trained(state["variables"], tuple(history), seconds)


def fit_seeds(
    model: nn.Module,
    recipe: Recipe,
    dataset: Dataset,
    *,
    seeds: Iterable[int],
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> list[Trained]:
    """Trains one model per seed, one after the other; see `fit`.

    The runs share their compiled step.  On CPU, training several at once would be slower than this
    loop.  For options that differ between runs, such as `start`, call `fit`.

    Args:
        model: As in `fit`.
        recipe: As in `fit`.
        dataset: As in `fit`.
        seeds: The seeds.
        work_dir: Each run saves its state in the subfolder ``seed<n>``.
        resume: As in `fit`.
        progress: As in `fit`.

    Returns:
        The `Trained` models, in the order of `seeds`.

    Raises:
        ValueError: As `fit`.
        FloatingPointError: As `fit`; models trained before are not returned, but with a `work_dir`
            a second call picks them up.

    Example:
        >>> from vfjax import data, models
        >>> recipe = Recipe(learning_rate=0.05, batch_size=50)
        >>> runs = fit_seeds(models.MLP((8,)), recipe, data.load("digits", train=100), seeds=(0, 1))
        >>> len(runs)
        2
    """
    return [
        fit(
            model,
            recipe,
            dataset,
            seed=seed,
            work_dir=None if work_dir is None else Path(work_dir) / f"seed{seed}",
            resume=resume,
            progress=progress,
        )
        for seed in seeds
    ]


@dataclasses.dataclass(frozen=True)
class _Task:
    """Everything static about a run except its seed; equal tasks share their compiled step."""

    model: nn.Module
    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    logits: Callable[[Array], Array] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.recipe.batch_size)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return self.recipe.transformation(self.steps_per_epoch)

    def init(self, seed: int, shape: Sequence[int], start: PyTree | None = None) -> PyTree:
        """Returns the state before the first step, for images of `shape`."""
        initial = functools.partial(_variables, self.model, tuple(shape), jax.random.key(seed))
        variables = initial() if start is None else _started(start, jax.eval_shape(initial))
        return {
            "variables": variables,
            "optimizer": self.optimizer.init(variables["params"]),
            "step": jnp.zeros((), jnp.int32),
            # Sums over the epoch so far, kept on the device so that no step waits for the host.
            "loss": jnp.zeros((), jnp.float32),
            "correct": jnp.zeros((), jnp.int32),
        }

    def order(self, seed: int, epoch: int) -> Array:
        """Returns the images of an epoch, int32 ``[steps, batch]``.

        The last batch is filled up with the first images of the same order, so that all batches
        have one shape and the number of steps is that with a smaller last batch.
        """
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        order = jax.random.permutation(key, self.count)
        size = self.steps_per_epoch * self.recipe.batch_size
        return jnp.resize(order, (size,)).reshape(self.steps_per_epoch, self.recipe.batch_size)

    def step(self, state: PyTree, seed: Array, images: Array, labels: Array, rows: Array) -> PyTree:
        """Takes one step on the images of indices ``rows [batch]``."""
        key = jax.random.fold_in(jax.random.key(seed), 2)
        key = jax.random.fold_in(key, state["step"])
        batch = augment(images[rows], key, crop=self.recipe.crop, flip=self.recipe.flip)
        x, label = normalise(batch, self.mean, self.std), labels[rows]
        others = {name: value for name, value in state["variables"].items() if name != "params"}

        def forward(params: PyTree, others: PyTree, x: Array) -> tuple[Array, PyTree]:
            variables = {"params": params, **others}
            return self.model.apply(variables, x, train=True, mutable=list(others))

        def objective(params: PyTree) -> tuple[Array, tuple[PyTree, Array]]:
            outputs, changed = routed(forward)(params, others, x)
            logits = outputs if self.logits is None else self.logits(outputs)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            correct = jnp.sum(jnp.argmax(logits, -1) == label, dtype=jnp.int32)
            return loss, (changed, correct)

        params = state["variables"]["params"]
        (loss, (changed, correct)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer = self.optimizer.update(gradient, state["optimizer"], params)
        return {
            "variables": {"params": optax.apply_updates(params, updates), **changed},
            "optimizer": optimizer,
            "step": state["step"] + 1,
            "loss": state["loss"] + loss,
            "correct": state["correct"] + correct,
        }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _variables(model: nn.Module, shape: tuple[int, ...], key: Array) -> PyTree:
    # Compiled as a whole: an eager call would compile each operation of the forward pass
    # separately.
    return model.lazy_init(key, jax.ShapeDtypeStruct((1, *shape), jnp.float32))


# A step donates the buffers of its state, so variables that are handed in or out are copied.
_copy = functools.partial(jnp.array, copy=True)


def _started(start: PyTree, like: PyTree) -> PyTree:
    """Checks that the variables to start from fit the model; returns a copy of them."""
    flat, expected = flatten_named(start, name="start")[0], flatten_named(like)[0]
    for path in sorted(flat.keys() | expected.keys()):
        kinds = [
            f"{jnp.result_type(tree[path])}{list(np.shape(tree[path]))}"
            if path in tree
            else "nothing"
            for tree in (flat, expected)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"start must be variables of the model: at {path!r} it has {kinds[0]}, the model "
                f"{kinds[1]}."
            )
    check_finite(flat, name="start")
    return jax.tree.unflatten(jax.tree.structure(like), [_copy(flat[path]) for path in expected])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(
    task: _Task, state: PyTree, seed: Array, images: Array, labels: Array, order: Array, row: Array
) -> PyTree:
    return task.step(state, seed, images, labels, order[row])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _epoch(
    task: _Task, state: PyTree, seed: Array, images: Array, labels: Array, order: Array
) -> PyTree:
    def body(state: PyTree, rows: Array) -> tuple[PyTree, None]:
        return task.step(state, seed, images, labels, rows), None

    return jax.lax.scan(body, state, order)[0]


def _scans() -> bool:
    """Whether an epoch is one compiled scan.

    Accelerators gain from it; on CPU the gradient of a convolution is up to 50 times slower inside
    a scan than outside.
    """
    return jax.default_backend() != "cpu"


def _run_epoch(
    task: _Task, state: PyTree, seed: int, images: Array, labels: Array, epoch: int, bar: tqdm
) -> PyTree:
    """Takes all steps of an epoch; the given state is donated."""
    order, key_seed = task.order(seed, epoch), jnp.asarray(seed, jnp.uint32)
    if _scans():
        state = jax.block_until_ready(_epoch(task, state, key_seed, images, labels, order))
        bar.update(task.steps_per_epoch)
        return state
    done = 0
    for row in range(task.steps_per_epoch):
        state = _step(task, state, key_seed, images, labels, order, np.int32(row))
        # Wait now and then, so that the bar is right and few steps are in flight.
        if row % 10 == 9:
            state["step"].block_until_ready()
            bar.update(row + 1 - done)
            done = row + 1
    state = jax.block_until_ready(state)
    bar.update(task.steps_per_epoch - done)
    return state
