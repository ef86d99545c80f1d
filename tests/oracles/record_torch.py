"""Records what PyTorch makes of RESET, REPAIR and RESCALE, for `tests/renorm/test_oracles.py`.

    pip install ".[oracle]" && python tests/oracles/record_torch.py

The procedure is the published one: batch normalisation layers that only observe give the
references' moments; in the merged network one such layer after every convolution is set to them,
estimates its own moments in one pass in training mode, and stays.
"""

import json
import pathlib

import torch
from closed_form import CHANNELS, CLASSES, images, weights
from torch import nn


def chain(tree, after):
    """conv, what comes after it, relu; three times; then the mean and a linear layer."""
    layers = []
    for i in range(3):
        conv = nn.Conv2d(CHANNELS[i], CHANNELS[i + 1], 3, padding=1).double()
        conv.weight.data = torch.tensor(tree[f"w{i}"])
        conv.bias.data = torch.tensor(tree[f"b{i}"])
        layers += [conv, after(i), nn.ReLU()]
    head = nn.Linear(CHANNELS[-1], CLASSES).double()
    head.weight.data, head.bias.data = torch.tensor(tree["w3"]), torch.tensor(tree["b3"])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def norm(channels):
    """Batch normalisation whose running statistics are cumulative averages."""
    return nn.BatchNorm2d(channels, momentum=None, eps=1e-5).double()


class Observe(nn.Module):
    """Passes its input on; a batch normalisation beside it keeps the moments."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)

    def forward(self, x):
        self.norm(x)
        return x


class Rescale(nn.Module):
    """x / std * goal, uncentred, with the centred standard deviation."""

    def __init__(self, goal):
        super().__init__()
        self.goal, self.var = goal, None

    def forward(self, x):
        var = x.var((0, 2, 3), unbiased=False) if self.training else self.var
        if self.training:
            self.var = x.var((0, 2, 3), unbiased=True)
        return x / (var + 1e-5).sqrt()[:, None, None] * self.goal[:, None, None]


def moments(tree, x):
    """Mean and standard deviation of every convolution's output."""
    net = chain(tree, lambda i: Observe(CHANNELS[i + 1])).train()
    net(x)
    found = [m.norm for m in net if isinstance(m, Observe)]
    return [(m.running_mean.clone(), m.running_var.sqrt().clone()) for m in found]


def main():
    """Writes the record beside this file."""
    torch.set_grad_enabled(False)
    x, trees = torch.tensor(images()), [weights(0), weights(1)]
    alpha = 0.3
    merged = {k: (1 - alpha) * trees[0][k] + alpha * trees[1][k] for k in trees[0]}
    ends = [moments(t, x) for t in trees]
    goals = [
        ((1 - alpha) * a[0] + alpha * b[0], (1 - alpha) * a[1] + alpha * b[1])
        for a, b in zip(*ends, strict=True)
    ]

    def repair(i):
        layer = norm(CHANNELS[i + 1])
        layer.bias.data, layer.weight.data = goals[i]
        return layer

    def own(i):
        layer = norm(CHANNELS[i + 1])
        layer.weight.data = torch.tensor(merged[f"g{i}"])
        layer.bias.data = torch.tensor(merged[f"s{i}"])
        return layer

    record = {"alpha": alpha, "torch": torch.__version__, "outputs": {}}
    record["references"] = [[[m.tolist(), s.tolist()] for m, s in end] for end in ends]
    for name, after in (
        ("none", lambda i: nn.Identity()),
        ("repair", repair),
        ("rescale", lambda i: Rescale(goals[i][1])),
        ("reset", own),
    ):
        net = chain(merged, after)
        net.train()(x)
        record["outputs"][name] = net.eval()(x)[:8].tolist()
        if name == "reset":
            layers = [m for m in net if isinstance(m, nn.BatchNorm2d)]
            record["reset"] = [[m.running_mean.tolist(), m.running_var.tolist()] for m in layers]
    path = pathlib.Path(__file__).with_name("torch.json")
    path.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
