"""PyTorch weights: files of torchvision's and timm's networks against what those compute."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

from helpers import without
from vfjax import checkpoint, models
from vfjax.checkpoint import _torch as from_torch_module

HERE = pathlib.Path(__file__).parent.parent / "oracles"
RECORD = json.loads((HERE / "torch_models.json").read_text())
NARROW = RECORD["narrow"]


def oracle(name):
    """A module beside the records."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


closed_form = oracle("closed_form")
TWO_STAGES = {"depths": (1, 2), "dims": (6, 8)}
FOUR_STAGES = {"depths": (1, 2, 1, 1), "dims": (4, 6, 8, 6)}
VGG11 = {"depth": 11, "width": 1 / 32}
MODELS = {
    "convnext": models.ConvNeXt(**TWO_STAGES, classes=5),
    "convnext-timm": models.ConvNeXt(**FOUR_STAGES, classes=5),
    "resnet50": models.create("resnet50", width=1 / 16, classes=5),
    "vgg11": models.create("imagenet-vgg16", **VGG11, classes=5),
    "vgg11-bn": models.create("imagenet-vgg16-bn", **VGG11, classes=5),
    "vgg11-timm": models.create("imagenet-vgg16", **VGG11, classes=5),
}


def weights(name):
    """A state_dict of a narrow network as NumPy arrays, with counts where PyTorch has them."""
    tree = closed_form.torch_weights(NARROW[name]["shapes"])
    counted = [key.removesuffix("running_var") for key in tree if key.endswith("running_var")]
    return tree | {f"{key}num_batches_tracked": np.array(7) for key in counted}


def load(path, name, tree):
    np.savez(path / "net.npz", **tree)
    side = NARROW[name]["side"]
    return checkpoint.from_torch(path / "net.npz", MODELS[name], image=(side, side, 3))


def logits(name, variables):
    x = closed_form.torch_images(NARROW[name]["side"]).transpose(0, 2, 3, 1)
    return np.asarray(jax.jit(models.apply_fn(MODELS[name]))(variables, x))


def check_outputs(found, expected):
    """Equal but for float32 rounding of tens of layers."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    # The comparison sees what the images do.
    assert np.abs(expected[0] - expected[1]).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("name", NARROW)
def test_outputs_are_those_recorded(name, tmp_path):
    check_outputs(logits(name, load(tmp_path, name, weights(name))), NARROW[name]["outputs"])


@pytest.mark.parametrize("name", NARROW)
def test_outputs_are_those_of_pytorch(name, tmp_path):
    for library in ("torch", "torchvision", "timm"):
        pytest.importorskip(library)
    # The recorder imports its neighbour by its bare name.
    sys.modules.setdefault("closed_form", closed_form)
    recorder = oracle("record_torch_models")
    net, side = recorder.networks()[name]
    expected = recorder.outputs(net, side)
    tree = {key: value.numpy() for key, value in net.state_dict().items()}
    check_outputs(logits(name, load(tmp_path, name, tree)), expected)


@pytest.mark.parametrize("key", RECORD["published"])
def test_names_and_shapes_are_the_published_ones(key):
    library, name = key.split()
    layouts = from_torch_module._layouts(models.create(name, classes=1000), (224, 224, 3))
    tensors = layouts[-1 if library == "timm" else 0]
    shapes = sorted((tensor.name, list(tensor.shape)) for tensor in tensors)
    if library == "torchvision":
        shapes = [
            (name, [*shape, 1, 1] if name.endswith("layer_scale") else shape)
            for name, shape in shapes
        ]
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    assert digest == RECORD["published"][key]


@pytest.mark.parametrize("name", NARROW)
def test_every_value_arrives_once(name, tmp_path):
    """The values of the tree are those of the file, and its shapes and dtypes the model's."""
    tree = weights(name)
    found = load(tmp_path, name, tree)
    side = NARROW[name]["side"]
    x = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    values = [value for key, value in tree.items() if "num_batches" not in key]
    given = np.sort(np.concatenate([value.ravel() for value in values]))
    got = np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)]))
    np.testing.assert_array_equal(got, given)


