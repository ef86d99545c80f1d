"""What statistics, renormalisation and evaluation cost on top of a bare forward pass.

    python experiments/benchmarks/passes.py

All rivals see the same 20 batches of 500 random images, as many as the experiments take, and take
turns: the bare forward pass of a quarter-width VGG16 (jitted, by the same fast equations),
evaluation, a RESCALE pass, the statistics of two models that RESCALE and REPAIR aim at, those with
covariances that matching needs, and both kinds in one pass. A ratio of 0.9 says that a pass takes
1/0.9 of the time of the forward passes in it. Aims: 0.9, with covariances 0.8. The pass that does
both stands for two, and is what the default table takes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _frame

import vfjax
from vfjax import merge, models, renorm, stats, train
from vfjax._jaxpr.faster import routed


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark; returns the path of the record."""
    args = _frame.parser(__doc__).parse_args(argv)
    model, shape, count = models.create("vgg16", width=0.25), (500, 32, 32, 3), 20
    if args.quick:
        model, shape, count = models.create("digits-mlp"), (10, 8, 8, 1), 2
    fn = models.apply_fn(model)
    keys = jax.random.split(jax.random.key(0), count)
    data = [(jax.random.normal(key, shape), jnp.arange(shape[0]) % 10) for key in keys]
    x = data[0][0]
    init = jax.jit(model.init)
    trees = [init(jax.random.key(seed), x) for seed in (1, 2)]
    net = vfjax.trace(fn, trees[0], x)
    references = stats.moments(net, trees, data)
    merged = merge.interpolate(trees)
    bare = jax.jit(routed(fn))

    def forward(chosen: Sequence[Any]) -> list[jax.Array]:
        return [bare(tree, x) for x, _ in data for tree in chosen]

    rivals = {
        "forward": lambda: forward(trees[:1]),
        "forward, two models": lambda: forward(trees),
        "evaluation": lambda: train.evaluate(fn, merged, data).accuracy,
        "RESCALE": lambda: renorm.rescale(net, merged, data, references=references),
        "statistics, two models": lambda: stats.moments(net, trees, data),
        "statistics for matching": lambda: stats.moments(
            net, trees, data, sites="taps", covariance="cross"
        ),
        "both in one pass": lambda: stats.moments(net, trees, data, covariance="cross"),
    }
    aims = {
        "evaluation": 0.9,
        "RESCALE": 0.9,
        "statistics, two models": 0.9,
        "statistics for matching": 0.8,
        "both in one pass": 0.8,
    }
    seconds = _frame.alternate(rivals, args.repeats)
    rows = []
    for what in rivals:
        row = {"what": what, "seconds": min(seconds[what])}
        if not what.startswith("forward"):
            one = what in ("evaluation", "RESCALE")
            row["ratio"] = _frame.ratio(seconds, "forward" if one else "forward, two models", what)
        if what in aims:
            row |= {"target": f">= {aims[what]:g}", "met": row["ratio"] >= aims[what]}
        rows.append(row)
    name = "digits-mlp" if args.quick else "VGG16 at a quarter of the width"
    title = f"{name}, {count} batches of {shape[0]}: passes against a bare forward pass"
    return _frame.finish("passes", args, title, rows)


if __name__ == "__main__":
    main()
