"""RESET, REPAIR and RESCALE against what PyTorch recorded (`tests/oracles/record_torch.py`)."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import merge, renorm, stats

HERE = pathlib.Path(__file__).parent.parent / "oracles"
RECORD = json.loads((HERE / "torch.json").read_text())
_spec = importlib.util.spec_from_file_location("closed_form", HERE / "closed_form.py")
closed_form = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(closed_form)

# PyTorch keeps 1e-5 in every quotient, and divides sums of squares by n - 1 in stored variances
# but by n in a training pass: with n = 64 * 36 samples a relative 2e-4 a layer, for three layers.
RTOL = 1e-3


def apply_fn(norm: bool):
    def fn(p, x):
        for i in range(3):
            x = jax.lax.conv_general_dilated(
                x, p[f"w{i}"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            x = x + p[f"b{i}"][None, :, None, None]
            if norm:
                row = {k: p[f"{k}{i}"][None, :, None, None] for k in "mvgs"}
                x = (x - row["m"]) * jax.lax.rsqrt(row["v"] + 1e-5) * row["g"] + row["s"]
            x = jax.nn.relu(x)
        return x.mean((2, 3)) @ p["w3"].T + p["b3"][None]

    return fn


def trees(norm: bool):
    made = [closed_form.weights(k) for k in (0, 1)]
    for tree in made:
        for i in range(3):
            tree[f"m{i}"] = np.zeros_like(tree[f"g{i}"])
            tree[f"v{i}"] = np.ones_like(tree[f"g{i}"])
    keep = "wbmvgs" if norm else "wb"
    return [{k: jnp.asarray(v, jnp.float32) for k, v in t.items() if k[0] in keep} for t in made]


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(closed_form.images(), jnp.float32)


def test_reference_moments(images):
    pair = trees(norm=False)
    net = vfjax.trace(apply_fn(norm=False), pair[0], images)
    found = stats.moments(net, pair, [images])
    for i in range(3):
        for k in range(2):
            mean, std = RECORD["references"][k][i]
            scale = np.abs(std).max()
            np.testing.assert_allclose(found.mean[f"w{i}"][k], mean, rtol=RTOL, atol=1e-5 * scale)
            np.testing.assert_allclose(found.std[f"w{i}"][k], std, rtol=RTOL)


@pytest.mark.parametrize("method", ["none", "repair", "rescale"])
def test_corrected_outputs(images, method):
    pair = trees(norm=False)
    net = vfjax.trace(apply_fn(norm=False), pair[0], images)
    weights = (1 - RECORD["alpha"], RECORD["alpha"])
    merged = merge.interpolate(pair, weights)
    if method != "none":
        correct = getattr(renorm, method)
        merged = correct(net, merged, [images], references=pair, weights=weights)
    expected = np.asarray(RECORD["outputs"][method])
    out = net.run(merged, images)[: len(expected)]
    np.testing.assert_allclose(out, expected, rtol=RTOL, atol=RTOL * np.abs(expected).max())


def test_reset(images):
    pair = trees(norm=True)
    net = vfjax.trace(apply_fn(norm=True), pair[0], images)
    weights = (1 - RECORD["alpha"], RECORD["alpha"])
    merged = renorm.reset(net, merge.interpolate(pair, weights), [images])
    for i, (mean, var) in enumerate(RECORD["reset"]):
        np.testing.assert_allclose(merged[f"m{i}"], mean, rtol=RTOL, atol=1e-4)
        np.testing.assert_allclose(merged[f"v{i}"], var, rtol=RTOL)
    expected = np.asarray(RECORD["outputs"]["reset"])
    out = net.run(merged, images)[: len(expected)]
    np.testing.assert_allclose(out, expected, rtol=RTOL, atol=RTOL * np.abs(expected).max())
