"""Training: schedules and steps against closed forms, resuming, evaluation against NumPy."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

from helpers import Compilations, take_road
from vfjax import checkpoint, data, models, train

TINY = train.Recipe(
    learning_rate=0.2, schedule="cosine", epochs=3, batch_size=64, weight_decay=1e-3
)


class SmallBatchNorm(nn.Module):
    """One hidden layer with BatchNorm, whose statistics training has to carry along."""

    classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="dense1")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm1")(x)
        return nn.Dense(self.classes, name="head")(nn.relu(x))


class Watched(nn.Module):
    """Hands out the first pixel of every image that it is trained on."""

    see: Callable
    classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        def look(x):
            self.see(x[:, 0, 0, 0])
            return x

        x = jax.pure_callback(look, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train=200, test=50)


@pytest.fixture(scope="module")
def uninterrupted(digits):
    return train.fit(SmallBatchNorm(), TINY, digits, seed=3, progress=False)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- recipes


def test_step_decay_has_absolute_milestones():
    for name, warm in (("paper-cifar", 0), ("paper-cifar-warmup", 391)):
        rate = train.RECIPES[name].rate(391)
        for step in (0, 1, 200, 390, 391, 31999, 32000, 47999, 48000, 62559):
            expected = 0.1 * 0.1 ** ((step >= 32000) + (step >= 48000))
            if step < warm:
                expected = 1e-6 + (0.1 - 1e-6) * step / warm
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-8), (name, step)


def test_cosine_falls_to_zero_after_the_last_step():
    recipe = train.RECIPES["cpu-vgg"]
    rate, warm, total = recipe.rate(391), 391, 24 * 391
    for step in (0, 100, 391, 392, 5000, total - 1, total):
        expected = 0.05 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        if step < warm:
            expected = 1e-6 + (0.05 - 1e-6) * step / warm
        assert float(rate(step)) == pytest.approx(expected, rel=1e-4, abs=1e-8), step


def test_constant():
    rate = train.RECIPES["paper-linear"].rate(469)
    assert {round(float(rate(step)), 7) for step in (0, 10, 9000)} == {0.01}


def test_sgd_adds_the_decay_to_the_gradient_as_pytorch_does():
    recipe = train.Recipe(learning_rate=0.5, momentum=0.9, weight_decay=0.1)
    optimizer = recipe.transformation(1)
    params, gradients = jnp.array([1.0, -2.0]), jnp.array([[0.3, 0.1], [0.2, -0.4], [0.0, 1.0]])
    state, found = optimizer.init(params), params
    expected, velocity = np.array([1.0, -2.0]), np.zeros(2)
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, found)
        found = found + update
        velocity = 0.9 * velocity + np.asarray(gradient) + 0.1 * expected
        expected = expected - 0.5 * velocity
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_adam_adds_the_decay_to_the_gradient_too():
    optimizer = train.Recipe(optimizer="adam", learning_rate=0.1, weight_decay=1.0).transformation(
        1
    )
    params = jnp.array([2.0])
    # Adam's first update is the sign of what it is given: here of 0 + 1.0 * 2.
    update, _ = optimizer.update(jnp.zeros(1), optimizer.init(params), params)
    np.testing.assert_allclose(update, [-0.1], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, got 'lion'"),
        ({"schedule": "exponential"}, "schedule must be one of"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        train.Recipe(**change)


def test_recipes_of_models():
    assert train.recipe_for("vgg16", "cifar10") == train.RECIPES["cpu-vgg"]
    assert train.recipe_for("vgg16-bn", "cifar100", preset="paper") == train.RECIPES["paper-cifar"]
    assert train.recipe_for("resnet20-ln", "cifar10", preset="paper").warmup_epochs == 1
    assert train.recipe_for("digits-conv", "digits", preset="paper").epochs == 60
    assert train.recipe_for("convnext-pico", "cifar10") == train.RECIPES["cpu-vit"]
    for name in models.NAMES:
        for dataset in ("cifar10", "cifar100", "mnist", "digits"):
            assert isinstance(train.recipe_for(name, dataset), train.Recipe)
    with pytest.raises(ValueError, match="preset must be one of cpu, paper"):
        train.recipe_for("vgg16", "cifar10", preset="gpu")


# ---- augmentation


def test_augmentation_crops_and_mirrors():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (64, 6, 5, 2), dtype=np.uint8)
    found = np.asarray(train.augment(jnp.asarray(images), jax.random.key(0), crop=2, flip=True))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    kinds = set()
    for before, after in zip(padded, found, strict=True):
        fits = [
            (row, column, mirror)
            for row in range(5)
            for column in range(5)
            for mirror in (1, -1)
            if np.array_equal(before[row : row + 6, column : column + 5][:, ::mirror], after)
        ]
        assert len(fits) == 1
        kinds.add(fits[0])
    assert len({kind[:2] for kind in kinds}) > 15 and {kind[2] for kind in kinds} == {1, -1}
    untouched = train.augment(jnp.asarray(images), jax.random.key(0), crop=0, flip=False)
    np.testing.assert_array_equal(untouched, images)


def test_an_epoch_takes_every_image_and_fills_its_last_batch(digits):
    # Each image has a grey of its own, which tells when it was taken.
    greys = np.arange(200, dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(greys, digits.train_images.shape)
    dataset = dataclasses.replace(digits, train_images=images)
    recipe = dataclasses.replace(TINY, epochs=2, crop=0, flip=False)
    orders = []
    for seed in (0, 1):
        seen = []
        train.fit(Watched(seen.append), recipe, dataset, seed=seed, progress=False)
        greys = np.sort(np.unique(seen))
        assert len(greys) == 200
        orders += list(np.searchsorted(greys, seen).reshape(2, 4, 64))
    for order in orders:
        np.testing.assert_array_equal(np.sort(order.ravel()[:200]), np.arange(200))
        np.testing.assert_array_equal(order.ravel()[200:], order.ravel()[:56])
    for other in orders[1:]:
        assert (other != orders[0]).mean() > 0.9


# ---- training


def test_training_learns_and_keeps_records(uninterrupted):
    assert uninterrupted.history[-1]["loss"] < 0.7 * uninterrupted.history[0]["loss"]
    assert [record["epoch"] for record in uninterrupted.history] == [1, 2, 3]
    assert set(uninterrupted.variables) == {"params", "batch_stats"}
    assert uninterrupted.variables["batch_stats"]["norm1"]["var"].max() != 1
    assert uninterrupted.seconds == pytest.approx(
        sum(record["seconds"] for record in uninterrupted.history)
    )


def test_the_first_step_is_the_plain_one(digits):
    """Against the same step without routing, jit, state or augmentation."""
    recipe = train.Recipe(learning_rate=0.05, batch_size=200, weight_decay=1e-3)
    model = models.MLP((8,))
    found = train.fit(model, recipe, digits, seed=5, progress=False).variables["params"]
    still = dataclasses.replace(recipe, learning_rate=0.0)
    params = train.fit(model, still, digits, seed=5, progress=False).variables["params"]
    (x, label), *_ = digits.batches("train", batch_size=200)

    def loss(params):
        logits = jax.nn.log_softmax(model.apply({"params": params}, x))
        return -jnp.take_along_axis(logits, label[:, None], 1).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    expected = jax.tree.map(lambda p, g: p - 0.05 * (g + 1e-3 * p), params, gradient)
    # The order of the images differs, and with it that of the summation.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_seeds_differ_and_repeat(digits, uninterrupted):
    one, two = train.fit_seeds(SmallBatchNorm(), TINY, digits, seeds=(0, 1), progress=False)
    kernel = one.variables["params"]["head"]["kernel"]
    assert not np.allclose(kernel, two.variables["params"]["head"]["kernel"])
    (again,) = train.fit_seeds(SmallBatchNorm(), TINY, digits, seeds=(0,), progress=False)
    assert_equal(one.variables, again.variables)


class Killed(BaseException):
    """No Exception: nothing may catch it on the way."""


def kill_at(patch, where, owner, name, moment):
    """Makes the `moment`-th call of ``owner.name`` raise, before or after it has run."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == moment and where == "before":
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == moment:
            raise Killed
        return result

    patch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("where", "owner", "name", "moment"),
    [
        ("before", jax, "block_until_ready", 1),  # in the first epoch: nothing saved yet
        ("before", jax, "block_until_ready", 2),  # in the second
        ("before", ocp.Checkpointer, "save", 2),  # while the second is saved
        ("after", ocp.Checkpointer, "save", 2),  # its arrays written, nothing else
        ("before", os, "rename", 2),  # all written, not yet in place
        ("after", os, "rename", 2),  # in place, the first not yet removed
    ],
)
def test_a_killed_run_resumes_to_the_same_numbers(
    digits, uninterrupted, tmp_path, monkeypatch, where, owner, name, moment
):
    with monkeypatch.context() as patch:
        kill_at(patch, where, owner, name, moment)
        with pytest.raises(Killed):
            train.fit(SmallBatchNorm(), TINY, digits, seed=3, work_dir=tmp_path, progress=False)
    resumed = train.fit(SmallBatchNorm(), TINY, digits, seed=3, work_dir=tmp_path, progress=False)
    assert_equal(resumed.variables, uninterrupted.variables)
    for one, two in zip(resumed.history, uninterrupted.history, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0003"]
    # A run that is complete is not trained again.
    again = train.fit(SmallBatchNorm(), TINY, digits, seed=3, work_dir=tmp_path, progress=False)
    assert again.history == resumed.history


def test_variables_of_every_epoch_may_be_kept(digits, uninterrupted, tmp_path):
    seen = []
    options = {"seed": 3, "work_dir": tmp_path, "progress": False}
    train.fit(SmallBatchNorm(), TINY, digits, on_epoch=lambda *found: seen.append(found), **options)
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    # Nothing of them was used up by later steps.
    for epoch, variables in seen[:2]:
        assert not all(
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (variables, seen[epoch][1])), strict=True)
        )
    assert_equal(seen[-1][1], uninterrupted.variables)
    # A complete run has no epoch left.
    train.fit(SmallBatchNorm(), TINY, digits, on_epoch=lambda *_: pytest.fail(), **options)


