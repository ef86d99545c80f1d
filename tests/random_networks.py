"""Random networks, made of operations: each takes features, a number and what makes leaves.

Features are `[examples, ...]`. The number chooses between variants and axes; which symmetries a
variant has is what the networks are to show.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH, LARGEST = 3, 400
OPERATIONS = {}


def operation(fn):
    OPERATIONS[fn.__name__] = fn
    return fn


def along(h, n):
    """An axis of h other than the batch."""
    return 1 + n % (h.ndim - 1)


def shaped(h, axis):
    """The shape of a leaf that varies along one axis only."""
    return tuple(h.shape[k] if k == axis else 1 for k in range(h.ndim))


@operation
def dense(h, n, leaf):
    return h @ leaf((h.shape[-1], (4, 6, 12)[n % 3]))


@operation
def dense_out_in(h, n, leaf):
    axis = along(h, n)
    return jnp.moveaxis(jnp.tensordot(leaf((6, h.shape[axis])), h, axes=(1, axis)), 0, axis)


@operation
def bias(h, n, leaf):
    return h + leaf(shaped(h, along(h, n)))


@operation
def embed(h, n, leaf):
    """A shift that varies along all axes, as that of positions."""
    return h + leaf((1, *h.shape[1:]))


@operation
def scale(h, n, leaf):
    return h * leaf(shaped(h, along(h, n)))


@operation
def activation(h, n, leaf):
    return (jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.silu, jnp.sin, jnp.square)[n % 6](h)


@operation
def gate(h, n, leaf):
    return h * jax.nn.sigmoid(h @ leaf((h.shape[-1], h.shape[-1])))


@operation
def residual(h, n, leaf):
    inner = jnp.tanh(h @ leaf((h.shape[-1], 5)))
    return h + inner @ leaf((5, h.shape[-1]))


@operation
def softmax(h, n, leaf):
    return jax.nn.softmax(h, axis=along(h, n))


@operation
def norm(h, n, leaf):
    axis = along(h, n)
    h = h - h.mean(axis, keepdims=True)
    return h / jnp.sqrt(1e-3 + (h * h).mean(axis, keepdims=True)) * leaf(shaped(h, axis))


@operation
def attention(h, n, leaf):
    flat = h.reshape(BATCH, h.shape[1], -1)
    query, key = (flat @ leaf((flat.shape[-1], 4)) for _ in range(2))
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, key))
    return jnp.einsum("bqk,bkd->bqd", scores, flat).reshape(h.shape)


@operation
def convolution(h, n, leaf):
    flat = h.reshape(BATCH, -1, h.shape[-1])
    channels = flat.shape[-1]
    options = [g for g in (1, 2, 3, channels) if channels % g == 0]
    groups = options[(n % 2 + n % 3 - 1) % len(options)]
    kernel = leaf((3, channels // groups, 2 * groups))
    dims = ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(
        flat, kernel, (1,), "SAME", dimension_numbers=dims, feature_group_count=groups
    )


@operation
def pool(h, n, leaf):
    axis = along(h, n)
    window = shaped(np.broadcast_to(2, (2,) * h.ndim), axis)
    return lax.reduce_window(h, -jnp.inf, lax.max, window, window, "SAME")


@operation
def split_axis(h, n, leaf):
    axis, factor = along(h, n), (2, 3)[n // 3 % 2]
    if h.shape[axis] % factor or h.ndim > 3:
        return h
    return h.reshape(*h.shape[:axis], factor, -1, *h.shape[axis + 1 :])


@operation
def merge_axes(h, n, leaf):
    return h.reshape(BATCH, -1, *h.shape[3:]) if n % 2 else h.reshape(BATCH, -1)


@operation
def across_examples(h, n, leaf):
    return jnp.tanh(h.reshape(-1, BATCH)).reshape(h.shape)


@operation
def transpose(h, n, leaf):
    return jnp.swapaxes(h, along(h, n), -1)


@operation
def reduce(h, n, leaf):
    return (jnp.mean, jnp.max)[n // 2 % 2](h, axis=along(h, n), keepdims=h.ndim < 3)


@operation
def centre(h, n, leaf):
    return h - jnp.maximum(h, 0.1).mean(along(h, n), keepdims=True)


@operation
def reverse(h, n, leaf):
    return jnp.flip(h, along(h, n))


@operation
def cumulate(h, n, leaf):
    return jnp.cumsum(h, axis=along(h, n))


@operation
def sort(h, n, leaf):
    return jnp.sort(h, axis=along(h, n))


@operation
def drop_first(h, n, leaf):
    axis = along(h, n)
    return lax.slice_in_dim(h, min(1, h.shape[axis] - 1), None, axis=axis)


@operation
def concatenate(h, n, leaf):
    return jnp.concatenate([h, jnp.cos(h)], axis=along(h, n))


@operation
def concatenate_layers(h, n, leaf):
    """As in a DenseNet: features, and those that a layer makes of them."""
    parts = [h, jnp.tanh(h @ leaf((h.shape[-1], 4)))]
    if n % 2:
        parts.append(parts[0] @ leaf((h.shape[-1], 3)))
    return jnp.concatenate(parts[::-1] if n % 3 else parts, axis=-1)


@operation
def split_and_gate(h, n, leaf):
    """As a gated linear unit; the parts may be of unequal size, and one may be dropped."""
    axis = along(h, n)
    size = h.shape[axis]
    cut = size // 2 if n % 2 else max(1, size // 3)
    first, second = jnp.split(h, [cut], axis=axis)
    if first.shape == second.shape:
        return first * jax.nn.sigmoid(second)
    return jnp.concatenate([jnp.sin(second), first], axis=axis) if n % 3 else second


@operation
def slices(h, n, leaf):
    axis = along(h, n)
    size = h.shape[axis]
    part = lax.slice_in_dim(h, size // 4, size - size // 4, axis=axis)
    return part + lax.slice_in_dim(h, 0, part.shape[axis], axis=axis) if n % 2 else part


@operation
def pad(h, n, leaf):
    config = [(0, 0, 0)] * h.ndim
    config[along(h, n)] = [(1, 2, 0), (2, 0, 0), (-1, 1, 0), (0, 1, 1)][n % 4]
    return lax.pad(h, jnp.asarray(0.5, h.dtype), config)


@operation
def padded_shortcut(h, n, leaf):
    """As option A of a ResNet: the shortcut's new channels are zero."""
    wide = jnp.tanh(h @ leaf((h.shape[-1], h.shape[-1] + 3)))
    return wide + jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(1, 2)])


