"""Tests of the report: its advice follows the cause, and what it writes is whole and plain."""

from __future__ import annotations

import functools
import html.parser

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import Compilations, initial, normal, of_shapes
from vfjax import align, diagnose, merge, renorm

# Rounding of float32 through five layers.
RTOL = 1e-4
DEPTH = 5


def _mlp(v, x):
    for k in range(DEPTH - 1):
        x = jax.nn.relu(x @ v[f"w{k}"] + v[f"b{k}"][None])
    return x @ v[f"w{DEPTH - 1}"] + v[f"b{DEPTH - 1}"][None]


def _draw(seed, width=48, bias=0.3):
    rng = np.random.default_rng(seed)
    sizes = [6, *[width] * (DEPTH - 1), 4]
    tree = {}
    for k, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        tree[f"w{k}"] = np.float32(rng.normal(size=(n, m)) * np.sqrt(2 / n))
        tree[f"b{k}"] = np.float32(rng.normal(size=m) * bias)
    return tree


@functools.cache
def mlp():
    """A network, a tree of it, and 200 inputs."""
    x = np.float32(np.random.default_rng(9).normal(size=(200, 6)))
    return vfjax.trace(_mlp, _draw(0), x[:4]), _draw(0), x


class Conv(nn.Module):
    """Three convolutions with BatchNorm, and a head."""

    @nn.compact
    def __call__(self, x):
        for k in range(3):
            x = nn.Conv(6, (3, 3), name=f"conv{k}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm{k}")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@functools.cache
def conv():
    """A network with stored statistics, a tree in which they fit, and 40 inputs."""
    x = np.float32(np.random.default_rng(3).normal(size=(40, 6, 6, 3)))
    model = Conv()
    tree = initial(model, x[:4])
    net = vfjax.trace(lambda v, x: model.apply(v, x), tree, x[:4])
    return net, renorm.reset(net, tree, [x], sweeps="layer"), x


def _remedies(found):
    return [advice.remedy for advice in found.advice]


def _scaled(tree, factor, *, only=None, biases=False):
    def scale(name, leaf):
        hit = name.startswith("w") or (biases and name.startswith("b"))
        return leaf * np.float32(factor) if hit and only in (None, int(name[1:])) else leaf

    return {name: scale(name, leaf) for name, leaf in tree.items()}


# ---------------------------------------------------------------------------- advice and causes


def test_a_network_merged_with_itself_needs_nothing():
    net, tree, x = mlp()
    found = diagnose.report(net, merge.interpolate([tree, tree]), [x], references=[tree, tree])
    assert _remedies(found) == ["nothing to do"]
    assert found.vanishes is None and not found.biases_dominate
    np.testing.assert_allclose([row.relative for row in found.layers], 1, rtol=RTOL)
    np.testing.assert_allclose([row.std_ratio for row in found.layers], 1, rtol=RTOL)
    assert not found.collapse.collapsed[0]


def test_smaller_weights_beside_kept_biases_vanish_from_the_first_layer_on():
    net, tree, x = mlp()
    # Half of a weight beside a whole bias, as where two references' weights cancel.
    found = diagnose.report(net, _scaled(tree, 0.5), [x], references=[tree, tree])
    # The first layer is linear in its weights, so exactly half of its feature is left.
    assert found.layers[0].relative == pytest.approx(0.5, rel=1e-6)
    assert found.vanishes is found.layers[0] or found.vanishes is found.layers[1]
    assert found.biases_dominate and found.collapse.collapsed[0]
    assert _remedies(found) in (["RESCALE", "bias calibration"], ["REPAIR", "bias calibration"])
    assert "w0 (depth 1)" in found.advice[0].reason
    assert found.left < 0.5**3


def test_biases_decide_between_rescale_and_repair():
    net, tree, x = mlp()
    large = {k: (8 * v if k.startswith("b") else v) for k, v in tree.items()}
    small = {k: (v / 8 if k.startswith("b") else v) for k, v in tree.items()}
    for reference, remedy in ((large, "REPAIR"), (small, "RESCALE")):
        found = diagnose.report(net, _scaled(reference, 0.4), [x], references=[reference])
        assert found.advice[0].remedy == remedy
        call = getattr(renorm, remedy.lower())
        mended = call(net, _scaled(reference, 0.4), [x], references=[reference], sites="all")
        after = diagnose.report(net, mended, [x], references=[reference])
        assert _remedies(after) == ["nothing to do"]


