"""CONTRIBUTING: what it says takes public pieces alone, and what it names exists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import Primitive
from jax.interpreters import mlir
from scipy.optimize import linear_sum_assignment

import vfjax
from vfjax import _propagate, align, diagnose, merge, renorm, stats

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")


class MLP(nn.Module):
    """A network to merge."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        for features in (12, 10, 8):
            x = nn.Dense(features, bias_init=nn.initializers.normal(0.3))(x)
            x = nn.BatchNorm(use_running_average=not train)(x) if self.norm else x
            x = nn.gelu(x)  # Without dead units, which nothing tells apart.
        return nn.Dense(4)(x)


@pytest.fixture(scope="module")
def data() -> list[jax.Array]:
    return list(jax.random.normal(jax.random.key(0), (3, 60, 6)))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "BatchNorm"])
def net_and_trees(request, data) -> tuple[vfjax.Network, list[Any]]:
    model = MLP(request.param)
    trees = [model.init(jax.random.key(seed), data[0]) for seed in (1, 2)]
    return vfjax.trace(model.apply, trees[0], data[0]), trees


# -------------------------------------------------------------------------------------- a matcher


def gains(net: vfjax.Network, moments: stats.Moments, blocks: Any) -> dict[str, np.ndarray]:
    """Sums over the taps of each group: what a matcher has to go by."""
    found: dict[str, np.ndarray] = {}
    for site, axes in moments.axes:
        if site in moments.covariance:
            (axis,) = axes
            found[axis.group] = found.get(axis.group, 0.0) + blocks(moments, site)
    assert set(found) == set(net.spec.groups)
    return found


def match_covariances(net: vfjax.Network, trees: Sequence[Any], data: Iterable[Any]) -> align.Maps:
    """A toy matcher that permutes: units of the second network by their covariance."""
    moments = stats.moments(net, trees, data, sites="taps", covariance="cross")
    found = gains(net, moments, lambda m, site: np.asarray(m.covariance[site][0, 1]))
    orders = {group: linear_sum_assignment(-gain)[1] for group, gain in found.items()}
    return align.Maps.of_permutations([None, orders])


def merge_neighbours(net: vfjax.Network, trees: Sequence[Any], data: Iterable[Any]) -> align.Maps:
    """A toy matcher that merges: each unit of the second with its most correlated partner."""
    moments = stats.moments(net, trees, data, sites="taps", covariance=True)

    def correlation(moments: stats.Moments, site: str) -> np.ndarray:
        one, other = np.asarray(moments.std[site])
        scale = np.outer(one, other)
        cross = np.asarray(moments.covariance[site][0, 1])
        return np.divide(cross, scale, out=np.zeros_like(scale), where=scale > 0)

    labels = {}
    for group, gain in gains(net, moments, correlation).items():
        labels[group] = np.concatenate([np.arange(len(gain)), gain.argmax(0)])
    return align.Maps.of_labels(labels, len(trees))


def test_a_toy_matcher_recovers_a_known_permutation(net_and_trees, data):
    net, (a, _) = net_and_trees
    orders = net.spec.random(jax.random.key(3))
    b = net.spec.permute(a, orders)
    maps = match_covariances(net, [a, b], data)
    for group, order in orders.items():
        back = np.asarray(order)[maps.permutations[1][group]]
        np.testing.assert_array_equal(back, np.arange(len(order)))
    merged = merge.interpolate(maps.apply(net, [a, b]))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), merged, a)


@pytest.mark.parametrize("matcher", [match_covariances, merge_neighbours])
def test_a_toy_matcher_works_to_the_end(net_and_trees, data, matcher):
    """What it finds can be merged, in part and with heads, renormalised and diagnosed."""
    net, trees = net_and_trees
    maps = matcher(net, trees, data)
    models = [
        merge.interpolate(maps.apply(net, trees)),
        merge.partial(net, trees, maps, span=slice(1, None)),
        merge.partial(net, trees, maps, span=slice(1, 3)),
    ]
    for merged in models:
        if net.norms:
            mended = renorm.reset(net, merged, data)
        else:
            mended = renorm.repair(net, merged, data, references=trees, maps=maps)
        whole = isinstance(mended, merge.Merged)
        outputs = mended(data[0]) if whole else net.run(mended, data[0])
        for out in jax.tree.leaves(outputs):
            assert out.shape == (60, 4) and bool(jnp.isfinite(out).all())
    assert diagnose.report(net, mended, data, references=trees, maps=maps).layers


# --------------------------------------------------------------------------------------- a remedy


