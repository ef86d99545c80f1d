"""Checkpoints of merged models: to named arrays and JSON, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vfjax._trees import flatten_named, some
from vfjax._types import PyTree
from vfjax.network._arguments import networks
from vfjax.network._inside import tree_of
from vfjax.network._network import Network


def take_apart(model: Any) -> tuple[PyTree, dict[str, Any]]:
    """Takes a `Merged` apart into arrays and JSON.

    Args:
        model: The model.

    Returns:
        Lists of arrays by name, and the JSON that describes them.
    """
    trees = {"trunk": flatten_named(model.trunk)[0]}
    trees |= {f"stem{k}": flatten_named(stem)[0] for k, stem in enumerate(model.stems)}
    trees |= {f"head{k}": flatten_named(head)[0] for k, head in enumerate(model.heads)}
    trees |= {f"merge{k}": dict(maps) for k, maps in enumerate(model.merge)}
    trees |= {f"unmerge{k}": dict(maps) for k, maps in enumerate(model.unmerge)}
    # Leaves are numbered, and their paths go into the JSON, since a path may hold any character.
    arrays = {name: list(leaves.values()) for name, leaves in trees.items()}
    arrays["corrections"] = [list(pair) for pair in model.corrections.values()]
    meta = {
        "cut": model.cut,
        "end": model.end,
        "weights": list(model.weights),
        "paths": {name: list(leaves) for name, leaves in trees.items()},
        "corrections": list(model.corrections),
        "layers": _signature(model.net),
    }
    parts = ("stems", "heads", "merge", "unmerge", "nets")
    meta |= {part: len(getattr(model, part)) for part in parts}
    if model.nets:
        meta["layers_of"] = [_signature(net) for net in model.nets]
    return arrays, meta


def put_together(
    tree: PyTree, meta: Mapping[str, Any], net: Network | Sequence[Network] | None
) -> dict[str, Any]:
    """Rebuilds the fields of a `Merged` from what `take_apart` returned.

    Args:
        tree: Lists of arrays by name.
        meta: The JSON that describes them. Checkpoints of models without heads may lack the keys of
            heads and matrices.
        net: The traced network, or one per model.

    Raises:
        TypeError: If `net` is neither a network nor a sequence of networks.
        ValueError: If `net` is missing, or is not the network of the checkpoint: it has other
            layers, lacks leaves that were saved, or reads leaves that were not.
    """
    if net is None:
        raise ValueError(
            "this checkpoint holds a merged model, which needs its traced network: "
            "load(path, net=vfjax.trace(apply_fn, variables, x))"
        )
    nets = networks(net, len(meta["weights"]))
    several = bool(meta.get("nets"))
    layers = meta["layers_of"] if several else [meta["layers"]] * len(nets)
    for k, (given, saved) in enumerate(zip(nets, layers, strict=True)):
        if saved != _signature(given):
            raise ValueError(
                f"net{f'[{k}]' if several else ''} is not the network of this checkpoint: its "
                f"layers are {_signature(given)}, those saved {saved}"
            )

    cut: int = meta["cut"]
    end: Any = meta.get("end")  # None without heads

    def rebuilt(name: str, net: Network, read: Collection[str]) -> PyTree:
        _check_leaves(net, meta["paths"][name], read, name)
        return tree_of(net, dict(zip(meta["paths"][name], tree[name], strict=True)))

    stems = range(meta["stems"])
    heads = range(meta.get("heads", 0))

    def maps(kind: str) -> tuple[dict[str, Any], ...]:
        names = [f"{kind}{k}" for k in range(meta.get(kind, 0))]
        return tuple(dict(zip(meta["paths"][n], tree[n], strict=True)) for n in names)

    corrections = zip(meta["corrections"], tree["corrections"], strict=True)
    return {
        "stems": tuple(rebuilt(f"stem{k}", nets[k], nets[k].stem_leaves(cut)) for k in stems),
        "trunk": rebuilt("trunk", nets[0], nets[0].trunk_leaves(cut, end)),
        "corrections": {name: (scale, shift) for name, (scale, shift) in corrections},
        "net": nets[0],
        "cut": cut,
        "weights": tuple(meta["weights"]),
        "heads": tuple(rebuilt(f"head{k}", nets[k], nets[k].trunk_leaves(end)) for k in heads),
        "merge": maps("merge"),
        "unmerge": maps("unmerge"),
        "end": end,
        "nets": nets if several else (),
    }


def _check_leaves(net: Network, saved: Collection[str], read: Collection[str], name: str) -> None:
    """Checks that a network has the leaves of a saved part, and reads no others there."""
    # Merging may leave variances unknown, so these may be missing.
    missing = set(read).difference(saved, [norm.var for norm in net.norms])
    lacking = set(saved).difference(net.paths)
    if lacking or missing:
        parts = [f"it lacks {some(sorted(lacking))} of the {name}"] if lacking else []
        parts += [f"the {name} was saved without {some(sorted(missing))}"] if missing else []
        raise ValueError(f"net is not the network of this checkpoint: {', and '.join(parts)}")


def _signature(net: Network) -> list[list[Any]]:
    """The layers of a network, as JSON: networks that agree here have interchangeable trees."""
    return [[layer.name, list(layer.shape), layer.depth] for layer in net.layers]