@pytest.mark.parametrize("place", range(DEPTH))
def test_the_layer_at_fault_is_named(place):
    net, tree, x = mlp()
    damaged = _scaled(tree, 0.1, only=place, biases=True)
    found = diagnose.report(net, damaged, [x], references=[tree, tree])
    assert found.vanishes is not None and found.vanishes.site == f"w{place}"
    assert found.largest_drop is found.vanishes
    assert found.largest_drop.step == pytest.approx(0.1, rel=RTOL)
    # Weights and biases shrank alike, so scales are all that is off.
    assert found.advice[0].remedy == "RESCALE"
    assert f"w{place} (depth {place + 1})" in found.advice[0].reason
    outside = place == DEPTH - 1  # the last layer is not among the paper's sites
    assert ('sites="all"' in found.advice[0].call) == outside
    kept = [advice.layers for advice in found.advice if advice.remedy == "PFM"]
    assert kept == ([place + 1] if 0 < place < DEPTH - 1 else [])


def test_layers_that_are_kept_apart_are_whole():
    net, tree, x = mlp()
    damaged = _scaled(tree, 0.1, only=2)
    found = diagnose.report(net, damaged, [x], references=[tree, tree])
    (advice,) = [advice for advice in found.advice if advice.remedy == "PFM"]
    model = merge.preserve_first(net, [tree, tree], layers=advice.layers)
    whole = diagnose.report(net, model, [x], references=[tree, tree])
    assert _remedies(whole) == ["nothing to do"]


def test_shifted_biases_ask_for_repair():
    net, tree, x = mlp()
    shifted = {k: (v + 3 if k == "b1" else v) for k, v in tree.items()}
    found = diagnose.report(net, shifted, [x], references=[tree])
    assert found.layers[1].mean_shift > 1
    assert found.layers[1].std_ratio == pytest.approx(1, rel=RTOL)
    assert _remedies(found)[0] == "REPAIR"
    assert "w1 (depth 2)" in found.advice[0].reason
    assert "PFM" not in _remedies(found) and "bias calibration" not in _remedies(found)


def test_unrelated_networks_are_to_be_matched_first():
    net, _, x = mlp()
    edges = [_draw(0, bias=0.05), _draw(1, bias=0.05)]
    found = diagnose.report(net, merge.interpolate(edges), [x], references=edges)
    assert _remedies(found)[0] == "match first"
    # Averages of unrelated rows: sqrt(1/4 + 1/4) of their norm.
    steps = [row.step for row in found.layers]
    np.testing.assert_allclose(np.mean(steps), np.sqrt(0.5), rtol=0.1)
    # Related edges lose less, and the same network in another order is found to be so.
    near = {k: v + np.float32(0.1) * edges[1][k] for k, v in edges[0].items()}
    found = diagnose.report(
        net, merge.interpolate([edges[0], near]), [x], references=[edges[0], near]
    )
    assert "match first" not in _remedies(found)


def test_matching_takes_the_advice_to_match_away():
    net, tree, x = mlp()
    order = net.spec.random(jax.random.key(1))
    shuffled = net.spec.permute(tree, order)
    found = diagnose.report(
        net, merge.interpolate([tree, shuffled]), [x], references=[tree, shuffled]
    )
    assert _remedies(found)[0] == "match first"
    back = align.match_weights(net, tree, shuffled, key=jax.random.key(0)).permutations
    matched = net.spec.permute(shuffled, back)
    found = diagnose.report(
        net, merge.interpolate([tree, matched]), [x], references=[tree, matched]
    )
    assert _remedies(found) == ["nothing to do"]


def test_what_is_no_merge_of_its_references_is_not_to_be_merged_otherwise():
    net, tree, x = mlp()
    # One of two unrelated references, with one layer damaged.
    damaged = _scaled(tree, 0.02, only=3)
    found = diagnose.report(net, damaged, [x], references=[tree, _draw(1)])
    assert found.vanishes is not None and found.vanishes.site == "w3"
    assert {"PFM", "match first"}.isdisjoint(_remedies(found))


