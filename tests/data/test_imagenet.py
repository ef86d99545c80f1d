"""Streaming photographs: geometry, order, and what is said where there are none."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import data, imagenet, prune, renorm


def photograph(seed, height, width):
    """Smooth, so that resizing changes little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    parts = [np.sin(a * y + b * x + c) for a, b, c in rng.uniform(1, 6, (3, 3))]
    return np.uint8(127.5 * (1 + np.stack(parts, -1)))


@pytest.fixture
def source():
    sizes = [(40, 30), (30, 40), (33, 33), (20, 64), (16, 16)]
    return [{"image": photograph(k, *size), "label": k} for k, size in enumerate(sizes)]


def test_the_shorter_side_is_resized_and_the_centre_kept():
    image = photograph(0, 64, 128)
    found = imagenet.centre(image, resize=32, crop=32)
    # Halved, and the middle half of the width: what averaging 2 x 2 pixels gives.
    expected = image[:, 32:96].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert np.abs(found - expected)[1:-1, 1:-1].max() < 4


def test_portrait_and_landscape_are_treated_alike():
    image = photograph(1, 50, 70)
    found, upright = (
        imagenet.centre(each, resize=24, crop=20) for each in (image, image.transpose(1, 0, 2))
    )
    # The two axes are resized one after the other, and rounded in between.
    assert np.abs(np.int32(found) - upright.swapaxes(0, 1)).max() <= 1


def test_an_image_of_the_right_size_stays_as_it_is():
    image = photograph(2, 24, 24)
    np.testing.assert_array_equal(imagenet.centre(image, resize=24, crop=24), image)
    np.testing.assert_array_equal(imagenet.centre(image, resize=24, crop=20), image[2:22, 2:22])


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1)])
def test_grey_is_repeated(shape):
    found = imagenet.centre(np.full(shape, 77, np.uint8), resize=16, crop=12)
    assert found.shape == (12, 12, 3) and (found == 77).all()


def test_batches_come_in_order_again_and_again(source):
    batches = imagenet.Streamed(source, batch_size=2, resize=16, crop=12)
    assert len(batches) == 3 and repr(batches) == "Streamed(5 images in batches of 2)"
    for _ in range(2):
        xs, labels = zip(*batches, strict=True)
        assert [x.shape[0] for x in xs] == [2, 2, 1]
        assert np.concatenate(labels).tolist() == [0, 1, 2, 3, 4]
    plain = imagenet.centre(source[3]["image"], resize=16, crop=12) / 255
    expected = (plain - np.float32(imagenet.MEAN)) / np.float32(imagenet.STD)
    np.testing.assert_allclose(xs[1][1], expected, rtol=1e-4, atol=1e-5)
    assert [label.tolist() for _, label in batches.samples(3)] == [[0, 1], [2]]
    for held, streamed in zip(batches.held(), batches, strict=True):
        for mine, other in zip(held, streamed, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_decoding_is_one_batch_ahead_and_no_further(source):
    class Counted(list):
        asked = 0

        def __getitem__(self, row):
            self.asked += 1
            return super().__getitem__(row)

    counted = Counted(source)
    batches = iter(imagenet.Streamed(counted, batch_size=1, resize=16, crop=12))
    next(batches)
    batches.close()
    assert 1 <= counted.asked <= 2


def test_streams_serve_statistics_and_scores(source):
    batches = imagenet.Streamed(source, batch_size=2, resize=16, crop=8)
    tree = {"w": jnp.ones((192, 4)), "v": jnp.ones((4, 2))}

    def apply_fn(p, x):
        return jnp.tanh(x.reshape(len(x), -1) @ p["w"]) @ p["v"]

    net = vfjax.trace(apply_fn, tree, next(iter(batches))[0])
    mask = prune.masks(prune.wanda(net, tree, batches), 0.5, scope="row")
    pruned = prune.apply(tree, mask)
    rescaled = renorm.rescale(net, pruned, batches, references=[tree])
    assert np.isfinite(net.run(rescaled, next(iter(batches))[0])).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"resize": 8, "crop": 9}, "crop must be from 1 to resize = 8, got 9"),
    ],
)
def test_options_are_checked(source, options, message):
    with pytest.raises(ValueError, match=message):
        imagenet.Streamed(source, **options)
    with pytest.raises(ValueError, match="crop must be from 1 to resize = 8, got 0"):
        imagenet.centre(source[0]["image"], resize=8, crop=0)


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(data.DatasetError, match="ILSVRC2012_img_val.tar from image-net.org"):
        imagenet.load()
