"""A merged model with the leaves of its trees by path: what functions that change one work on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from vfjax._trees import paths
from vfjax._trees.paths import Flat
from vfjax._types import PyTree
from vfjax.merge._merged import Merged
from vfjax.network._checks import check_variances
from vfjax.network._network import Network


@dataclasses.dataclass(frozen=True, eq=False)
class Unpacked:
    """A merged model that has been checked, and its trees taken apart, each of them once.

    Attributes:
        model: The model; a tree is one of cut 0.
        plain: Whether a tree was given, and a tree is what the caller wants back.
    """

    model: Merged
    plain: bool = False

    @classmethod
    def of_tree(cls, net: Network, tree: PyTree, flat: Flat) -> Unpacked:
        """A tree that has been checked and taken apart, as a merged model."""
        found = cls(Merged((), tree, {}, net, 0, (1.0,)), plain=True)
        vars(found)["trunk"] = flat
        return found

    @property
    def net(self) -> Network:
        """The network of the trunk."""
        return self.model.net

    @functools.cached_property
    def trunk(self) -> Flat:
        """The trunk."""
        return paths.flatten_named(self.model.trunk)

    @functools.cached_property
    def stems(self) -> tuple[Flat, ...]:
        """The stem of each model."""
        return tuple(paths.flatten_named(stem) for stem in self.model.stems)

    @functools.cached_property
    def heads(self) -> tuple[Flat, ...]:
        """The head of each model."""
        return tuple(paths.flatten_named(head) for head in self.model.heads)

    def places(self, name: str) -> tuple[tuple[Network, Flat, float], ...]:
        """Where a layer or a norm has its leaves: networks, trees, and their weights.

        Args:
            name: Name of its site.

        Returns:
            One for each model inside stems and heads, else the trunk alone.
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
            stems: Those of each stem; empty if these stay.
            heads: Those of each head; empty if these stay.
            **fields: Fields of `Merged` to replace, which hold no trees.
        """
        parts = {"stems": (stems, self.stems), "heads": (heads, self.heads)}
        flats: dict[str, Any] = {
            part: tuple(flat.put(found) for flat, found in zip(old, leaves, strict=True))
            for part, (leaves, old) in parts.items()
            if leaves
        }
        trees = {part: tuple(flat.tree() for flat in of) for part, of in flats.items()}
        if trunk is not None:
            flats["trunk"] = self.trunk.put(trunk)
            trees["trunk"] = flats["trunk"].tree()
        changed = Unpacked(dataclasses.replace(self.model, **trees, **fields), self.plain)
        # What is taken apart stays so.
        known = {part: of for part, of in vars(self).items() if part in ("trunk", *parts)}
        vars(changed).update(known | flats)
        return changed

    def given_back(self) -> PyTree | Merged:
        """The model as the caller gave it: a tree as a tree, while nothing keeps it from that."""
        return self.model.trunk if self.plain and not self.model.corrections else self.model

    def check(self, name: str) -> None:
        """Checks that the model can be evaluated: all is finite, and no variance unknown.

        Args:
            name: What to call it.

        Raises:
            ValueError: If it cannot.
        """
        model = self.model
        kept = model.net.trunk_leaves(model.cut, model.end) - self.trunk.leaves.keys()
        check_variances(model.net, [p for p in model.net.paths if p in kept], name)
        parts = [("trunk", self.trunk)]
        parts += [(f"stems/{k}", flat) for k, flat in enumerate(self.stems)]
        parts += [(f"heads/{k}", flat) for k, flat in enumerate(self.heads)]
        leaves = {f"{of}/{path}": leaf for of, flat in parts for path, leaf in flat.leaves.items()}
        others = {"corrections": model.corrections, "merge": model.merge, "unmerge": model.unmerge}
        paths.check_finite(leaves | paths.flatten_named(others).leaves, name=name)
