"""Weights and images in closed form: no random stream to keep in step between libraries."""

import numpy as np

CHANNELS = (3, 6, 5, 4)
CLASSES, SIDE, BATCH = 3, 6, 64


def weights(model):
    """Parameters of model 0 or 1; kernels are (out, in, height, width)."""
    tree, c = {}, 0
    for i in range(3):
        shape = (CHANNELS[i + 1], CHANNELS[i], 3, 3)
        n = np.arange(np.prod(shape), dtype=np.float64)
        wave = np.sin(1.7 * n * (model + 1) + c) * np.cos(0.3 * n + c + model)
        tree[f"w{i}"] = wave.reshape(shape)
        tree[f"b{i}"] = 0.3 * np.cos(np.arange(CHANNELS[i + 1]) * (2.0 + model) + i)
        c += 1
    n = np.arange(CLASSES * CHANNELS[-1], dtype=np.float64)
    tree["w3"] = np.sin(n * (1.1 + model)).reshape(CLASSES, CHANNELS[-1])
    tree["b3"] = 0.1 * np.arange(CLASSES, dtype=np.float64)
    for i in range(3):
        n = np.arange(CHANNELS[i + 1])
        tree[f"g{i}"] = 1 + 0.3 * np.sin(n + model)
        tree[f"s{i}"] = 0.2 * np.cos(n * 2 + model)
    return tree


def images():
    """A batch of closed-form images, (N, C, H, W)."""
    n = np.arange(BATCH * CHANNELS[0] * SIDE * SIDE, dtype=np.float64)
    return (np.sin(0.37 * n) + 0.5 * np.cos(0.011 * n * n)).reshape(BATCH, CHANNELS[0], SIDE, SIDE)


def transport_problem(n, m):
    """Distances between points on two curves, and unequal shares of them."""
    points = [
        np.stack([np.sin(a * np.arange(k) + 0.3), np.cos(b * np.arange(k) ** 2)], axis=1)
        for k, a, b in ((n, 1.3, 0.7), (m, 2.1, 0.4))
    ]
    cost = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(-1))
    shares = [1 + 0.5 * np.sin(np.arange(k) * a) for k, a in ((n, 1.7), (m, 2.9))]
    return cost, shares[0] / shares[0].sum(), shares[1] / shares[1].sum()


def torch_weights(shapes):
    """Weights of a PyTorch state_dict of such shapes, float32; running variances are positive."""
    tree = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        n = np.arange(np.prod(shape, dtype=int), dtype=np.float64)
        wave = np.sin(1.7 * n + index) * np.cos(0.3 * n + 2 * index) + 0.3 * np.sin(0.11 * n)
        if name.endswith("running_var"):
            wave = 0.5 + wave**2
        elif len(shape) in (2, 4):
            # Kernels that keep the size of what passes them.
            wave = wave * np.sqrt(6 / np.prod(shape[1:]))
        else:
            wave = 0.3 * wave + (not name.endswith(("bias", "running_mean")))
        tree[name] = wave.reshape(shape).astype(np.float32)
    return tree


def torch_images(side, count=2):
    """Closed-form images (N, C, H, W), float32."""
    n = np.arange(count * 3 * side * side, dtype=np.float64).reshape(count, 3, side, side)
    index, _, row, column = np.indices(n.shape)
    # Coarse forms too, other ones and stronger in every image: deep layers see no others.
    coarse = np.sin(0.2 * row * (index + 1)) + np.cos(0.15 * column + 2 * index)
    return ((1 + index) * (np.sin(0.37 * n) + coarse)).astype(np.float32)
