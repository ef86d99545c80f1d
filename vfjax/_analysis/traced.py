"""One trace of a network at one abstract input: its graph, named sites and cuts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._analysis import outside
from vfjax._analysis.cost import equation_flops
from vfjax._analysis.effects import Effect, leaf_effects
from vfjax._analysis.expressions import Atom, Expressions, Leaf, Opaque
from vfjax._analysis.groups import named_groups
from vfjax._analysis.layers import (
    LinearSite,
    depths,
    follow,
    linear_sites,
)
from vfjax._analysis.norms import NormSite, norm_sites, unrecognised
from vfjax._analysis.taps import loop_results, tap_of
from vfjax._jaxpr import INPUT, PARAM, Graph, evaluate, holds_layer
from vfjax._jaxpr.primitives import CONV, LINEAR, SUMS
from vfjax._propagate import Propagation, propagate
from vfjax.symmetry._places import Axis, Place, owners


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A network cut at a depth.

    Attributes:
        stem: Indices of the stem's equations that depend on the input.
        crossing: Ids of the input-dependent values computed in the stem and used in the trunk.
        averaged: For each of them, whether it depends on parameters, so that it differs by model.
    """

    stem: frozenset[int]
    crossing: tuple[int, ...]
    averaged: tuple[bool, ...]