def test_layouts(tmp_path):
    tree = weights("vgg11-bn")
    found = traverse_util.flatten_dict(load(tmp_path, "vgg11-bn", tree), sep="/")
    conv = found["params/conv1/kernel"]
    np.testing.assert_array_equal(conv[0, 2, 1], tree["features.0.weight"][:, 1, 0, 2])
    np.testing.assert_array_equal(found["params/head/kernel"], tree["classifier.6.weight"].T)
    np.testing.assert_array_equal(found["batch_stats/norm1/var"], tree["features.1.running_var"])
    # Sixteen channels of 2 x 2 pixels: row 1, column 0, channel 5.
    np.testing.assert_array_equal(
        found["params/dense1/kernel"][2 * 16 + 5], tree["classifier.0.weight"][:, 5 * 4 + 2]
    )


def test_safetensors(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    tree = weights("resnet50")
    numpy.save_file(tree, tmp_path / "net.safetensors")
    found = checkpoint.from_torch(tmp_path / "net.safetensors", MODELS["resnet50"])
    assert jax.tree.all(jax.tree.map(np.array_equal, found, load(tmp_path, "resnet50", tree)))


def test_safetensors_absent(tmp_path, monkeypatch):
    (tmp_path / "net.safetensors").write_bytes(b"")
    without(monkeypatch, "safetensors")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "vfjax\[torch-io\]"'):
        checkpoint.from_torch(tmp_path / "net.safetensors", MODELS["convnext"])


def test_half_precision_is_widened(tmp_path):
    tree = {key: value.astype(np.float16) for key, value in weights("convnext").items()}
    found = load(tmp_path, "convnext", tree)["params"]["head"]["bias"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, tree["classifier.2.bias"])


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    tree = weights("vgg11")
    tree["features.99.weight"] = tree.pop("classifier.3.weight")
    message = "lacks classifier.3.weight; the model has no features.99.weight. Create the model"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "vgg11", tree)
    # A file of the network with BatchNorm, into the one without.
    with pytest.raises(ValueError, match="the model has no .*running_mean.* and 18 more"):
        load(tmp_path, "vgg11", weights("vgg11-bn"))
    wrapped = {f"module.{key}": value for key, value in weights("vgg11").items()}
    with pytest.raises(ValueError, match="begins with 'module.': save it without"):
        load(tmp_path, "vgg11", wrapped)


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [
        ("convnext", "classifier.2.weight", (7, 8), r"\(7, 8\) in place of \(5, 8\)"),
        ("convnext", "features.1.0.layer_scale", (1, 6, 1), r"\(1, 6, 1\) in place of \(6,\)"),
        ("convnext", "features.1.0.block.3.weight", (24, 3, 2, 1), r"in place of \(24, 6\)"),
        ("resnet50", "conv1.weight", (7, 7, 3, 4), r"in place of \(4, 3, 7, 7\)"),
        ("vgg11-timm", "pre_logits.fc1.weight", (128, 4, 4, 4), r"in place of \(128, 64\)"),
    ],
)
def test_other_shapes(name, key, shape, message, tmp_path):
    tree = weights(name) | {key: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=f"{key} .*{message}"):
        load(tmp_path, name, tree)


def test_a_vgg_of_another_image_size(tmp_path):
    np.savez(tmp_path / "net.npz", **weights("vgg11"))
    with pytest.raises(ValueError, match=r"classifier.0.weight \(128, 64\) in place of.*as image"):
        checkpoint.from_torch(tmp_path / "net.npz", MODELS["vgg11"])


def test_whole_numbers_are_no_weights(tmp_path):
    tree = weights("convnext")
    tree["classifier.2.bias"] = np.arange(5)
    with pytest.raises(ValueError, match="not floating: classifier.2.bias int64"):
        load(tmp_path, "convnext", tree)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("net.pth", b"", "must end in .safetensors or .npz"),
        ("none.npz", None, "there is no file at"),
        ("net.npz", b"PK\x03\x04 and no more", "cannot be read: BadZipFile"),
    ],
)
def test_bad_files(file, content, message, tmp_path):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.from_torch(tmp_path / file, MODELS["convnext"])


def test_damaged_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "net.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read: SafetensorError"):
        checkpoint.from_torch(tmp_path / "net.safetensors", MODELS["convnext"])


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="model must be one of ConvNeXt.*got VGG"):
        checkpoint.from_torch(tmp_path / "net.npz", models.create("vgg16"))
    with pytest.raises(ValueError, match="image must be .height, width, channels., got"):
        checkpoint.from_torch(tmp_path / "net.npz", MODELS["convnext"], image=(224, 224))
