"""What a trace tells of a network before anything runs: its parts, symmetries, sizes and sides."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfjax._analysis.groups import from_propagation
from vfjax._jaxpr.flatten import MAX_UNROLL
from vfjax._types import PyTree
from vfjax.network import _retrace, _summary
from vfjax.network._records import (
    JointTap,
    Layer,
    Norm,
    Tap,
    describe_joint_taps,
    describe_layer,
    describe_norm,
    describe_taps,
)
from vfjax.network._run import Plan
from vfjax.symmetry._places import Place
from vfjax.symmetry._spec import PermutationSpec


class Structure:
    """The facts about a traced network, found on first use: the part of `Network` that only reads.

    Args:
        traces: Its traces.
    """

    def __init__(self, traces: _retrace.Retracer) -> None:
        self._traces = traces
        self._reference, self._treedef = traces.reference, traces.treedef
        self._avals = traces.avals

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all leaves of the variables."""
        return tuple(self._avals)

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The linear and convolution layers, in the order of evaluation."""
        return tuple(
            describe_layer(
                self._reference,
                name,
                batch=self._traces.batch,
                axes=self._propagation.axes,
                groups=self._symmetry[1],
            )
            for name in self._reference.layers
        )

    @functools.cached_property
    def norms(self) -> tuple[Norm, ...]:
        """The normalisations with stored statistics, in the order of evaluation."""
        return tuple(describe_norm(self._reference, n) for n in self._reference.norms)

    @functools.cached_property
    def _propagation(self) -> Any:
        return self._reference.propagation

    @functools.cached_property
    def _symmetry(self) -> tuple[PermutationSpec, dict[int, str]]:
        return from_propagation(self._propagation, self.paths, self._reference.effects)

    @property
    def spec(self) -> PermutationSpec:
        """Groups of axes that can be permuted together without changing the function."""
        return self._symmetry[0]

    @functools.cached_property
    def taps(self) -> tuple[Tap, ...]:
        """Where each group shows: one per tap of a layer and group, each value once."""
        return describe_taps(self._reference, axes=self._propagation.axes, groups=self._symmetry[1])

    @functools.cached_property
    def joint_taps(self) -> tuple[JointTap, ...]:
        """Where groups show inside the entries of the groups that they are within."""
        return describe_joint_taps(self._reference, self.spec.within)

    @property
    def depth(self) -> int:
        """L, the number of layers on the longest path from input to output."""
        return self._reference.depth

    @functools.cached_property
    def statistics(self) -> frozenset[str]:
        """Paths of the stored statistics of norms, which are no parameters."""
        return frozenset(p for norm in self.norms for p in (norm.mean, norm.var))

    @property
    def parameters(self) -> int:
        """Number of parameters, stored statistics not counted."""
        return self._count(self.paths)

    @functools.cached_property
    def flops(self) -> int:
        """Operations per example: see `Layer.flops`, plus norms, activations and pools."""
        return self._flops(range(len(self._reference.graph.equations)))

    @property
    def x(self) -> PyTree:
        """The traced input: `jax.ShapeDtypeStruct`s, batch axis first."""
        return self._traces.x

    @functools.cached_property
    def residual(self) -> bool:
        """Whether the network has a residual join: a sum of values behind different layers."""
        return self._reference.joins

    @property
    def opaque(self) -> tuple[tuple[str, str], ...]:
        """Primitives that hold linear equations and were kept whole: (primitive, file:line)."""
        return self._reference.opaque

    @property
    def others(self) -> tuple[tuple[str, str, str], ...]:
        """Leaves that act outside of layers, norms and biases: (path, primitive, file:line).

        Embeddings, layer scales and gates are such. Permutations follow them, corrections and the
        removal of biases do not. A leaf that is an output by itself is listed under `output`.
        """
        return self._reference.others

    def summary(self) -> str:
        """A table of layer, depth, shapes, parameters, FLOPs and group.

        Returns:
            Text of several lines; below the table stands what could not be followed.
        """
        return _summary.summary(self)

    def layer(self, name: str) -> Layer:
        """The layer of a name.

        Args:
            name: As in `Layer.name`.

        Returns:
            Its record.

        Raises:
            ValueError: If there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(self._unknown("layer", name, [x.name for x in self.layers]))

    def norm(self, name: str) -> Norm:
        """The norm of a name.

        Args:
            name: As in `Norm.name`: the path of its leaf of means.

        Returns:
            Its record.

        Raises:
            ValueError: If there is none.
        """
        for norm in self.norms:
            if norm.name == name:
                return norm
        raise ValueError(self._unknown("norm", name, [x.name for x in self.norms]))

    # ---------------------------------------------------------------------------- sides of a cut

    def stem_leaves(self, depth: int) -> frozenset[str]:
        """Paths of the leaves that the stem of a cut reads.

        Args:
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is no whole number.
            ValueError: If it is out of range.
        """
        self.check_depth(depth, "depth")
        return self._leaves(None, depth)

    def trunk_leaves(self, depth: int, stop: int | None = None) -> frozenset[str]:
        """Paths of the leaves that the trunk of a cut reads.

        Args:
            depth: Depth of the cut, from 0 to `net.depth`.
            stop: Depth of a second cut at which the trunk ends; None for the output.

        Raises:
            TypeError: If a depth is no whole number.
            ValueError: If it is out of range, or `stop` is less than `depth`.
        """
        self.check_depth(depth, "depth")
        return self._leaves(depth, stop)

    def head_leaves(self, start: int, end: int | None) -> frozenset[str]:
        """Paths of the leaves that heads alone read, and neither stems nor the trunk between.

        Args:
            start: Depth at which the trunk begins, from 0 to `net.depth`.
            end: Depth at which heads begin; None where there are none.
        """
        if end is None:
            return frozenset()
        shared = self.trunk_leaves(start, end) | self.stem_leaves(start)
        return self.trunk_leaves(end) - shared

    def leaves(self, paths: Iterable[str]) -> dict[str, Any]:
        """Types of leaves of the variables, by path."""
        return {path: self._avals[path] for path in paths}

    def stem_parameters(self, depth: int) -> int:
        """Number of parameters that the stem of a cut reads; see `stem_leaves`."""
        return self._count(self.stem_leaves(depth))

    def trunk_parameters(self, depth: int, stop: int | None = None) -> int:
        """Number of parameters that the trunk of a cut reads; see `trunk_leaves`."""
        return self._count(self.trunk_leaves(depth, stop))

    def stem_flops(self, depth: int) -> int:
        """Operations per example of the stem of a cut, counted as in `flops`."""
        self.check_depth(depth, "depth")
        return self._flops(self._reference.part(None, depth))

    def trunk_flops(self, depth: int, stop: int | None = None) -> int:
        """Operations per example of the trunk of a cut, counted as in `flops`."""
        self.check_depth(depth, "depth")
        self.check_part(depth, stop)
        return self._flops(self._reference.part(depth, stop))

    def _leaves(self, start: int | None, stop: int | None) -> frozenset[str]:
        self.check_part(start, stop)
        traced = self._reference
        return traced.leaves_of(traced.part(start, stop), traced.ends(stop))

    def crossing(self, depth: int) -> tuple[tuple[Any, frozenset[str]], ...]:
        """What crosses a cut: of each value its type, and the groups that its axes carry.

        Args:
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is no whole number.
            ValueError: If it is out of range.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> p = {"w0": jnp.ones((3, 4)), "w1": jnp.ones((4, 2))}
            >>> net = vfjax.trace(lambda p, x: x @ p["w0"] @ p["w1"], p, jnp.ones((5, 3)))
            >>> [(aval.shape, set(groups)) for aval, groups in net.crossing(1)]
            [((5, 4), {'w0'})]
        """
        self.check_depth(depth, "depth")
        traced = self._reference
        return tuple(
            (
                traced.graph.avals[v],
                frozenset(place.group for place in traced.places(v)),
            )
            for v in traced.cut(depth).crossing
        )

    def places(self, site: str) -> tuple[Place, ...]:
        """Groups that the axes of a site's value carry, each with its place there.

        Args:
            site: Name of a site, as in `run`, but for `output` and an `input` of several arrays.

        Raises:
            ValueError: If the network has no such site.
        """
        plan = Plan(self, self._reference, None, None, None, None)
        return self._reference.places(plan.value_of(site))

    def in_stem(self, site: str, depth: int) -> bool:
        """Whether the value at a site is made in the stem of a cut.

        Args:
            site: Name of a site, as in `run`.
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is no whole number.
            ValueError: If it is out of range, or the network has no such site.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> p = {"w0": jnp.ones((3, 4)), "w1": jnp.ones((4, 2))}
            >>> net = vfjax.trace(lambda p, x: x @ p["w0"] @ p["w1"], p, jnp.ones((5, 3)))
            >>> [net.in_stem(layer.name, 1) for layer in net.layers]
            [True, False]
            >>> sorted(net.stem_leaves(1)), net.stem_parameters(1), net.trunk_flops(1)
            (['w0'], 12, 8)
        """
        self.check_depth(depth, "depth")
        return Plan(self, self._reference, None, None, None, None).in_stem(site, depth)

    def crosses(self, site: str, depth: int) -> bool:
        """Whether the value at a site is handed from the stem of a cut to its trunk.

        Args:
            site: Name of a site, as in `run`.
            depth: Depth of the cut, from 0 to `net.depth`.

        Raises:
            TypeError: If `depth` is no whole number.
            ValueError: If it is out of range, or the network has no such site.

        Example:
            >>> import jax.numpy as jnp, vfjax
            >>> p = {"w0": jnp.ones((3, 4)), "w1": jnp.ones((4, 2))}
            >>> net = vfjax.trace(lambda p, x: x @ p["w0"] @ p["w1"], p, jnp.ones((5, 3)))
            >>> [net.crosses(site, 1) for site in ("input", "w0", "w1")]
            [False, True, False]
        """
        self.check_depth(depth, "depth")
        return Plan(self, self._reference, None, None, None, None).crosses(site, depth)

    # ---------------------------------------------------------------------------------- messages

    def opaque_hint(self) -> str:
        """A sentence for messages about layers: what hides some of them, or an empty string."""
        if not self.opaque:
            return ""
        primitive, where = self.opaque[0]
        return (
            f" Layers inside the opaque {primitive} at {where} cannot be reached: write it as a "
            f"Python loop, or as a scan over at most {MAX_UNROLL} stacked layers."
        )

    def check_depth(self, depth: Any, argument: str) -> None:
        """Checks that the network can be cut at a depth.

        Args:
            depth: What the caller gave.
            argument: The caller's name for it, for the message.

        Raises:
            TypeError: If it is no whole number.
            ValueError: If it is not from 0 to `net.depth`.
        """
        if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)):
            raise TypeError(f"{argument} must be a whole number of layers; it was {depth!r}.")
        if not 0 <= depth <= self.depth:
            raise ValueError(
                f"{argument} was {depth}; this network has {self.depth} layers from input to "
                f"output, so give 0 to {self.depth}.{self.opaque_hint()}"
            )

    def check_part(self, start: Any, stop: Any) -> None:
        """Checks that the network can be run from one depth to another; None stands for an end.

        Raises:
            TypeError: If a depth is no whole number.
            ValueError: If it is not from 0 to `net.depth`, or the second is less than the first.
        """
        for depth, argument in ((start, "start"), (stop, "stop")):
            if depth is not None:
                self.check_depth(depth, argument)
        if start is not None and stop is not None and stop < start:
            raise ValueError(f"stop was {stop}, before start, {start}; a part runs forwards.")

    def _unknown(self, kind: str, name: str, known: Sequence[str]) -> str:
        parts = {part for part in str(name).split("/") if part}
        near = sorted(known, key=lambda k: -len(parts & set(k.split("/"))))
        known = f"it has, among others, {near[:6]}.{self.opaque_hint()}"
        return f"The network has no {kind} '{name}'; {known}"

    # ----------------------------------------------------------------------------------- counting

    def count(self, leaves: Mapping[str, Any]) -> int:
        """Number of parameters among leaves by path.

        Stored statistics, integers and random keys are none.
        """
        counted = [np.shape(a) for p, a in leaves.items() if self._counts(p, a)]
        return sum(int(np.prod(shape)) for shape in counted)

    def part_flops(self, leaves: Mapping[str, Any], start: int | None, stop: int | None) -> int:
        """Operations per example from one cut to another, at the shapes of these leaves.

        Args:
            leaves: Leaves by path; those that are missing count as traced.
            start: Depth of the first cut; None for the input.
            stop: Depth of the second; None for the output.
        """
        traced = self._traces.at(leaves, self.x)
        return sum(traced.flops(i) for i in traced.part(start, stop)) // self._traces.batch

    def map_flops(self, depth: int, widths: Mapping[str, int]) -> int:
        """Operations per example of mapping what crosses a cut by matrices.

        Args:
            depth: Depth of the cut.
            widths: By group, how many entries its matrix makes.
        """
        total, traced = 0, self._reference
        for value in traced.cut(depth).crossing:
            entries = int(np.prod(traced.graph.avals[value].shape))
            for group, *_ in traced.places(value):
                if group in widths:
                    size = self.spec.sizes[group]
                    entries = entries // size * widths[group]
                    total += entries * size
        return total // self._traces.batch

    def _counts(self, path: str, leaf: Any) -> bool:
        return path not in self.statistics and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)

    def _count(self, paths: Iterable[str]) -> int:
        return self.count({path: self._avals[path] for path in paths})

    def _flops(self, equations: Iterable[int]) -> int:
        return sum(self._reference.flops(i) for i in equations) // self._traces.batch
