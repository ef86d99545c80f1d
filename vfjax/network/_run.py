"""One run of a network: named sites, resolved to values and equations of one trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vfjax._analysis.traced import Traced
from vfjax._types import Array
from vfjax.network._checks import unknown

Edit = Callable[[Array], Array]


class Plan:
    """What one run reads and replaces, and where.

    Attributes:
        edits: By value id, the function that replaces the value for all its readers.
        operand_edits: By (equation, operand), the function that replaces it for one reader.
        values: Ids of the values that have to be computed for the captures.
    """

    def __init__(
        self,
        net: Any,
        traced: Traced,
        capture: Iterable[str] | None,
        edit: Mapping[str, Edit] | None,
        stop: int | None,
        start: int | None,
    ) -> None:
        """Resolves the sites; see `Network.run` for the arguments and errors."""
        capture, edit = check_capture(capture), edit or {}
        check_edit(edit)
        if not all(isinstance(site, str) for site in (*capture, *edit)):
            raise TypeError(
                f"capture and edit must name sites by strings; they were {list(capture)} and "
                f"{list(edit)}."
            )
        self._net, self._traced, self._capture = net, traced, capture
        self._start, self._stop = start, stop
        self._whole = {s: _checked(edit[s], s) for s in ("input", "output") if s in edit}
        self._seen: dict[str, Any] = {}
        self._ids: dict[str, int] = {}
        self.edits: dict[int, Edit] = {}
        self.operand_edits: dict[tuple[int, int], Edit] = {}
        self.values: list[int] = []
        for site in dict.fromkeys([*edit, *self._capture]):
            self._check_side(site)
            if site == "output":
                continue
            if site == "input":
                self.values += self._inputs
                continue
            value, use = self._locate(site)
            change = _checked(edit[site], site) if site in edit else None
            self._ids[site] = value
            if change is not None and use is not None:
                self.operand_edits[use] = functools.partial(self._record, site, change)
                value = traced.graph.equations[use[0]].result  # so that the edit is made
            elif change is not None:
                self.edits[value] = change
            if site in self._capture:
                self.values.append(value)

    @property
    def _inputs(self) -> tuple[int, ...]:
        return self._traced.graph.inputs[self._traced.graph.num_leaves :]

    def value_of(self, site: str) -> int:
        """Id of the value at a site of one array."""
        return self._locate(site)[0]

    def in_stem(self, site: str, depth: int) -> bool:
        """Whether the value at a site is made in the stem of a cut."""
        if site in ("input", "output"):
            return site == "input"
        value, use = self._locate(site)
        index = use[0] if use is not None else self._traced.graph.producer.get(value)
        return index is None or index in self._traced.cut(depth).stem

    def crosses(self, site: str, depth: int) -> bool:
        """Whether the value at a site is handed from the stem of a cut to the trunk."""
        if site == "output":
            return False
        ids = self._inputs if site == "input" else (self._locate(site)[0],)
        return set(ids) <= set(self._traced.cut(depth).crossing)

    def enter(self, env: Mapping[int, Any]) -> dict[int, Any]:
        """The given values after the edits that concern them."""
        env = dict(env)
        if "input" in self._whole:
            leaves = [env[v] for v in self._inputs]
            x = self._whole["input"](jax.tree.unflatten(self._traced.x_tree, leaves))
            env.update(zip(self._inputs, jax.tree.leaves(x), strict=True))
        env.update((v, change(env[v])) for v, change in self.edits.items() if v in env)
        return env

    def finish(self, out: Any) -> Any:
        """The output after its edit."""
        return self._whole["output"](out) if "output" in self._whole else out

    def captured(self, values: Mapping[int, Any], env: Mapping[int, Any], out: Any) -> dict:
        """The captured values by site, given what was computed, what was given, and the output."""
        found = {}
        for site in self._capture:
            if site == "output":
                found[site] = out
            elif site == "input":
                leaves = [env[v] for v in self._inputs]
                found[site] = jax.tree.unflatten(self._traced.x_tree, leaves)
            else:
                found[site] = self._seen.get(site, values.get(self._ids[site]))
        return found

    def _locate(self, site: str) -> tuple[int, tuple[int, int] | None]:
        """Id of the value at a site; and, if it is one use of it, which equation's operand."""
        traced = self._traced
        if site in traced.layers:
            return traced.layers[site].preactivation, None
        if site.endswith(":act") and site[:-4] in traced.layers:
            return traced.taps[site[:-4]], None
        if site.endswith(":in") and site[:-3] in traced.norms:
            index = traced.norms[site[:-3]].index
            return traced.graph.equations[index].values[0], (index, 0)
        if site.endswith(":in") and site[:-3] in traced.layers:
            layer = traced.layers[site[:-3]]
            operand = 1 - layer.side
            value = traced.graph.equations[layer.index].inputs[operand]
            assert isinstance(value, int)  # it depends on the input
            return value, (layer.index, operand)
        inner = [f"{n}:in" for n in (*traced.norms, *traced.layers)]
        known = [*traced.layers, *inner, "input", "output"]
        raise ValueError(unknown(self._net, "site", site, known))

    def _check_side(self, site: str) -> None:
        """Checks that a site lies in the part that runs; what crosses lies in both."""
        start, stop = self._start, self._stop
        if stop is not None and not self.in_stem(site, stop):
            raise ValueError(f"Site '{site}' lies in the trunk; stop={stop} ends before it.")
        if start is not None and self.in_stem(site, start) and not self.crosses(site, start):
            raise ValueError(f"Site '{site}' lies in the stem; start={start} begins after it.")

    def _record(self, site: str, change: Edit, value: Array) -> Array:
        self._seen[site] = change(value)
        return self._seen[site]


def check_capture(capture: Any) -> tuple[Any, ...]:
    """The sites to capture, as a tuple; raises a TypeError unless they are a sequence."""
    capture = () if capture is None else capture
    if isinstance(capture, str) or not isinstance(capture, Iterable):
        raise TypeError(f"capture must be a sequence of site names; it was {capture!r}.")
    return tuple(capture)  # once: an iterator is read only once


def check_edit(edit: Any) -> None:
    """Raises a TypeError unless `edit` is a mapping, or nothing at all."""
    if not isinstance(edit, Mapping) and edit is not None:
        raise TypeError(f"edit must map site names to functions; it was {edit!r}.")


def _checked(change: Edit, site: str) -> Edit:
    if not callable(change):
        raise TypeError(f"edit['{site}'] must be a function of the value; it was {change!r}.")

    def checked(value: Any) -> Any:
        new = change(value)
        before, after = _types(value), _types(new)
        if before != after:
            raise ValueError(
                f"edit['{site}'] must keep shape and dtype; it made {after} of {before}. Cast back "
                "with `.astype(value.dtype)`."
            )
        return new

    return checked


def _types(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    types = [(jnp.shape(a), str(jnp.result_type(a))) for a in leaves]
    return types[0] if jax.tree.structure(0) == structure else (structure, types)