@pytest.mark.parametrize("moment", [1, 2])
def test_an_epoch_is_shown_again_if_it_was_not_saved(digits, tmp_path, moment):
    """A run that is killed and resumed shows every epoch, with the numbers of one that was not."""
    seen = {}

    def show(epoch, variables):
        seen.setdefault(epoch, []).append(variables)
        if epoch == moment and len(seen[epoch]) == 1:
            raise Killed

    options = {"work_dir": tmp_path, "on_epoch": show, "progress": False}
    with pytest.raises(Killed):
        train.fit(SmallBatchNorm(), TINY, digits, **options)
    train.fit(SmallBatchNorm(), TINY, digits, **options)
    assert {epoch: len(found) for epoch, found in seen.items()} == {1: 1, 2: 1, 3: 1} | {moment: 2}
    assert_equal(*seen[moment])


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray])
def test_starting_from_given_variables(digits, uninterrupted, tmp_path, convert):
    start = jax.tree.map(convert, uninterrupted.variables)
    kept = jax.tree.map(np.array, start)
    recipe = dataclasses.replace(TINY, learning_rate=1e-12, epochs=1)
    frozen = dataclasses.replace(recipe, weight_decay=0.0)
    found = train.fit(SmallBatchNorm(), frozen, digits, start=start, progress=False)
    assert_equal(start, kept)  # not used up by the step either
    assert_equal(found.variables["params"], start["params"])
    assert found.history[0]["loss"] < 0.8 * uninterrupted.history[0]["loss"]


