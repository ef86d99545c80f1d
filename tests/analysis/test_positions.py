"""Which positions a site's positions stand for: compared with the mask moved by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import stats

T, D = 6, 4
W = np.random.default_rng(0).normal(size=(D, D)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(3, T, D)).astype(np.float32)
LENGTHS = np.array([6, 3, 1])
MASK = np.arange(T) < LENGTHS[:, None]


def dense(v, h):
    return jax.lax.dot_general(h, v["w"], (((h.ndim - 1,), (0,)), ((), ())))


def windows(h, size, stride, padding):
    return jax.lax.reduce_window(
        h, 0.0, jax.lax.add, (1, size, 1), (1, stride, 1), [(0, 0), padding, (0, 0)]
    )


def causal(h):
    """Each position with the two before, by padding and a window that does not pad."""
    return windows(jnp.pad(h, ((0, 0), (2, 0), (0, 0))), 3, 1, (0, 0))


def token(h):
    return jnp.concatenate([jnp.ones((len(h), 1, D)), h], 1)


# How values reach the layer, and what counts there: an array along its sample axes.
ROADS = {
    "as it is": (lambda h: h, MASK),
    "time first": (lambda h: h.transpose(1, 0, 2), MASK.T),
    "heads between": (
        lambda h: jnp.broadcast_to(h[:, None], (3, 6, T, D)),
        MASK[:, None].repeat(6, 1),
    ),
    "windows": (lambda h: h.reshape(3, 2, 3, D), MASK.reshape(3, 2, 3)),
    "windows, moved": (
        lambda h: h.reshape(3, 2, 3, D).swapaxes(1, 2).reshape(3, 6, D),
        MASK.reshape(3, 2, 3).swapaxes(1, 2).reshape(3, 6),
    ),
    "one axis": (lambda h: h.reshape(-1, D), MASK.reshape(-1)),
    "one axis and back": (lambda h: h.reshape(-1, D).reshape(3, T, D), MASK),
    "reversed": (lambda h: h[:, ::-1], MASK[:, ::-1]),
    "every second": (lambda h: h[:, ::2], MASK[:, ::2]),
    "the last": (lambda h: h[:, -1], MASK[:, -1]),
    "pooled": (lambda h: h.max(1), MASK.any(1)),
    "pooled and added": (lambda h: h + h.mean(1, keepdims=True), MASK),
    "in pairs": (lambda h: windows(h, 2, 2, (0, 0)), MASK.reshape(3, 3, 2).any(2)),
    "seen around": (lambda h: windows(h, 3, 1, (1, 1)), MASK),
    "seen before": (causal, MASK),
    "inner windows": (lambda h: windows(h, 3, 1, (0, 0)), MASK[:, 1:-1]),
    "with a token": (token, np.concatenate([MASK.any(1, keepdims=True), MASK], 1)),
    "split and joined": (
        lambda h: jnp.concatenate(jnp.split(h, 2, 1)[::-1], 1),
        np.roll(MASK, 3, 1),
    ),
    "stacked": (lambda h: jnp.stack([h, h], 2), MASK[..., None].repeat(2, 2)),
    "summed so far": (lambda h: jnp.cumsum(h, 1), MASK),
    "attention": (
        lambda h: jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h,
        MASK,
    ),
    "sharing one x": (lambda h: jnp.where(h > 0, h, 2 * h[:, :, ::-1]), MASK),
}


@pytest.mark.parametrize("road", ROADS)
def test_positions_are_followed(road):
    move, counts = ROADS[road]
    net = vfjax.trace(lambda v, x: dense(v, move(x)), {"w": W}, X)
    found = stats.moments(net, [{"w": W}], [X], sites=["w"], mask=lambda x: MASK)
    rows = np.asarray(move(jnp.asarray(X)) @ W)[counts]
    assert found.count["w"] == len(rows)
    np.testing.assert_allclose(found.mean["w"][0], rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.var["w"][0], rows.var(0), rtol=1e-4, atol=1e-5)


def loop(x):
    return jax.lax.scan(lambda c, h: (c + h, c + h), jnp.zeros((3, D)), x.swapaxes(0, 1))


def test_behind_an_opaque_loop_the_shape_decides_or_an_error_says_why():
    def fit(move):
        net = vfjax.trace(lambda v, x: dense(v, move(x)), {"w": W}, X)
        return stats.moments(net, [{"w": W}], [X], sites=["w"], mask=lambda x: MASK).count["w"]

    assert fit(lambda x: loop(x)[1].swapaxes(0, 1)) == MASK.sum()
    assert fit(lambda x: loop(x)[0]) == 3
    with pytest.raises(ValueError, match=r"\[3, 6\].*site 'w', of shape \[6, 3, 4\].*'scan'"):
        fit(lambda x: loop(x)[1])


def test_positions_that_are_mixed_fit_no_mask():
    net = vfjax.trace(lambda v, x: dense(v, x + x[:, ::-1]), {"w": W}, X)
    with pytest.raises(ValueError, match="'w'.*mixes positions of the input that differ"):
        stats.moments(net, [{"w": W}], [X], sites=["w"], mask=lambda x: MASK)
    with pytest.raises(ValueError, match="'w'"):
        net = vfjax.trace(lambda v, x: dense(v, x.mean(0)), {"w": W}, X)
        stats.moments(net, [{"w": W}], [X], sites=["w"], mask=lambda x: MASK)
