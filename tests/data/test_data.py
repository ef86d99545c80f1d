"""Data: batches and their rules, the search for prepared data, the real sets where they are."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers import without
from vfjax import data

PLACE = os.environ.get("TFDS_DATA_DIR", "")


def needs(name):
    found = PLACE and any(Path(PLACE, name).glob("*/dataset_info.json"))
    return pytest.mark.skipif(not found, reason=f"TFDS_DATA_DIR has no prepared {name}")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture
def nothing_prepared(tmp_path, monkeypatch):
    """A machine without data and without TensorFlow."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    without(monkeypatch, "tensorflow")
    return tmp_path


def test_digits(digits):
    assert (digits.train_images.shape, digits.test_images.shape) == (
        (1300, 8, 8, 1),
        (497, 8, 8, 1),
    )
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int32
    assert not digits.fallback
    # A fair split: each class in both parts, in much the same share.
    assert np.bincount(digits.test_labels, minlength=10).min() > 30
    every = np.concatenate([digits.train_images, digits.test_images]).reshape(1797, -1)
    assert len(np.unique(every, axis=0)) == 1797
    np.testing.assert_allclose(np.mean(digits.train_images / 255), digits.mean, atol=1e-4)
    np.testing.assert_allclose(np.std(digits.train_images / 255), digits.std, atol=1e-4)


def test_batches_start_over_and_end_ragged(digits):
    batches = digits.batches("test", batch_size=200)
    for _ in range(2):
        seen = list(batches)
        assert [x.shape for x, _ in seen] == [(200, 8, 8, 1), (200, 8, 8, 1), (97, 8, 8, 1)]
        assert seen[0][0].dtype == np.float32 and seen[0][1].dtype == np.int32
        np.testing.assert_array_equal(
            np.concatenate([label for _, label in seen]), digits.test_labels
        )
    assert len(batches) == 3
    x = np.concatenate([x for x, _ in batches])
    expected = (digits.test_images / 255 - digits.mean[0]) / digits.std[0]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_samples(digits):
    batches = digits.batches("train", batch_size=100)
    assert [len(label) for _, label in batches.samples(250)] == [100, 100, 50]
    assert len(batches.samples(None)) == len(batches) == 13
    assert "250 images" in repr(digits.batches("train", samples=250))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: data.load("svhn"), "name must be one of auto, cifar10.*got 'svhn'"),
        (lambda d: data.load("digits", train=0), "train must be at least 1"),
        (lambda d: d.batches("validation"), "split must be 'train' or 'test'"),
        (lambda d: d.batches("test", batch_size=0), "batch_size must be at least 1"),
        (lambda d: d.batches("test").samples(0), "count must be at least 1"),
        (
            lambda d: data.Batches(d.test_images, d.test_labels[1:], d.mean, d.std),
            "equally many, got 497 and 496",
        ),
    ],
)
def test_bad_arguments(digits, call, message):
    with pytest.raises(ValueError, match=message):
        call(digits)


def test_unprepared_data_names_the_places_and_the_extra(nothing_prepared, tmp_path):
    with pytest.raises(data.DatasetError, match=r"mnist.*--data-dir.*TFDS's default.*\[prepare\]"):
        data.load("mnist", tmp_path / "here")


def test_auto_falls_back_loudly(nothing_prepared, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = data.load("auto", train=10)
    assert dataset.name == "digits" and dataset.fallback
    assert len(dataset.train_images) == 10
    assert "FALLING BACK" in caplog.text and "cifar10" in caplog.text


def test_failing_to_prepare_is_told(nothing_prepared, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    import tensorflow_datasets as tfds

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    without(monkeypatch, there=("tensorflow", "importlib_resources"))
    monkeypatch.setattr(tfds, "builder", offline)
    with pytest.raises(data.DatasetError, match="could not download.*no route to host"):
        data.load("mnist")


@needs("mnist")
def test_order_of_the_search(nothing_prepared, monkeypatch):
    folder = nothing_prepared / "tensorflow_datasets"
    folder.mkdir()
    (folder / "mnist").symlink_to(Path(PLACE, "mnist"))
    assert data.load("mnist", train=1, test=1).source == f"TFDS in {folder}"
    monkeypatch.setenv("TFDS_DATA_DIR", PLACE)
    assert data.load("mnist", train=1, test=1).source == f"TFDS in {PLACE}"
    assert data.load("mnist", folder, train=1, test=1).source == f"TFDS in {folder}"
    # What is not in data_dir is looked for further on.
    assert data.load("mnist", folder / "mnist", train=1, test=1).source == f"TFDS in {PLACE}"


@needs("mnist")
def test_damaged_data_is_told(tmp_path):
    folder = shutil.copytree(Path(PLACE, "mnist"), tmp_path / "mnist")
    for path in folder.rglob("mnist-train*"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(data.DatasetError, match=r"'mnist' in .* cannot be read.*prepare it again"):
        data.load("mnist", tmp_path, train=100, test=10)


@needs("mnist")
def test_data_of_another_format_is_told(tmp_path):
    folder = shutil.copytree(Path(PLACE, "mnist"), tmp_path / "mnist")
    (info,) = folder.glob("*/dataset_info.json")
    info.chmod(0o644)
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(data.DatasetError, match="array_record"):
        data.load("mnist", tmp_path, train=100, test=10)


@needs("mnist")
def test_mnist():
    dataset = data.load("mnist", train=2000, test=500)
    assert dataset.train_images.shape == (2000, 28, 28, 1)
    assert np.mean(dataset.train_images / 255) == pytest.approx(0.1307, abs=0.003)
    assert np.bincount(dataset.test_labels, minlength=10).min() > 25


@needs("cifar10")
def test_cifar10():
    dataset = data.load("auto", train=1000, test=500)
    assert dataset.name == "cifar10" and not dataset.fallback
    assert dataset.train_images.shape == (1000, 32, 32, 3)
    assert dataset.test_images.dtype == np.uint8
    (x, label), *_ = dataset.batches("train", batch_size=1000)
    assert np.abs(np.mean(x, (0, 1, 2))).max() < 0.1
    # The deviations within single images that CIFAR is divided by are a fifth too small.
    assert np.std(x) == pytest.approx(1.23, abs=0.05)
    assert np.bincount(label, minlength=10).min() > 70


def test_grey_images_of_another_size(digits):
    grey = data.grey(digits, size=16)
    assert grey.train_images.shape == (1300, 16, 16, 1) and grey.train_images.dtype == np.uint8
    np.testing.assert_array_equal(grey.test_labels, digits.test_labels)
    # What is only grey stays so, and a size that is there already changes nothing.
    np.testing.assert_array_equal(data.grey(digits, size=8).test_images, digits.test_images)
    np.testing.assert_allclose(np.mean(grey.train_images / 255), grey.mean, rtol=1e-6)
    np.testing.assert_allclose(np.std(grey.train_images / 255), grey.std, rtol=1e-6)
    # Half the size is near the mean of what it covers, colours as the eye weighs them.
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 1], images[1] = 200, 90
    colour = dataclasses.replace(digits, train_images=images, test_images=images)
    small = data.grey(colour, size=2).test_images
    assert (abs(small[0].astype(int) - 0.587 * 200) <= 1).all() and (small[1] == 90).all()
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        data.grey(digits, size=0)
    with pytest.raises(ValueError, match="1 or 3 channels, it has 2"):
        data.grey(dataclasses.replace(digits, train_images=images[..., :2]), size=2)
