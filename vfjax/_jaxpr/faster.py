"""Faster equivalents of primitives that a backend is slow at.

Evaluation, `Network.run` and training all use them.

XLA on CPU is pathologically slow at convolutions on maps of 2x2 and less (300 times slower than the
same linear map as a matrix product), at depthwise convolutions (up to 100 times slower than the
matrix products or the sum over their taps) and at the gradient of max-pooling by `reduce_window`.
Each has an equivalent that is exact up to the order of summation:

* a convolution on such a map is a dense layer from all input to all output positions, its matrix
  made of copies of the kernel's taps;
* a depthwise convolution on a small map is a product with one such matrix for each channel, if the
  batch is large enough to pay for building them; on larger maps it is a sum of shifted maps, each
  times one tap, which XLA fuses into one loop (though not its gradient);
* pooling over windows that tile the map is a reshape followed by a maximum (or a sum). The first of
  several equal entries counts as the maximum, as in `reduce_window`, so gradients agree too.

Models and the traced network stay as written; only evaluation takes the faster route. The
measurements are in `experiments/benchmarks`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vfjax._jaxpr.flattening import flatten
from vfjax._jaxpr.graph import Equation, evaluate
from vfjax._types import Array

# Up to this many (input position, output position) pairs a dense layer beats a convolution on CPU.
_MAX_PAIRS = 16
# A depthwise convolution becomes a matrix for each channel up to this many pairs, if the input has
# no more positions than this many times the batch.
_MAX_PAIRS_DEPTHWISE = 2**16
_MAX_POSITIONS = 2
# Otherwise a kernel of more taps stays a convolution: every tap is one more operation to compile.
_MAX_TAPS = 64


def routed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, evaluated by the equations that are fastest on the default backend.

    Call it under `jit`: every call traces `fn` anew. It can be differentiated, vmapped and jitted;
    its results differ from those of `fn` by float rounding at most.

    Args:
        fn: A pure function of pytrees of arrays.

    Returns:
        A function with the same signature.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pool = lambda x: jax.lax.reduce_window(
        ...     x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> bool((routed(pool)(x) == pool(x)).all())
        True
    """

    @functools.wraps(fn)
    def wrapper(*args: Any) -> Any:
        chosen = rules()
        if chosen is None:
            return fn(*args)
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        graph = flatten(closed, 0)
        env = dict(zip(graph.inputs, jax.tree.leaves(args), strict=True))
        values = evaluate(graph, env, graph.output_ids, rules=chosen)
        return jax.tree.unflatten(jax.tree.structure(shape), graph.output_values(values))

    return wrapper


def rules() -> Callable[[Equation, Sequence[Any]], Callable[..., Any] | None] | None:
    """The rules for the default backend, as `evaluate` takes them, or None if it needs none."""
    return _cpu_rule if jax.default_backend() == "cpu" else None


def _cpu_rule(equation: Equation, args: Sequence[Any]) -> Callable[..., Any] | None:
    make = _CPU_RULES.get(equation.primitive)
    return None if make is None else make(equation.params, *(np.shape(a) for a in args))


def _convolution(
    params: Any, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]
) -> Callable[..., Array] | None:
    """An equivalent for a tiny map or a depthwise kernel; None where the convolution is faster."""
    if params["batch_group_count"] != 1 or params.get("preferred_element_type"):
        return None
    if any(d != 1 for d in params["lhs_dilation"]):
        return None
    dims, groups = params["dimension_numbers"], params["feature_group_count"]
    size_in = [x_shape[d] for d in dims.lhs_spec[2:]]
    taps = [kernel_shape[d] for d in dims.rhs_spec[2:]]
    size_out = [
        max(0, (n + lo + hi - (k - 1) * dilation - 1) // stride + 1)
        for n, k, (lo, hi), stride, dilation in zip(
            size_in,
            taps,
            params["padding"],
            params["window_strides"],
            params["rhs_dilation"],
            strict=True,
        )
    ]
    pairs = int(np.prod(size_in) * np.prod(size_out))
    if not pairs or np.prod(taps) == 1:
        return None
    if groups == 1:
        return _as_dense(params, size_in, taps, size_out) if pairs <= _MAX_PAIRS else None
    alone = groups == x_shape[dims.lhs_spec[1]] == kernel_shape[dims.rhs_spec[0]]
    if not alone:
        return None
    batch = x_shape[dims.lhs_spec[0]]
    if pairs <= _MAX_PAIRS_DEPTHWISE and np.prod(size_in) <= _MAX_POSITIONS * batch:
        return _as_matrices(params, size_in, taps, size_out)
    return _as_sum(params, taps, size_out) if np.prod(taps) <= _MAX_TAPS else None


def _as_dense(
    params: Any, size_in: Sequence[int], taps: Sequence[int], size_out: Sequence[int]
) -> Callable[..., Array]:
    """A convolution as a dense layer from all input to all output positions."""
    dims, rank = params["dimension_numbers"], len(taps)

    def tap(source: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
        """Which tap of the kernel carries the source position to the target position, if any."""
        index = []
        for axis in range(rank):
            offset = source[axis] - target[axis] * params["window_strides"][axis]
            offset += params["padding"][axis][0]
            step, rest = divmod(offset, params["rhs_dilation"][axis])
            if rest or not 0 <= step < taps[axis]:
                return None
            index.append(step)
        return tuple(index)

    sources = list(itertools.product(*map(range, size_in)))
    targets = list(itertools.product(*map(range, size_out)))

    def dense(x: Array, kernel: Array) -> Array:
        x, kernel = _channels_last(dims, x, kernel)
        c_in, c_out = kernel.shape[-2:]
        zero = jnp.zeros((c_in, c_out), kernel.dtype)
        picked = [[tap(s, t) for t in targets] for s in sources]
        blocks = [
            jnp.concatenate([zero if i is None else kernel[i] for i in row], axis=1)
            for row in picked
        ]
        x = x.reshape(x.shape[0], len(sources) * c_in)
        y = jnp.matmul(x, jnp.concatenate(blocks, axis=0), precision=params["precision"])
        y = y.reshape(x.shape[0], *size_out, c_out)
        return _from_channels_last(dims, y)

    return dense


def _as_matrices(
    params: Any, size_in: Sequence[int], taps: Sequence[int], size_out: Sequence[int]
) -> Callable[..., Array]:
    """A depthwise convolution as one matrix for each channel."""
    dims, rank = params["dimension_numbers"], len(taps)

    def places(axis: int) -> np.ndarray:
        """One where a tap carries an input position to an output position, `[taps, in, out]`."""
        tap, source, target = np.ogrid[: taps[axis], : size_in[axis], : size_out[axis]]
        start = target * params["window_strides"][axis] - params["padding"][axis][0]
        return source == start + tap * params["rhs_dilation"][axis]

    def product(x: Array, kernel: Array) -> Array:
        x, kernel = _channels_last(dims, x, kernel)
        n, *_, c = x.shape
        kept = x.dtype
        x, kernel = _widened(x), _widened(kernel)
        matrices = jnp.squeeze(kernel, rank)
        for axis in range(rank):
            one_hot = jnp.asarray(places(axis), kernel.dtype)
            matrices = jnp.tensordot(matrices, one_hot, (0, 0), precision="highest")
        # From (channel, in, out, in, out, ...) to (channel, every in, every out).
        order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))
        matrices = matrices.transpose(order).reshape(c, int(np.prod(size_in)), -1)
        x = x.reshape(n, matrices.shape[1], c)
        y = jnp.einsum("npc,cpq->nqc", x, matrices, precision=params["precision"])
        return _from_channels_last(dims, y.reshape(n, *size_out, c).astype(kept))

    return product


