"""Retracing a network, once for each abstract value of its arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from vfjax._analysis import Traced
from vfjax._jaxpr import flatten
from vfjax._trees import flatten_named, leaf_paths, some
from vfjax._types import PyTree
from vfjax.network._crossing import Crossing
from vfjax.network._misuse import check_axes, check_sizes, explain, explain_input

if TYPE_CHECKING:
    from vfjax.network._network import Network


def traces_of(net: Network) -> Retracer:
    """The traces of a network: no other function knows where it keeps them."""
    return net._traces


class Retracer:
    """The traces of one function.

    A jaxpr contains batch sizes as literals, so evaluating it at another batch size would be
    silently wrong. A trace therefore serves only the shapes, dtypes, weak types and shardings that
    it was made with, under the settings of JAX that affect tracing.

    Attributes:
        avals: Abstract value of each leaf of the variables, by path, as first traced.
        treedef: Structure of the variables.
        x: The abstract input first traced.
        reference: The first trace, which names all sites.
    """

    def __init__(self, apply_fn: Callable[..., Any], variables: PyTree, x: PyTree) -> None:
        """Traces for the first time.

        Args:
            apply_fn: A function `(variables, x) -> output`.
            variables: A tree of arrays or `jax.ShapeDtypeStruct`s.
            x: A tree of the same kinds of leaves.
        """
        self._apply = apply_fn
        named, self.treedef = flatten_named(variables, deleted=True)
        self.avals = {path: abstract(leaf) for path, leaf in named.items()}
        self.x = _abstract_input(x)
        check_sizes(self.avals, self.x)
        self._cache: dict[Hashable, Traced] = {}
        self._inputs: dict[Hashable, PyTree] = {}
        self._lock = threading.Lock()
        try:
            self.reference: Traced = self.at(named, x)
        except Exception as error:
            explain(error, variables, self.avals, self.x)
            raise

    @property
    def batch(self) -> int:
        """Number of examples of the input first traced."""
        return _batch_of(self.x)

    def at(self, named: Mapping[str, Any], x: PyTree) -> Traced:
        """The trace for these leaves and this input.

        Args:
            named: Leaves by path; missing ones count as first traced.
            x: The input.

        Returns:
            The trace, from the cache or made now.

        Raises:
            TypeError: If a leaf of the input is not an array.
            ValueError: If its layers or norms differ from those of the first trace, the input has
                other axes, or the function raises a KeyError, for example for a key that the trees
                do not have.
        """
        avals = [
            abstract(named[path]) if path in named else aval for path, aval in self.avals.items()
        ]
        leaves, x_tree = jax.tree.flatten(_abstract_input(x))
        key = (x_tree, *map(_key, avals), *map(_key, leaves), _settings())
        cached = self._cache.get(key)
        if cached is not None:
            return cached

        def flat(variables: Sequence[Any], inputs: Sequence[Any]) -> PyTree:
            variables = jax.tree.unflatten(self.treedef, variables)
            return self._apply(variables, jax.tree.unflatten(x_tree, inputs))

        if self._cache:
            check_axes(x, self.x)
        # Traced from abstract values only, so the trace is the same inside jit, vmap or grad.
        try:
            closed, shape = jax.make_jaxpr(flat, return_shape=True)(avals, leaves)
        except KeyError as error:
            if type(error) is not KeyError:
                raise
            raise ValueError(
                f"apply_fn raised KeyError {error}. If that is a key of variables or x: "
                f"{_listed('variables', list(self.avals))}, {_listed('x', leaf_paths(x))}; "
                "pass trees as apply_fn reads them."
            ) from error
        except Exception as error:
            if self._cache:
                explain_input(error, _abstract_input(x), self.x)
            raise
        graph = flatten(closed, len(avals))
        traced = Traced(graph, list(self.avals), x_tree, jax.tree.structure(shape))
        if self._cache and self.reference.signature != traced.signature:
            raise ValueError(
                "apply_fn is another network at this input: its layers or norms differ from those "
                f"of the first trace (x was {self.x}, is {jax.tree.unflatten(x_tree, leaves)}). "
                "Trace it anew."
            )
        with self._lock:
            self._inputs.setdefault(origin_of(x), jax.tree.unflatten(x_tree, leaves))
            return self._cache.setdefault(key, traced)

    def at_crossing(self, named: Mapping[str, Any], crossing: Crossing) -> Traced:
        """The trace that a crossing comes from, at the crossing's batch size.

        A crossing records its input apart from the batch size, so that its arrays can be sliced and
        joined along the batch. The batch size follows from their shapes.

        Args:
            named: Leaves by path.
            crossing: The values.

        Returns:
            The trace.

        Raises:
            ValueError: If no batch size gives these shapes.
        """
        x = self.x if crossing.origin is None else self._inputs.get(crossing.origin)
        if x is None:  # an input that another network of the same architecture was run on
            x = _input_of(crossing.origin, self.batch)
        given = [(tuple(v.shape), v.dtype) for v in crossing.values]
        if x is not None:
            size = _scaled(_shapes(self.at(named, x), crossing.depth), given, _batch_of(x))
            if size is not None:
                traced = self.at(named, jax.tree.map(lambda a: _resized(a, size), x))
                if _shapes(traced, crossing.depth) == given:
                    return traced
        raise ValueError(
            f"The crossing's shapes and dtypes {given} belong to no batch of the traced input "
            f"{x or self.x}; give the Crossing that this network's run(..., stop=...) returned, "
            "sliced or joined along the batch only."
        )


def _abstract_input(x: PyTree) -> PyTree:
    """An input's shapes and dtypes; raises a TypeError if a leaf is not an array."""
    flatten_named(x, name="x", deleted=True)
    return jax.tree.map(abstract, x)