class Traced:
    """The analysis of one flattened jaxpr; everything is computed on first use and kept."""

    def __init__(self, graph: Graph, paths: Sequence[str], x_tree: Any, out_tree: Any) -> None:
        """Takes a graph and the names of its leaves.

        Args:
            graph: The flattened jaxpr; its first `num_leaves` inputs are the variables' leaves.
            paths: Path of each leaf.
            x_tree: Structure of the network's input.
            out_tree: Structure of the network's output.
        """
        self.graph, self.paths = graph, tuple(paths)
        self.x_tree, self.out_tree = x_tree, out_tree

    def output(self, values: Mapping[int, Any]) -> Any:
        """The network's output, given the values of `graph.output_ids`."""
        return jax.tree.unflatten(self.out_tree, self.graph.output_values(values))

    @functools.cached_property
    def layers(self) -> dict[str, LinearSite]:
        """Layers by name, in the order of their equations."""
        named: dict[str, LinearSite] = {}
        norms = frozenset(i for norm in self.norms.values() for i in norm.equations)
        for site in linear_sites(self.graph, norms):
            slot = None if site.kernel is None else site.kernel.slot
            named[_unused(_slotted(self.paths[site.leaf], slot), named)] = site
        return named

    @functools.cached_property
    def norms(self) -> dict[str, NormSite]:
        """Normalisations with stored statistics by name, in the order of their equations."""
        named: dict[str, NormSite] = {}
        for site in norm_sites(self.graph, self._expressions):
            base = _slotted(self.paths[site.mean.leaf], site.mean.slot)
            named[_unused(base, named)] = site
        return named

    @functools.cached_property
    def _expressions(self) -> Expressions:
        return Expressions(self.graph)

    @functools.cached_property
    def unrecognised(self) -> tuple[tuple[str, str, str], ...]:
        """Leaves that act as statistics of no known norm: (path, verb, file:line)."""
        uses = unrecognised(self.graph, self._expressions, self.norms.values())
        return tuple((self.paths[leaf], verb, where) for leaf, verb, where in uses)

    def scalars(self, leaves: Mapping[str, Any]) -> Callable[[Atom], Any]:
        """The values of scalars of the parameters in the expressions of norms.

        Args:
            leaves: Leaves by path, among them all that the scalars depend on.
        """

        def value(atom: Atom) -> Any:
            if isinstance(atom, Leaf):
                leaf = jnp.asarray(leaves[self.paths[atom.leaf]])
                scalar = leaf if atom.slot is None else leaf[atom.slot]
            else:
                assert isinstance(atom, Opaque)  # the others are evaluated term by term
                needed = self._expressions.leaves_in(atom)
                env = {self.graph.inputs[k]: leaves[self.paths[k]] for k in needed}
                scalar = evaluate(self.graph, env, [atom.value])[atom.value]
            scalar = jnp.ravel(scalar)[0]
            return scalar.astype(jnp.promote_types(scalar.dtype, jnp.float32))

        return value

    @functools.cached_property
    def taps(self) -> dict[str, int]:
        """Id of the tap of each layer, by the layer's name."""
        return {name: tap_of(self.graph, site.preactivation) for name, site in self.layers.items()}

    @functools.cached_property
    def loops(self) -> dict[str, int]:
        """Ids of what loops return that are kept whole, by name: `<leaf>:loop`."""
        named: dict[str, int] = {}
        for leaf, value in loop_results(self.graph):
            named[_unused(f"{self.paths[leaf]}:loop", named)] = value
        return named

    @functools.cached_property
    def _depths(self) -> tuple[dict[int, int], dict[int, int]]:
        return depths(self.graph, list(self.layers.values()))

    @functools.cached_property
    def depth(self) -> int:
        """Number of layers on the longest path from input to output."""
        depth, after = self._depths
        return max((depth[i] + after[i] for i in depth if i in after), default=0)

    def depth_of(self, site: LinearSite) -> int:
        """Number of layers on the longest path from the input up to and including this one."""
        return self._depths[0][site.index]

    def is_main(self, site: LinearSite) -> bool:
        """Whether a layer lies on a longest path from input to output."""
        depth, after = self._depths
        return depth[site.index] + after.get(site.index, -1) == self.depth

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """By layer that a cut can end with, the least depth of a cut whose stem computes it.

        For layers on a longest path this is their depth. A branch, which no layer of a longer path
        reads, ends where its own output is: as many layers follow the cut there as follow it on the
        longest path, if the branch has so many. All other layers, shortcuts, go with their readers.
        """
        depth, after = self._depths
        paths: dict[int, list[str]] = {}
        for name, site in self.layers.items():
            if site.index in after:
                paths.setdefault(depth[site.index] + after[site.index], []).append(name)
        ranks: dict[str, int] = {}
        read: set[int] = set()
        for length in sorted(paths, reverse=True):
            ends = [name for name in paths[length] if self.layers[name].index not in read]
            ranks |= {name: self.depth - after[self.layers[name].index] for name in ends}
            # What a branch shares with a longer path was found there.
            have = {v for i in read for v in self.graph.equations[i].results}
            read |= {*self.graph.needed([self.layers[name].preactivation for name in ends], have)}
        return ranks

    @functools.cached_property
    def joins(self) -> bool:
        """Whether values that follow different layers are added, as in residual networks."""
        layers = {site.index for site in self.layers.values()}
        behind: dict[int, frozenset[int]] = {}
        for index, equation in enumerate(self.graph.equations):
            before = [behind.get(v, frozenset()) for v in equation.values]
            if equation.primitive in SUMS and index not in layers:
                summands = [
                    b
                    for v, b in zip(equation.values, before, strict=True)
                    if self.graph.depends[v] & INPUT
                    and self.graph.avals[v].shape == self.graph.avals[equation.result].shape
                ]
                if len(set(summands)) > 1:
                    return True
            layers_before = frozenset().union(*before) | (
                {index} if index in layers else frozenset()
            )
            behind.update((v, layers_before) for v in equation.results)
        return False

    @functools.cached_property
    def opaque(self) -> tuple[tuple[str, str], ...]:
        """Primitives that were kept whole although a layer lies inside: (name, file:line)."""
        depends = self.graph.depends
        return tuple(
            (e.primitive, e.where)
            for e in self.graph.equations
            if e.primitive not in LINEAR
            and e.depends == PARAM | INPUT
            and holds_layer(e.eqn, [depends[v] if isinstance(v, int) else 0 for v in e.inputs])
        )

    @functools.cached_property
    def others(self) -> tuple[tuple[str, str, str], ...]:
        """Leaves that act outside of layers, norms and biases: (path, primitive, file:line)."""
        uses = outside.leaves_outside(self.graph, self.layers.values(), self.norms.values())
        return tuple((self.paths[leaf], primitive, where) for leaf, primitive, where in uses)

    @functools.cached_property
    def widest(self) -> int:
        """Bytes of the largest value that depends on the input."""
        values = (v for v, bits in self.graph.depends.items() if bits & INPUT)
        avals = (self.graph.avals[v] for v in values)
        return max((a.size * a.dtype.itemsize for a in avals), default=0)

    @functools.cached_property
    def propagation(self) -> Propagation:
        """The groups along the axes of all values."""
        return propagate(self.graph)

    @functools.cached_property
    def effects(self) -> dict[int, dict[str, Effect]]:
        """By index of a leaf, how it acts on values that depend on the input."""
        return leaf_effects(self.graph, self.norms.values())

    @functools.cached_property
    def groups(self) -> dict[int, str]:
        """Names of the groups, by their ids in `propagation`."""
        return named_groups(self.propagation, self.paths)[2]

    def places(self, value: int) -> tuple[Place, ...]:
        """The groups along the axes of a value, those within others last."""
        by_group: dict[int, list[Axis]] = {}
        for axis, atoms in enumerate(self.propagation.axes.get(value, ())):
            for atom in atoms:
                if atom.group is not None and atom.group in self.groups:
                    where = atom.outer, atom.inner, atom.windows, atom.entries
                    place = Axis("", axis, "elementwise", *where)
                    by_group.setdefault(atom.group, []).append(place)
        within, places = self.propagation.within, []
        for group in sorted(by_group, key=within.__contains__):
            for place in by_group[group]:
                around = owners(place, by_group.get(within.get(group, -1), ()))
                owner = around[0] if len(around) == 1 else None
                places.append(Place(self.groups[group], place, owner))
        return tuple(places)

    def norm_after(self, site: LinearSite) -> str | None:
        """The norm that is the only reader of a pre-activation up to layout, or None."""
        link = self.norm_link(site)
        return None if link is None else link[0]

    @functools.cache  # noqa: B019 - lives and dies with the network that owns it
    def norm_link(self, site: LinearSite) -> tuple[str, tuple[int, ...]] | None:
        """The norm of `norm_after`, and the layer's channel axes in the norm's input."""
        graph = self.graph
        shape = graph.avals[site.preactivation].shape
        sizes = [n if a in site.channel_axes else 1 for a, n in enumerate(shape)]
        labels = np.arange(int(np.prod(sizes))).reshape(sizes)
        index, value, axes, labels = follow(graph, site.preactivation, site.channel_axes, labels)
        for name, norm in self.norms.items():
            if norm.index == index and norm.input == value:
                # If the norm saw the channels in another order, corrections would have to be
                # reordered.
                ordered = bool((np.diff(labels.reshape(-1)) > 0).all())
                return (name, axes) if ordered else None
        return None

    @functools.cache  # noqa: B019 - lives and dies with the network that owns it
    def cut(self, depth: int) -> Cut:
        """The cut at a depth: the stem computes the pre-activations up to that depth."""
        graph = self.graph
        ends = [name for name, least in self.ranks.items() if least <= depth]
        seeds = [self.layers[name].preactivation for name in ends]
        stem = frozenset(i for i in graph.needed(seeds, ()) if graph.equations[i].depends & INPUT)
        made = {v for i in stem for v in graph.equations[i].outputs if v is not None}
        made |= set(graph.inputs[graph.num_leaves :])
        crossing = sorted(
            v
            for v in made
            if v in graph.output_ids
            or any(u not in stem and self._alive(u) for u in graph.users.get(v, ()))
        )
        averaged = tuple(bool(graph.depends[v] & PARAM) for v in crossing)
        return Cut(stem, tuple(crossing), averaged)

    def _alive(self, index: int) -> bool:
        return bool(self.graph.equations[index].depends & INPUT)

    def part(self, start: int | None, stop: int | None) -> list[int]:
        """Equations that run from one cut to another, including parameter-only ones.

        Args:
            start: Depth of the first cut; None for the input.
            stop: Depth of the second; None for the output.
        """
        have = () if start is None else self.cut(start).crossing
        return self.graph.needed(self.ends(stop), have)

    def ends(self, stop: int | None) -> tuple[int, ...]:
        """Ids of the values at which a part ends: those that cross the cut, or the outputs."""
        return self.graph.output_ids if stop is None else self.cut(stop).crossing

    def leaves_of(self, equations: Sequence[int], outputs: Sequence[int] = ()) -> frozenset[str]:
        """Paths of the leaves that equations read, and of those among `outputs`."""
        leaves = set(self.graph.inputs[: self.graph.num_leaves])
        read = {v for i in equations for v in self.graph.equations[i].values} | set(outputs)
        return frozenset(self.paths[self.graph.inputs.index(v)] for v in read & leaves)

    def flops(self, index: int) -> int:
        """Operations of one equation over the whole batch; see `vfjax._analysis.cost`."""
        return equation_flops(self.graph, index, self._conv_biases, self._norm_equations)

    @functools.cached_property
    def _conv_biases(self) -> frozenset[int]:
        return frozenset(
            s.bias_equation
            for s in self.layers.values()
            if s.bias_equation is not None and self.graph.equations[s.index].primitive == CONV
        )

    @functools.cached_property
    def _norm_equations(self) -> frozenset[int]:
        return frozenset(s.index for s in self.norms.values())

    @property
    def signature(self) -> tuple[Any, ...]:
        """The facts that must agree between traces: sites, depths, and the leaves they use."""
        layers = tuple(
            (
                name,
                self.depth_of(site),
                self.is_main(site),
                site.kernel is None,
                None if site.bias is None else (site.bias.leaf, site.bias.slot),
                site.bias_equation is None,
            )
            for name, site in self.layers.items()
        )
        return layers, tuple(self.norms)


def _slotted(path: str, slot: int | None) -> str:
    return path if slot is None else f"{path}[{slot}]"


def _unused(base: str, named: Mapping[str, Any]) -> str:
    """A name that is not taken: the n-th use of a leaf is `leaf#n`."""
    name, n = base, 1
    while name in named:
        n += 1
        name = f"{base}#{n}"
    return name
