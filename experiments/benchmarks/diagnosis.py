"""What diagnosis costs on top of the forward passes in it.

    python experiments/benchmarks/diagnosis.py

Features: the bare forward passes of a quarter-width VGG16 over 20 batches of 500 random images
(jitted, by the same fast equations), and passes that measure its features at every tap and at every
pre-activation, take turns. A ratio of 0.87 says that a pass takes 1/0.87 = 1.15 of the time of the
forward passes in it, which is the aim.

Interpolation: eleven evaluations of a half-width ResNet20 on 10,000 random images, and an
interpolation of two over 11 points, take at most three turns. The aim is at most 1.3 times as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _frame

import vfjax
from vfjax import diagnose, models, train
from vfjax._jaxpr.faster import routed

# At most 1.15 times the bare passes.
FEATURES = round(1 / 1.15, 2)
# At most 1.3 times eleven evaluations.
INTERPOLATION = round(1 / 1.3, 2)
POINTS = 11


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark; returns the path of the record."""
    args = _frame.parser(__doc__).parse_args(argv)
    rows = feature_rows(args) + interpolation_rows(args)
    return _frame.finish("diagnosis", args, "diagnosis against bare passes", rows)


def feature_rows(args: Any) -> list[dict[str, Any]]:
    """Feature passes against bare forward passes of the same batches."""
    name, shape, count = "VGG16 at a quarter of the width", (500, 32, 32, 3), 20
    model = models.create("vgg16", width=0.25)
    if args.quick:
        name, shape, count = "digits-mlp", (10, 8, 8, 1), 2
        model = models.create("digits-mlp")
    fn = models.apply_fn(model)
    data = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), count)]
    tree = jax.jit(model.init)(jax.random.key(1), data[0])
    net = vfjax.trace(fn, tree, data[0])
    bare = jax.jit(routed(fn))
    base = f"forward, {name}, {count} batches of {shape[0]}"
    rivals = {
        base: lambda: [bare(tree, x) for x in data],
        "features at taps": lambda: diagnose.features(net, tree, data),
        "features at pre-activations": lambda: diagnose.features(net, tree, data, sites="layers"),
    }
    return compared(rivals, args.repeats, FEATURES)


def interpolation_rows(args: Any) -> list[dict[str, Any]]:
    """An interpolation against as many evaluations."""
    name, shape, count = "ResNet20 at half the width", (500, 32, 32, 3), 20
    model = models.create("resnet20", width=0.5)
    if args.quick:
        name, shape, count = "digits-mlp", (10, 8, 8, 1), 2
        model = models.create("digits-mlp")
    fn = models.apply_fn(model)
    keys = jax.random.split(jax.random.key(0), count)
    data = [(jax.random.normal(key, shape), jnp.arange(shape[0]) % 10) for key in keys]
    x = data[0][0]
    init = jax.jit(model.init)
    trees = [init(jax.random.key(seed), x) for seed in (1, 2)]
    net = vfjax.trace(fn, trees[0], x)
    base = f"{POINTS} evaluations, {name}, {count * shape[0]:,} images"
    rivals = {
        base: lambda: [train.evaluate(fn, trees[0], data).loss for _ in range(POINTS)],
        f"interpolation, {POINTS} points": lambda: (
            diagnose.interpolation(net, trees, data, alphas=POINTS, progress=False).loss
        ),
    }
    return compared(rivals, min(args.repeats, 3), INTERPOLATION)


def compared(rivals: Mapping[str, Callable[[], Any]], repeats: int, aim: float) -> list[Any]:
    """Rows of the table: the first rival is what the others are measured by."""
    seconds = _frame.alternate(rivals, repeats)
    base, *others = rivals
    rows = [{"what": base, "seconds": min(seconds[base])}]
    for what in others:
        ratio = _frame.ratio(seconds, base, what)
        verdict = {"target": f">= {aim:g}", "met": ratio >= aim}
        rows.append({"what": what, "seconds": min(seconds[what]), "ratio": ratio} | verdict)
    return rows


if __name__ == "__main__":
    main()
