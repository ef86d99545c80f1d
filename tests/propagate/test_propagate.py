"""Groups found in whole networks: right ones, all of them, and none that is no symmetry."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from helpers import change, infer, normal, randomised
from vfjax.symmetry import PermutationSpec

IMAGES = normal(1, 2, 16, 16, 3)
TOKENS = jnp.arange(14).reshape(2, 7)


def init(model, x):
    return randomised(jax.eval_shape(model.init, jax.random.key(0), x))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in (12, 10, 14):
            x = nn.relu(nn.Dense(n)(x))
        return nn.log_softmax(nn.Dense(5)(x))


class VGG(nn.Module):
    norm: str = "none"
    pool: str = "mean"
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for n in (4, "M", 6, 5, "M", 8):
            if n == "M":
                x = nn.max_pool(x, (2, 2), (2, 2))
                continue
            x = nn.Conv(n, (3, 3))(x)
            if self.norm == "batch":
                x = nn.BatchNorm(use_running_average=not self.train)(x)
            if self.norm == "layer":
                x = nn.LayerNorm()(x)
            x = nn.relu(x)
        x = x.mean((1, 2)) if self.pool == "mean" else x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(9)(x))
        return nn.Dense(5)(x)


class Block(nn.Module):
    """A residual block of two or three convolutions; the shortcut projects where shapes differ."""

    features: int
    stride: int = 1
    norm: str = "batch"
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(name):
            if self.norm == "batch":
                return nn.BatchNorm(use_running_average=True, name=name)
            return nn.LayerNorm(name=name)

        def conv(n, size, stride, name):
            return nn.Conv(n, (size, size), (stride, stride), use_bias=False, name=name)

        out = self.features * (4 if self.bottleneck else 1)
        plan = [(self.features, 3, self.stride), (out, 3, 1)]
        if self.bottleneck:
            plan = [(self.features, 1, 1), (self.features, 3, self.stride), (out, 1, 1)]
        y = x
        for k, (n, size, stride) in enumerate(plan, start=1):
            y = norm(f"norm{k}")(conv(n, size, stride, f"conv{k}")(nn.relu(y) if k > 1 else y))
        if x.shape != y.shape:
            x = norm("sc_norm")(conv(out, 1, self.stride, "sc_conv")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    depths: tuple[int, ...] = (3, 3, 3)
    norm: str = "batch"
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv1")(x)
        x = nn.BatchNorm(True, name="norm1")(x) if self.norm == "batch" else nn.LayerNorm()(x)
        x = nn.relu(x)
        for g, depth in enumerate(self.depths):
            for b in range(depth):
                stride = 2 if g and not b else 1
                width = 4 * 2**g
                name = f"bg{g}_b{b}"
                x = Block(width, stride, self.norm, self.bottleneck, name=name)(x)
        return nn.Dense(5, name="dense")(x.mean((1, 2)))


class Transformer(nn.Module):
    fused: bool = False

    @nn.compact
    def __call__(self, ids):
        d, h = 12, 2
        x = nn.Embed(20, d)(ids) + self.param("pos", nn.initializers.normal(), (1, ids.shape[1], d))
        y = nn.LayerNorm()(x)
        if self.fused:
            qkv = nn.Dense(3 * d, name="qkv")(y).reshape(*y.shape[:2], 3, h, d // h)
            q, k, v = jnp.moveaxis(qkv, 2, 0)
            a = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
            y = nn.Dense(d, name="out")(jnp.einsum("bhqk,bkhd->bqhd", a, v).reshape(y.shape))
        else:
            y = nn.MultiHeadDotProductAttention(num_heads=h, name="attention")(y)
        x = x + y
        y = nn.gelu(nn.Dense(14, name="up")(nn.LayerNorm()(x)))
        x = x + nn.Dense(d, name="down")(y)
        return nn.Dense(20, name="head")(nn.LayerNorm()(x).mean(1))


class Mixed(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3))(x))
        if self.kind == "depthwise":
            x = nn.Conv(12, (3, 3), feature_group_count=12)(x)
        if self.kind == "multiplied":
            x = nn.Conv(24, (3, 3), feature_group_count=12)(x)
        if self.kind == "grouped":
            x = nn.Conv(24, (3, 3), feature_group_count=3)(x)
        if self.kind == "groupnorm":
            x = nn.GroupNorm(num_groups=4)(x)
        if self.kind == "concatenated":
            x = jnp.concatenate([x, nn.Conv(8, (3, 3))(x)], axis=-1)
        return nn.Dense(5)(nn.relu(nn.Conv(6, (1, 1))(nn.relu(x))).mean((1, 2)))


def dense(i, last=False, name="params/Dense_{}"):
    """Places of the group that dense layer i writes and layer i + 1 reads."""
    this, after = name.format(i), name.format(i + 1)
    return [(f"{this}/kernel", 1, "out"), (f"{this}/bias", 0), (f"{after}/kernel", 0, "in")]


def batch_norm(name):
    places = [(f"params/{name}/{leaf}", 0) for leaf in ("scale", "bias")]
    return places + [(f"batch_stats/{name}/{leaf}", 0) for leaf in ("mean", "var")]


def conv(name, reads=None, writes=None, groups=None):
    if reads is not None:
        groups.setdefault(reads, []).append((f"params/{name}/kernel", 2, "in"))
    groups.setdefault(writes, []).append((f"params/{name}/kernel", 3, "out"))


def known_resnet(depths, per_block):
    """Git Re-Basin's structure: one group per residual stream, and those inside each block."""
    groups = {}
    conv("conv1", None, "first", groups)
    groups["first"] += batch_norm("norm1")
    stream = "first"
    for g, depth in enumerate(depths):
        for b in range(depth):
            block, projects = f"bg{g}_b{b}", b == 0 and (g > 0 or per_block == 3)
            after = f"stream{g}" if projects else stream
            path = [stream, *(f"{block}.{k}" for k in range(1, per_block)), after]
            for k in range(1, per_block + 1):
                conv(f"{block}/conv{k}", path[k - 1], path[k], groups)
                groups[path[k]] += batch_norm(f"{block}/norm{k}")
            if projects:
                conv(f"{block}/sc_conv", stream, after, groups)
                groups[after] += batch_norm(f"{block}/sc_norm")
            stream = after
    groups[stream].append(("params/dense/kernel", 0, "in"))
    return PermutationSpec(groups)


