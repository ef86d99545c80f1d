"""How long tracing takes, and weight matching at full width.

    python experiments/benchmarks/tracing.py

Tracing is measured from shapes alone and includes everything that is computed on demand: layers,
norms, groups, taps. Weight matching aligns two randomly initialised VGG16. Aims on two cores: 0.5 s
and 30 s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _frame

import vfjax
from vfjax import align, models


def shape_of(name: str) -> tuple[int, ...]:
    """Shape of the images that a model takes."""
    return (8, 8, 1) if name.startswith("digits") else (32, 32, 3)


def tracing(name: str) -> Callable[[], Any]:
    """A function that traces a model, nothing kept from the last time."""
    model = models.create(name)
    x = jax.ShapeDtypeStruct((500, *shape_of(name)), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def trace() -> None:
        net = vfjax.trace(models.apply_fn(model), variables, x)
        _ = net.layers, net.norms, net.spec, net.taps, net.flops

    return trace


def matching(name: str) -> Callable[[], Any]:
    """A function that matches two networks by their weights."""
    model = models.create(name)
    x = jnp.zeros((1, *shape_of(name)))
    init = jax.jit(model.init)
    a, b = (init(jax.random.key(seed), x) for seed in (1, 2))
    net = vfjax.trace(models.apply_fn(model), a, x)
    return lambda: align.match_weights(net, a, b, key=jax.random.key(0)).objective


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark; returns the path of the record."""
    args = _frame.parser(__doc__).parse_args(argv)
    names = ("digits-mlp",) if args.quick else ("vgg16", "vgg16-bn", "resnet20")
    rows = []
    for name in names:
        seconds = sorted(_frame.alternate({name: tracing(name)}, args.repeats)[name])
        median = seconds[len(seconds) // 2]
        row = {"what": f"tracing {name}", "seconds": median, "target": "< 0.5 s"}
        rows.append(row | {"met": median < 0.5})
    spent = _frame.timed(matching(names[0]))
    row = {"what": f"weight matching of {names[0]} at full width", "seconds": spent}
    rows.append(row | {"target": "< 30 s", "met": spent < 30})
    return _frame.finish("tracing", args, "Tracing and weight matching", rows)


if __name__ == "__main__":
    main()
