"""How much faster training and evaluation are than the same Linen model jitted plainly.

    python experiments/benchmarks/routing.py

XLA on CPU is slow at convolutions on tiny maps, at depthwise ones and at the gradient of
max-pooling; `vfjax` takes other roads there (`vfjax/_route.py`). Plain and routed steps take turns
on one batch of random images, so that ratios hold on a busy machine too. Aims on two cores: for a
quarter-width VGG16 1.6 in training and 2 in evaluation, for a small ConvNeXt 5 in both. On
accelerators both are the same program and the ratio is 1.
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

import _frame

from vfjax import models
from vfjax._jaxpr.faster import routed

# Per model: its width, and how much faster it is to be.
MODELS = {
    "vgg16": (0.25, {"training step": 1.6, "evaluation": 2.0}),
    "convnext-pico": (0.5, {"training step": 5.0, "evaluation": 5.0}),
}
QUICK = {"digits-mlp": (1.0, {"training step": 1.0, "evaluation": 1.0})}


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
    args = _frame.parser(__doc__).parse_args(argv)
    shape, steps = ((8, 8, 8, 1), 1) if args.quick else ((128, 32, 32, 3), 5)
    x = jax.random.normal(jax.random.key(1), shape)
    rows = []
    for name, (width, aims) in (QUICK if args.quick else MODELS).items():
        model = models.create(name, **({} if args.quick else {"width": width}))
        plain = programs(model, x, steps, lambda fn: fn)
        fast = programs(model, x, steps, routed)
        for what, aim in aims.items():
            seconds = _frame.alternate({"plain": plain[what], "routed": fast[what]}, args.repeats)
            found = _frame.ratio(seconds, "plain", "routed")
            for kind, values in seconds.items():
                label = f"{name}, width {width:g}, {what}, {kind}"
                rows.append({"what": label, "seconds": min(values) / steps})
            rows[-1] |= {"ratio": found, "target": f">= {aim:g}", "met": found >= aim}
    return _frame.finish("routing", args, f"batches of {len(x)}: routed against plain", rows)


if __name__ == "__main__":
    main()