def _as_sum(params: Any, taps: Sequence[int], size_out: Sequence[int]) -> Callable[..., Array]:
    """A depthwise convolution as a sum over the taps of its kernel."""
    dims, strides = params["dimension_numbers"], params["window_strides"]

    def summed(x: Array, kernel: Array) -> Array:
        x, kernel = _channels_last(dims, x, kernel)
        n, *_, c = x.shape
        kept = x.dtype
        x, kernel = _widened(x), _widened(kernel)
        edges = [(lo, hi, 0) for lo, hi in params["padding"]]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        parts = []
        for index in itertools.product(*map(range, taps)):
            start = [k * d for k, d in zip(index, params["rhs_dilation"], strict=True)]
            stop = [
                s + (size - 1) * stride + 1
                for s, size, stride in zip(start, size_out, strides, strict=True)
            ]
            part = lax.slice(x, (0, *start, 0), (n, *stop, c), (1, *strides, 1))
            parts.append(part * kernel[index].reshape((1,) * (len(taps) + 1) + (c,)))
        return _from_channels_last(dims, functools.reduce(jnp.add, parts).astype(kept))

    return summed


def _widened(x: Array) -> Array:
    """Floats in float32 or better: XLA, too, accumulates a bfloat16 convolution in float32."""
    wide = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if wide else x


def _channels_last(dims: Any, x: Array, kernel: Array) -> tuple[Array, Array]:
    """The operands of a convolution as `[N, *space, C]` and `[*space, I, O]`."""
    x = jnp.transpose(x, (dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1]))
    order = (*dims.rhs_spec[2:], dims.rhs_spec[1], dims.rhs_spec[0])
    return x, jnp.transpose(kernel, order)


def _from_channels_last(dims: Any, y: Array) -> Array:
    """The result `[N, *space, C]` of a convolution in its own layout."""
    order = np.argsort((dims.out_spec[0], *dims.out_spec[2:], dims.out_spec[1]))
    return jnp.transpose(y, order.tolist())


def _tiled_pool(
    reduce: Callable[[Array, Array], Array], params: Any, shape: tuple[int, ...]
) -> Callable[..., Array] | None:
    """Pooling over windows that tile the map, without `reduce_window`."""
    window, stride = params["window_dimensions"], params["window_strides"]
    if tuple(window) != tuple(stride) or any(lo or hi for lo, hi in params["padding"]):
        return None
    if any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"])):
        return None
    if np.prod(window) > _MAX_PAIRS or any(w > n for w, n in zip(window, shape, strict=True)):
        return None

    def pool(x: Array) -> Array:
        # Last axis first, so that among equal entries the first in the window's own order wins.
        for axis, w in reversed(list(enumerate(window))):
            if w == 1:
                continue
            n = x.shape[axis] // w
            x = lax.slice_in_dim(x, 0, n * w, axis=axis)
            x = x.reshape(*x.shape[:axis], n, w, *x.shape[axis + 1 :])
            parts = [lax.index_in_dim(x, k, axis + 1, keepdims=False) for k in range(w)]
            x = functools.reduce(reduce, parts)
        return x

    return pool


def _first_max(a: Array, b: Array) -> Array:
    """The greater of two values, the first if they are equal, and NaN if either is NaN."""
    return lax.select((a >= b) | (a != a), a, b)


_CPU_RULES: dict[str, Callable[..., Callable[..., Array] | None]] = {
    "conv_general_dilated": _convolution,
    "reduce_window_max": functools.partial(_tiled_pool, _first_max),
    "reduce_window_sum": functools.partial(_tiled_pool, lax.add),
}