def test_starting_from_its_own_beginning_changes_nothing(digits, uninterrupted):
    x = jnp.zeros((1, 8, 8, 1))
    start = jax.jit(SmallBatchNorm().init)(jax.random.key(3), x)
    found = train.fit(SmallBatchNorm(), TINY, digits, seed=3, start=start, progress=False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        found.variables,
        uninterrupted.variables,
    )


def test_a_run_is_resumed_with_its_start_only(digits, uninterrupted, tmp_path, monkeypatch):
    start = uninterrupted.variables
    options = {"seed": 4, "progress": False}
    whole = train.fit(SmallBatchNorm(), TINY, digits, start=start, **options)
    options["work_dir"] = tmp_path
    with monkeypatch.context() as patch:
        kill_at(patch, "before", jax, "block_until_ready", 2)
        with pytest.raises(Killed):
            train.fit(SmallBatchNorm(), TINY, digits, start=start, **options)
    other = jax.tree.map(lambda leaf: leaf + 1, start)
    for wrong in (None, other):
        with pytest.raises(ValueError, match="another run: its start differ"):
            train.fit(SmallBatchNorm(), TINY, digits, start=wrong, **options)
    resumed = train.fit(SmallBatchNorm(), TINY, digits, start=start, **options)
    assert_equal(resumed.variables, whole.variables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"params": v["params"]}, "at 'batch_stats/norm1/mean' it has nothing, the mod"),
        (lambda v: {**v, "other": jnp.ones(2)}, r"at 'other' it has float32\[2\], the model noth"),
        (lambda v: jax.tree.map(lambda a: a[:3], v), r"/mean' it has float32\[3\].*float32\[8\]"),
        (lambda v: jax.tree.map(lambda a: a.astype("float16"), v), r"float16\[8\], the model floa"),
        (lambda v: jax.tree.map(lambda a: a * jnp.nan, v), "start holds 8 NaN"),
    ],
)
def test_a_start_that_does_not_fit(digits, uninterrupted, change, message):
    start = change(uninterrupted.variables)
    with pytest.raises(ValueError, match=message):
        train.fit(SmallBatchNorm(), TINY, digits, start=start, progress=False)


