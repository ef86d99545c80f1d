"""Records what torchvision's and timm's models compute, for `tests/checkpoint/test_torch.py`.

    pip install ".[oracle]" && python tests/oracles/record_torch_models.py

The networks are the libraries' own, made narrow, with weights in closed form.  Of the published
ones the names and shapes of all tensors are recorded, as a checksum.
"""

import hashlib
import json
import pathlib

import timm
import torch
import torchvision
from closed_form import torch_images, torch_weights
from torch import nn
from torchvision.models import convnext, resnet, vgg

COUNT = "num_batches_tracked"


class NarrowResNet(resnet.ResNet):
    """torchvision's ResNet50 with 4 channels behind the stem in place of 64."""

    def __init__(self, classes):
        super().__init__(resnet.Bottleneck, [3, 4, 6, 3], num_classes=classes)
        self.conv1 = nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(128, classes)

    def _make_layer(self, block, planes, blocks, **options):
        self.inplanes = 4 if planes == 64 else self.inplanes
        return super()._make_layer(block, planes // 16, blocks, **options)


def narrow_vgg(norm, classes):
    """torchvision's VGG11 at 1/32 of its width, for images of 64 x 64."""
    plan = [n if n == "M" else n // 32 for n in vgg.cfgs["A"]]
    net = vgg.VGG(nn.Identity(), classes, init_weights=False)
    net.features, net.avgpool = vgg.make_layers(plan, batch_norm=norm), nn.Identity()
    for index, (inputs, outputs) in {0: (64, 128), 3: (128, 128), 6: (128, classes)}.items():
        net.classifier[index] = nn.Linear(inputs, outputs)
    return net


def narrow_timm_vgg(classes):
    """timm's VGG11 of the same width, whose dense layers are convolutions."""
    plan = [n if n == "M" else n // 32 for n in vgg.cfgs["A"]]
    with torch.device("meta"):
        net = timm.models.VGG(plan, num_classes=classes)
    net.pre_logits = timm.models.vgg.ConvMlp(16, 128, 2)
    net.head.fc = nn.Linear(128, classes)
    return net.to_empty(device="cpu")


def networks():
    """By name: a network in evaluation mode, and the side of its images."""
    blocks = [convnext.CNBlockConfig(6, 8, 1), convnext.CNBlockConfig(8, None, 2)]
    stages = {"depths": (1, 2, 1, 1), "dims": (4, 6, 8, 6)}
    nets = {
        "convnext": (convnext.ConvNeXt(blocks, num_classes=5), 16),
        "convnext-timm": (timm.models.ConvNeXt(**stages, num_classes=5), 32),
        "resnet50": (NarrowResNet(5), 32),
        "vgg11-timm": (narrow_timm_vgg(classes=5), 64),
        "vgg11": (narrow_vgg(norm=False, classes=5), 64),
        "vgg11-bn": (narrow_vgg(norm=True, classes=5), 64),
    }
    return {name: (net.eval(), side) for name, (net, side) in nets.items()}


def shapes_of(net):
    """Shapes of all tensors but the counts of training steps."""
    state = net.state_dict().items()
    return {name: list(value.shape) for name, value in state if not name.endswith(COUNT)}


def outputs(net, side):
    """Logits of the closed-form images."""
    weights = {name: torch.tensor(v) for name, v in torch_weights(shapes_of(net)).items()}
    state = net.state_dict()
    net.load_state_dict({**state, **weights})
    with torch.no_grad():
        return net(torch.tensor(torch_images(side))).numpy()


def checksum(shapes):
    """Of names and shapes, in the order of the names."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def published():
    """Checksums of the full networks, made without memory."""
    with torch.device("meta"):
        return {
            "torchvision convnext-tiny": checksum(shapes_of(convnext.convnext_tiny())),
            "torchvision convnext-base": checksum(shapes_of(convnext.convnext_base())),
            "torchvision resnet50": checksum(shapes_of(resnet.resnet50())),
            "torchvision imagenet-vgg16": checksum(shapes_of(vgg.vgg16(init_weights=False))),
            "torchvision imagenet-vgg16-bn": checksum(shapes_of(vgg.vgg16_bn(init_weights=False))),
            "timm convnext-tiny": checksum(shapes_of(timm.create_model("convnext_tiny"))),
            "timm convnext-base": checksum(shapes_of(timm.create_model("convnext_base"))),
            "timm resnet50": checksum(shapes_of(timm.create_model("resnet50"))),
        }


def main():
    """Writes the record beside this file."""
    versions = {lib.__name__: lib.__version__ for lib in (torch, torchvision, timm)}
    record = {"versions": versions, "published": published(), "narrow": {}}
    for name, (net, side) in networks().items():
        record["narrow"][name] = {
            "side": side,
            "shapes": shapes_of(net),
            "outputs": outputs(net, side).tolist(),
        }
    path = pathlib.Path(__file__).with_name("torch_models.json")
    path.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
