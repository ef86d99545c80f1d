"""Axes made of segments: networks that concatenate, split, slice and pad channels."""

from __future__ import annotations

import types
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from helpers import normal
from vfjax._analysis import from_propagation
from vfjax._jaxpr import flatten
from vfjax._propagate import propagate
from vfjax._propagate.algebra import Algebra
from vfjax._propagate.atoms import Cause
from vfjax._trees import leaf_paths
from vfjax.symmetry import Axis, PermutationSpec, check_spec

IMAGES = normal(1, 2, 8, 8, 3)
TOKENS = normal(2, 2, 5, 4)
HEADS, DIMS = 2, 3
WIDTH = HEADS * DIMS
CAUSE = Cause("test")


def infer(fn, variables, x):
    leaves, treedef = jax.tree.flatten(variables)
    closed = jax.make_jaxpr(lambda *a: fn(jax.tree.unflatten(treedef, a[:-1]), a[-1]))(*leaves, x)
    return from_propagation(propagate(flatten(closed, len(leaves))), leaf_paths(variables))[0]


def randomised(variables):
    """Random numbers in every leaf; variances are positive."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape) * 0.5
        return jnp.asarray(np.abs(noise) + 0.5 if "var" in name else noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, variables)


def init(model, x):
    return randomised(jax.eval_shape(model.init, jax.random.key(0), x))


def drawn(**shapes):
    return randomised({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})


def change(fn, variables, x, spec, key=0):
    """Largest change of the output under random permutations, relative to its size."""
    fn = jax.jit(fn)
    net = types.SimpleNamespace(spec=spec, run=fn)
    size = float(jnp.abs(fn(variables, x)).max())
    return check_spec(net, variables, x, key=jax.random.key(key)) / size


def segment(path, axis, start, size, role="elementwise"):
    return (path, axis, role, 1, 1, ((1, start, size, 1),))


class DenseNet(nn.Module):
    """Two blocks whose layers read everything before them, and a transition between them."""

    @nn.compact
    def __call__(self, x):
        def norm(name, x):
            return nn.relu(nn.BatchNorm(use_running_average=True, name=name)(x))

        def conv(name, n, x, size=3):
            return nn.Conv(n, (size, size), use_bias=False, name=name)(x)

        x = conv("stem", 5, x)
        for k in range(2):
            x = jnp.concatenate([x, conv(f"a{k}", 3, norm(f"norm_a{k}", x))], axis=-1)
        x = nn.avg_pool(conv("transition", 4, norm("norm_t", x), 1), (2, 2), (2, 2))
        y = conv("b0", 3, norm("norm_b", x))
        x = norm("norm", jnp.concatenate([y, x], axis=-1))  # newest first, as some have it
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_densenet_agrees_with_the_known_spec():
    model = DenseNet()
    variables = init(model, IMAGES)
    spec = infer(model.apply, variables, IMAGES)
    sizes = {"stem": 5, "a0": 3, "a1": 3, "transition": 4, "b0": 3}
    groups = {name: [(f"params/{name}/kernel", 3, "out")] for name in sizes}

    def reads(names, kernel, axis, norm):
        start = 0
        for name in names:
            size = sizes[name]
            places = [(f"params/{kernel}/kernel", axis, "in")]
            places += [(f"params/{norm}/{leaf}", 0, "elementwise") for leaf in ("scale", "bias")]
            places += [(f"batch_stats/{norm}/{leaf}", 0, "elementwise") for leaf in ("mean", "var")]
            for path, k, role in places:
                place = segment(path, k, start, size, role) if len(names) > 1 else (path, k, role)
                groups[name].append(place)
            start += size

    reads(["stem"], "a0", 2, "norm_a0")
    reads(["stem", "a0"], "a1", 2, "norm_a1")
    reads(["stem", "a0", "a1"], "transition", 2, "norm_t")
    reads(["transition"], "b0", 2, "norm_b")
    reads(["b0", "transition"], "head", 0, "norm")
    assert spec == PermutationSpec(groups)
    assert spec.sizes == {f"params/{name}": size for name, size in sizes.items()}
    assert change(model.apply, variables, IMAGES, spec) < 1e-5


class PaddedResNet(nn.Module):
    """Shortcuts of option A: strided, and padded with zeros where channels double."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for k, (n, stride) in enumerate([(4, 1), (8, 2), (8, 1)]):
            y = nn.relu(nn.Conv(n, (3, 3), (stride, stride), name=f"in{k}")(x))
            y = nn.Conv(n, (3, 3), name=f"out{k}")(y)
            if stride == 2:
                x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (n // 4, n // 4)))
            x = nn.relu(x + y)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_resnet_with_padded_shortcuts_agrees_with_the_known_spec():
    model = PaddedResNet()
    variables = init(model, IMAGES)
    spec = infer(model.apply, variables, IMAGES)

    def inner(k):
        kernels = [(f"params/in{k}/kernel", 3, "out"), (f"params/out{k}/kernel", 2, "in")]
        return [*kernels, (f"params/in{k}/bias", 0)]

    writes, reads = ["out1", "out2"], [("in2", 2), ("head", 0)]

    def wide(start, size):
        """The segment in the stream of 8 channels."""
        places = [segment(f"params/{name}/kernel", 3, start, size, "out") for name in writes]
        places += [segment(f"params/{name}/bias", 0, start, size) for name in writes]
        return places + [segment(f"params/{n}/kernel", k, start, size, "in") for n, k in reads]

    narrow = [(f"params/{name}/kernel", 3, "out") for name in ("stem", "out0")]
    narrow += [(f"params/{name}/bias", 0) for name in ("stem", "out0")]
    narrow += [(f"params/{name}/kernel", 2, "in") for name in ("in0", "in1")]
    groups = {"stream": narrow + wide(2, 4), "low": wide(0, 2), "high": wide(6, 2)}
    assert spec == PermutationSpec({**groups, **{f"in{k}": inner(k) for k in range(3)}})
    assert list(spec.groups)[:4] == ["params/stem", "params/in0", "params/in1", "params/out1:0"]
    assert change(model.apply, variables, IMAGES, spec) < 1e-5


def heads_of(x):
    return x.reshape(*x.shape[:-1], HEADS, -1)


FUSED = {  # how queries, keys and values come out of one kernel
    "split": lambda y: [heads_of(p) for p in jnp.split(y, 3, axis=-1)],
    "sliced": lambda y: [heads_of(y[..., k * WIDTH : (k + 1) * WIDTH]) for k in range(3)],
    "three outermost": lambda y: list(
        jnp.moveaxis(y.reshape(*y.shape[:-1], 3, HEADS, DIMS), -3, 0)
    ),
    "permuted": lambda y: [
        jnp.swapaxes(p, 1, 2)
        for p in jnp.transpose(y.reshape(*y.shape[:-1], 3, HEADS, DIMS), (2, 0, 3, 1, 4))
    ],
    "indexed": lambda y: [y.reshape(*y.shape[:-1], 3, HEADS, DIMS)[..., k, :, :] for k in range(3)],
    "unflattened in steps": lambda y: [
        heads_of(p) for p in jnp.unstack(y.reshape(*y.shape[:-1], 3, WIDTH), axis=-2)
    ],
    "split in heads": lambda y: jnp.split(heads_of(y), 3, axis=-1),
    "indexed in heads": lambda y: [
        y.reshape(*y.shape[:-1], HEADS, 3, DIMS)[..., k, :] for k in range(3)
    ],
}


def fused_transformer(how):
    """A pre-norm block on a fused kernel, in plain JAX."""

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def apply(p, x):
        x = x @ p["embed"]
        query, key, value = FUSED[how](norm(x) @ p["qkv"] + p["bias"][None, None])
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / DIMS**0.5)
        out = jnp.einsum("bhqk,bkhd->bqhd", scores, value)
        x = x + out.reshape(*out.shape[:2], WIDTH) @ p["out"]
        x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
        return x.mean(1) @ p["head"]

    shapes = {"embed": (4, 7), "qkv": (7, 3 * WIDTH), "bias": (3 * WIDTH,), "out": (WIDTH, 7)}
    return apply, drawn(**shapes, up=(7, 8), down=(8, 7), head=(7, 2))