def test_mlp_agrees_with_the_known_spec():
    model, x = MLP(), IMAGES.reshape(2, -1)
    spec = infer(model.apply, init(model, x), x)
    assert spec == PermutationSpec({f"h{i}": dense(i) for i in range(3)})
    assert list(spec.groups) == [f"params/Dense_{i}" for i in range(3)]
    assert list(spec.sizes.values()) == [12, 10, 14]
    causes = {(f.path, f.axis): f.primitive for f in spec.fixed}
    assert causes == {
        ("params/Dense_0/kernel", 0): "input",
        ("params/Dense_3/kernel", 1): "output",
        ("params/Dense_3/bias", 0): "output",
    }


@pytest.mark.parametrize("pool", ["mean", "flatten"])
def test_vgg_agrees_with_the_known_spec(pool):
    model = VGG("batch", pool)
    spec = infer(model.apply, init(model, IMAGES), IMAGES)
    groups = {}
    for i in range(4):
        conv(f"Conv_{i}", i - 1 if i else None, i, groups)
        groups[i] += [(f"params/Conv_{i}/bias", 0), *batch_norm(f"BatchNorm_{i}")]
    # Flattening leaves a 4x4 map in front of the channels.
    outer = 1 if pool == "mean" else 16
    groups[3].append(("params/Dense_0/kernel", 0, "in", outer, 1))
    groups[4] = dense(0)
    assert spec == PermutationSpec(groups)
    assert list(spec.groups) == [*(f"params/Conv_{i}" for i in range(4)), "params/Dense_0"]


def test_resnet20_agrees_with_the_known_spec():
    model = ResNet()
    spec = infer(model.apply, init(model, IMAGES), IMAGES)
    assert len(spec.groups) == 12  # three streams and nine inside blocks
    assert spec == known_resnet((3, 3, 3), 2)


def test_bottleneck_resnet_agrees_with_the_known_spec():
    model = ResNet((3, 4, 6, 3), bottleneck=True)  # the blocks of ResNet50
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    spec = infer(model.apply, variables, IMAGES)
    assert len(spec.groups) == 1 + 4 + 2 * 16
    assert spec == known_resnet((3, 4, 6, 3), 3)


