"""Training towards class embeddings, on some of the classes: the head, its files, the networks."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfjax import checkpoint, data, models, train

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
cli, heads, training = (importlib.import_module(f"kit.{n}") for n in ("cli", "heads", "training"))
train_edges = importlib.import_module("train_edges")

RECIPE = train.Recipe(learning_rate=0.1, epochs=30, schedule="linear", batch_size=20)
MODEL = models.MLP((32,), classes=6)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train=400, test=100)


@pytest.fixture(scope="module")
def head():
    return heads.of_embeddings(heads.orthonormal(10, 6 + 4), 10.0)


def six(head):
    """The same head in as many dimensions as the model has outputs."""
    return heads.of_embeddings(np.linalg.qr(np.ones((6, 6)) + np.eye(6))[0], head.scale)


def model_of(card):
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in card["options"].items()}
    return models.create(card["model"], **options)


def headed(fn, head):
    return lambda variables, x: head(fn(variables, x))


# ---- recipes and training


def test_linear_schedule_falls_to_zero_after_the_last_step():
    recipe = train.RECIPES["paper-zipit"]
    rate, warm, total = recipe.rate(50), 250, 5000
    for step in (0, 100, 250, 251, 2625, total - 1, total):
        expected = 0.4 * (total - step) / (total - warm)
        if step < warm:
            expected = 1e-6 + (0.4 - 1e-6) * step / warm
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7), step


@pytest.mark.slow
def test_networks_learn_to_point_at_their_classes(digits, head):
    half = heads.only(digits, (7, 3, 1))
    own = six(head).of((5, 0, 2))
    trained = train.fit(MODEL, RECIPE, half, logits=own, progress=False)
    fn = models.apply_fn(MODEL)
    found = train.evaluate(headed(fn, own), trained.variables, half.batches("test"))
    assert found.accuracy > 0.9 and found.count == len(half.test_images)
    outputs = fn(trained.variables, next(iter(half.batches("train")))[0])
    unit = outputs / jnp.linalg.norm(outputs, axis=-1, keepdims=True)
    means = [unit[half.train_labels == k].mean(0) for k in range(3)]
    # Each class is closer to its own embedding than to the others, by far.
    cosines = np.array(means) @ np.array(own.embeddings).T
    others = np.where(np.eye(3), -1, cosines).max(1)
    assert (np.diag(cosines) > others + 0.2).all()


def test_without_logits_nothing_changes(digits):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    model = models.MLP((8,))
    plain = train.fit(model, recipe, digits, progress=False)
    same = heads.of_embeddings(np.eye(10), None)
    told = train.fit(model, recipe, digits, logits=same, progress=False)
    for a, b in zip(jax.tree.leaves(plain.variables), jax.tree.leaves(told.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert plain.history[0]["loss"] == pytest.approx(told.history[0]["loss"], rel=1e-6)


def test_other_logits_are_another_run(digits, head, tmp_path):
    recipe, half = dataclasses.replace(RECIPE, epochs=1), heads.only(digits, (0, 1))
    options = {"work_dir": tmp_path, "progress": False}
    train.fit(MODEL, recipe, half, logits=six(head).of((0, 1)), **options)
    train.fit(MODEL, recipe, half, logits=six(head).of((0, 1)), **options)
    with pytest.raises(ValueError, match="another run"):
        train.fit(MODEL, recipe, half, logits=six(head).of((0, 2)), **options)


# ---- heads


def test_logits_are_scaled_cosines(head):
    outputs = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)
    rows = np.array(head.embeddings)
    expected = 10 * outputs @ rows.T / np.linalg.norm(outputs, axis=-1, keepdims=True)
    np.testing.assert_allclose(head(outputs), expected, rtol=1e-5, atol=1e-5)
    # Only the direction of outputs counts; of zeros there is none.
    np.testing.assert_allclose(head(7 * outputs), expected, rtol=1e-5, atol=1e-5)
    assert not np.asarray(head(np.zeros((2, 10), np.float32))).any()
    gradient = jax.grad(lambda x: head(x).sum())(jnp.zeros((1, 10)))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(head.of((3, 1))(outputs), expected[:, [3, 1]], rtol=1e-5, atol=1e-5)


def test_heads_of_equal_embeddings_are_equal(head):
    again = heads.of_embeddings(heads.orthonormal(10, 10), 10.0)
    assert again == head and hash(again) == hash(head)
    assert heads.of_embeddings(heads.orthonormal(10, 10, seed=1), 10.0) != head
    assert dataclasses.replace(head, scale=None) != head


def test_only_some_classes(digits):
    half = heads.only(digits, (7, 3))
    assert half.classes == 2 and set(half.train_labels) == {0, 1}
    for new, old in enumerate((7, 3)):
        for split in ("train", "test"):
            images, labels = (getattr(digits, f"{split}_{name}") for name in ("images", "labels"))
            found = getattr(half, f"{split}_images")[getattr(half, f"{split}_labels") == new]
            np.testing.assert_array_equal(found, images[labels == old])


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_embeddings_from_a_file(tmp_path, suffix):
    rows = np.random.default_rng(0).normal(size=(10, 7))
    path = tmp_path / f"clip.{suffix}"
    np.save(path, rows) if suffix == "npy" else np.savez(path, rows)
    found = heads.read(str(path), 10)
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-6)
    with pytest.raises(
        cli.UserError, match=r"must hold 5 finite rows .* got float64 of shape \[10, 7\]"
    ):
        heads.read(str(path), 5)


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (np.eye(10, 12)[:, :11] * (np.arange(10) != 4)[:, None], r"float64 of shape \[10, 11\]"),
        (np.full((10, 3), np.nan), r"float64 of shape \[10, 3\]"),
        (np.ones(10), r"shape \[10\]"),
        (np.ones((2, 10, 3)), r"shape \[2, 10, 3\]"),
        (np.float64(3), r"shape \[\]"),
        (np.ones((10, 3), np.complex64), "complex64"),
        (np.ones((10, 3), [("a", "f4"), ("b", "f4")]), "of shape"),
        (np.array([["a"] * 3] * 10), "<U1"),
    ],
)
def test_bad_embeddings(tmp_path, rows, got):
    np.save(tmp_path / "bad.npy", rows)
    with pytest.raises(cli.UserError, match=rf"bad.npy: must hold 10 finite rows .* got .*{got}"):
        heads.read(str(tmp_path / "bad.npy"), 10)


def test_files_that_hold_no_array(tmp_path):
    (tmp_path / "bad.npy").write_text("nothing")
    np.savez(tmp_path / "two.npz", np.eye(10), np.eye(10))
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "whole.npz", np.eye(10))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    (tmp_path / "changed.npz").write_bytes(changed)
    for name in ("bad.npy", "two.npz", "none.npy", "empty.npy", "cut.npz", "changed.npz"):
        with pytest.raises(cli.UserError, match=f"{name}: no array could be read"):
            heads.read(str(tmp_path / name), 10)


def test_cards_tell_files_of_one_name_apart(tmp_path):
    """By their rows: those of other lengths are the same embeddings."""
    rows = np.random.default_rng(0).normal(size=(10, 7))
    told = []
    for place, found in (("a", rows), ("b", 2 * rows), ("c", rows[::-1])):
        (tmp_path / place).mkdir()
        np.save(tmp_path / place / "clip.npy", found)
        args = options("--classes", "1", "2", "--embeddings", str(tmp_path / place / "clip.npy"))
        told.append(heads.described(args, heads.head_of(args, 10)))
    assert told[0] == told[1] != told[2]
    (difference,) = training.different(told[2], told[0])
    assert difference.startswith("embeddings kind clip.npy, ")
    assert training.different(told[1], told[0]) == []
    # Cards from before they told rows.
    old = told[0] | {"embeddings": told[0]["embeddings"] | {"kind": "clip.npy"}}
    (difference,) = training.different(old, told[0])
    assert difference.startswith("embeddings kind clip.npy, not clip.npy, ")


# ---- train_edges.py


def options(*words):
    return cli.parse(training.Training, "train_edges.py", None, list(words))


def test_command_of_the_card_trains_the_same_model():
    words = ["--model", "vgg7-bn", "--width", "0.5", "--classes", "5", "6", "--dimensions", "32"]
    args = options(*words, "--scale", "20", "--seeds", "4")
    said = training.command(args).split()
    assert said[:2] == ["python", "experiments/train_edges.py"]
    assert options(*said[2:]) == args


@pytest.mark.slow
def test_train_edges_on_some_classes(tmp_path, monkeypatch):
    small = data.load("digits", train=200, test=60)
    monkeypatch.setattr(training.data, "load", lambda *_: small)
    words = ["--model", "digits-mlp", "--classes", "1", "3", "4", "--dimensions", "12"]
    words += ["--epochs", "2", "--seeds", "5", "--out", str(tmp_path / "out")]
    (folder,) = train_edges.main([*words, "--work-dir", str(tmp_path / "work")])
    assert folder.name == "digits-mlp-classes1-3-4-seed5"
    card = checkpoint.card(folder)
    assert card["classes"] == [1, 3, 4] and card["loss"] == "cosine"
    assert card["embeddings"]["dimensions"] == 12 == card["options"]["classes"]
    assert "--classes 1 3 4" in card["command"] and "--dimensions 12" in card["command"]
    tree = checkpoint.load(folder)
    model = model_of(card)
    dataset = heads.only(small, (1, 3, 4))
    own = heads.of_embeddings(heads.orthonormal(10, 12), 10.0).of((1, 3, 4))
    found = train.evaluate(headed(models.apply_fn(model), own), tree, dataset.batches("test"))
    assert found._asdict() == pytest.approx(card["test"]) and math.isfinite(found.loss)
    json.dumps(card, allow_nan=False)
    # What is there is not taken for what another recipe or head would give.
    assert train_edges.main(words) == [folder]
    for change, message in (
        (["--epochs", "3"], "recipe epochs 2, not 3: choose another --out"),
        (
            ["--scale", "4", "--epochs", "3"],
            "embeddings scale 10.0, not 4.0, recipe epochs 2, not 3",
        ),
        (["--learning-rate", "0.5"], "recipe learning_rate 0.1, not 0.5"),
    ):
        with pytest.raises(cli.UserError, match=f"was trained with {message}"):
            training.run(options(*words, *change))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "1", "1"], "two or more different ones from 0 to 9, got 1 1"),
        (["--classes", "3"], "two or more different ones"),
        (["--classes", "3", "10"], "from 0 to 9, got 3 10"),
        (["--scale", "3"], "--scale does nothing here: it is for some of the --classes"),
        (["--classes", "0", "1", "--dimensions", "4"], "--dimensions must be 10 or more"),
        (["--classes", "0", "1", "--embeddings", "/nowhere.npy"], "no array could be read"),
    ],
)
def test_bad_options(words, message, tmp_path):
    with pytest.raises(cli.UserError, match=message):
        training.run(options("--model", "digits-mlp", *words, "--out", str(tmp_path)))


def test_cross_entropy_is_a_plain_classifier():
    whole = heads.head_of(heads.EmbeddingOptions(loss="cross-entropy"), 10)
    head = whole.of((2, 5))
    outputs = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    np.testing.assert_array_equal(head(outputs), outputs[:, [2, 5]])
    assert whole.dimensions == 10
