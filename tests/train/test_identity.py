"""Which run a saved state belongs to: its data and functions by what they are, not by their names.

Functions are made anew for every call, as in a second process.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfjax import data, train

RECIPE = train.Recipe(learning_rate=0.1, batch_size=50)
WEIGHTS = np.eye(3, 10)


class Small(nn.Module):
    """One layer, and a function of its outputs."""

    act: object = nn.relu

    @nn.compact
    def __call__(self, x, train=False):
        return self.act(nn.Dense(3)(x.reshape(x.shape[0], -1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Towards:
    """An object with arrays, of which a repr leaves out the middle."""

    weights: np.ndarray

    def __call__(self, z):
        return z @ self.weights[:, :10]


def helped(z):
    return z @ WEIGHTS


def scaled(z, by):
    return by * (z @ WEIGHTS)


def wide(middle):
    weights = np.zeros((3, 2000))
    weights[:, :10] = np.eye(3, 10)
    weights[1, 1000] = middle
    return weights


# A function of a number makes the same `logits` for the same number, and other ones for another.
LOGITS = {
    "a closure": lambda n: lambda z: n * (z @ WEIGHTS),
    "a default": lambda n: lambda z, w=n * WEIGHTS: z @ w,
    "a partial": lambda n: functools.partial(scaled, by=n),
    "jitted": lambda n: jax.jit(lambda z: n * (z @ WEIGHTS)),
    "an object": lambda n: Towards(wide(n)),
    "a method": lambda n: Towards(wide(n)).__call__,
    "its code": lambda n: [lambda z: helped(z) + 1, lambda z: helped(z) - 1][n - 1],
    "the function it calls": lambda n: lambda z, f=[jnp.sin, jnp.cos][n - 1]: f(helped(z)),
}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train=100, test=10)


def epochs(*args, **options):
    """The epochs that a call trains: none if it resumes a run that was done."""
    seen = []
    train.fit(*args, progress=False, on_epoch=lambda epoch, _: seen.append(epoch), **options)
    return seen


@pytest.mark.parametrize("kind", LOGITS)
def test_a_run_is_resumed_with_the_same_function_alone(kind, digits, tmp_path):
    make = LOGITS[kind]
    options = {"work_dir": tmp_path}
    assert epochs(Small(), RECIPE, digits, logits=make(1), **options) == [1]
    assert epochs(Small(), RECIPE, digits, logits=make(1), **options) == []
    with pytest.raises(ValueError, match="another run: its logits differs"):
        epochs(Small(), RECIPE, digits, logits=make(2), **options)


def test_a_global_that_a_function_reads_is_part_of_it(digits, tmp_path, monkeypatch):
    options = {"work_dir": tmp_path, "logits": lambda z: helped(z)}
    assert epochs(Small(), RECIPE, digits, **options) == [1]
    monkeypatch.setitem(globals(), "WEIGHTS", WEIGHTS + 1)
    with pytest.raises(ValueError, match="its logits differs"):
        epochs(Small(), RECIPE, digits, **options)


def test_functions_of_a_model_are_part_of_it(digits, tmp_path):
    def model(by):
        return Small(act=lambda z: by * jax.nn.softplus(z))

    options = {"work_dir": tmp_path, "logits": helped}
    assert epochs(model(1), RECIPE, digits, **options) == [1]
    assert epochs(model(1), RECIPE, digits, **options) == []
    with pytest.raises(ValueError, match="its model differs"):
        epochs(model(2), RECIPE, digits, **options)


def test_other_data_of_the_same_name_and_shape_is_another_run(digits, tmp_path):
    options = {"work_dir": tmp_path, "logits": helped}
    assert epochs(Small(), RECIPE, digits, **options) == [1]
    images = digits.train_images
    changes = (
        {"train_images": images[::-1]},
        {"train_images": np.where(images == images.max(), 0, images)},
        {"train_labels": np.roll(digits.train_labels, 1)},
        {"mean": (digits.mean[0] + 1e-3,)},
        {"std": (digits.std[0] + 1e-3,)},
    )
    for change in changes:
        other = dataclasses.replace(digits, **change)
        with pytest.raises(ValueError, match=r"another run: its data differs\..*resume=False"):
            epochs(Small(), RECIPE, other, **options)
    # The test split plays no part in training.
    unread = dataclasses.replace(digits, test_images=digits.test_images[::-1])
    assert epochs(Small(), RECIPE, unread, **options) == []


def test_a_start_is_told_by_paths_and_shapes_too(digits, tmp_path):
    start = train.fit(Small(), RECIPE, digits, logits=helped, progress=False).variables
    options = {"work_dir": tmp_path, "logits": helped}
    assert epochs(Small(), RECIPE, digits, start=start, **options) == [1]
    assert epochs(Small(), RECIPE, digits, start=jax.tree.map(np.array, start), **options) == []
    card = json.loads((tmp_path / "epoch-0001" / "card.json").read_text())
    assert card["run"].keys() == {"model", "recipe", "data", "seed", "start", "logits"}
