"""What the input adds to the output of every layer: measured, bounded, and shown."""

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
RATIO = "norm of f(x) - f(0), ratio to edge models"
AGAINST = "norm of f(x) - f(0) / norm of f(0)"
BARS = "standard deviation over test images"
# By the preset `cpu`; all with the preset `paper`.
SAMPLES, STATISTICS = 2_000, 10_000


def samples() -> Any:
    """The option of how many test images there are."""
    return cli.images("samples", "test images, the first N, that features are measured on", SAMPLES)


def rows_of(
    net: vfjax.Network,
    networks: Mapping[str, merge.Merged],
    test: Any,
    whole: Sequence[float] | None = None,
) -> Iterator[records.Row]:
    """Features, offsets and bounds of every layer, and logits by class, of networks by name.

    Relative features are relative to `whole`, one number by layer; None for these networks' mean.
    Rows have the name as `network`, and a `layer` or a `class`.
    """
    layers = sorted((layer for layer in net.layers if layer.main), key=lambda layer: layer.depth)
    sites = [layer.name for layer in layers]
    found = diagnose.features(net, list(networks.values()), test, sites=sites)
    zero = jnp.zeros((1, *net.x.shape[1:]), net.x.dtype)
    by_site = {key: getattr(found, key) for key in ("feature", "feature_std", "offset")}
    every = {key: np.array([of[s] for s in sites], np.float64).T for key, of in by_site.items()}
    relative = every["feature"] / (every["feature"].mean(0) if whole is None else np.array(whole))
    every["relative"], every["bound"] = relative, diagnose.upper_bound(relative)
    every["smoothed"] = diagnose.upper_bound(relative, gamma=GAMMA)
    for k, (name, network) in enumerate(networks.items()):
        for place, layer in enumerate(layers):
            numbers = {key: float(values[k, place]) for key, values in every.items()}
            yield {"network": name, "layer": layer.depth, "site": layer.name, **numbers}
        logits = found.mean[sites[-1]][k], found.std[sites[-1]][k], network.run(zero)[0]
        keys = ("logit", "logit_std", "logit_at_zero")
        for place, numbers in enumerate(np.transpose(logits).tolist()):
            yield {"network": name, "class": place} | dict(zip(keys, numbers, strict=True))


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
    """Geometric mean over layers."""
    return float(np.exp(np.log(np.maximum(relative, np.finfo(float).tiny)).mean()))


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


def line(
    record: records.Record, network: str, *, bound: bool, start: int = 1, **style: Any
) -> figures.Line:
    """Against relative depth bounds of a network's features, or from `start` on over offsets."""
    rows, depth = record.rows.where(network=network), record["model"]["depth"]
    seeds = rows.where(layer=depth).distinct("seed") or [None]
    x = np.array(sorted(rows.distinct("layer")))[start - 1 :] / depth
    if bound:
        each = [by_layer(rows, "bound", seed=seed) for seed in seeds]
        found = diagnose.resample(each, POINTS, at=x)
        x = np.arange(1, POINTS + 1) / POINTS
    else:
        found = np.array([shares(rows, seed=seed)[start - 1 :] for seed in seeds])
        found[np.isinf(found)] = np.nan
    spread = found.std(0, ddof=1).tolist() if len(seeds) > 1 else None
    return figures.Line(x=x.tolist(), y=found.mean(0).tolist(), error=spread, **style)


def logits_panel(record: records.Record, networks: Mapping[str, Mapping[str, Any]]) -> Any:
    """Mean logits, which vary by their bars; styles of lines by network.

    The first repetition's alone; with `at_zero` in its style, a network's logits at the mean image.
    """
    lines, seed = [], next(iter(record.rows.distinct("seed")), None)
    ticks = record.rows.distinct("class")
    for k, (name, style) in enumerate(networks.items()):
        zero = style.get("at_zero")
        rows = record.rows.where(network=zero or name, seed=seed)
        y, error = rows.values("logit_at_zero" if zero else "logit"), rows.values("logit_std")
        look = {key: value for key, value in style.items() if key != "at_zero"}
        x = [place + 0.12 * (k - 1.5) for place in ticks]
        lines.append(figures.Line(x=x, y=y, error=None if zero else error, **look))
    return figures.Panel("logits", "class", "logit (mean over images)", lines, ticks=ticks)