@pytest.mark.parametrize("how", FUSED)
def test_fused_attention_agrees_with_the_known_spec(how):
    apply, variables = fused_transformer(how)
    spec = infer(apply, variables, TOKENS)
    heads, dims = [("out", 0, "in", 1, DIMS)], {"q": [], "v": [("out", 0, "in", HEADS, 1)]}
    for path, axis, role in (("qkv", 1, "out"), ("bias", 0, "elementwise")):
        if "in heads" in how:
            heads.append((path, axis, role, 1, 3 * DIMS))
        for k, name in enumerate("qqv"):
            if "in heads" in how:
                window = ((HEADS, k * DIMS, DIMS, 1),)
                dims[name].append((path, axis, role, 1, 1, window))
            else:
                window = ((1, k * WIDTH, WIDTH, 1),)
                heads.append((path, axis, role, 1, DIMS, window))
                dims[name].append((path, axis, role, HEADS, 1, window))
    stream = [("embed", 1, "out"), ("qkv", 0, "in"), ("out", 1, "out"), ("up", 0, "in")]
    groups = {"stream": [*stream, ("down", 1, "out"), ("head", 0, "in")], "heads": heads}
    groups |= {"mlp": [("up", 1, "out"), ("down", 0, "in")], **dims}
    assert spec == PermutationSpec(groups)
    assert [(name, spec.sizes[name]) for name in spec.groups] == [
        ("embed", 7),
        ("qkv:heads", HEADS),
        ("qkv:dims", DIMS),
        ("qkv:dims#2", DIMS),
        ("up", 8),
    ]
    assert max(change(apply, variables, TOKENS, spec, key) for key in range(3)) < 1e-5