def test_a_pruned_network_is_not_told_to_merge_otherwise():
    net, tree, x = mlp()
    pruned = {k: np.where(np.abs(v) < 0.25, 0, v) if k == "w3" else v for k, v in tree.items()}
    found = diagnose.report(net, pruned, [x], references=[tree])
    assert found.largest_drop.site == "w3"
    assert {"PFM", "match first"}.isdisjoint(_remedies(found))


def test_stems_keep_the_statistics_they_were_trained_with():
    net, tree, x = conv()
    stats = jax.tree.map(lambda leaf: 9 * leaf, tree["batch_stats"])
    stale = {**tree, "batch_stats": stats}
    model = merge.preserve_first(net, [stale, stale], layers=2)
    found = diagnose.report(net, model, [x], references=[tree, tree])
    # The first norm lies inside the stems, the second at the cut.
    assert [norm.name for norm in found.norms] == [net.norms[1].name, net.norms[2].name]
    assert _remedies(found)[0] == "RESET"


def test_stale_statistics_ask_for_reset_and_only_for_that():
    net, tree, x = conv()
    healthy = diagnose.report(net, tree, [x], references=[tree])
    assert _remedies(healthy) == ["nothing to do"]
    assert len(healthy.norms) == 3 and not any(norm.stale for norm in healthy.norms)

    stats = jax.tree.map(lambda leaf: leaf, tree["batch_stats"])
    stats["norm1"] = {"mean": stats["norm1"]["mean"], "var": 25 * stats["norm1"]["var"]}
    stale = {**tree, "batch_stats": stats}
    found = diagnose.report(net, stale, [x], references=[tree])
    assert [norm.stale for norm in found.norms] == [False, True, True]
    assert found.norms[1].std_ratio == pytest.approx(0.2, rel=1e-3)  # but for the eps
    assert _remedies(found)[0] == "RESET" and "norm1" in found.advice[0].reason
    assert {"RESCALE", "REPAIR", "bias calibration"}.isdisjoint(_remedies(found))
    assert found.vanishes is not None and found.vanishes.site == "params/conv2/kernel"
    after = diagnose.report(net, renorm.reset(net, stale, [x]), [x], references=[tree])
    assert _remedies(after) == ["nothing to do"]


def test_statistics_that_fit_the_references_no_better_are_not_stale():
    net, tree, x = conv()
    # Measured on other data, all networks' statistics are off alike.
    found = diagnose.report(net, tree, [3 * x], references=[tree])
    assert found.norms[0].std_ratio > 2
    assert _remedies(found) == ["nothing to do"]


def test_vanishing_lasts_to_the_output():
    net, tree, x = mlp()
    dip = _scaled(tree, 0.1, only=1, biases=True)
    dip["w2"] = dip["w2"] * 10
    found = diagnose.report(net, dip, [x], references=[tree])
    assert found.layers[1].relative == pytest.approx(0.1, rel=RTOL)
    assert found.vanishes is None and found.left == pytest.approx(1, rel=RTOL)
    assert found.largest_drop.site == "w1"


# ----------------------------------------------------------------------------------- the numbers


