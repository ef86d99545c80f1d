"""One run of a network: its captures and edits, resolved to values and equations of one trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from vfjax._analysis import Traced
from vfjax._jaxpr import evaluate, faster
from vfjax._trees.concrete import check_one_device, check_values
from vfjax._types import Array, PyTree
from vfjax.network._checks import check_crossing, check_part, check_present, named_leaves
from vfjax.network._crossing import Crossing
from vfjax.network._retrace import origin_of, traces_of
from vfjax.network._sites import WORDS, crosses, in_stem, inputs_of, locate, select

if TYPE_CHECKING:
    from vfjax.network._network import Network

Edit = Callable[[Array], Array]


def run(
    net: Network,
    variables: PyTree,
    x: PyTree,
    capture: Iterable[str] | None,
    edit: Mapping[str, Edit] | None,
    stop: int | None,
    start: int | None,
) -> Any:
    """Evaluates a network or a part of it; see `Network.run`."""
    check_part(net, start, stop)
    check_crossing(x, start)
    named = named_leaves(net, variables)
    if isinstance(x, Crossing):
        traced = traces_of(net).at_crossing(named, x)
        env = dict(zip(traced.cut(x.depth).crossing, x.values, strict=True))
    else:
        traced = traces_of(net).at(named, x)
        env = dict(zip(inputs_of(traced), jax.tree.leaves(x), strict=True))
    ids = zip(traced.graph.inputs, net.paths, strict=False)
    env |= {value: named[path] for value, path in ids if path in named}
    try:
        env = {v: a if isinstance(a, jax.Array) else jnp.asarray(a) for v, a in env.items()}
    except TypeError:
        check_values("evaluation computes", variables=named, x=x)
        raise
    changes = Changes(net, traced, capture, edit, stop, start)
    env = changes.enter(env)
    ends = traced.ends(stop)
    wanted = list(dict.fromkeys([*ends, *changes.values]))
    check_present(net, traced, wanted, env, "variables")
    try:
        values = evaluate(
            traced.graph,
            env,
            wanted,
            edits=changes.edits,
            operand_edits=changes.operand_edits,
            rules=faster.rules(),
        )
    except ValueError:
        check_one_device(variables=named, x=x)
        raise
    if stop is not None:
        origin = x.origin if isinstance(x, Crossing) else origin_of(x)
        out: Any = Crossing(tuple(values[v] for v in ends), stop, origin)
    else:
        out = changes.finish(traced.output(values))
    if capture is None:
        return out
    return out, changes.captured(values, env, out)


class Changes:
    """The captures and edits of one run, by value and equation.

    Attributes:
        edits: By value id, the function that replaces the value for all its readers.
        operand_edits: By (equation, operand), the function that replaces it for one reader.
        values: Ids of the values to compute for the captures.
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
        capture, edit = check_capture(net, capture), edit or {}
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
        # A pre-activation may be its own tap; then the layer's edit comes before the tap's.
        names = sorted(dict.fromkeys([*edit, *self._capture]), key=lambda s: s.endswith(":act"))
        for site in names:
            self._check_side(site)
            if site == "output":
                continue
            if site == "input":
                self.values += inputs_of(self._traced)
                continue
            value, use = locate(net, traced, site)
            change = _checked(edit[site], site) if site in edit else None
            self._ids[site] = value
            if change is not None and use is not None:
                self.operand_edits[use] = functools.partial(self._record, site, change)
                value = traced.graph.equations[use[0]].result  # computing this runs the edit
            elif change is not None:
                before = self.edits.get(value)
                self.edits[value] = change if before is None else _after(before, change)
            if site in self._capture:
                self.values.append(value)

    def enter(self, env: Mapping[int, Any]) -> dict[int, Any]:
        """The given values after their edits."""
        env = dict(env)
        if "input" in self._whole:
            leaves = [env[v] for v in inputs_of(self._traced)]
            x = self._whole["input"](jax.tree.unflatten(self._traced.x_tree, leaves))
            env.update(zip(inputs_of(self._traced), jax.tree.leaves(x), strict=True))
        env.update((v, change(env[v])) for v, change in self.edits.items() if v in env)
        return env

    def finish(self, out: Any) -> Any:
        """The output after its edit."""
        return self._whole["output"](out) if "output" in self._whole else out

    def captured(self, values: Mapping[int, Any], env: Mapping[int, Any], out: Any) -> dict:
        """The captured values by site, from the computed values, the given ones and the output."""
        captured = {}
        for site in self._capture:
            if site == "output":
                captured[site] = out
            elif site == "input":
                leaves = [env[v] for v in inputs_of(self._traced)]
                captured[site] = jax.tree.unflatten(self._traced.x_tree, leaves)
            else:
                captured[site] = self._seen.get(site, values.get(self._ids[site]))
        return captured

    def _check_side(self, site: str) -> None:
        """Checks that a site lies in the part that runs; values that cross a cut lie in both."""
        start, stop, where = self._start, self._stop, (self._net, self._traced, site)
        if stop is not None and not in_stem(*where, stop):
            raise ValueError(f"Site '{site}' lies in the trunk; stop={stop} ends before it.")
        if start is not None and in_stem(*where, start) and not crosses(*where, start):
            raise ValueError(f"Site '{site}' lies in the stem; start={start} begins after it.")

    def _record(self, site: str, change: Edit, value: Array) -> Array:
        self._seen[site] = change(value)
        return self._seen[site]


def check_capture(net: Any, capture: Any) -> tuple[Any, ...]:
    """The sites to capture; raises a TypeError unless they are a sequence, or a word for some."""
    capture = () if capture is None else capture
    if isinstance(capture, str) and capture in WORDS:
        return select(net, capture, whole=True)
    if isinstance(capture, str) or not isinstance(capture, Iterable):
        raise TypeError(
            f"capture must be a sequence of site names, or one of {', '.join(WORDS)}; it was "
            f"{capture!r}."
        )
    return tuple(capture)  # a tuple, since an iterator can be read only once


def check_edit(edit: Any) -> None:
    """Raises a TypeError unless `edit` is a mapping, or nothing at all."""
    if not isinstance(edit, Mapping) and edit is not None:
        raise TypeError(f"edit must map site names to functions; it was {edit!r}.")


def _after(first: Edit, second: Edit) -> Edit:
    return lambda value: second(first(value))


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