def test_what_looks_at_all_three_ties_their_dims():
    """Queries, keys and values that are summed, scaled or normalised alike have one group."""

    def applied(together):
        def apply(p, x):
            y = together((x @ p["qkv"]).reshape(*x.shape[:-1], 3, HEADS, DIMS))
            query, key, value = y[..., 0, :, :], y[..., 1, :, :], y[..., 2, :, :]
            scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
            return jnp.einsum("bhqk,bkhd->bqhd", scores, value).mean((1, 2)) @ p["out"]

        return apply

    scale = np.linspace(1, 2, DIMS, dtype=np.float32).reshape(1, 1, 1, 1, -1)
    variables = drawn(qkv=(4, 3 * WIDTH), out=(DIMS, 2))
    for together, sizes in (
        (lambda y: jnp.tanh(y), [2, 3, 3]),
        (lambda y: y - y.mean(-3, keepdims=True), [2, 3]),
        (lambda y: y * scale, [2]),  # dims that differ, in all three
    ):
        apply = applied(together)
        spec = infer(apply, variables, TOKENS)
        assert sorted(spec.sizes.values()) == sizes, spec
        assert max(change(apply, variables, TOKENS, spec, key) for key in range(3)) < 1e-5


def conv(x, kernel, groups=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups
    )


