"""`Merged`: several models up to a depth, one from there on, as a pytree that can be called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vfjax import _tree
from vfjax._plan import check_edit
from vfjax._weights import resolve_weights
from vfjax.network import Crossing, Layer, Network, check_net

Array = jax.Array
PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stems", "trunk", "corrections"],
    meta_fields=["net", "cut", "weights"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Merged:
    """Several models up to a depth, one from there on: what `vfjax.merge.preserve_first` returns.

    A frozen pytree whose leaves are parameters: `model(x)`, `jax.jit(model)(x)`, `jax.grad`,
    `jax.jit(lambda m, x: m(x))(model, x)`, `jax.device_put` and `jax.tree.map` all work. Equality
    and hash are by identity.

    Attributes:
        stems: One tree per model with the leaves that its stem reads, None in place of the others;
            empty at cut 0.
        trunk: The averaged tree, None in place of leaves that the trunk does not read; at cut 0 the
            whole tree.
        corrections: `{layer name: (scale, shift)}`, float32 or better, shaped like the layer's
            channels: `z <- scale * z + shift` on its pre-activation (averaged, at the cut). Only
            those that could not be folded into leaves.
        net: The traced network (static).
        cut: How many layers are kept per model, from 0 to `net.depth` (static).
        weights: The weights of the averages, one float per model (static).

    Example:
        >>> import vfjax
        >>> a, b = {"w0": jnp.eye(2), "w1": jnp.eye(2)}, {"w0": jnp.eye(2), "w1": 3 * jnp.eye(2)}
        >>> x = jnp.array([[1.0, 2.0]])
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w0"]) @ v["w1"], a, x)
        >>> model = vfjax.merge.preserve_first(net, [a, b], layers=1)
        >>> model
        Merged(cut=1 of 2, models=2, weights=(0.5, 0.5), params=12, flops=14, corrections=[])
        >>> jax.jit(model)(x).tolist()
        [[2.0, 4.0]]
    """

    stems: tuple[PyTree, ...]
    trunk: PyTree
    corrections: Mapping[str, tuple[Array, Array]]
    net: Network
    cut: int
    weights: tuple[float, ...]

    def __call__(self, x: PyTree) -> PyTree:
        """Evaluates the model on a batch x, as the traced `apply_fn` would."""
        return self.run(x)

    def run(
        self,
        x: PyTree,
        *,
        capture: Sequence[str] | None = None,
        edit: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> PyTree:
        """Evaluates the model with values of the trunk read or replaced, like `Network.run`.

        Args:
            x: A batch, or the `Crossing` that `crossing` made of one.
            capture: Names of sites to return; of the trunk, or the layers at the cut, whose
                pre-activation is the average over the stems.
            edit: `{site: function}`. Where a correction sits, it comes first.

        Returns:
            The output, or with `capture` the pair `(output, {name: value})`.

        Raises:
            TypeError: If `capture` is no sequence of names, or `edit` no mapping to functions.
            ValueError: If a site does not exist or lies inside the stems, x is no batch of the
                traced network and no `Crossing` of this cut, or an edit changes shape or dtype.

        Example:
            >>> import vfjax
            >>> a, b = {"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}
            >>> x = jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: x @ v["w"], a, x)
            >>> model = vfjax.merge.preserve_first(net, [a, b], layers=1)
            >>> out, found = model.run(x, capture=["w"], edit={"w": lambda z: -z})
            >>> out.tolist(), found["w"].tolist()
            ([[-2.0, -4.0]], [[-2.0, -4.0]])
        """
        check_edit(edit)
        edit = dict(edit or {})
        for name, (scale, shift) in self.corrections.items():
            edit[name] = _chain(affine(self.net.layer(name), scale, shift), edit.get(name))
        if self.cut == 0:
            return self.net.run(self.trunk, x, capture=capture, edit=edit)
        if not isinstance(x, Crossing):
            x = self.crossing(x)
        return self.net.run(self.trunk, x, capture=capture, edit=edit, start=self.cut)

    def apart(self, site: str) -> bool:
        """Whether a site lies inside the stems, where it has a value per model and no average.

        What crosses the cut is averaged, so the layers at the cut are not apart.

        Args:
            site: Name of a site, as in `Network.run`.

        Raises:
            ValueError: If the network has no such site.

        Example:
            >>> import vfjax
            >>> a = {"w0": jnp.eye(2), "w1": jnp.eye(2), "w2": jnp.eye(2)}
            >>> net = vfjax.trace(lambda v, x: x @ v["w0"] @ v["w1"] @ v["w2"], a, jnp.ones((1, 2)))
            >>> model = vfjax.merge.preserve_first(net, [a, a], layers=2)
            >>> [model.apart(site) for site in ("input", "w0", "w1", "w2")]
            [True, True, False, False]
        """
        return self.net.in_stem(site, self.cut) and not self.net.crosses(site, self.cut)

    def read(self, x: PyTree, sites: Sequence[str]) -> tuple[PyTree, dict[str, tuple[Any, ...]]]:
        """Evaluates the model with values read anywhere, inside the stems too.

        Args:
            x: A batch.
            sites: Names of sites.

        Returns:
            The output, and by site a tuple: of one value per model where the site is `apart`, of
            one value elsewhere.

        Raises:
            TypeError: If `sites` is no sequence of names.
            ValueError: If a site does not exist, or x is no batch of the traced network.

        Example:
            >>> import vfjax
            >>> a = {"w0": jnp.eye(2), "w1": jnp.eye(2)}
            >>> x = jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w0"]) @ v["w1"], a, x)
            >>> model = vfjax.merge.preserve_first(net, [a, {**a, "w0": 3 * a["w0"]}], layers=2)
            >>> out, found = model.read(x, ["w0", "w1"])
            >>> [[value.tolist() for value in found[site]] for site in ("w0", "w1")]
            [[[[1.0, 2.0]], [[3.0, 6.0]]], [[[2.0, 4.0]]]]
        """
        if self.cut == 0:
            out, found = self.run(x, capture=sites)
            return out, {site: (value,) for site, value in found.items()}
        inside = [site for site in sites if self.apart(site)]
        runs = [self.net.run(stem, x, capture=inside, stop=self.cut) for stem in self.stems]
        crossing = self.net.average_crossings([end for end, _ in runs], self.weights)
        out, found = self.run(crossing, capture=[site for site in sites if site not in inside])
        return out, {
            site: tuple(values[site] for _, values in runs) if site in inside else (found[site],)
            for site in sites
        }

    def crossing(self, x: PyTree) -> Crossing:
        """Evaluates the stems on a batch and averages what crosses the cut.

        Corrections at the cut belong to `run`, so a crossing depends on the stems alone: it can be
        stored and given to `run`, or to `vfjax.renorm` as data, for every trunk tried behind them.

        Args:
            x: A batch.

        Returns:
            The averaged crossing.

        Raises:
            ValueError: At cut 0, where nothing crosses.

        Example:
            >>> import vfjax
            >>> a, b = {"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}
            >>> x = jnp.array([[1.0, 2.0]])
            >>> net = vfjax.trace(lambda v, x: x @ v["w"], a, x)
            >>> model = vfjax.merge.preserve_first(net, [a, b], layers=1)
            >>> crossing = model.crossing(x)
            >>> crossing.values[0].tolist(), model.run(crossing).tolist()
            ([[2.0, 4.0]], [[2.0, 4.0]])
        """
        if self.cut == 0:
            raise ValueError("a model merged from its first layer on (cut 0) has no crossing")
        crossings = [self.net.run(stem, x, stop=self.cut) for stem in self.stems]
        return self.net.average_crossings(crossings, self.weights)

    @property
    def params(self) -> int:
        """Number of parameters: those of every stem and of the trunk, running statistics apart."""
        net = self.net
        if self.cut == 0:  # the whole tree, also leaves that nothing reads
            return net.parameters
        return len(self.stems) * net.stem_parameters(self.cut) + net.trunk_parameters(self.cut)

    parameters = params

    @property
    def flops(self) -> int:
        """Multiply-accumulates per example: those of every stem and of the trunk."""
        net = self.net
        return len(self.stems) * net.stem_flops(self.cut) + net.trunk_flops(self.cut)

    def __repr__(self) -> str:
        """Says what it is in a line, without arrays."""
        return (
            f"Merged(cut={self.cut} of {self.net.depth}, models={len(self.weights)}, "
            f"weights={self.weights}, params={self.params}, flops={self.flops}, "
            f"corrections={list(self.corrections)})"
        )

    def __checkpoint__(self) -> tuple[str, PyTree, dict[str, Any]]:
        """Returns (kind, arrays, JSON) for `vfjax.checkpoint.save`."""
        trees = {"trunk": _tree.flatten_named(self.trunk)[0]}
        trees |= {f"stem{k}": _tree.flatten_named(s)[0] for k, s in enumerate(self.stems)}
        # Leaves go by number, their paths into the JSON: a path may hold any character.
        arrays = {name: list(leaves.values()) for name, leaves in trees.items()}
        arrays["corrections"] = [list(pair) for pair in self.corrections.values()]
        meta = {
            "cut": self.cut,
            "weights": list(self.weights),
            "stems": len(self.stems),
            "paths": {name: list(leaves) for name, leaves in trees.items()},
            "corrections": list(self.corrections),
            "layers": _signature(self.net),
        }
        return "vfjax.merge.Merged", arrays, meta

    @classmethod
    def __from_checkpoint__(
        cls, tree: PyTree, meta: Mapping[str, Any], *, net: Network | None
    ) -> Merged:
        """Rebuilds what `__checkpoint__` took apart."""
        if net is None:
            raise ValueError(
                "this checkpoint holds a merged model, which needs its traced network: "
                "load(path, net=vfjax.trace(apply_fn, variables, x))"
            )
        if meta["layers"] != _signature(net):
            raise ValueError(
                "net is not the network of this checkpoint: its layers are "
                f"{_signature(net)}, those saved {meta['layers']}"
            )

        def rebuild(name: str) -> PyTree:
            leaves = dict(zip(meta["paths"][name], tree[name], strict=True))
            ordered = [leaves.get(path) for path in net.paths]
            return jax.tree.unflatten(net._treedef, ordered)

        corrections = zip(meta["corrections"], tree["corrections"], strict=True)
        return cls(
            stems=tuple(rebuild(f"stem{k}") for k in range(meta["stems"])),
            trunk=rebuild("trunk"),
            corrections={name: (scale, shift) for name, (scale, shift) in corrections},
            net=net,
            cut=meta["cut"],
            weights=tuple(meta["weights"]),
        )


def as_merged(net: Network, tree: PyTree, *, weights: Sequence[float] | None = None) -> Merged:
    """Wraps one tree as a `Merged` of cut 0.

    Args:
        net: The traced network.
        tree: A tree of the network's variables.
        weights: The weights with which it was averaged; None for those of two models.

    Returns:
        A model that computes what the tree does.

    Raises:
        TypeError: If `net` is no traced network, a leaf no array, or `weights` no sequence.
        ValueError: If the tree does not fit the network, or weights do not sum to one.

    Example:
        >>> import vfjax
        >>> x, tree = jnp.ones((4, 3)), {"kernel": jnp.ones((3, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["kernel"], tree, x)
        >>> as_merged(net, tree)(x).shape
        (4, 2)
    """
    check_fits(net, tree, "tree")
    weights = (0.5, 0.5) if weights is None else resolve_weights(weights, None)
    return Merged(stems=(), trunk=tree, corrections={}, net=net, cut=0, weights=weights)


def affine(layer: Layer, scale: Array, shift: Array) -> Callable[[Array], Array]:
    """The function `z -> scale * z + shift` on a layer's pre-activation.

    Args:
        layer: The layer.
        scale: Shaped like its channels.
        shift: Likewise.

    Returns:
        A function that computes in float32 or better and casts back.
    """

    def apply(z: Array) -> Array:
        dtype = jnp.promote_types(z.dtype, jnp.float32)
        a, b = (jnp.expand_dims(v, layer.sample_axes).astype(dtype) for v in (scale, shift))
        return (z.astype(dtype) * a + b).astype(z.dtype)

    return apply


def check_fits(net: Network, tree: PyTree, name: str) -> None:
    """Checks that a tree has the leaves of a traced network's variables.

    Raises:
        TypeError: If `net` is no traced network, or a leaf no array.
        ValueError: If leaves are missing or added, or differ in shape or dtype.
    """
    check_net(net)
    leaves, _ = _tree.flatten_named(tree, name=name)
    _tree.check_like(leaves, net._avals, name=name, other="the traced network's variables")


def check_merged(net: Network, merged: PyTree | Merged) -> None:
    """Checks a `merged` argument: a finite tree of the network's variables, or a `Merged` of it.

    Raises:
        TypeError: If `net` is no traced network, or a leaf no array.
        ValueError: If it does not fit the network, or holds NaN or infinite values.
    """
    check_net(net)
    if not isinstance(merged, Merged):
        leaves, _ = _tree.flatten_named(merged, name="merged")
        check_fits(net, merged, "merged")
        _tree.check_finite(leaves, name="merged")
    elif merged.net is not net:
        raise ValueError("merged was made with another network than net; pass net=merged.net")


def weights_for(
    merged: PyTree | Merged, weights: Sequence[float] | None, count: int
) -> tuple[float, ...]:
    """Weights of `count` references of a merged model.

    None stands for the weights that a `Merged` of as many models was made with, since goals mixed
    in other proportions are never meant, and for equal ones otherwise.
    """
    if weights is None and isinstance(merged, Merged) and len(merged.weights) == count:
        return merged.weights
    return resolve_weights(weights, count, of="references")


def _chain(first: Callable, second: Callable | None) -> Callable:
    return first if second is None else lambda z: second(first(z))


def _signature(net: Network) -> list[list[Any]]:
    """What a network must share with another for their trees to be interchangeable, as JSON."""
    return [[layer.name, list(layer.shape), layer.depth] for layer in net.layers]