def test_numbers_are_those_of_the_parts():
    net, tree, x = mlp()
    other = _draw(1)
    found = diagnose.report(
        net, _scaled(tree, 0.5), [x[:77], x[77:]], references=[tree, other], weights=[0.25, 0.75]
    )
    measured = diagnose.features(
        net, _scaled(tree, 0.5), [x], references=[tree, other], weights=[0.25, 0.75], sites="layers"
    )
    bound = diagnose.bound_sequence(measured)
    smoothed = diagnose.bound_sequence(measured, gamma=1.4)
    rows = found.layers
    np.testing.assert_allclose([row.relative for row in rows], bound.relative[0], rtol=RTOL)
    np.testing.assert_allclose([row.bound for row in rows], bound.bound[0], rtol=RTOL)
    np.testing.assert_allclose([row.smoothed for row in rows], smoothed.bound[0], rtol=RTOL)
    np.testing.assert_allclose(np.cumprod([row.step for row in rows]), bound.relative[0], rtol=RTOL)
    for row in rows:
        name = row.site
        assert row.ratio == pytest.approx(float(measured.ratio[name][0]), rel=RTOL)
        std = [np.asarray(r.std[name], np.float64) for r in (measured, measured.references)]
        goal = 0.25 * std[1][0] + 0.75 * std[1][1]
        assert row.std_ratio == pytest.approx(std[0][0].mean() / goal.mean(), rel=RTOL)
        mean = [np.asarray(r.mean[name], np.float64) for r in (measured, measured.references)]
        aim = 0.25 * mean[1][0] + 0.75 * mean[1][1]
        unit = np.sqrt((goal**2).mean())
        shifts = [np.sqrt(((m - aim) ** 2).mean()) / unit for m in mean[0]]
        assert row.mean_shift == pytest.approx(shifts[0], rel=RTOL)
        rescaled = np.sqrt(((mean[0][0] * goal / std[0][0] - aim) ** 2).mean()) / unit
        assert row.rescaled_shift == pytest.approx(rescaled, rel=10 * RTOL)
        size = [np.abs(t[name]).mean() for t in (tree, other)]
        wanted = 0.5 * size[0] / (0.25 * size[0] + 0.75 * size[1])
        assert row.kernel_ratio == pytest.approx(wanted, rel=RTOL)
        a, b = tree[name].ravel(), other[name].ravel()
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert row.cosine == pytest.approx(cosine, rel=RTOL, abs=1e-6)
        mean = 0.25 * a + 0.75 * b
        cosine = a @ mean / np.linalg.norm(a) / np.linalg.norm(mean)
        assert row.merge_cosine == pytest.approx(cosine, rel=RTOL)


def test_a_merged_of_as_many_models_gives_the_weights():
    net, tree, x = mlp()
    model = merge.preserve_first(net, [tree, _draw(1)], layers=2, weights=[0.25, 0.75])
    found = diagnose.report(net, model, [x], references=[tree, _draw(1)])
    assert found.features.weights == (0.25, 0.75)
    assert np.isnan(found.layers[0].cosine) and np.isfinite(found.layers[3].cosine)
    assert found.layers[0].relative == pytest.approx(1, rel=RTOL)


def test_a_network_without_biases_or_any_feature_left():
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a"]) @ v["b"], *_bare())
    tree, x = _bare()
    dead = {"a": tree["a"], "b": np.zeros_like(tree["b"])}
    found = diagnose.report(net, dead, [x], references=[tree])
    assert found.left == 0 and found.vanishes.site == "b" and not found.biases_dominate
    assert found.collapse.collapsed[0]
    assert "there is neither feature nor offset, in the references there is no offset" in str(found)
    # No scale revives b, but its means can be put right.
    assert _remedies(found) == ["REPAIR"] and "only they can be put right" in str(found)
    assert "What is left at b (depth 2 of 2) does not vary with the input" in str(found)
    assert found.figure().axes


def _bare():
    rng = np.random.default_rng(5)
    tree = {"a": np.float32(rng.normal(size=(3, 7))), "b": np.float32(rng.normal(size=(7, 2)))}
    return tree, np.float32(rng.normal(size=(10, 3)))


# ------------------------------------------------------------------------------ what is written