def test_grouped_convolution_after_a_concatenation():
    def apply(p, x):
        h = jnp.concatenate([jnp.tanh(conv(x, p["a"])), jnp.tanh(conv(x, p["b"]))], axis=-1)
        return jnp.tanh(conv(h, p["grouped"], 5)).mean((1, 2)) @ p["head"]

    variables = drawn(a=(3, 3, 3, 4), b=(3, 3, 3, 6), grouped=(3, 3, 2, 15), head=(15, 2))
    spec = infer(apply, variables, IMAGES)
    # Two channels in each group, alike in all: 2 groups of `a`, 3 of `b`, 3 channels out of each.
    first, second = ((1, 0, 6, 1),), ((1, 6, 9, 1),)
    assert spec == PermutationSpec(
        {
            "a groups": [
                ("a", 3, "out", 1, 2),
                ("grouped", 3, "elementwise", 1, 3, first),
                ("head", 0, "in", 1, 3, first),
            ],
            "b groups": [
                ("b", 3, "out", 1, 2),
                ("grouped", 3, "elementwise", 1, 3, second),
                ("head", 0, "in", 1, 3, second),
            ],
            "in": [("a", 3, "out", 2, 1), ("b", 3, "out", 3, 1), ("grouped", 2, "in")],
            "out": [
                ("grouped", 3, "out", 2, 1, first),
                ("grouped", 3, "out", 3, 1, second),
                ("head", 0, "in", 2, 1, first),
                ("head", 0, "in", 3, 1, second),
            ],
        }
    )
    assert max(change(apply, variables, IMAGES, spec, key) for key in range(3)) < 1e-5


def test_channel_shuffle_between_grouped_convolutions():
    def apply(p, x):
        h = jnp.tanh(conv(jnp.tanh(conv(x, p["stem"])), p["first"], 3))
        h = h.reshape(*h.shape[:-1], 3, 4).swapaxes(-1, -2).reshape(h.shape)
        h = jnp.tanh(conv(h, p["depthwise"], 12))
        return conv(h, p["second"], 4).mean((1, 2)) @ p["head"]

    shapes = {"stem": (3, 3, 3, 6), "first": (1, 1, 2, 12), "depthwise": (3, 3, 1, 12)}
    variables = drawn(**shapes, second=(1, 1, 3, 8), head=(8, 2))
    spec = infer(apply, variables, IMAGES)
    # The 4 channels of each of 3 groups become 4 groups of 3 channels.
    assert sorted(spec.sizes.values()) == [2, 2, 3, 4], spec
    assert max(change(apply, variables, IMAGES, spec, key) for key in range(3)) < 1e-5


def test_depthwise_and_pointwise_convolutions():
    def apply(p, x):  # MobileNet's inverted residual, and ConvNeXt's layer scale
        x = conv(x, p["stem"])
        h = jax.nn.relu(conv(x, p["expand"]))
        h = jax.nn.relu(conv(h, p["depthwise"], h.shape[-1]))
        x = x + conv(h, p["project"]) * p["scale"][None, None, None]
        return x.mean((1, 2)) @ p["head"]

    shapes = {"stem": (3, 3, 3, 4), "expand": (1, 1, 4, 9), "depthwise": (3, 3, 1, 9)}
    variables = drawn(**shapes, project=(1, 1, 9, 4), scale=(4,), head=(4, 2))
    spec = infer(apply, variables, IMAGES)
    stream = [("stem", 3, "out"), ("expand", 2, "in"), ("project", 3, "out"), ("scale", 0)]
    inner = [("expand", 3, "out"), ("depthwise", 3), ("project", 2, "in")]
    assert spec == PermutationSpec({"stream": [*stream, ("head", 0, "in")], "inner": inner})
    assert change(apply, variables, IMAGES, spec) < 1e-5