def test_a_damaged_state_is_skipped_and_told(digits, uninterrupted, tmp_path, caplog):
    train.fit(SmallBatchNorm(), TINY, digits, seed=3, work_dir=tmp_path, progress=False)
    (tmp_path / "epoch-0003" / "structure.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = train.fit(SmallBatchNorm(), TINY, digits, seed=3, work_dir=tmp_path, progress=False)
    assert "skipping" in caplog.text
    assert_equal(found.variables, uninterrupted.variables)


def test_the_newest_state_is_that_of_most_epochs(digits, uninterrupted, tmp_path):
    """Whatever the number of digits: an older one, of another run, is not looked at."""
    for seed, name in ((0, "epoch-9999"), (3, "epoch-10000")):
        folder = tmp_path / f"seed{seed}"
        train.fit(SmallBatchNorm(), TINY, digits, seed=seed, work_dir=folder, progress=False)
        (folder / "epoch-0003").rename(tmp_path / name)
        folder.rmdir()
    found = train.fit(SmallBatchNorm(), TINY, digits, seed=3, work_dir=tmp_path, progress=False)
    assert_equal(found.variables, uninterrupted.variables)


def test_the_state_of_another_run_is_not_resumed(digits, tmp_path):
    options = {"work_dir": tmp_path, "progress": False}
    train.fit(SmallBatchNorm(), TINY, digits, seed=0, **options)
    with pytest.raises(ValueError, match=r"another run: its seed differs\. .*resume=False"):
        train.fit(SmallBatchNorm(), TINY, digits, seed=1, **options)
    train.fit(SmallBatchNorm(), TINY, digits, seed=1, resume=False, **options)


def test_a_scanned_epoch_is_the_loop(digits, monkeypatch, uninterrupted):
    take_road(monkeypatch, "gpu")
    scanned = train.fit(SmallBatchNorm(), TINY, digits, seed=3, progress=False)
    # XLA fuses the two differently; a dozen steps of SGD let the rounding grow a little.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        scanned.variables,
        uninterrupted.variables,
    )


def test_divergence_is_told_and_nothing_of_it_saved(digits, tmp_path):
    recipe = dataclasses.replace(TINY, learning_rate=1e30, schedule="constant")
    with pytest.raises(FloatingPointError, match="diverged in epoch 1.*learning_rate"):
        train.fit(models.MLP((8,)), recipe, digits, work_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_too_few_classes_are_told(digits):
    with pytest.raises(ValueError, match="model has 5 classes, digits has 10"):
        train.fit(models.MLP((8,), classes=5), TINY, digits, progress=False)


def test_no_compilation_on_the_second_run(digits):
    # The first run is here, under this test's own settings: they are part of the cache's key.
    train.fit(SmallBatchNorm(), TINY, digits, seed=7, progress=False)
    with Compilations() as compiled:
        train.fit(SmallBatchNorm(), TINY, digits, seed=8, progress=False)
    assert compiled.count == 0


# ---- evaluation


def linear(params, x):
    return x @ params["kernel"] + params["bias"][None]


@pytest.fixture
def labelled():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(5, 4)), "bias": rng.normal(size=4)}
    params = jax.tree.map(np.float32, params)
    x, label = rng.normal(size=(23, 5)).astype(np.float32), rng.integers(0, 4, 23)
    return params, x, label.astype(np.int32)


class Foreign:
    """An array of another library, of a dtype that NumPy does not know."""

    def __init__(self, values):
        self.values, self.dtype, self.ndim = values, "other.int64", values.ndim

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_labels_of_other_libraries(labelled):
    params, x, label = labelled
    expected = train.evaluate(linear, params, [(x, label)])
    assert train.evaluate(linear, params, [(x, Foreign(label))]) == expected


