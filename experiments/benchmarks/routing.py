"""How much faster training and evaluation are than the same Linen model jitted plainly.

    python experiments/benchmarks/routing.py

XLA on CPU is slow at convolutions on tiny maps and at the gradient of max-pooling; `vfjax` takes
other roads there (`vfjax/_route.py`). Plain and routed steps of a quarter-width VGG16 take turns on
one batch of random images, so that ratios hold on a busy machine too. Aims on two cores: 1.6 in
training, 2 in evaluation. On accelerators both are the same program and the ratio is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _common

from vfjax import models
from vfjax._route import routed

AIMS = {"training step": 1.6, "evaluation": 2.0}


def programs(
    model: Any, x: jax.Array, steps: int, wrap: Callable[[Any], Any]
) -> dict[str, Callable[[], Any]]:
    """Training steps and evaluations of a model, with the forward pass wrapped."""
    batch = len(x)
    label = jnp.arange(batch) % 10
    variables = jax.jit(model.init)(jax.random.key(0), x)
    optimizer = optax.sgd(0.05, momentum=0.9)
    forward = wrap(models.apply_fn(model))

    @jax.jit
    def step(variables: Any, state: Any) -> tuple[Any, Any]:
        def loss(variables: Any) -> jax.Array:
            logits = forward(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    evaluate = jax.jit(forward)

    def train() -> Any:
        carry = variables, optimizer.init(variables)
        for _ in range(steps):
            carry = step(*carry)
        return carry

    return {
        "training step": train,
        "evaluation": lambda: [evaluate(variables, x) for _ in range(steps)],
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark; returns the path of the record."""
    args = _common.benchmark_parser(__doc__).parse_args(argv)
    model, x, steps = models.create("vgg16", width=0.25), jnp.zeros((128, 32, 32, 3)), 5
    if args.quick:
        model, x, steps = models.create("digits-mlp"), jnp.zeros((8, 8, 8, 1)), 1
    x = jax.random.normal(jax.random.key(1), x.shape)
    plain = programs(model, x, steps, lambda fn: fn)
    fast = programs(model, x, steps, routed)
    rows = []
    for what, aim in AIMS.items():
        seconds = _common.alternate({"plain": plain[what], "routed": fast[what]}, args.repeats)
        found = _common.ratio(seconds, "plain", "routed")
        for kind, values in seconds.items():
            rows.append({"what": f"{what}, {kind}", "seconds": min(values) / steps})
        rows[-1] |= {"ratio": found, "target": f">= {aim:g}", "met": found >= aim}
    name = "digits-mlp" if args.quick else "VGG16 at a quarter of the width"
    title = f"{name}, batches of {len(x)}: routed against plain"
    return _common.finish_benchmark("routing", args, title, rows)


if __name__ == "__main__":
    main()
