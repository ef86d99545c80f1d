"""Reading PyTorch weights, named as by torchvision or timm, into variables of the models."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from vfjax._types import PyTree
from vfjax.checkpoint._packed import CheckpointError
from vfjax.models._bottleneck import BLOCKS, BottleneckResNet
from vfjax.models._convnext import ConvNeXt
from vfjax.models._layers import scaled
from vfjax.models._vgg import STAGES, ImageNetVGG

# PyTorch calls the scale of a normalisation its weight.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# BatchNorm's count of training steps, which evaluation does not read.
_IGNORED = "num_batches_tracked"
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where the values of one leaf lie in a file.

    Attributes:
        name: Name of the tensor.
        path: Path of the leaf in the variables.
        leaf: Shape and dtype of the leaf.
        channels: For a dense kernel after a flattened map, the number of inputs per pixel: PyTorch
            flattens a map channel by channel, Flax pixel by pixel. None for other leaves.
    """

    name: str
    path: tuple[str, ...]
    leaf: jax.ShapeDtypeStruct
    channels: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in PyTorch: outputs first, then inputs, then space."""
        shape = self.leaf.shape
        return (*shape[:-3:-1], *shape[:-2])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape holds the leaf."""
        if len(self.shape) == 2 and len(shape) == 4:
            # timm stores such a dense layer as a convolution over the whole map.
            outputs, inputs = self.shape
            rest = (outputs, self.channels or inputs)
            return shape[:2] == rest and math.prod(shape) == outputs * inputs
        if len(self.shape) == 1 and len(shape) == 3:
            return shape == (*self.shape, 1, 1)
        return shape == self.shape

    def converted(self, value: np.ndarray) -> jax.Array:
        """The leaf's values in Flax's layout and the leaf's dtype."""
        shape = self.leaf.shape
        if len(shape) == 4:
            value = value.transpose(2, 3, 1, 0)
        elif len(shape) == 2:
            value = value.reshape(shape[1], self.channels or shape[0], -1).transpose(2, 1, 0)
        return jnp.asarray(value.reshape(shape), self.leaf.dtype)