def test_evaluation_against_numpy(labelled):
    params, x, label = labelled
    logits = linear(params, x).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    expected = (log_z - logits[np.arange(23), label]).mean()
    batches = [(x[:8], label[:8]), (x[8:16], label[8:16]), (x[16:], label[16:])]
    found = train.evaluate(linear, params, batches)
    assert found.count == 23
    assert found.accuracy == (logits.argmax(-1) == label).mean()
    assert found.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_network_with_nan_has_no_accuracy(bad):
    data = [(jnp.eye(3), jnp.zeros(3, int))]
    with pytest.raises(ValueError, match="params holds 1 NaN or infinite value at 'w'"):
        train.evaluate(lambda p, x: x @ p["w"], {"w": jnp.eye(3).at[0, 0].set(bad)}, data)
    with pytest.raises(TypeError, match=r"eqx\.partition"):
        train.evaluate(lambda p, x: x @ p["w"], {"w": jnp.eye(3), "act": jax.nn.relu}, data)


def test_evaluation_compiles_once_per_shape(labelled):
    params, x, label = labelled
    batches = [(x[:8], label[:8]), (x[8:16], label[8:16])]
    train.evaluate(linear, params, batches)
    twice = jax.tree.map(lambda leaf: 2 * leaf, params)
    with Compilations() as compiled:
        train.evaluate(linear, twice, batches)
    assert compiled.count == 0


def test_evaluation_of_routed_models_agrees_with_the_plain_one(digits):
    model = models.DigitsConv(width=0.25)
    (x, label), *_ = digits.batches("test")
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 5,
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    found = train.evaluate(models.apply_fn(model), variables, [(x, label)])
    logits = jax.nn.log_softmax(jax.jit(model.apply)(variables, x))
    expected = -np.take_along_axis(np.asarray(logits), np.asarray(label)[:, None], 1).mean()
    assert found.accuracy == pytest.approx(float((logits.argmax(-1) == label).mean()))
    assert found.loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: None, TypeError, "`data` must be an iterable of batches.*got NoneType"),
        (lambda x, y: {"x": x, "y": y}, TypeError, "`data` must be an iterable of batches.*dict"),
        (lambda x, y: [], ValueError, "`data` gave no batches.*it is empty.*Got list"),
        (lambda x, y: [(x[:0], y[:0])], ValueError, "`data` gave no batches with samples"),
        (lambda x, y: iter([]), ValueError, "`data` gave no batches: this list_iterator is empty"),
        (lambda x, y: [x], TypeError, r"`data`, batch 0 must be a pair \(x, label\)"),
        (lambda x, y: x, TypeError, r"`data`, batch 0 must be a pair \(x, label\), got ndarray"),
        (lambda x, y: (x, y), TypeError, r"`data`, batch 0.*one batch.*list of batches, \[\(x, la"),
        (lambda x, y: (x, y.tolist()), TypeError, "batch 0.*this looks like one batch"),
        (lambda x, y: [x, x], TypeError, "accuracy needs labels$"),
        (lambda x, y: [x, [[1], [2, 3]]], TypeError, "accuracy needs labels$"),
        (lambda x, y: "abc", TypeError, r"each \(x, label\), got str.*: \[\(x, label\)\]"),
        (lambda x, y: [(x, y), (x, [[1], [2, 3]])], TypeError, "batch 1: labels must be integers"),
        (lambda x, y: [(x, Foreign(y.astype(float)))], TypeError, "must be integers.*float64"),
        (lambda x, y: [(x, y[:, None])], TypeError, r"labels must be integers \[n\]"),
        (lambda x, y: [({}, y)], ValueError, "23 labels for nothing"),
        (lambda x, y: [(x, y.astype(np.float32))], TypeError, "labels must be integers"),
        (lambda x, y: [(x, np.eye(4, dtype=np.int32)[y])], TypeError, "argmax"),
        (lambda x, y: [(x, y), (x, y[1:])], ValueError, "batch 1.*22 labels for 23"),
    ],
)
def test_bad_data(labelled, make, error, message):
    params, x, label = labelled
    with pytest.raises(error, match=message):
        train.evaluate(linear, params, make(x, label))


