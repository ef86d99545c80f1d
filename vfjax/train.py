"""Training the edge models: recipes, the loop, resuming, evaluation.

The state of a run is a pytree whose only clock is its step counter: the order of the images and
their augmentation follow from the seed and the step, so that a run that was killed and resumed ends
with the very numbers of one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tqdm import tqdm

from vfjax import checkpoint
from vfjax._route import routed
from vfjax.data import Dataset, normalise

__all__ = ["RECIPES", "Evaluation", "Recipe", "Trained", "evaluate", "fit", "fit_seeds"]

Array = jax.Array
PyTree = Any

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
      optimizer: ``"sgd"`` (with momentum) or ``"adam"``.
      learning_rate: Its peak.
      schedule: ``"constant"``, ``"cosine"`` (to zero at the last step) or ``"step"`` (times `factor`
        at each of `milestones`).
      milestones: Iterations counted from the first, warm-up included.
      factor: What the learning rate is multiplied with at a milestone.
      warmup_epochs: Epochs over which the rate rises linearly from 1e-6 to its peak.
      epochs: Passes over the training split.
      batch_size: Images per step.
      weight_decay: L2 penalty of all parameters, added to the gradient before the optimizer, as
        PyTorch's SGD and Adam do.
      momentum: Of SGD.
      crop: Pixels of zero padding before a random crop; 0 for none.
      flip: Whether images are mirrored at random.

    Example:
      >>> recipe = Recipe(epochs=2, learning_rate=0.5, schedule="cosine")
      >>> [round(float(recipe.rate(4)(step)), 3) for step in (0, 4, 8)]
      [0.5, 0.25, 0.0]
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    warmup_epochs: float = 0.0
    epochs: int = 1
    batch_size: int = 128
    weight_decay: float = 0.0
    momentum: float = 0.9
    crop: int = 0
    flip: bool = False

    def __post_init__(self):
        """Checks the values that are easily mistyped."""
        for name, value, known in (
            ("optimizer", self.optimizer, ("sgd", "adam")),
            ("schedule", self.schedule, ("constant", "cosine", "step")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}.")

    def rate(self, steps_per_epoch: int) -> Callable[[Any], Array]:
        """Returns the learning rate as a function of the step, counted from 0."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        total = self.epochs * steps_per_epoch
        if self.schedule == "step":
            # Milestones are absolute: a warm-up delays nothing.
            after = optax.piecewise_constant_schedule(
                self.learning_rate, {step: self.factor for step in self.milestones}
            )
        elif self.schedule == "cosine":
            cosine = optax.cosine_decay_schedule(self.learning_rate, max(1, total - warmup))

            def after(step: Any) -> Array:
                return cosine(step - warmup)
        else:
            after = optax.constant_schedule(self.learning_rate)
        if not warmup:
            return lambda step: jnp.asarray(after(step), jnp.float32)
        rise = optax.linear_schedule(1e-6, self.learning_rate, warmup)
        return lambda step: jnp.where(step < warmup, rise(step), after(step)).astype(jnp.float32)

    def transformation(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """Returns the optax optimizer."""
        rate = self.rate(steps_per_epoch)
        if self.optimizer == "adam":
            optimizer = optax.adam(rate)
        else:
            optimizer = optax.sgd(rate, momentum=self.momentum or None)
        if not self.weight_decay:
            return optimizer
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optimizer)


_CIFAR = Recipe(
    learning_rate=0.1,
    schedule="step",
    milestones=(32000, 48000),
    epochs=160,
    weight_decay=1e-4,
    crop=4,
    flip=True,
)