@operation
def mix_parts(h, n, leaf):
    """A residual layer after a concatenation of parts of other sizes."""
    size = h.shape[-1]
    parts = [h @ leaf((size, k)) for k in (size // 3, size - size // 3)]
    return h + jnp.concatenate(parts, axis=-1) if parts[0].size else h


@operation
def depthwise_pointwise(h, n, leaf):
    flat = h.reshape(BATCH, -1, h.shape[-1])
    channels, dims = flat.shape[-1], ("NHC", "HIO", "NHC")
    flat = lax.conv_general_dilated(
        flat,
        leaf((3, 1, channels)),
        (1,),
        "SAME",
        dimension_numbers=dims,
        feature_group_count=channels,
    )
    return flat @ leaf((channels, 6))


@operation
def shuffle(h, n, leaf):
    """The channel shuffle between grouped convolutions."""
    groups = (2, 3)[n % 2]
    if h.shape[-1] % groups:
        return h
    parts = h.reshape(*h.shape[:-1], groups, -1)
    return jnp.swapaxes(parts, -1, -2).reshape(h.shape)


@operation
def fused_attention(h, n, leaf):
    """Queries, keys and values of one kernel, in the orders that libraries use."""
    heads, dims = 2, 3
    flat = h.reshape(BATCH, -1, h.shape[-1])
    fused = flat @ leaf((flat.shape[-1], 3 * heads * dims)) + leaf((1, 1, 3 * heads * dims))
    if n == 0:
        parts = [p.reshape(*p.shape[:2], heads, dims) for p in jnp.split(fused, 3, axis=-1)]
    elif n in (1, 2):
        parts = fused.reshape(*flat.shape[:2], 3, heads, dims)
        parts = list(jnp.moveaxis(parts, 2, 0)) if n == 1 else [parts[:, :, k] for k in range(3)]
    elif n == 3:
        parts = jnp.split(fused.reshape(*flat.shape[:2], heads, 3 * dims), 3, axis=-1)
    elif n == 4:
        parts = fused.reshape(*flat.shape[:2], heads, 3, dims)
        parts = [parts[..., k, :] for k in range(3)]
    else:  # rank 3 after all, and two of the three summed
        parts = fused.reshape(*flat.shape[:2], 3, heads, dims)
        parts = [parts[:, :, 0], parts[:, :, 1], parts.sum(2)]
    query, key, value = parts
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    out = jnp.einsum("bhqk,bkhd->bqhd", scores, value)
    return out.reshape(*flat.shape[:2], heads * dims) @ leaf((heads * dims, 6))


@operation
def split_attention(h, n, leaf):
    """Attention with a kernel each, and the heads an axis of the kernels or not."""
    flat = h.reshape(BATCH, -1, h.shape[-1])
    if n % 2:
        parts = [jnp.einsum("btc,chd->bthd", flat, leaf((flat.shape[-1], 2, 3))) for _ in range(3)]
    else:
        parts = [flat @ leaf((flat.shape[-1], 6)) for _ in range(3)]
        parts = [p.reshape(*p.shape[:2], 2, 3) for p in parts]
    if n % 3 == 1:
        parts[0] = parts[0] * leaf((1, 1, 1, 3))  # a scale that the heads share
    if n % 3 == 2:
        parts[2] = jnp.einsum("bthd,hg->btgd", parts[2], leaf((2, 2)))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", parts[0], parts[1]))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, parts[2]).reshape(*flat.shape[:2], 6)


@operation
def tile(h, n, leaf):
    return jnp.tile(h, shaped(np.broadcast_to(2, (2,) * h.ndim), along(h, n)))


@operation
def repeat(h, n, leaf):
    return jnp.repeat(h, 2, axis=along(h, n))


@operation
def pick(h, n, leaf):
    axis = along(h, n)
    return jnp.take(h, jnp.arange(h.shape[axis] - 1, -1, -2), axis=axis)


@operation
def constant(h, n, leaf):
    shape = shaped(h, along(h, n))
    return h * (np.linspace(1, 2, np.prod(shape)).reshape(shape) if n % 2 else np.ones(h.shape))


@operation
def recur(h, n, leaf):
    rows = jnp.moveaxis(h, along(h, n), 0)
    weight = leaf((rows.shape[-1], rows.shape[-1]))

    def step(carry, row):
        carry = jnp.tanh(carry @ weight + row)
        return carry, carry

    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(rows[0]), rows)[1], 0, along(h, n))


