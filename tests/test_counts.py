"""How often functions look at what they are given: each tree is taken apart and checked once.

Counted are calls of `flatten_named` and `check_finite` that see an array of a tree, whatever object
holds it by then; so parts of a tree, such as stems, count as the tree. What is being traced counts
for nothing: it is no tree that was given.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import _trees, align, diagnose, merge, prune, renorm, stats
from vfjax.network import _arguments

WIDTH, LAYERS = 4, 5


def apply_fn(v, x):
    for k in range(LAYERS):
        x = x @ v[f"w{k}"] + v[f"b{k}"][None]
        x = jax.nn.relu(x) if k < LAYERS - 1 else x
    return x


def normed(v, x):
    z = x @ v["w0"] - v["mean"][None]
    return jax.nn.relu(z / jnp.sqrt(v["var"] + 1e-5)[None]) @ v["w1"]


def draw(shapes, seed):
    random = np.random.default_rng(seed)
    return {name: jnp.float32(random.uniform(0.5, 1.5, s)) for name, s in shapes.items()}


PLAIN = {f"{kind}{k}": (WIDTH,) * n for k in range(LAYERS) for kind, n in (("w", 2), ("b", 1))}
NORMED = {"w0": (WIDTH, WIDTH), "mean": (WIDTH,), "var": (WIDTH,), "w1": (WIDTH, WIDTH)}


@pytest.fixture(scope="module")
def given():
    """Networks, trees and data, by the names that calls below take them by."""
    x = jnp.float32(np.random.default_rng(9).normal(size=(16, WIDTH)))
    a, b, m = (draw(PLAIN, seed) for seed in range(3))
    n = draw(NORMED, 3)
    net, other = vfjax.trace(apply_fn, a, x), vfjax.trace(normed, n, x)
    half = np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32)
    unknown = draw(NORMED, 4) | {"var": None}
    return {
        "x": [x],
        "pairs": [(x, jnp.zeros(len(x), jnp.int32))],
        "a": a,
        "b": b,
        "m": m,
        "n": n,
        "unknown": unknown,
        "net": net,
        "normed": other,
        "cut": merge.preserve_first(net, [a, b], layers=2),
        "swap": align.Maps.of_permutations([None, {"w1": [1, 0, 2, 3]}]),
        "mix": align.Maps(({}, {"w1": (half, half)})),
        "key": jax.random.key(0),
    }


class Case(NamedTuple):
    """A call; how often it takes trees apart; and why any of them more than once."""

    call: object
    flat: dict[str, int]
    why: str = ""
    # Looked for NaN and infinity.
    finite: dict[str, int] | None = None


PAIR = {"a": 1, "b": 1}
ALL = {"a": 1, "b": 1, "m": 1}
DATA = {"sites": "all"}

CASES = {
    "reset": Case(lambda g: renorm.reset(g["normed"], g["n"], g["x"]), {"n": 1}),
    "reset, by layer": Case(
        lambda g: renorm.reset(g["normed"], g["n"], g["x"], sweeps="layer"), {"n": 1}
    ),
    "reset of unknown variances": Case(
        lambda g: renorm.reset(g["normed"], g["unknown"], g["x"]),
        {"unknown": 2},
        "variances that are put in place make a tree of other leaves",
        finite={"unknown": 1},
    ),
    "repair": Case(
        lambda g: renorm.repair(g["net"], g["m"], g["x"], references=[g["a"], g["b"]], **DATA), ALL
    ),
    "repair, by layer": Case(
        lambda g: renorm.repair(
            g["net"], g["m"], g["x"], references=[g["a"], g["b"]], sweeps="layer", **DATA
        ),
        ALL,
    ),
    "repair behind a cut": Case(
        lambda g: renorm.repair(g["net"], g["cut"], g["x"], references=[g["a"], g["b"]]),
        {"a": 2, "b": 2},
        "the stems hold leaves of the references, and corrections at the cut are folded into them",
        finite=PAIR,
    ),
    "repair, mapped": Case(
        lambda g: renorm.repair(
            g["net"], g["m"], g["x"], references=[g["a"], g["b"]], maps=g["mix"], **DATA
        ),
        ALL,
    ),
    "rescale": Case(
        lambda g: renorm.rescale(g["net"], g["m"], g["x"], references=[g["a"], g["b"]], **DATA), ALL
    ),
    "remove_bias": Case(lambda g: renorm.remove_bias(g["net"], g["m"], last=2), {"m": 1}),
    "calibrate_bias": Case(
        lambda g: renorm.calibrate_bias(g["net"], g["m"], references=[g["a"], g["b"]]), ALL
    ),
    "calibrate_bias, mapped": Case(
        lambda g: renorm.calibrate_bias(
            g["net"], g["m"], references=[g["a"], g["b"]], maps=g["swap"]
        ),
        {"m": 1, "a": 1, "b": 4},
        "permuting checks and takes apart the tree, and writes a new one",
        finite=ALL,
    ),
    "interpolate": Case(lambda g: merge.interpolate([g["a"], g["b"]]), PAIR),
    "preserve_first": Case(
        lambda g: merge.preserve_first(g["net"], [g["a"], g["b"]], layers=2), PAIR
    ),
    "ensemble": Case(lambda g: merge.ensemble(g["net"], [g["a"], g["b"]]), PAIR),
    "partial": Case(lambda g: merge.partial(g["net"], [g["a"], g["b"]], span=slice(1, 3)), PAIR),
    "partial, permuted": Case(
        lambda g: merge.partial(g["net"], [g["a"], g["b"]], g["swap"], span=slice(1, 3)),
        {"a": 1, "b": 4},
        "permuting checks and takes apart the tree, and writes a new one",
        finite=PAIR,
    ),
    "features": Case(
        lambda g: diagnose.features(g["net"], g["m"], g["x"], references=[g["a"], g["b"]]), ALL
    ),
    "features behind a cut": Case(
        lambda g: diagnose.features(g["net"], g["cut"], g["x"], references=[g["a"], g["b"]]),
        {"a": 2, "b": 2},
        "the stems hold leaves of the references, and are looked at as what is given",
    ),
    "report": Case(
        lambda g: diagnose.report(g["net"], g["m"], g["x"], references=[g["a"], g["b"]]), ALL
    ),
    "rescale_product": Case(
        lambda g: diagnose.rescale_product(g["net"], g["m"], [g["a"], g["b"]]), ALL
    ),
    "distance": Case(lambda g: diagnose.distance(g["a"], g["b"], net=g["net"]), PAIR),
    "moments": Case(lambda g: stats.moments(g["net"], [g["a"], g["b"]], g["x"]), PAIR),
    "match_activations": Case(
        lambda g: align.match_activations(g["net"], g["a"], g["b"], g["x"]), PAIR
    ),
    "match_weights": Case(
        lambda g: align.match_weights(g["net"], g["a"], g["b"], key=g["key"]), PAIR
    ),
    "match_universe": Case(
        lambda g: align.match_universe(g["net"], [g["a"], g["b"]], key=g["key"]), PAIR
    ),
    "zip_features": Case(lambda g: align.zip_features(g["net"], [g["a"], g["b"]], g["x"]), PAIR),
    "magnitude": Case(lambda g: prune.magnitude(g["net"], g["a"]), {"a": 1}, finite={}),
    "fisher": Case(lambda g: prune.fisher(g["net"], g["a"], g["pairs"]), {"a": 1}, finite={}),
}


@pytest.mark.parametrize("name", CASES)
def test_trees_are_taken_apart_and_checked_once(name, given, monkeypatch):
    case = CASES[name]
    found = counted(lambda: case.call(given), given, monkeypatch)
    assert dict(found.flat) == case.flat
    assert dict(found.finite) == (case.flat if case.finite is None else case.finite)
    assert found.nets <= 1
    assert case.why or max(case.flat.values()) == 1


class Found(NamedTuple):
    """What was counted: by tree, and of the network."""

    flat: Counter
    finite: Counter
    nets: int


def counted(call, given, monkeypatch):
    """Counts what a call looks at."""
    arrays = {
        name: {id(leaf) for leaf in jax.tree.leaves(tree)}
        for name, tree in given.items()
        if name in ("a", "b", "m", "n", "unknown")
    }
    found = Found(Counter(), Counter(), 0)
    nets = []

    def sees(counter, leaves):
        seen = {id(leaf) for leaf in leaves}
        counter.update(name for name, ids in arrays.items() if ids & seen)

    def flatten_named(tree, **options):
        sees(found.flat, jax.tree.leaves(tree))
        return originals["flatten_named"](tree, **options)

    def check_finite(flat, **options):
        sees(found.finite, flat.values())
        return originals["check_finite"](flat, **options)

    def check_net(*arguments, **options):
        nets.append("check_net")
        return originals["check_net"](*arguments, **options)

    def networks(*arguments, **options):
        nets.append("networks")
        return originals["networks"](*arguments, **options)

    originals = {
        "flatten_named": _trees.flatten_named,
        "check_finite": _trees.check_finite,
        "check_net": _arguments.check_net,
        "networks": _arguments.networks,
    }
    counting = (flatten_named, check_finite, check_net, networks)
    rooms = [
        module
        for room, module in sys.modules.items()
        # `resolve_sites` is public, and looks at its own argument.
        if room.startswith("vfjax") and not room.endswith("_sites")
    ]
    for function in counting:
        original = originals[function.__name__]
        for module in rooms:
            for attribute, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, attribute, function)
    call()
    monkeypatch.undo()
    return found._replace(nets=len(nets))
