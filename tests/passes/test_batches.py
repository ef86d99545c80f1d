"""Tests of the rules of `data`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import align, diagnose, prune, renorm, stats
from vfjax._passes import batch_size, batches

LIKE = jax.ShapeDtypeStruct((8, 3), jnp.float32)


def _x(n, dtype=np.float32, width=3):
    return np.arange(n * width).reshape(n, width).astype(dtype)


class Restarting:
    """A re-iterable that makes a new iterator each time, as a data set does."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Stuck:
    """A re-iterable that forgets to start over."""

    def __init__(self, items):
        self.iterator = iter(items)

    def __iter__(self):
        yield from self.iterator


@pytest.mark.parametrize("wrap", [list, tuple, Restarting, iter, Stuck])
@pytest.mark.parametrize("labelled", [False, True])
def test_one_pass_gives_the_inputs_in_order(wrap, labelled):
    xs = [_x(4), _x(4) + 1, _x(1)]
    items = [(x, np.zeros(len(x), int)) for x in xs] if labelled else xs
    found = list(batches(wrap(items), like=LIKE))
    assert [batch_size(x) for x in found] == [4, 4, 1]
    assert all(a is b for a, b in zip(found, xs, strict=True))


def test_a_pair_may_be_a_list():
    assert len(list(batches([[_x(2), np.zeros(2)]], like=LIKE))) == 1


def test_one_batch_is_legal_and_jax_arrays_are():
    assert len(list(batches([jnp.zeros((5, 3))], like=LIKE))) == 1


def test_an_array_of_stacked_batches_is_an_iterable_of_batches():
    assert [x.shape for x in batches(np.zeros((4, 2, 3), np.float32), like=LIKE)] == [(2, 3)] * 4


def test_a_pair_of_inputs_is_told_from_an_input_and_a_label():
    like = (LIKE, LIKE)
    pair = (_x(2), _x(2))
    assert list(batches([pair], like=like))[0] is pair
    assert list(batches([(pair, np.zeros(2))], like=like))[0] is pair


def test_trees_of_inputs():
    like = {"image": LIKE, "mask": jax.ShapeDtypeStruct((8,), jnp.bool_)}
    x = {"image": _x(2), "mask": np.ones(2, bool)}
    assert list(batches([(x, np.zeros(2))], like=like))[0] is x
    with pytest.raises(TypeError, match=r"x\['mask'\] has dtype float32"):
        list(batches([x | {"mask": np.ones(2, np.float32)}], like=like))
    with pytest.raises(ValueError, match="different batch sizes: .2, 3."):
        list(batches([x | {"mask": np.ones(3, bool)}], like=like))


def test_leaves_without_a_batch_axis():
    like = {"image": LIKE, "scale": jax.ShapeDtypeStruct((), jnp.float32)}
    message = r"x\['scale'\] is a scalar.* axis 0 of every leaf of x is the batch"
    with pytest.raises(ValueError, match=message):
        list(batches([{"image": _x(2), "scale": np.float32(2)}], like=like))
    with pytest.raises(ValueError, match=message):
        list(batches([{"image": _x(2), "scale": 2.0}], like=like))


def test_batches_without_samples_count_nothing():
    assert [len(x) for x in batches([_x(0), _x(2), _x(0)], like=LIKE)] == [2]
    with pytest.raises(ValueError, match="no batches with samples"):
        list(batches([_x(0)], like=LIKE))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, np.int32])
def test_another_dtype_is_an_error_that_says_which(dtype):
    with pytest.raises(TypeError, match=f"`data`, batch 1 has dtype {np.dtype(dtype)}.*float32"):
        list(batches([_x(2), _x(2, dtype)], like=LIKE))


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 1), (2,)])
def test_another_shape_is_an_error_that_says_which(shape):
    with pytest.raises(ValueError, match=r"traced with \[batch, 3\]"):
        list(batches([np.zeros(shape, np.float32)], like=LIKE))


def test_a_bare_array_is_told_to_be_a_batch():
    with pytest.raises(ValueError, match="pass a list of batches"):
        list(batches(_x(4), like=LIKE))


@pytest.mark.parametrize("data", [None, 3, "digits", {"x": 1}])
def test_no_iterable(data):
    with pytest.raises(TypeError, match="`images` must be an iterable of batches"):
        list(batches(data, like=LIKE, name="images"))


@pytest.mark.parametrize("item", [[[1.0, 2.0, 3.0]], ([1.0], 2), (1, 2, 3), None])
def test_no_arrays(item):
    with pytest.raises(TypeError, match="batch 0"):
        list(batches([item], like=LIKE))


def test_empty():
    with pytest.raises(ValueError, match="`data` gave no batches.*empty"):
        list(batches([], like=LIKE))


def _generator():
    yield _x(2)


@pytest.mark.parametrize("make", [_generator, lambda: iter([_x(2)]), lambda: map(_x, [2])])
def test_an_iterator_exhausted_on_second_use(make):
    data = make()
    assert len(list(batches(data, like=LIKE))) == 1
    with pytest.raises(ValueError, match="exhausted.*starts over"):
        list(batches(data, like=LIKE))


def test_an_iterable_that_does_not_start_over():
    data = Stuck([_x(2)])
    assert len(list(batches(data, like=LIKE))) == 1
    with pytest.raises(ValueError, match="does not start over"):
        list(batches(data, like=LIKE))


def test_checks_come_before_later_batches_are_read():
    """A bad batch is reported when it comes up; those before it were already given out."""
    iterator = batches([_x(2), _x(2, np.uint8)], like=LIKE)
    assert len(next(iterator)) == 2
    with pytest.raises(TypeError, match="batch 1"):
        next(iterator)


def _net(x):
    rng = np.random.default_rng(0)
    v = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    v = {name: leaf.astype(np.float32) for name, leaf in v.items()}
    return vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a"]) @ v["b"], v, x), v


USES = {
    "moments": lambda net, v, data: stats.moments(net, [v], data, sites="layers").var,
    "repair": lambda net, v, data: renorm.repair(net, v, data, references=[v], sites="all"),
    "match": lambda net, v, data: align.match_activations(net, v, v, data).permutations,
    "transport": lambda net, v, data: align.transport([net] * 2, [v, v], data).maps,
    "features": lambda net, v, data: diagnose.features(net, v, data).feature,
    "cka": lambda net, v, data: diagnose.cka((net, v), (net, v), data).matrix,
    "wanda": lambda net, v, data: prune.wanda(net, v, data).values,
}


@pytest.mark.parametrize("use", USES)
def test_a_pass_needs_a_batch_and_the_host(use):
    with pytest.warns(UserWarning, match="single example"):
        alone, v = _net(_x(1)[0])
    with pytest.raises(ValueError, match=r"'a' gives \[4\].*trace again with a batch"):
        USES[use](alone, v, [_x(1)[0]])
    net, v = _net(_x(4))
    with pytest.raises(TypeError, match="on the host, with numbers"):
        jax.jit(lambda v: USES[use](net, v, [_x(4)]))(v)
    with pytest.raises(TypeError, match="on the host, with numbers"):
        jax.jit(lambda x: USES[use](net, v, [x]))(_x(4))
