"""What the input adds to the output of every layer: measured, bounded, and shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import vfjax
from kit import cli, figures, records, tables
from vfjax import diagnose, merge

# Of smoothed bounds, and where bounds are drawn.
GAMMA, POINTS = 1.4, 20
DEPTH = "relative depth (layer / L)"
AGAINST = "norm of f(x) - f(0) / norm of f(0)"
BARS = "standard deviation over test images"
# By the preset `cpu`; all with the preset `paper`.
SAMPLES, STATISTICS = 2_000, 10_000


def samples() -> Any:
    """The option of how many test images there are."""
    return cli.images("samples", "test images, the first N, that features are measured on", SAMPLES)


def main_layers(net: vfjax.Network) -> list[vfjax.Layer]:
    """The layers of the main path, by depth."""
    return sorted((layer for layer in net.layers if layer.main), key=lambda layer: layer.depth)


# ------------------------------------------------------------------------------------- measuring


def rows_of(
    net: vfjax.Network,
    networks: Mapping[str, merge.Merged],
    test: Any,
    whole: Sequence[float] | None = None,
) -> Iterator[records.Row]:
    """Features, offsets and bounds of every layer, and logits by class.

    Args:
      net: The traced network.
      networks: By name.
      test: Batches of images.
      whole: By layer, the features that relative ones are relative to; None for these networks'
        mean.

    Yields:
      Rows with the name as `network`, by `layer` or by `class`.
    """
    layers = main_layers(net)
    sites = [layer.name for layer in layers]
    found = diagnose.features(net, list(networks.values()), test, sites=sites)
    zero = jnp.zeros((1, *net.x.shape[1:]), net.x.dtype)
    every = {
        key: np.array([getattr(found, key)[site] for site in sites], np.float64).T
        for key in ("feature", "feature_std", "offset")
    }
    relative = every["feature"] / (every["feature"].mean(0) if whole is None else np.array(whole))
    every["relative"], every["bound"] = relative, diagnose.upper_bound(relative)
    every["smoothed"] = diagnose.upper_bound(relative, gamma=GAMMA)
    for k, (name, network) in enumerate(networks.items()):
        for place, layer in enumerate(layers):
            numbers = {key: float(values[k, place]) for key, values in every.items()}
            yield {"network": name, "layer": layer.depth, "site": layer.name, **numbers}
        logits = found.mean[sites[-1]][k], found.std[sites[-1]][k], network.run(zero)[0]
        for place, numbers in enumerate(zip(*map(np.asarray, logits), strict=True)):
            keys = ("logit", "logit_std", "logit_at_zero")
            yield {
                "network": name,
                "class": place,
                **dict(zip(keys, map(float, numbers), strict=True)),
            }


# ---------------------------------------------------------------------------- numbers of a record


def by_layer(rows: records.Rows, key: str = "relative", **where: Any) -> np.ndarray:
    """A number by layer, `[L]`; the mean over repetitions."""
    return np.array(rows.where(**where).curve("layer", key)[1])


def shares(rows: records.Rows, **where: Any) -> np.ndarray:
    """Features over offsets, by layer; infinite where there is no offset.

    Example:
      >>> rows = records.Rows([{"layer": 1, "feature": 1.0, "offset": 2.0},
      ...                      {"layer": 2, "feature": 1.0, "offset": 0.0}])
      >>> shares(rows).tolist()
      [0.5, inf]
    """
    feature, offset = (by_layer(rows, key, **where) for key in ("feature", "offset"))
    return np.divide(feature, offset, out=np.full(len(feature), np.inf), where=offset > 0)


def over_layers(relative: np.ndarray) -> float:
    """Geometric mean over layers.

    Example:
      >>> round(over_layers(np.array([1.0, 0.25])), 6)
      0.5
    """
    return float(np.exp(np.log(np.maximum(relative, np.finfo(float).tiny)).mean()))


# ---------------------------------------------------------------------------------------- shown


def table(record: records.Record, networks: Mapping[str, str]) -> tables.Table:
    """Accuracy, features at half depth and at the output, logits; `networks` by their labels."""
    number, depth = tables.number(), record["model"]["depth"]
    columns = [
        tables.Column("accuracy, %"),
        tables.Column("feature at L/2, ratio", {"layer": depth // 2}, "relative", number),
        tables.Column("at L", {"layer": depth}, "relative", number),
        tables.Column("feature of logits", {"layer": depth}, "feature", number),
        tables.Column("offset of logits", {"layer": depth}, "offset", number),
        tables.Column("spread of logits", key="logit_std", show=number),
    ]
    lines = {label: {"network": name} for label, name in networks.items()}
    return tables.pivot(record.rows, lines, columns, title=record["title"], corner="network")


def bound_line(record: records.Record, network: str, **style: Any) -> figures.Line:
    """Upper bounds of a network's features against relative depth, over repetitions."""
    rows, depth = record.rows.where(network=network), record["model"]["depth"]
    seeds = rows.where(layer=depth).distinct("seed") or [None]
    each = [by_layer(rows, "bound", seed=seed) for seed in seeds]
    at = np.array(sorted(rows.distinct("layer"))) / depth
    found = diagnose.resample(each, POINTS, at=at)
    return _line(np.arange(1, POINTS + 1) / POINTS, found, **style)


def share_line(record: records.Record, network: str, start: int = 1, **style: Any) -> figures.Line:
    """Features against offsets, by relative depth, from some layer on."""
    rows, depth = record.rows.where(network=network), record["model"]["depth"]
    seeds = rows.where(layer=depth).distinct("seed") or [None]
    found = np.array([shares(rows, seed=seed) for seed in seeds])[:, start - 1 :]
    at = np.array(sorted(rows.distinct("layer")))[start - 1 :] / depth
    return _line(at, np.where(np.isfinite(found), found, np.nan), **style)


def logits_panel(record: records.Record, networks: Mapping[str, Mapping[str, Any]]) -> Any:
    """Mean logits, which vary by their bars; styles of lines by network.

    The first repetition's alone; with `at_zero` in its style, a network's logits at the mean image.
    """
    lines = []
    for k, (name, style) in enumerate(networks.items()):
        zero = style.get("at_zero")
        rows = record.rows.where(network=zero or name)
        seeds = rows.distinct("seed")[:1] or [None]
        rows = rows.where(seed=seeds[0])
        x = [place + 0.12 * (k - 1.5) for place in rows.distinct("class")]
        y = rows.values("logit_at_zero" if zero else "logit")
        error = None if zero else rows.values("logit_std")
        kept = {key: value for key, value in style.items() if key != "at_zero"}
        lines.append(figures.Line(x=x, y=y, error=error, **kept))
    ticks = record.rows.distinct("class")
    return figures.Panel("logits", "class", "logit (mean over images)", lines, ticks=ticks)


def _line(x: np.ndarray, found: np.ndarray, **style: Any) -> figures.Line:
    spread = found.std(0, ddof=1).tolist() if len(found) > 1 else None
    return figures.Line(x=x.tolist(), y=found.mean(0).tolist(), error=spread, **style)