LINEN = {
    "mlp": (MLP(), IMAGES.reshape(2, -1), [12, 10, 14]),
    "vgg": (VGG(), IMAGES, [4, 6, 5, 8, 9]),
    "vgg flatten": (VGG(pool="flatten"), IMAGES, [4, 6, 5, 8, 9]),
    "vgg batch norm": (VGG("batch"), IMAGES, [4, 6, 5, 8, 9]),
    "vgg layer norm": (VGG("layer", "flatten"), IMAGES, [4, 6, 5, 8, 9]),
    "resnet batch norm": (ResNet(), IMAGES, [4] * 4 + [8] * 4 + [16] * 4),
    "resnet layer norm": (ResNet((1, 2), "layer"), IMAGES, [4, 4, 8, 8, 8]),
    "transformer": (Transformer(), TOKENS, [12, 2, 6, 6, 14]),
    "transformer fused": (Transformer(True), TOKENS, [12, 2, 6, 6, 14]),
    "depthwise": (Mixed("depthwise"), IMAGES, [12, 6]),
    "multiplied": (Mixed("multiplied"), IMAGES, [12, 2, 6]),
    "grouped": (Mixed("grouped"), IMAGES, [3, 4, 8, 6]),
    "groupnorm": (Mixed("groupnorm"), IMAGES, [4, 3, 6]),
    "concatenated": (Mixed("concatenated"), IMAGES, [12, 8, 6]),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_networks_are_invariant(name):
    model, x, sizes = LINEN[name]
    variables = init(model, x)
    spec = infer(model.apply, variables, x)
    assert sorted(spec.sizes.values()) == sorted(sizes), spec
    # Sums in another order: float32 rounding, some ten layers deep.
    assert change(model.apply, variables, x, spec) < 1e-5


def test_batch_norm_in_training_mode_is_invariant():
    model = VGG("batch", train=True)
    variables = init(model, IMAGES)

    def apply(v, x):
        return model.apply(v, x, mutable=["batch_stats"])[0]

    spec = infer(apply, variables, IMAGES)
    # The running statistics are not read, so no group has them.
    assert not any("batch_stats" in a.path for axes in spec.groups.values() for a in axes)
    assert {f.primitive for f in spec.fixed if "batch_stats" in f.path} == {"unused"}
    assert sorted(spec.sizes.values()) == [4, 5, 6, 8, 9]
    assert change(apply, variables, IMAGES, spec) < 1e-4  # variances of 2 examples, squared


def test_attention_has_heads_and_two_inner_dimensions():
    model = Transformer()
    spec = infer(model.apply, jax.eval_shape(model.init, jax.random.key(0), TOKENS), TOKENS)
    attention = "params/attention"
    assert list(spec.groups) == [
        "params/Embed_0",
        f"{attention}/query:heads",
        f"{attention}/query:dims",
        f"{attention}/value:dims",
        "params/up",
    ]
    dims = {(a.path, a.axis) for a in spec.groups[f"{attention}/query:dims"]}
    assert dims == {
        (f"{attention}/{part}/{leaf}", axis)
        for part in ("query", "key")
        for leaf, axis in (("kernel", 2), ("bias", 1))
    }
    roles = {(a.path, a.axis): a.role for a in spec.groups[f"{attention}/value:dims"]}
    assert roles[f"{attention}/value/kernel", 2] == "out"
    assert roles[f"{attention}/out/kernel", 1] == "in"


def test_grouped_convolution_names_and_blocks():
    model = Mixed("grouped")
    spec = infer(model.apply, jax.eval_shape(model.init, jax.random.key(0), IMAGES), IMAGES)
    names = ["params/Conv_0:groups", "params/Conv_0:channels", "params/Conv_1", "params/Conv_2"]
    assert list(spec.groups) == names
    places = {(a.path, a.axis): a for a in spec.groups["params/Conv_0:groups"]}
    assert places["params/Conv_0/kernel", 3][2:5] == ("out", 1, 4)
    # Groups are no matrix product, so exchanging them is neither "out" nor "in" here.
    assert places["params/Conv_1/kernel", 3][2:5] == ("elementwise", 1, 8)