# "paper": Table 2 of "Vanishing Feature" and the text around it.  "cpu": what two cores finish.
RECIPES: dict[str, Recipe] = {
    "paper-cifar": _CIFAR,
    "paper-cifar-warmup": dataclasses.replace(_CIFAR, warmup_epochs=1.0),
    "paper-linear": Recipe(
        optimizer="adam", learning_rate=0.01, epochs=20, weight_decay=1e-4
    ),
    "paper-mnist-vgg": Recipe(
        learning_rate=0.01,
        schedule="cosine",
        epochs=25,
        batch_size=100,
        weight_decay=5e-4,
        warmup_epochs=1.0,
    ),
    "cpu-vgg": Recipe(
        learning_rate=0.05,
        schedule="cosine",
        warmup_epochs=1.0,
        epochs=24,
        weight_decay=5e-4,
        crop=4,
        flip=True,
    ),
    "cpu-resnet": Recipe(
        learning_rate=0.1,
        schedule="cosine",
        warmup_epochs=1.0,
        epochs=15,
        weight_decay=5e-4,
        crop=4,
        flip=True,
    ),
    "cpu-mlp": Recipe(learning_rate=0.05, schedule="cosine", epochs=10, weight_decay=1e-4),
    "cpu-linear": Recipe(optimizer="adam", learning_rate=0.01, epochs=5, weight_decay=1e-4),
    "cpu-digits": Recipe(
        learning_rate=0.1,
        schedule="cosine",
        warmup_epochs=5.0,
        epochs=60,
        batch_size=64,
        weight_decay=1e-3,
    ),
}