def from_torch(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    image: Sequence[int] = (224, 224, 3),
) -> PyTree:
    """Loads a file of PyTorch weights into the variables of an ImageNet model.

    The file holds the tensors of a PyTorch `state_dict` by name, as torchvision or timm publish
    them: a `.safetensors` file, or an `.npz` file written by

        np.savez("weights.npz", **{k: v.numpy() for k, v in net.state_dict().items()})

    PyTorch itself is not needed. Every tensor is used exactly once; counts of training steps
    (`num_batches_tracked`) are left out.

    Args:
        path: The file, `.safetensors` (needs safetensors: extra `torch-io`) or `.npz`.
        model: The model to load into, a `ConvNeXt`, `BottleneckResNet` or `ImageNetVGG`, such as
            `vfjax.models.create("resnet50", classes=1000)`.
        image: Height, width and channels of its images. Only the first dense kernel of a VGG
            depends on height and width.

    Returns:
        The variables, `{"params": ...}` and with BatchNorm also `"batch_stats"`, as arrays of the
        model's dtype, float32: convolution kernels `[H, W, I, O]`, dense ones `[I, O]`.

    Raises:
        TypeError: If `model` is not an instance of one of these classes.
        ModuleNotFoundError: If safetensors is needed and not installed.
        CheckpointError: If the file does not exist, is damaged or has another suffix.
        ValueError: If tensors are missing or unknown, have another shape or are not floating.

    Example:
        >>> import tempfile
        >>> from vfjax import models
        >>> model = models.create("convnext-pico", depths=(1,), dims=(2,), classes=3)
        >>> rng = np.random.default_rng(0)
        >>> file = {
        ...     "features.0.0.weight": (2, 3, 2, 2), "features.0.0.bias": (2,),
        ...     "features.0.1.weight": (2,), "features.0.1.bias": (2,),
        ...     "features.1.0.layer_scale": (2, 1, 1),
        ...     "features.1.0.block.0.weight": (2, 1, 7, 7), "features.1.0.block.0.bias": (2,),
        ...     "features.1.0.block.2.weight": (2,), "features.1.0.block.2.bias": (2,),
        ...     "features.1.0.block.3.weight": (8, 2), "features.1.0.block.3.bias": (8,),
        ...     "features.1.0.block.5.weight": (2, 8), "features.1.0.block.5.bias": (2,),
        ...     "classifier.0.weight": (2,), "classifier.0.bias": (2,),
        ...     "classifier.2.weight": (3, 2), "classifier.2.bias": (3,)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(folder + "/a.npz", **{k: rng.normal(size=s) for k, s in file.items()})
        ...     variables = from_torch(folder + "/a.npz", model)
        >>> variables["params"]["stage1_block1"]["depthwise"]["kernel"].shape
        (7, 7, 1, 2)

    Source: names and layouts of torchvision 0.28 and timm 1.0.
    """
    layouts = _layouts(model, image)
    values = _read(path)
    given = {name for name in values if name.rpartition(".")[2] != _IGNORED}
    # A file that fits neither layout is compared with the one that shares most names with it.
    tensors = max(layouts, key=lambda layout: len(given & {tensor.name for tensor in layout}))
    names = {tensor.name for tensor in tensors}
    _check_names(path, names, given)
    wrong = [
        f"{tensor.name} {values[tensor.name].shape} in place of {tensor.shape}"
        for tensor in tensors
        if not tensor.fits(values[tensor.name].shape)
    ]
    if wrong:
        raise ValueError(
            f"path: {path} has tensors of other shapes than model: {_list(wrong)}. Create the "
            "model with the options of the file, such as classes=1000, and give the height, width "
            "and channels of its images as image."
        )
    wrong = [
        f"{tensor.name} {values[tensor.name].dtype.name}"
        for tensor in tensors
        if not jnp.issubdtype(values[tensor.name].dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(
            f"path: {path} has weights that are not floating: {_list(wrong)}. Save them as float32."
        )
    # Popped one by one, so that at most one tensor is in memory twice.
    leaves = {tensor.path: tensor.converted(values.pop(tensor.name)) for tensor in tensors}
    return traverse_util.unflatten_dict(leaves)


def _layouts(model: nn.Module, image: Sequence[int]) -> list[list[_Tensor]]:
    """The tensors of a model, once for each way of naming them."""
    family = next((kind for kind in _FAMILIES if isinstance(model, kind)), None)
    if family is None:
        known = ", ".join(kind.__name__ for kind in _FAMILIES)
        raise TypeError(f"model must be one of {known}, got {type(model).__name__}")
    image = tuple(image)
    if len(image) != 3 or not all(isinstance(n, int) and n > 0 for n in image):
        raise ValueError(f"image must be (height, width, channels), got {image!r}")
    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    shapes = cast(dict[Any, Any], traverse_util.flatten_dict(variables))
    channels = {}
    if isinstance(model, ImageNetVGG):
        channels["params", "dense1", "kernel"] = scaled(STAGES[model.depth][-1][-1], model.width)
    return [
        [
            _Tensor(_name(path, names), path, leaf, channels.get(path))
            for path, leaf in shapes.items()
        ]
        for names in _FAMILIES[family](model)
    ]


def _name(path: tuple[str, ...], names: Mapping[str, str]) -> str:
    """The tensor's name for a leaf; `names` has an entry for the leaf itself or for its module."""
    _, *module, leaf = path
    if "/".join([*module, leaf]) in names:
        return names["/".join([*module, leaf])]
    return f"{names['/'.join(module)]}.{_LEAVES[leaf]}"


def _convnext(model: ConvNeXt) -> tuple[dict[str, str], ...]:
    torchvision = {
        "stem": "features.0.0",
        "stem_norm": "features.0.1",
        "head_norm": "classifier.0",
        "head": "classifier.2",
    }
    timm = {"stem": "stem.0", "stem_norm": "stem.1", "head_norm": "head.norm", "head": "head.fc"}
    for stage, blocks in enumerate(model.depths):
        # torchvision counts the downsampling layers as a separate stage.
        for part, name in enumerate((f"down{stage + 1}_norm", f"down{stage + 1}")):
            torchvision[name] = f"features.{2 * stage}.{part}"
            timm[name] = f"stages.{stage}.downsample.{part}"
        for block in range(blocks):
            own = f"stage{stage + 1}_block{block + 1}"
            there = f"features.{2 * stage + 1}.{block}"
            torchvision[f"{own}/layer_scale"] = f"{there}.layer_scale"
            for part, index in {"depthwise": 0, "norm": 2, "mlp1": 3, "mlp2": 5}.items():
                torchvision[f"{own}/{part}"] = f"{there}.block.{index}"
            there = f"stages.{stage}.blocks.{block}"
            timm[f"{own}/layer_scale"] = f"{there}.gamma"
            parts = {"depthwise": "conv_dw", "norm": "norm", "mlp1": "mlp.fc1", "mlp2": "mlp.fc2"}
            for part, name in parts.items():
                timm[f"{own}/{part}"] = f"{there}.{name}"
    return torchvision, timm


def _resnet(model: BottleneckResNet) -> tuple[dict[str, str], ...]:
    names = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
    for stage, blocks in enumerate(BLOCKS[model.depth], start=1):
        for block in range(blocks):
            own, there = f"stage{stage}_block{block + 1}", f"layer{stage}.{block}"
            for index in (1, 2, 3):
                names[f"{own}/conv{index}"] = f"{there}.conv{index}"
                names[f"{own}/norm{index}"] = f"{there}.bn{index}"
            names[f"{own}/shortcut"] = f"{there}.downsample.0"
            names[f"{own}/shortcut_norm"] = f"{there}.downsample.1"
    return (names,)


def _vgg(model: ImageNetVGG) -> tuple[dict[str, str], ...]:
    names: dict[str, str] = {}
    place = index = 0
    for channels in STAGES[model.depth]:
        for _ in channels:
            index += 1
            names[f"conv{index}"] = f"features.{place}"
            names[f"norm{index}"] = f"features.{place + 1}"
            place += 2 if model.norm is None else 3
        place += 1  # the max-pool
    torchvision = {"dense1": "classifier.0", "dense2": "classifier.3", "head": "classifier.6"}
    timm = {"dense1": "pre_logits.fc1", "dense2": "pre_logits.fc2", "head": "head.fc"}
    return {**names, **torchvision}, {**names, **timm}


_FAMILIES: dict[type[nn.Module], Any] = {
    ConvNeXt: _convnext,
    BottleneckResNet: _resnet,
    ImageNetVGG: _vgg,
}


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a file by name."""
    path = Path(path).expanduser()
    if path.suffix not in (".npz", ".safetensors"):
        raise CheckpointError(
            f"path must end in .safetensors or .npz, got {path}. With PyTorch, write it: "
            "np.savez('net.npz', **{k: v.numpy() for k, v in torch.load(path).items()})"
        )
    if not path.is_file():
        raise CheckpointError(f"path: there is no file at {path}.")
    if path.suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            'from_torch needs safetensors to read such a file: pip install "vfjax[torch-io]"',
            name="safetensors",
        )
    try:
        if path.suffix == ".npz":
            # Opened here because NumPy, given a name, leaves a damaged file open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        from safetensors.numpy import load_file  # pyright: ignore[reportMissingImports]

        return dict(load_file(path))
    # Zip, zlib, NumPy and safetensors each raise different exceptions for damage.
    except Exception as error:
        summary = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"path: {path} cannot be read: {type(error).__name__}: {summary}. Save it again."
        ) from error


def _check_names(path: str | os.PathLike[str], wanted: set[str], given: set[str]) -> None:
    sides = (("it lacks", wanted - given), ("the model has no", given - wanted))
    parts = [f"{what} {_list(sorted(names))}" for what, names in sides if names]
    if not parts:
        return
    hint = "Create the model with the depth and norm of the file, and save its state_dict by the "
    hint += "names that torchvision or timm give."
    begins = {name.partition(".")[0] for name in given}
    if len(begins) == 1 and not begins & {name.partition(".")[0] for name in wanted}:
        # Wrappers of modules (DataParallel, say) prefix every name.
        hint = f"Every name in it begins with '{begins.pop()}.': save it without this prefix."
    raise ValueError(
        f"path: {path} does not hold the tensors of the model: {'; '.join(parts)}. {hint}"
    )


def _list(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
