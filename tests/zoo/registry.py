"""The registry of the zoo: what a network is, and how its numbers are drawn."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

ZOO: dict[str, Entry] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network: its function, shapes of its variables, and inputs.

    Attributes:
        fn: `fn(variables, x)`.
        shapes: Variables, as shapes.
        inputs: Draws x, from a number of examples and a generator.
        fails: By law that does not hold, the reason.
        slow: Laws that are checked only where time does not matter: others show the same.
    """

    fn: Callable[[Any, Any], Any]
    shapes: Any
    inputs: Callable[[int, np.random.Generator], Any]
    fails: Mapping[str, str]
    slow: Collection[str]

    def variables(self, seed: int) -> Any:
        """Variables with random numbers in every leaf."""
        return drawn(self.shapes, seed)

    def x(self, count: int, seed: int = 0) -> Any:
        """Random inputs."""
        return self.inputs(count, np.random.default_rng(seed))


def entry(shapes, inputs, *, slow=("repair", "report"), **fails):
    """Puts a function into the zoo, under its name."""
    draw = functools.partial(_varied, inputs) if isinstance(inputs, tuple) else inputs

    def add(fn):
        ZOO[fn.__name__] = Entry(fn, shapes, draw, fails, slow)
        return fn

    return add


def _varied(shape, n, rng):
    """Numbers of which some differ between examples only, so that means over positions vary."""
    first, last = (shape[0], *(1,) * (len(shape) - 1)), (*(1,) * (len(shape) - 1), shape[-1])
    return sum(rng.normal(size=(n, *of)) for of in (first, last, shape)).astype(np.float32)


def tokens(length, vocabulary=11):
    """Draws sequences of numbers below a bound."""
    return lambda n, rng: rng.integers(0, vocabulary, (n, length), np.int32)


def drawn(shapes, seed):
    """Random leaves: kernels that keep sizes, means and shifts near 0, scales and variances near 1.

    A kernel's weights sum to nothing, so that positive means of inputs cancel, and no unit dies.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name, value = jax.tree_util.keystr(path), rng.normal(size=shape)
        if "var" in name:
            value = 0.5 + np.square(value)
        elif "scale" in name or "gamma" in name:
            value = 1 + 0.3 * value
        elif len(shape) > 1:
            for axis in (0, len(shape) - 1):  # one holds the units, the others their inputs
                value = value - value.mean(tuple({*range(len(shape))} - {axis}), keepdims=True)
            value = 1.5 * value / math.sqrt(math.prod(shape) / max(shape))
        else:
            value = 0.1 * value
        return np.int32(3) if "counter" in name else value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda n: _is_shape(n))


def orders(spec, seed):
    """Random permutations of all groups, drawn on the host: nothing is compiled."""
    rng = np.random.default_rng(seed)
    found = {}
    for group, n in spec.sizes.items():
        shape = (spec.sizes[spec.within[group]], n) if group in spec.within else (n,)
        order = np.broadcast_to(np.arange(n, dtype=np.int32), shape)
        found[group] = rng.permuted(order, axis=-1)
    return found


def _is_shape(node):
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)