def test_data_that_is_used_up(labelled):
    params, x, label = labelled
    once = (batch for batch in [(x, label)])
    assert train.evaluate(linear, params, once).count == 23
    with pytest.raises(ValueError, match="`data` gave no batches.*exhausted.*starts over"):
        train.evaluate(linear, params, once)


@pytest.mark.parametrize("wrong", [-1, 4, 255])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, np.ndarray.tolist])
def test_labels_that_are_no_classes(labelled, wrong, convert):
    """They would give a loss of NaN or of another class, and an accuracy that looks right."""
    params, x, label = labelled
    bad = np.where(np.arange(23) == 20, wrong, label % 3)
    low, high = min(wrong, 0), max(wrong, 2)
    message = f"`data`, batch 2: labels.*0 to 3, as fn returns 4 classes.*from {low} to {high}"
    good = (x[:8], convert(label[:8]))
    with pytest.raises(ValueError, match=message):
        train.evaluate(linear, params, [good, (x[:0], label[:0]), (x[8:], convert(bad[8:]))])
    assert train.evaluate(linear, params, [good]).count == 8


@pytest.mark.parametrize(
    "fn", [lambda p, x: x[:, 0], lambda p, x: x[:3], lambda p, x: x[:, None], lambda p, x: (x, x)]
)
def test_outputs_that_are_no_logits(labelled, fn):
    params, x, label = labelled
    with pytest.raises(ValueError, match=r"fn must return logits \[n, classes\]; for 23 inputs"):
        train.evaluate(fn, params, [(x, label)])


# ---- the experiment


def model_of(card):
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in card["options"].items()}
    return models.create(card["model"], **options)


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent.parent / "experiments" / "train_edges.py"
    if not path.exists():
        pytest.skip("the experiments are not installed with the package")
    # Experiments are scripts: they import each other as Python finds them when one is run.
    sys.path.insert(0, str(path.parent))
    return importlib.import_module("train_edges")


@pytest.mark.slow
def test_the_script_trains_saves_and_does_not_train_again(script, tmp_path):
    options = ["--model", "digits-mlp", "--seeds", "4", "--epochs", "2", "--out", str(tmp_path)]
    options += ["--work-dir", str(tmp_path / "work")]
    (folder,) = script.main(options)
    assert folder.name == "digits-mlp-seed4"
    card = checkpoint.card(folder)
    assert card["test"]["count"] == 497 and card["recipe"]["epochs"] == 2
    assert "--epochs 2" in card["command"] and "--seeds 4" in card["command"]
    assert card["device"]["platform"] == jax.default_backend() and card["device"]["cores"] >= 1
    assert {"python", "vfjax", "jax", "optax"} <= set(card["versions"]) and card["date"]
    variables = checkpoint.load(folder)
    assert set(variables) == {"params"}
    fn = models.apply_fn(model_of(card))
    again = train.evaluate(fn, variables, data.load("digits").batches("test"))
    assert again.accuracy == pytest.approx(card["test"]["accuracy"])
    before = (folder / "card.json").stat().st_mtime_ns
    assert script.main(options) == [folder]
    assert (folder / "card.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "0.5"], "digits-mlp has no option 'width'"),
        (["--epochs", "0"], "argument --epochs: '0' is not a number of epochs, from 1 on"),
    ],
)
def test_bad_options_of_the_script(script, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--model", "digits-mlp", "--out", str(tmp_path / "out"), *options])
    assert f"error: {message}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_shipped_checkpoints_are_what_their_cards_say(script):
    folders = sorted((Path(__file__).parent.parent.parent / "checkpoints").glob("[!.]*/card.json"))
    # 18 MB, and 8 of networks by other recipes.
    assert sum(p.stat().st_size for f in folders for p in f.parent.rglob("*")) < 26e6
    for path in folders:
        card = json.loads(path.read_text())
        variables = checkpoint.load(path.parent)
        assert set(variables) <= {"params", "batch_stats"}
        sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
        assert sum(sizes) == card["parameters"]
        assert path.parent.name.endswith(f"seed{card['seed']}")
        assert {"recipe", "seed", "test", "train", "command", "versions"} <= set(card)
        if card["dataset"] == "digits":
            fn = models.apply_fn(model_of(card))
            found = train.evaluate(fn, variables, data.load("digits").batches("test"))
            # A borderline digit may fall to the other side on another machine.
            assert found.accuracy == pytest.approx(card["test"]["accuracy"], abs=0.005)