def _input_of(origin: Any, batch: int) -> PyTree:
    """An abstract input of some origin."""
    tree, leaves = origin
    return jax.tree.unflatten(
        tree, [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in leaves]
    )


def origin_of(x: PyTree) -> Hashable:
    """Structure, shapes and dtypes of an input apart from its batch size; hashable."""
    leaves, tree = jax.tree.flatten(jax.tree.map(abstract, x))
    return tree, tuple((tuple(a.shape[1:]), a.dtype) for a in leaves)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype, weak type and (where a mesh matters) sharding of a leaf."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    how = {"weak_type": getattr(aval, "weak_type", False)}
    sharding = getattr(aval, "sharding", None)
    if sharding is not None and not sharding.mesh.empty:
        how["sharding"] = sharding
        if getattr(aval, "manual_axis_type", None) is not None:  # inside a shard_map
            how["manual_axis_type"] = aval.manual_axis_type
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **how)


def _listed(name: str, paths: Sequence[str]) -> str:
    if not any(paths):
        return f"{name} is a single array" if paths else f"{name} is empty"
    return f"{name} has {some(paths)}"


def _key(leaf: jax.ShapeDtypeStruct) -> Hashable:
    manual = getattr(leaf, "manual_axis_type", None)
    return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding, manual


def _settings() -> Hashable:
    """Settings of JAX that change what a function traces to."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")
    return (
        *(getattr(jax.config, name) for name in names),
        jax.sharding.get_abstract_mesh(),
    )


def _batch_of(x: PyTree) -> int:
    return next((max(1, a.shape[0]) for a in jax.tree.leaves(x) if a.shape), 1)


def _resized(aval: jax.ShapeDtypeStruct, size: int) -> jax.ShapeDtypeStruct:
    if not aval.shape or aval.shape[0] == size:
        return aval
    shape = (size, *aval.shape[1:])
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


def _shapes(traced: Traced, depth: int) -> list[tuple[tuple[int, ...], Any]]:
    avals = [traced.graph.avals[v] for v in traced.cut(depth).crossing]
    return [(tuple(a.shape), a.dtype) for a in avals]


def _scaled(known: Sequence[Any], given: Sequence[Any], batch: int) -> Any:
    """The batch size that turns one list of shapes into another, if there is one.

    Sizes may be symbolic, as under `jax.export`.
    """
    if len(known) != len(given):
        return None
    sizes: set[Any] = set()
    for (before, _), (after, _) in zip(known, given, strict=True):
        if len(before) != len(after):
            return None
        scaled = [
            divmod(batch * b, max(a, 1)) for a, b in zip(before, after, strict=True) if a != b
        ]
        if any(rest != 0 for _, rest in scaled):
            return None
        sizes |= {size for size, _ in scaled}
    if len(sizes) > 1:
        return None
    return sizes.pop() if sizes else batch