def rescale_slowly(
    net: vfjax.Network, merged: Any, data: Iterable[Any], *, references: Sequence[Any]
) -> Any:
    """A toy remedy: RESCALE, one layer after the other, each time with a pass of its own."""
    sites = stats.resolve_sites(net, "paper")
    _, goals = stats.moments(net, references, data, sites=sites).mixed()
    for site in sites:
        std = stats.moments(net, [merged], data, sites=[site]).std[site][0]
        alive = std > 0
        scale = jnp.where(alive, goals[site] / jnp.where(alive, std, 1), 1)
        merged = net.fold(merged, site, scale, None)
    return merged


def test_a_toy_remedy_is_rescale(data):
    model = MLP()
    trees = [model.init(jax.random.key(seed), data[0]) for seed in (1, 2)]
    net = vfjax.trace(model.apply, trees[0], data[0])
    merged = merge.interpolate(trees)
    mended = rescale_slowly(net, merged, data, references=trees)
    wanted = renorm.rescale(net, merged, data, references=trees, sweeps="layer")
    x = data[0]
    np.testing.assert_allclose(net.run(mended, x), net.run(wanted, x), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(net.run(mended, x) - net.run(merged, x)).max()) > 0.1


# ------------------------------------------------------------------------------------ a primitive


@pytest.fixture
def halve() -> Primitive:
    """A primitive that nobody knows."""
    primitive = Primitive("toy_halve")
    primitive.def_impl(lambda x: x / 2)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x: x / 2, multiple_results=False))
    return primitive


@pytest.fixture
def rules() -> Iterator[Mapping[str, Any]]:
    """The rules, as they are again afterwards."""
    before, lazy = dict(_propagate.RULES), set(_propagate.LAZY)
    yield _propagate.RULES
    for kept, was in ((_propagate.RULES, before), (_propagate.LAZY, lazy)):
        kept.clear()
        kept.update(was)


def test_a_toy_rule_is_all_that_symmetries_need(halve, rules):
    def forward(v, x):
        return jax.nn.relu(halve.bind(x @ v["w"])) @ v["v"]

    v = {"w": jnp.ones((3, 5)), "v": jnp.ones((5, 2))}
    v = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), v)
    x = jax.random.normal(jax.random.key(1), (8, 3))
    unknown = vfjax.trace(forward, v, x)
    assert not unknown.spec.groups
    assert "toy_halve" in {axis.primitive for axis in unknown.spec.fixed}

    @_propagate.rule("toy_halve")
    def same_axes(step: _propagate.Step) -> list[_propagate.Axes]:
        return [step.inputs[0].axes]

    net = vfjax.trace(forward, v, x)
    assert list(net.spec.groups) == ["w"]
    assert float(vfjax.check_spec(net, v, x, key=jax.random.key(2))) < 1e-5
    found = align.match_activations(net, v, net.spec.permute(v, {"w": [3, 1, 0, 4, 2]}), [x])
    assert found.permutations["w"].tolist() == [2, 1, 4, 0, 3]


def test_no_toy_stays():
    assert not [name for name in _propagate.RULES if name.startswith("toy")]


# ---------------------------------------------------------------------------------- what it names


def test_it_is_short():
    assert len(CONTRIBUTING.splitlines()) <= 120


def test_files_that_it_names_exist():
    """Those of the kit of the experiments count where the kit is there."""
    kit = (ROOT / "experiments" / "kit").exists()
    named = re.findall(r"`((?:vfjax|experiments|tests|\.ci|\.github)/[\w./-]*)`", CONTRIBUTING)
    assert named
    for name in named:
        of_kit = name.startswith("experiments/kit") or name.endswith("test_contract.py")
        yours = "yours" in name
        assert yours or (ROOT / name).exists() or (of_kit and not kit), name


def test_functions_that_it_names_exist():
    """`name` in `file`, as it tells what to copy."""
    pairs = re.findall(r"`(\w+)` in\s+`((?:vfjax|tests)/[\w./]+\.py)`", CONTRIBUTING)
    assert len(pairs) >= 6
    for name, file in pairs:
        text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).exists() else None
        if text is not None:
            assert re.search(rf"^(?:def |class )?{name}\b", text, flags=re.MULTILINE), (name, file)


def test_its_floors_are_those_that_imports_keep_to():
    """The picture shows the rooms in the order of `[tool.importlinter]`."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)\]", project, flags=re.DOTALL | re.MULTILINE)
    wanted = [re.findall(r"\w+", floor) for floor in re.findall(r'"([^"]+)"', layers[1])]
    picture = re.search(r"```text\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    shown = [re.findall(r"\w+", line.partition("  #")[0]) for line in picture[1].splitlines()]
    assert shown == wanted
