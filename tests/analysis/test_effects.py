"""What leaves do to features, and which maps they allow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vfjax
from vfjax import align, merge, renorm

EPS = 1e-5


def leaves(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


def scaled(p, x):
    """A linear network, with a scale and a shift between its layers."""
    return ((x @ p["w"]) * p["s"][None] + p["b"][None]) @ p["v"]


def tied(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["w"].T


def language(p, x):
    h = p["table"][x]
    return (h + jax.nn.relu(h @ p["w"] + p["b"][None, None]) @ p["v"]) @ p["table"].T


def folded(p, x):
    """A BatchNorm as TensorFlow writes it."""
    inv = p["s"] * jax.lax.rsqrt(p["var"] + EPS)
    shift = p["b"] - p["mean"] * inv
    return jax.nn.relu((x @ p["w"]) * inv[None] + shift[None]) @ p["v"]


def plain(p, x):
    """The same as layers are found."""
    u = (x @ p["w"] - p["mean"][None]) * jax.lax.rsqrt(p["var"] + EPS)[None] * p["s"][None]
    return jax.nn.relu(u + p["b"][None]) @ p["v"]


def weight_normed(p, x):
    length = jnp.sqrt((p["w"] ** 2).sum(0, keepdims=True))
    return jax.nn.relu(x @ (p["w"] / length * p["g"][None])) @ p["v"]


def low_rank(p, x):
    return jax.nn.relu(x @ (p["w"] + p["a"] @ p["b"])) @ p["v"]


NORMED = leaves(w=(5, 6), s=6, b=6, mean=6, v=(6, 2)) | {"var": jnp.arange(1.0, 7)}
RIGID = {
    "tied": (tied, leaves(w=(5, 6), b=6), "w", "'w' is written by one layer and read by another"),
    "language": (
        language,
        leaves(table=(9, 6), w=(6, 4), b=4, v=(4, 6)),
        "table",
        "'table' is written by one layer and read by another",
    ),
    "weight norm": (weight_normed, leaves(w=(5, 6), g=6, v=(6, 2)), "w", "acts through"),
    "low rank": (
        low_rank,
        leaves(w=(5, 6), a=(5, 3), b=(3, 6), v=(6, 2)),
        "a",
        "'[ab]' is multiplied by other parameters in `dot_general`",
    ),
}


def traced(name):
    apply_fn, p, group, why = RIGID[name]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(0, 9, (40, 3))) if name == "language" else rng.normal(size=(40, 5))
    x = x if name == "language" else jnp.float32(x)
    return vfjax.trace(apply_fn, p, x), p, x, group, why


def dense(seed, n):
    """An invertible map and its inverse."""
    found = np.random.default_rng(seed).normal(size=(n, n)) + 2 * np.eye(n)
    return np.float32(found), np.float32(np.linalg.inv(found))


# ----------------------------------------------------------------------------------- what scales


def test_what_scales_is_told_from_what_is_added():
    net = vfjax.trace(scaled, leaves(w=(5, 6), s=6, b=6, v=(6, 2)), jnp.ones((3, 5)))
    assert net.spec.scaling == {"s"} and not net.spec.rigid
    net = vfjax.trace(plain, NORMED, jnp.ones((3, 5)))
    assert net.spec.scaling == {"s"} and not net.spec.rigid


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 10))
def test_a_change_of_basis_leaves_an_even_scale_alone(seed, scale):
    """A scale that is the same for all features commutes with every map."""
    p = leaves(w=(5, 6), s=6, b=6, v=(6, 2)) | {"s": jnp.full(6, scale, jnp.float32)}
    x = jnp.float32(np.random.default_rng(seed).normal(size=(8, 5)))
    net = vfjax.trace(scaled, p, x)
    m, u = dense(seed, 6)
    assume(np.linalg.cond(m) < 100)  # or float32 loses more digits than are compared
    mapped = net.spec.apply(p, {"w": (m, u)})
    before, after = net.run(p, x), net.run(mapped, x)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3 * np.abs(before).max())
    np.testing.assert_allclose(mapped["s"], p["s"], rtol=1e-3)


def test_a_change_of_basis_keeps_the_diagonal_of_a_scale():
    p = leaves(w=(5, 6), s=6, b=6, v=(6, 2))
    net = vfjax.trace(scaled, p, jnp.ones((3, 5)))
    m, u = dense(0, 6)
    mapped = jax.jit(lambda p, m, u: net.spec.apply(p, {"w": (m, u)}))(p, m, u)
    np.testing.assert_allclose(mapped["s"], np.diag(m @ np.diag(p["s"]) @ u), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mapped["b"], m @ p["b"], rtol=1e-4, atol=1e-4)


def test_an_average_takes_the_average_of_scales():
    p = leaves(w=(5, 6), s=6, b=6, v=(6, 2))
    net = vfjax.trace(scaled, p, jnp.ones((3, 5)))
    m = np.kron(np.eye(3), np.full((1, 2), 0.5)).astype(np.float32)
    mapped = net.spec.apply(p, {"w": (m, np.float32(m.T > 0))})
    np.testing.assert_allclose(mapped["s"], p["s"].reshape(3, 2).mean(1), rtol=1e-6)


def test_depthwise_kernels_scale():
    """The identity by depthwise convolution stays one in another basis."""

    def apply_fn(p, x):
        h = jnp.einsum("bhwc,cd->bhwd", x, p["w"])
        dims = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            h, p["k"], (1, 1), "SAME", feature_group_count=6, dimension_numbers=dims
        )
        return h.mean((1, 2)) @ p["v"]

    p = leaves(w=(3, 6), v=(6, 2)) | {"k": jnp.zeros((3, 3, 1, 6)).at[1, 1].set(1.0)}
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 4, 4, 3)))
    net = vfjax.trace(apply_fn, p, x)
    mapped = net.spec.apply(p, {"w": dense(1, 6)})
    before, after = net.run(p, x), net.run(mapped, x)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3 * np.abs(before).max())
    np.testing.assert_allclose(mapped["k"], p["k"], atol=1e-4)


# ------------------------------------------------------------------------ what is only permuted


@pytest.mark.parametrize("name", RIGID)
def test_groups_that_can_only_be_permuted_say_why(name):
    net, p, x, group, why = traced(name)
    assert group in net.spec.rigid
    assert f"{group} ({net.spec.sizes[group]}) only permuted" in repr(net.spec)
    vfjax.check_spec(net, p, x, key=jax.random.key(0))
    with pytest.raises(ValueError, match=f"this group can only be permuted: .*{why}"):
        net.spec.apply(p, {group: dense(0, net.spec.sizes[group])})
    order = np.roll(np.arange(net.spec.sizes[group]), 1)
    matrix = np.eye(len(order), dtype=np.float32)[order]
    mapped = net.spec.apply(p, {group: (matrix, matrix.T)})
    for path, leaf in net.spec.permute(p, {group: order}).items():
        np.testing.assert_allclose(mapped[path], leaf, rtol=1e-6)


@pytest.mark.parametrize("name", ["tied", "language", "weight norm"])
@pytest.mark.parametrize("matcher", [align.zip_features, align.cca, align.transport])
def test_matchers_permute_them(name, matcher):
    """A permuted copy is found, and the merge of two others is finite."""
    net, p, x, group, _ = traced(name)
    order = np.roll(np.arange(net.spec.sizes[group]), 2)
    copy = net.spec.permute(p, {group: order})
    soft = {"regularization": 0.5} if matcher is align.transport else {}
    maps = matcher(net, [p, copy], [x], **soft)
    assert maps.permutations[1][group].tolist() == np.argsort(order).tolist()
    merged = merge.interpolate(maps.apply(net, [p, copy]))
    before = net.run(p, x)
    if net.spec.rigid.keys() >= net.spec.groups.keys():
        found = net.run(merged, x)
        np.testing.assert_allclose(found, before, rtol=1e-3, atol=1e-3 * np.abs(before).max())
    other = jax.tree.map(lambda leaf: leaf[::-1] + 0.1, p)
    maps = matcher(net, [p, other], [x], **soft)
    assert np.isfinite(net.run(merge.interpolate(maps.apply(net, [p, other])), x)).all()


def test_different_widths_cannot_be_transported_along_them():
    rng = np.random.default_rng(0)
    trees = [leaves(w=(5, n), b=n) for n in (6, 4)]
    x = jnp.float32(rng.normal(size=(40, 5)))
    nets = [vfjax.trace(tied, tree, x) for tree in trees]
    with pytest.raises(ValueError, match="'w'.* can only be permuted"):
        align.transport(nets, trees, [x])


@pytest.mark.parametrize("written", [plain, folded])
def test_a_norm_that_is_found_may_be_mixed(written):
    x = jnp.float32(np.random.default_rng(1).normal(size=(40, 5)))
    net = vfjax.trace(written, NORMED, x)
    assert not net.spec.rigid
    maps = align.cca(net, [NORMED, jax.tree.map(lambda leaf: leaf[::-1], NORMED)], [x])
    assert maps.mixed == {"w"}
    merged = merge.interpolate(maps.apply(net, [NORMED, NORMED]))
    assert merged["var"] is None
    new = renorm.reset(net, merged, [x])
    assert np.isfinite(net.run(new, x)).all()
    np.testing.assert_allclose(net.run(new, x), plain(new, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "moved",
    [
        jax.device_put,
        jax.lax.optimization_barrier,
        lambda b: jax.lax.optimization_barrier((b, 2 * b))[0],
        lambda b: jnp.stack([b, b])[1],
        lambda b: jnp.tile(b, 2)[:6],
        lambda b: list(jnp.stack([b, -b]))[0],
        lambda b: jax.lax.complex(b, b).conj().imag,
    ],
)
def test_what_is_moved_or_summed_is_still_added(moved):
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + moved(p["b"])[None]) @ p["v"]

    net = vfjax.trace(fn, leaves(w=(5, 6), b=6, v=(6, 2)), jnp.ones((3, 5)))
    assert [a.path for a in net.spec.groups["w"]] == ["b", "v", "w"]
    assert not net.spec.scaling and not net.spec.rigid