@operation
def positions(h, n, leaf):
    """Copies of the features, at positions of their own."""
    return h[:, None] + leaf((1, 3, 1)) if h.ndim == 2 else h


@operation
def scatter_rows(h, n, leaf):
    axis = along(h, n)
    rows, places = jnp.moveaxis(h, axis, 0), np.arange(h.shape[axis])
    updates = jnp.sin(rows)
    some = places[: max(1, len(places) // 2)]
    written = [
        lambda: rows.at[places // 2].add(updates),
        lambda: rows.at[places // 2].multiply(updates),
        lambda: rows.at[places // 2].max(updates),
        lambda: rows.at[some].set(updates[some], unique_indices=True),
        lambda: rows.at[0].set(2.0),
        lambda: rows.at[: len(some)].set(0.5),
    ][n]
    return jnp.moveaxis(written(), 0, axis)


@operation
def scatter_under_vmap(h, n, leaf):
    """Each example writes where its number says, into what all or none of them share."""
    axis, places = along(h, n), np.arange(BATCH) % 2
    rows = jnp.moveaxis(h, axis, 1)
    if n < 3:
        wrote = jax.vmap(lambda a, k: a.at[k].set(jnp.cos(a[0])))(rows, places)
    else:
        wrote = jax.vmap(lambda a, k: lax.dynamic_update_index_in_dim(a, a[0] * 2, k, 0))(
            rows, places
        )
    return jnp.moveaxis(wrote, 1, axis)


@operation
def segments(h, n, leaf):
    axis = along(h, n)
    rows = jnp.moveaxis(h, axis, 0)
    reduced = (jax.ops.segment_sum, jax.ops.segment_max)[n // 2 % 2]
    found = reduced(rows, np.arange(len(rows)) // 2, (len(rows) + 1) // 2)
    return jnp.moveaxis(found, 0, axis)


@operation
def gather_under_vmap(h, n, leaf):
    axis = along(h, n)
    rows = jnp.moveaxis(h, axis, 1)
    places = (np.arange(BATCH * 2).reshape(BATCH, 2) * 5) % rows.shape[1]
    if n < 2:  # of one table
        picked = jax.vmap(jax.vmap(lambda k: rows[0, k]))(places)
    elif n < 4:
        picked = jax.vmap(lambda a, ks: jax.vmap(lambda k: a[k])(ks))(rows, places)
    else:
        index = places.reshape(*places.shape, *(1,) * (rows.ndim - 2))
        picked = jnp.take_along_axis(rows, index, axis=1)
    return jnp.moveaxis(picked, 1, axis)


@operation
def lookup(h, n, leaf):
    """A table that is read where the input says, or the features; as an array, or row by row."""
    table = leaf((5, h.shape[-1]))
    places = jnp.argmax(h.reshape(BATCH, -1) if n > 3 else leaf.x, axis=1) % 5
    rows = table[places] if n % 2 else jax.vmap(lambda k: table[k])(places)
    return h + rows.reshape(BATCH, *(1,) * (h.ndim - 2), -1)


@operation
def fourier(h, n, leaf):
    transform = (
        lambda a, k: jnp.fft.fft(a, axis=k).real,
        lambda a, k: abs(jnp.fft.rfft(a, axis=k)),
    )
    return transform[n // 3](h, along(h, n))


@operation
def loop(h, n, leaf):
    """Two carries, one that stays what it is, and a kernel, in a loop that is kept whole."""
    size = h.shape[-1]
    w, v = leaf((size, 5)), leaf((5, size))

    def body(_, carry):
        a, b, mask = carry
        b = jnp.tanh(a @ w + b) * mask
        return a + b @ v, b, mask

    start = h, jnp.zeros((*h.shape[:-1], 5)), jnp.ones((1,) * (h.ndim - 1) + (5,))
    if n < 3:
        return lax.fori_loop(0, 3, body, start)[n % 2] @ leaf((5 if n % 2 else size, 6))
    done = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, body(0, c[1])), (0, start))
    return done[1][0]


@operation
def uneven_carry(h, n, leaf):
    """A carry that is the same everywhere only before the first step."""
    step = (lambda m: m + jnp.arange(1.0 * m.size).reshape(m.shape), jnp.cumsum, jnp.sin)[n % 3]
    mask = jnp.ones((1,) * (h.ndim - 1) + h.shape[-1:])

    def body(_, carry):
        return carry[0] * carry[1], step(carry[1]).reshape(mask.shape)

    return lax.fori_loop(0, 2, body, (h, mask))[0]


@operation
def stacked(h, n, leaf):
    """Layers or experts that are stacked in one leaf: stepped over, or all at once."""
    size = h.shape[-1]
    if n < 2:
        first, second = leaf((2, size, 4)), leaf((2, 4, size))
        step = lambda a, w: (a + jnp.tanh(a @ w[0]) @ w[1], None)  # noqa: E731
        return lax.scan(step, h, (first, second))[0]
    if n < 4:
        inner = jnp.tanh(jnp.einsum("...i,eio->...eo", h, leaf((2, size, 4))))
        return jnp.einsum("...eo,eoi->...i", inner, leaf((2, 4, 6)))
    inner = jax.vmap(lambda w: jnp.tanh(h @ w))(leaf((2, size, 4)))
    return inner.sum(0) if n == 4 else jnp.concatenate(list(inner), axis=-1)


@operation
def experts(h, n, leaf):
    """Runs of rows, each with a kernel of its own."""
    rows = h.reshape(-1, h.shape[-1])
    sizes = np.array([1, len(rows) - 1], np.int32)
    inner = jnp.tanh(lax.ragged_dot(rows, leaf((2, h.shape[-1], 4)), sizes))
    return lax.ragged_dot(inner, leaf((2, 4, 6)), sizes).reshape(*h.shape[:-1], 6)


@operation
def early_exit(h, n, leaf):
    """An output at this depth."""
    flat = h.reshape(BATCH, -1)
    leaf.outputs.append(jnp.tanh(flat) @ leaf((flat.shape[1], 2)) if n % 2 else flat.sum(1))
    return h


@operation
def tower(h, n, leaf):
    """Another network on the same input, which meets this one in an output, as in CLIP."""
    other = jnp.cos(leaf.x @ leaf((leaf.x.shape[-1], 5)))
    for _ in range(n % 3):
        other = jnp.tanh(other @ leaf((5, 5)))
    sides = [a @ leaf((a.shape[-1], 4)) for a in (h.reshape(BATCH, -1), other)]
    sides = [a / jnp.sqrt(1e-3 + (a * a).sum(-1, keepdims=True)) for a in sides]
    leaf.outputs.append(sides[0] @ sides[1].T)
    return h


@operation
def debiased_norm(h, n, leaf):
    """Stored statistics that are divided by what they have seen; the variance is kept positive."""
    axis = along(h, n)
    shape = shaped(h, axis)
    seen = 1 - 0.9 ** (2 + jnp.square(leaf(())))
    mean, var = leaf(shape) / seen, jnp.square(leaf(shape)) / seen
    if n < 3:
        return (h - mean) * lax.rsqrt(var + 1e-2) * leaf(shape)
    inv = lax.rsqrt(var + 1e-2) * leaf(shape)
    return h * inv + (leaf(shape) - mean * inv)


@operation
def shared_constant(h, n, leaf):
    """One array of equal numbers, or of two halves, that several layers use."""
    size = h.shape[-1]
    row = [jnp.ones(size), jnp.full(size, -0.0) + 1, leaf.x[0, :1] * jnp.ones(size)][n % 3]
    if n > 3:
        row = jnp.concatenate([row[: size // 2], 0.5 * row[size // 2 :]])
    row = row.reshape((1,) * (h.ndim - 1) + (size,))
    inner = jnp.tanh(h * row @ leaf((size, size))) * row
    return inner @ leaf((size, size)) * row


@operation
def signed_zeros(h, n, leaf):
    """Constants that are equal numbers, of which some may have another sign."""
    zeros = np.zeros(shaped(h, along(h, n)))
    if n // 2 % 2:
        zeros = np.where(np.arange(zeros.size).reshape(zeros.shape) % 2, -zeros, zeros)
    return (jnp.copysign(h, zeros), jnp.arctan2(jnp.asarray(zeros), -1 - h * h))[n // 4] + h


@operation
def tied(h, n, leaf):
    """A kernel that is used twice, as in an autoencoder."""
    w = leaf((h.shape[-1], 5))
    if n % 2:
        return jnp.tanh(jnp.tanh(h @ w) @ w.T) @ leaf((h.shape[-1], 4))
    square = leaf((h.shape[-1], h.shape[-1]))
    return jnp.tanh(h @ square) @ square


@operation
def flipped(h, n, leaf):
    """Convolutions with one kernel, forwards and backwards, or transposed."""
    flat, dims = h.reshape(BATCH, -1, h.shape[-1]), ("NHC", "HIO", "NHC")
    kernel = leaf((3, flat.shape[-1], 4))

    def convolve(a, k, **how):
        return lax.conv_general_dilated(a, k, (1,), [(1, 1)], dimension_numbers=dims, **how)

    back = convolve(flat, jnp.flip(kernel, 0), lhs_dilation=(1 + n % 2,))
    if n < 2:
        return back
    if n < 4:
        return convolve(jnp.tanh(convolve(flat, kernel)), jnp.flip(kernel, 0).swapaxes(1, 2))
    return jnp.concatenate([convolve(flat, kernel), convolve(flat, jnp.flip(kernel, 0))], axis=-1)


@operation
def complex_numbers(h, n, leaf):
    """Features become complex, pass a complex kernel or phase, and become real again."""
    z = lax.complex(h, jnp.sin(h))
    z = z @ leaf((h.shape[-1], 5), complex) if n % 2 else z * leaf(shaped(h, h.ndim - 1), complex)
    if n < 2:
        return abs(z)
    if n < 4:
        return jnp.real(z * jnp.conj(z.sum(-1, keepdims=True)))
    return jnp.concatenate([jnp.real(z), jnp.imag(z)], axis=-1)


@operation
def two_axes(h, n, leaf):
    """Features that are joined, and a kernel with heads and dims behind them."""
    parts = [h, jnp.tanh(h @ leaf((h.shape[-1], 4)))]
    joined = jnp.concatenate(parts[:: 1 - 2 * (n % 2)], axis=-1)
    out = jnp.tensordot(joined, leaf((joined.shape[-1], 2, 3)), axes=1)
    return out if h.ndim < 3 else out.reshape(*h.shape[:-1], 6)


@operation
def solve(h, n, leaf):
    """A ridge regression among the positions of each example."""
    flat = h.reshape(BATCH, -1, h.shape[-1])
    gram = flat @ jnp.swapaxes(flat, 1, 2) + np.eye(flat.shape[1])[None]
    return jnp.linalg.solve(gram, jnp.sin(flat)).reshape(h.shape)


@operation
def product_scale(h, n, leaf):
    return jnp.einsum("...d,d->...d", h, leaf(h.shape[-1:]))


@operation
def noise(h, n, leaf):
    shape = h.shape if n > 3 else shaped(h, along(h, n))
    return h * (1 + jax.random.uniform(jax.random.key(n), shape, h.dtype))


class Leaves:
    """Makes leaves, and holds the input and the outputs of one network."""

    def __init__(self, make, x):
        self.make, self.x, self.outputs = make, x, []

    def __call__(self, shape, dtype=float):
        return self.make(shape, dtype)


def network(program, make, x, start=jnp.tanh):
    """Runs a program; a skip connection joins where the shape is that of the first layer."""
    leaf = Leaves(make, x)
    h = first = start(x @ leaf((x.shape[-1], 12)))
    for name, n in program:
        result = OPERATIONS[name](h, n, leaf)
        if 0 < result.size <= LARGEST:
            h = result
        if n == 5 and h.shape == first.shape:
            h = h + first
    h = h.reshape(BATCH, -1)
    return (*leaf.outputs, h @ leaf((h.shape[-1], 2)))


def leaves_of(program, x, start=jnp.tanh):
    """Shapes and dtypes of the leaves of a network, in order."""
    shapes = []

    def record(shape, dtype):
        shapes.append((shape, dtype))
        return jnp.zeros(shape, dtype)

    jax.eval_shape(lambda x: network(program, record, x, start), x)
    return shapes
