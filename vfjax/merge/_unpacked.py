"""A merged model with its trees flattened by path, for the functions that change one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from vfjax._trees import Flat, check_finite, flatten_named
from vfjax._types import PyTree
from vfjax.merge._merged import Merged
from vfjax.network._checks import check_variances
from vfjax.network._network import Network


@dataclasses.dataclass(frozen=True, eq=False)
class Unpacked:
    """A merged model that has been checked; each of its trees is flattened at most once.

    Attributes:
        model: The model; a plain tree is a model of cut 0.
        plain: Whether the caller gave a tree, and so wants a tree back.
    """

    model: Merged
    plain: bool = False

    @classmethod
    def of_tree(cls, net: Network, tree: PyTree, flat: Flat) -> Unpacked:
        """Wraps a tree that has been checked and flattened as a merged model."""
        unpacked = cls(Merged((), tree, {}, net, 0, (1.0,)), plain=True)
        vars(unpacked)["trunk"] = flat  # fills the cache of the property: not flattened again
        return unpacked

    @property
    def net(self) -> Network:
        """The network of the trunk."""
        return self.model.net

    @functools.cached_property
    def trunk(self) -> Flat:
        """The trunk."""
        return flatten_named(self.model.trunk)

    @functools.cached_property
    def stems(self) -> tuple[Flat, ...]:
        """The stem of each model."""
        return tuple(flatten_named(stem) for stem in self.model.stems)

    @functools.cached_property
    def heads(self) -> tuple[Flat, ...]:
        """The head of each model."""
        return tuple(flatten_named(head) for head in self.model.heads)

    def places(self, name: str) -> tuple[tuple[Network, Flat, float], ...]:
        """Where the leaves of a layer or a norm are: networks, trees, and their weights.

        Args:
            name: Name of its site.

        Returns:
            One triple for each model inside stems and heads, else one for the trunk.
        """
        model, trees = self.model, ()
        if model.cut and model.net.in_stem(name, model.cut):
            trees = self.stems
        elif model.in_heads(name):
            trees = self.heads
        if not trees:
            return ((model.net, self.trunk, 1.0),)
        return tuple((model.net_of(k), flat, model.weights[k]) for k, flat in enumerate(trees))

    def put(
        self,
        *,
        trunk: Mapping[str, Any] | None = None,
        stems: Sequence[Mapping[str, Any]] = (),
        heads: Sequence[Mapping[str, Any]] = (),
        **fields: Any,
    ) -> Unpacked:
        """The model with some of its leaves replaced.

        Args:
            trunk: New leaves of the trunk by path.
            stems: New leaves of each stem; empty to keep them.
            heads: New leaves of each head; empty to keep them.
            **fields: Other fields of `Merged` to replace, which hold no trees.
        """
        parts = {"stems": (stems, self.stems), "heads": (heads, self.heads)}
        flats: dict[str, Any] = {
            part: tuple(flat.put(new) for flat, new in zip(old, leaves, strict=True))
            for part, (leaves, old) in parts.items()
            if leaves
        }
        trees = {part: tuple(flat.tree() for flat in of) for part, of in flats.items()}
        if trunk is not None:
            flats["trunk"] = self.trunk.put(trunk)
            trees["trunk"] = flats["trunk"].tree()
        changed = Unpacked(dataclasses.replace(self.model, **trees, **fields), self.plain)
        # Trees that have been flattened are not flattened again.
        known = {part: of for part, of in vars(self).items() if part in ("trunk", *parts)}
        vars(changed).update(known | flats)
        return changed

    def given_back(self) -> PyTree | Merged:
        """The model in the form in which it was given; a tree with corrections is a `Merged`."""
        return self.model.trunk if self.plain and not self.model.corrections else self.model

    def check(self, name: str) -> None:
        """Checks that the model can be evaluated: leaves are finite, and variances known.

        Args:
            name: Name of the model in messages.

        Raises:
            ValueError: If a leaf is not finite, or a variance is unknown.
        """
        model = self.model
        kept = model.net.trunk_leaves(model.cut, model.end) - self.trunk.leaves.keys()
        check_variances(model.net, [p for p in model.net.paths if p in kept], name)
        parts = [("trunk", self.trunk)]
        parts += [(f"stems/{k}", flat) for k, flat in enumerate(self.stems)]
        parts += [(f"heads/{k}", flat) for k, flat in enumerate(self.heads)]
        leaves = {f"{of}/{path}": leaf for of, flat in parts for path, leaf in flat.leaves.items()}
        others = {"corrections": model.corrections, "merge": model.merge, "unmerge": model.unmerge}
        check_finite(leaves | flatten_named(others).leaves, name=name)