class Evaluation(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy in nats over `count` examples."""

    accuracy: float
    loss: float
    count: int


class Trained(NamedTuple):
    """What training ends with.

    Attributes:
      variables: ``{"params": ...}``, with ``"batch_stats"`` where the model has BatchNorm.
      history: One record per epoch: epoch, training loss and accuracy (augmented images, while
        learning), learning rate, seconds.
      seconds: Wall time of all epochs, of resumed runs together.
    """

    variables: PyTree
    history: tuple[dict[str, float], ...]
    seconds: float


# ----------------------------------------------------------------------------------------- one step


def _augment(images: Array, key: Array, crop: int, flip: bool) -> Array:
    """Crops uint8 images ``[N, H, W, C]`` at random from their zero-padded selves and mirrors them."""
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


@dataclasses.dataclass(frozen=True)
class _Task:
    """Everything static of a run; equal tasks share their compiled steps."""

    model: nn.Module
    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.recipe.batch_size)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return self.recipe.transformation(self.steps_per_epoch)

    def init(self, seed: int, shape: Sequence[int]) -> PyTree:
        """Returns the state before the first step."""
        # Compiled: an eager first call compiles each operation of the forward pass by itself.
        init = jax.jit(self.model.init)
        variables = init(jax.random.key(seed), jnp.zeros((1, *shape), jnp.float32))
        return {
            "variables": variables,
            "optimizer": self.optimizer.init(variables["params"]),
            "step": jnp.zeros((), jnp.int32),
            # Sums over the epoch so far; on the device, so that no step waits for the host.
            "loss": jnp.zeros((), jnp.float32),
            "correct": jnp.zeros((), jnp.int32),
        }

    def order(self, seed: int, epoch: Any) -> Array:
        """Returns the images of an epoch, ``[steps, batch]``.

        The last batch is filled up with the first images of the same order: every batch has the
        same size, and an epoch as many steps as in PyTorch.
        """
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
        order = jax.random.permutation(key, self.count)
        size = self.steps_per_epoch * self.recipe.batch_size
        return jnp.resize(order, (size,)).reshape(self.steps_per_epoch, self.recipe.batch_size)

    def step(self, state: PyTree, seed: Array, images: Array, labels: Array, rows: Array) -> PyTree:
        """Takes one step on the images ``rows [batch]``."""
        recipe = self.recipe
        key = jax.random.fold_in(jax.random.key(seed), 2)
        key = jax.random.fold_in(key, state["step"])
        x = normalise(
            _augment(images[rows], key, recipe.crop, recipe.flip), self.mean, self.std
        )
        label = labels[rows]
        constant = {k: v for k, v in state["variables"].items() if k != "params"}

        def forward(params: PyTree, constant: PyTree, x: Array) -> tuple[Array, PyTree]:
            variables = {"params": params, **constant}
            mutable = list(constant)
            logits, changed = self.model.apply(variables, x, train=True, mutable=mutable)
            return logits, changed

        def objective(params: PyTree) -> tuple[Array, tuple[PyTree, Array]]:
            logits, changed = routed(forward)(params, constant, x)
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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _one_step(
    task: _Task, state: PyTree, seed: Array, images: Array, labels: Array, order: Array, row: Array
) -> PyTree:
    return task.step(state, seed, images, labels, order[row])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _scanned(
    task: _Task, state: PyTree, seed: Array, images: Array, labels: Array, order: Array
) -> PyTree:
    def body(state: PyTree, rows: Array) -> tuple[PyTree, None]:
        return task.step(state, seed, images, labels, rows), None

    return jax.lax.scan(body, state, order)[0]


def _scan_epochs() -> bool:
    """Whether an epoch is one compiled scan; XLA:CPU is 30 times slower at gradients inside one."""
    return jax.default_backend() != "cpu"


def _run_epoch(
    task: _Task, state: PyTree, seed: int, images: Array, labels: Array, epoch: int, bar: tqdm
) -> PyTree:
    """Takes the steps of one epoch."""
    order = task.order(seed, epoch)
    seed_array = jnp.asarray(seed, jnp.uint32)
    if _scan_epochs():
        state = jax.block_until_ready(_scanned(task, state, seed_array, images, labels, order))
        bar.update(task.steps_per_epoch)
        return state
    for row in range(task.steps_per_epoch):
        state = _one_step(task, state, seed_array, images, labels, order, np.int32(row))
        # Now and then, so that the bar tells the truth and the queue of steps stays short.
        if row % 10 == 9:
            state["step"].block_until_ready()
            bar.update(10)
    bar.update(task.steps_per_epoch % 10)
    return jax.block_until_ready(state)


# ----------------------------------------------------------------------------------------- the loop


def _fingerprint(task: _Task, dataset: Dataset, seed: int) -> str:
    """Returns what must agree between a saved state and the run that resumes it."""
    return json.dumps(
        {
            "model": repr(task.model),
            "recipe": dataclasses.asdict(task.recipe),
            "data": [dataset.name, task.count, *dataset.train_images.shape[1:]],
            "seed": seed,
        }
    )


class _Saved:
    """The saved states of a run: ``epoch-0003`` and the like in its own folder."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str):
        self.folder, self.fingerprint = Path(folder).expanduser().absolute(), fingerprint

    def _epochs(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-[0-9]*"))

    def clear(self) -> None:
        """Removes all saved states."""
        for path in self._epochs():
            shutil.rmtree(path)

    def write(self, state: PyTree, epoch: int, history: Sequence[dict[str, float]]) -> None:
        """Saves the state after `epoch` epochs; then removes the older ones, never before."""
        older = self._epochs()
        path = self.folder / f"epoch-{epoch:04d}"
        meta = {"fingerprint": self.fingerprint, "epoch": epoch, "history": list(history)}
        checkpoint.save(path, {"leaves": jax.tree.leaves(state)}, meta)
        for other in older:
            if other != path:
                shutil.rmtree(other, ignore_errors=True)

    def read(self, like: PyTree) -> tuple[PyTree, int, list[dict[str, float]]] | None:
        """Returns the newest readable (state, epochs done, history), or None."""
        for path in reversed(self._epochs()):
            try:
                meta = checkpoint.card(path)
                if meta["fingerprint"] != self.fingerprint:
                    raise ValueError(
                        f"work_dir: {self.folder} holds another run ({meta['fingerprint']}); choose "
                        "another folder, or resume=False to begin afresh."
                    )
                leaves = checkpoint.load(path)["leaves"]
            except checkpoint.CheckpointError as error:
                _log.warning("skipping %s: %s", path, error)
                continue
            return jax.tree.unflatten(jax.tree.structure(like), leaves), meta["epoch"], meta["history"]
        return None


def fit(
    model: nn.Module,
    recipe: Recipe,
    dataset: Dataset,
    *,
    seed: int = 0,
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Trained:
    """Trains a model from scratch, or on from where a killed run of the same name stopped.

    Args:
      model: A model of `vfjax.models`, called as ``model.apply(variables, x, train=...)``.
      recipe: How to train it.
      dataset: Its training split is used, nothing else; uint8 on the device, gathered, augmented
        and normalised inside the compiled step.
      seed: Of the initial parameters, the order of the images and their augmentation.
      work_dir: Folder in which the state is saved after each epoch, for this run alone; None
        saves nothing.
      resume: Whether to go on from the state in `work_dir`; if False it is removed.
      progress: Whether a progress bar appears after two seconds.

    Returns:
      The `Trained` variables with their history.

    Raises:
      ValueError: If `work_dir` holds the state of another run.

    Example:
      >>> from vfjax import data, models
      >>> recipe = Recipe(epochs=2, learning_rate=0.05, batch_size=50)
      >>> trained = fit(models.MLP((16,)), recipe, data.load("digits", train=200))
      >>> trained.history[-1]["loss"] < trained.history[0]["loss"]
      True
    """
    task = _Task(model, recipe, dataset.mean, dataset.std, len(dataset.train_images))
    state = task.init(seed, dataset.train_images.shape[1:])
    epoch, history = 0, []
    saved = None
    if work_dir is not None:
        saved = _Saved(work_dir, _fingerprint(task, dataset, seed))
        if not resume:
            saved.clear()
        elif (found := saved.read(state)) is not None:
            state, epoch, history = found
            _log.info("resuming %s after epoch %d", work_dir, epoch)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    rate = recipe.rate(task.steps_per_epoch)
    with tqdm(
        total=recipe.epochs * task.steps_per_epoch,
        initial=epoch * task.steps_per_epoch,
        desc=f"training seed {seed}",
        unit="step",
        delay=2,
        disable=not progress,
    ) as bar:
        while epoch < recipe.epochs:
            start = time.perf_counter()
            state = _run_epoch(task, state, seed, images, labels, epoch, bar)
            steps = task.steps_per_epoch
            record = {
                "epoch": epoch + 1,
                "loss": float(state["loss"]) / steps,
                "accuracy": int(state["correct"]) / (steps * recipe.batch_size),
                "learning_rate": float(rate(int(state["step"]) - 1)),
                "seconds": round(time.perf_counter() - start, 3),
            }
            state = {
                **state,
                "loss": jnp.zeros_like(state["loss"]),
                "correct": jnp.zeros_like(state["correct"]),
            }
            epoch += 1
            history.append(record)
            bar.set_postfix(epoch=epoch, loss=record["loss"], accuracy=record["accuracy"])
            _log.info("seed %d: %s", seed, record)
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

    The runs share their compiled step, and each saves its state in ``work_dir/seed<n>``.

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


# --------------------------------------------------------------------------------------- evaluation


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score(
    fn: Callable[..., Array], params: PyTree, sums: tuple[Array, Array], x: PyTree, label: Array
) -> tuple[Array, Array]:
    """Adds a batch's number of correct answers and summed loss to `sums`."""
    logits = routed(fn)(params, x).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = jnp.sum(jnp.argmax(logits, -1) == label, dtype=jnp.int32)
    return sums[0] + correct, sums[1] + loss.sum()


def evaluate(
    fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    data: Iterable[tuple[Any, Array]],
    *,
    progress: bool = False,
) -> Evaluation:
    """Measures accuracy and cross-entropy, one compiled call per batch.

    Args:
      fn: Pure function ``(params, x) -> logits [n, classes]``.  Calls with an equal function and
        equal shapes share one compilation.
      params: Its parameters, any pytree.
      data: Batches ``(x, label)``, labels an integer array ``[n]``; the last may be smaller.
      progress: Whether a progress bar appears after two seconds.

    Returns:
      The `Evaluation`.

    Raises:
      ValueError: If `data` yields no batch.

    Example:
      >>> data = [(jnp.eye(3), jnp.arange(3)), (jnp.eye(3)[:1], jnp.array([2]))]
      >>> evaluate(lambda scale, x: scale * x, 50.0, data).accuracy
      0.75
    """
    sums = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    count = 0
    for x, label in tqdm(data, desc="evaluating", delay=2, leave=False, disable=not progress):
        sums = _score(fn, params, sums, x, jnp.asarray(label))
        count += len(label)
    if not count:
        raise ValueError("data yields no batch: it is empty, or an iterator that was used up.")
    return Evaluation(int(sums[0]) / count, float(sums[1]) / count, count)