class _Page(html.parser.HTMLParser):
    """Tags, their attributes, and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    net, tree, x = mlp()
    found = diagnose.report(
        net,
        _scaled(tree, 0.1, only=2),
        [x],
        references=[tree],
        title="<script>alert('1')</script> & $x_1",
        page=tmp_path / "new" / "report.html",
        figure=tmp_path / "report.png",
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]
    assert (tmp_path / "report.png").read_bytes()[1:4] == b"PNG"
    text = (tmp_path / "new" / "report.html").read_text()
    page = _Page(text)
    assert not page.open
    tags = [tag for tag, _ in page.tags]
    assert {"script", "link", "iframe"}.isdisjoint(tags) and tags.count("img") == 1
    (source,) = [a["src"] for tag, a in page.tags if tag == "img"]
    assert source.startswith("data:image/png;base64,")
    assert "http" not in text.replace(source, "")
    assert "<script>alert('1')</script> & $x_1" in page.text
    for sentence in (*found.words, *(advice.reason for advice in found.advice)):
        assert sentence in page.text
    assert sum("vanishes" in str(a.get("class")) for tag, a in page.tags if tag == "tr") == 1
    assert tags.count("tr") == 1 + DEPTH
    assert found.page(tmp_path / "again.html").read_text() == text


def test_names_are_escaped(tmp_path):
    tree, x = _bare()
    tree = {"a<b>[x]": tree["a"], "b&": tree["b"]}
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a<b>[x]"]) @ v["b&"], tree, x)
    found = diagnose.report(net, tree, [x], references=[tree])
    text = found.page(tmp_path / "p.html").read_text()
    assert "a&lt;b&gt;[x]" in text and "a<b>" not in text and "b&amp;" in text
    assert "a<b>[x]" in found.table()


def test_words_table_and_figure_say_the_same():
    net, tree, x = mlp()
    found = diagnose.report(net, _scaled(tree, 0.5), [x], references=[tree])
    shown = str(found)
    for part in (*found.words, *map(str, found.advice), found.table()):
        assert part in shown
    lines = found.table().splitlines()
    assert len(lines) == 1 + DEPTH and all(f"w{k}" in lines[k + 1] for k in range(DEPTH))
    assert "Biases dominate the output" in shown and "vanish" in repr(found)
    (axes,) = found.figure().axes
    assert axes.get_yscale() == "log" and "relative depth" in axes.get_xlabel()
    assert "units" in axes.get_ylabel()
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert len(curves) == 5
    drawn = curves["feature, this network"]
    size = [np.sqrt(found.features.site(row.site).size) for row in found.layers]
    wanted = np.array([row.feature for row in found.layers]) / size
    np.testing.assert_allclose(drawn.get_ydata(), wanted, rtol=1e-6)
    np.testing.assert_allclose(drawn.get_xdata(), np.arange(1, DEPTH + 1) / DEPTH)


# ---------------------------------------------------------------------------------------- errors


def test_errors():
    net, tree, x = mlp()
    with pytest.raises(ValueError, match="references must hold at least one"):
        diagnose.report(net, tree, [x], references=[])
    with pytest.raises(ValueError, match="one network, got 2"):
        diagnose.report(net, [tree, tree], [x], references=[tree])
    for threshold in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            diagnose.report(net, tree, [x], references=[tree], threshold=threshold)
    with pytest.raises(ValueError, match="no sites"):
        diagnose.report(net, tree, [x], references=[tree], sites=["input"])
    with pytest.raises(ValueError, match="features are 0"):
        dead = jax.tree.map(jnp.zeros_like, tree)
        diagnose.report(net, tree, [x], references=[dead])
    with pytest.raises(TypeError, match="vfjax.trace"):
        diagnose.report(None, tree, [x], references=[tree])


class _Counted:
    """Batches that count how often they are read."""

    def __init__(self, x):
        self.x, self.passes = x, 0

    def __iter__(self):
        self.passes += 1
        return iter([self.x, self.x])


@functools.cache
def _deep(depth):
    shapes = {f"w{k:02}": (7, 7) for k in range(depth)}

    def apply_fn(v, x):
        for k in sorted(v):
            x = jnp.tanh(x @ v[k])
        return x

    trees = [of_shapes(shapes, seed) for seed in (0, 1)]
    return vfjax.trace(apply_fn, trees[0], normal(0, 11, 7)), trees


def test_a_report_takes_one_pass_and_as_many_programs_for_any_depth():
    counts = []
    for depth in (3, 3, 9):
        net, trees = _deep(depth)
        data = _Counted(np.asarray(normal(1, 11, 7)))
        with Compilations() as compilations:
            diagnose.report(net, trees[0], data, references=trees)
        assert data.passes == 1
        counts.append(compilations.count)
    first, again, deeper = counts
    assert again == 0 and deeper <= first <= 8