N = 6
WHOLE = {  # what is done to 6 hidden features, and the sizes of the groups of the first layer
    "concatenated twice": (lambda h: jnp.concatenate([h, 2 * h], axis=1), [6]),
    "sliced": (lambda h: h[:, 1:5], [4]),
    "halves": (lambda h: jnp.split(h, 2, axis=1)[1], [3, 3]),
    "halves that meet": (lambda h: jnp.multiply(*jnp.split(h, 2, axis=1)), [3]),
    "cropped and padded": (lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0))), [5]),
    "halves that change places": (lambda h: jnp.roll(h, 3, axis=1), [3, 3]),
    "overlapping slices": (lambda h: h[:, :4] + h[:, 2:], [2]),
    "another boundary": (
        lambda h: h + jnp.concatenate([jnp.ones((len(h), 1)), jnp.zeros((len(h), 5))], axis=1),
        [5],
    ),
    "parts of factors": (lambda h: h.reshape(-1, 2, 3)[:, :1].reshape(-1, 3), [3, 3]),
    "inner factors": (lambda h: h.reshape(-1, 3, 2)[:, :, :1].reshape(-1, 3), [3]),
    "transposed factors": (lambda h: h.reshape(-1, 2, 3).mT.reshape(-1, 6)[:, :2], [2, 2]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_segments_of_a_layer(name):
    op, sizes = WHOLE[name]
    rows = jax.eval_shape(op, jnp.zeros((5, N))).shape[-1]
    variables = drawn(w=(4, N), b=(1, N), v=(rows, 3))

    def apply(p, x):
        return op(x @ p["w"] + p["b"]) @ p["v"]

    x = TOKENS[0]
    spec = infer(apply, variables, x)
    found = [n for g, n in spec.sizes.items() if any(a.path == "w" for a in spec.groups[g])]
    assert sorted(found) == sizes, spec
    assert max(change(apply, variables, x, spec, key) for key in range(3)) < 1e-5


def test_sums_are_refined_to_common_boundaries():
    algebra = Algebra()
    parts = [algebra.atom(n) for n in (4, 8, 6, 6)]
    left, right = (algebra.total([[a], [b]]) for a, b in (parts[:2], parts[2:]))
    algebra.unify(left, right, CAUSE)
    sizes = [[algebra.size(p.atom) for p in algebra.places(axis)] for axis in (left, right)]
    assert sizes == [[4, 2, 6], [4, 2, 6]]
    pairs = zip(algebra.places(left), algebra.places(right), strict=True)
    assert all(algebra.find(p.atom) == algebra.find(q.atom) for p, q in pairs)
    assert not algebra.causes(left)[:-1]  # but that the first part was cut nothing is to blame


def test_a_sum_meets_a_product():
    algebra = Algebra()
    parts = [algebra.atom(n) for n in (4, 8)]
    rows, columns = algebra.atom(6), algebra.atom(2)
    algebra.unify(algebra.total([[k] for k in parts]), [rows, columns], CAUSE)
    sizes = [[algebra.size(p.atom) for p in algebra.places([k])] for k in (*parts, rows)]
    assert sizes == [[2, 2], [4, 2], [2, 4]]
    inner = {algebra.find(algebra.places([k])[-1].atom) for k in (*parts, columns)}
    assert len(inner) == 1
    # Neither boundary lies on the other's: nothing is in common.
    parts, whole = [algebra.atom(n) for n in (5, 7)], [algebra.atom(6), algebra.atom(2)]
    algebra.unify(algebra.total([[k] for k in parts]), whole, CAUSE)
    assert all(algebra.cause(p.atom) == CAUSE for k in parts for p in algebra.places([k]))
    assert all(algebra.cause(p.atom) == CAUSE for p in algebra.places(whole))


def test_places_are_nested_windows():
    algebra = Algebra()
    low, dims, high = algebra.atom(2), algebra.atom(3), algebra.atom(5)
    axis = [algebra.atom(4), *algebra.total([[low, dims], [high]])]
    (_, *outer), *rest = algebra.places(axis)
    assert outer == [1, 11, ()]
    assert [tuple(p)[1:] for p in rest] == [
        (1, 3, ((4, 0, 6, 1),)),
        (2, 1, ((4, 0, 6, 1),)),
        (1, 1, ((4, 6, 5, 1),)),
    ]
    # A segment that is divided later leaves the windows flat.
    algebra.divide([high], [2], CAUSE)
    assert [p.windows for p in algebra.places(axis)[-2:]] == [((4, 6, 2, 1),), ((4, 8, 3, 1),)]


def test_printed_places():
    assert str(Axis("w", 1, "out", 1, 1, ((1, 4, 3, 1),))) == "w[1][4:7] out"
    assert str(Axis("w", 0, "in", 2, 3, ((2, 0, 6, 5),))) == "w[0](2,0:6,5)(2,n,3) in"
