"""Records: tidy rows with all that says where they come from, and what is read from them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vfjax
from kit import cli
from vfjax import checkpoint

ROOT = cli.ROOT
RESULTS = ROOT / "experiments" / "results"
PACKAGES = "jax jaxlib flax optax orbax-checkpoint numpy scipy scikit-learn tensorflow-datasets"
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mnist": "MNIST"}
DATASETS["digits"] = "scikit-learn's 8x8 digits"
Row = dict[str, Any]


class Rows(list[Row]):
    """Rows of a record, each a flat dict of what was measured and what of.

    Example:
      >>> rows = Rows([{"k": 1, "seed": 0, "accuracy": 0.5}, {"k": 1, "seed": 1, "accuracy": 0.7},
      ...              {"k": 2, "seed": 0, "accuracy": 0.9}])
      >>> rows.where(k=1).values("accuracy")
      [0.5, 0.7]
      >>> round(rows.mean("accuracy", k=1), 3), rows.distinct("k"), rows.where(k=3).mean("accuracy")
      (0.6, [1, 2], nan)
      >>> rows.curve("k")[0], rows.curve("k", seed=0)[1]
      ([1, 2], [0.5, 0.9])
    """

    def where(self, **wanted: Any) -> Rows:
        """Those with some values; of a tuple, list or set of values, any."""
        several = {k: v if isinstance(v, (tuple, list, set)) else (v,) for k, v in wanted.items()}
        return Rows(row for row in self if all(row.get(k) in v for k, v in several.items()))

    def values(self, key: str = "accuracy", **wanted: Any) -> list[Any]:
        """What stands at a key, in the order of the rows; rows with None there are left out."""
        return [row[key] for row in self.where(**wanted) if row.get(key) is not None]

    def mean(self, key: str = "accuracy", **wanted: Any) -> float:
        return mean_std(self.values(key, **wanted))[0]

    def distinct(self, key: str, **wanted: Any) -> list[Any]:
        """The values that there are, each once; None is left out."""
        return list(dict.fromkeys(self.values(key, **wanted)))

    def only(self, **wanted: Any) -> Row:
        """The one row with some values; raises a LookupError if there is none, or several."""
        found = self.where(**wanted)
        if len(found) != 1:
            raise LookupError(f"{len(found)} rows with {wanted}, not one.")
        return found[0]

    def curve(self, x: str, y: str = "accuracy", **wanted: Any) -> tuple[list, list, list]:
        """Values of x in their order, and mean and standard deviation of y over all else."""
        rows = self.where(**wanted)
        xs = sorted(rows.distinct(x))
        found = [mean_std(rows.values(y, **{x: value})) for value in xs]
        return xs, [mean for mean, _ in found], [spread for _, spread in found]


class Record(dict[str, Any]):
    """A record as in its JSON, with `rows` to select from."""

    @property
    def rows(self) -> Rows:
        return Rows(self["rows"])

    def notes(self, name: str) -> Rows:
        """What was found on the way, by the name that `Run.note` was given."""
        return Rows(self.get("notes", {}).get(name, ()))

    @property
    def chance(self) -> float:
        data = self["data"]
        known = {"cifar100": 100, "imagenet": 1000}
        return 1 / data.get("classes", known.get(data.get("name"), 10))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value, NaN for none)."""
    if not values:
        return float("nan"), float("nan")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread


def curve_rows(cell: Mapping[str, Any], found: Any) -> Iterator[Row]:
    """The rows of a `vfjax.diagnose.Interpolation`: one for each alpha, then one of barriers."""
    for alpha, value, loss in zip(found.alphas, found.accuracy, found.loss, strict=True):
        yield {**cell, "alpha": float(alpha), "accuracy": float(value), "loss": float(loss)}
    barriers = {k: float(getattr(found, k)) for k in ("barrier", "reference_barrier")}
    lowest, of_loss = float(found.accuracy.min()), float(found.loss_barrier)
    yield {**cell, "lowest": lowest, **barriers, "loss_barrier": of_loss}


def finite(value: Any) -> Any:
    """The same with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, record: Mapping[str, Any]) -> Path:
    checkpoint.write_json(path, finite(record))
    return path


def read(path: Path) -> Record:
    """Reads a record; raises a `UserError` if there is none."""
    try:
        return Record(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise cli.UserError(f"{path} is not a record: {error}") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version(), "vfjax": vfjax.__version__}
    for package in ("vfjax", *PACKAGES.split()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def environment() -> dict[str, Any]:
    """Where and when something was measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind, machine = jax.devices()[0].device_kind, platform.machine()
    device = {"platform": jax.default_backend(), "kind": kind, "count": jax.device_count()}
    device |= {"cores": cores, "machine": machine}
    return {"versions": versions(), "device": device, "date": time.strftime("%Y-%m-%d")}


def about(dataset: Any, **counts: int | None) -> dict[str, Any]:
    """What records say of a `vfjax.data.Dataset`, with numbers of images that are not None."""
    found = {key: getattr(dataset, key) for key in ("name", "fallback", "classes")}
    images = {f"{key}_images": count for key, count in counts.items() if count is not None}
    return found | {"source": dataset.source.split(" in ")[0]} | images


def dataset_label(source: Mapping[str, Any], wanted: str) -> str:
    """The data of a record as in titles, where a fall-back from what was wanted shows.

    Example:
      >>> dataset_label({"name": "digits", "fallback": True}, "mnist")
      "MNIST NOT FOUND, SO: scikit-learn's 8x8 digits"
    """
    label = DATASETS.get(source["name"], source["name"])
    return f"{DATASETS[wanted]} NOT FOUND, SO: {label}" if source["fallback"] else label


def networks(record: Mapping[str, Any], wanted: str = "cifar10") -> str:
    """Data and networks, as titles begin."""
    config = record["config"]
    width = "" if config["width"] == 1 else f" at {config['width']:g} of the width"
    return f"{dataset_label(record['data'], wanted)}: {config['model']}{width}"


def title(record: Mapping[str, Any], what: str = "", count: int = 1, of: str = "seeds") -> str:
    """Data, networks, what was done with them, on how many test images; the mean of how many."""
    parts = [networks(record), what, f"{record['data']['test_images']:,} test images"]
    return ", ".join(filter(None, [*parts, f"mean of {count} {of}" * (count > 1)]))


def made_on(record: Mapping[str, Any]) -> str:
    device = record["device"]
    return f"{device['cores']} CPU cores" if device["platform"] == "cpu" else device["kind"]


def joined(words: Iterable[Any]) -> str:
    """Words as in a sentence."""
    words = list(map(str, words))
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def file_name(
    record: Mapping[str, Any], options: type[cli.Options], stem: Sequence[str] | None = None
) -> str:
    """Name of record and figure, without suffix: what was asked for and is not default.

    So runs that differ in what they measure do not overwrite each other's results. `stem` is what
    it begins with after the experiment's name, None for data and network; the `part` of each of the
    options says how it shows.
    """
    config = record["config"]
    if stem is None:
        width = config.get("width", 1)
        stem = [record["data"]["name"], config["model"] + ("" if width == 1 else f"-w{width:g}")]
    parts, last = [record["experiment"], *stem], []
    defaults = cli.defaults(options, config)
    for field in dataclasses.fields(options):
        part, value, text = field.metadata["part"], config.get(field.name), None
        usual = field.metadata["usual"]
        default = usual(record) if usual else defaults[field.name]
        if callable(part):
            text = part(record)
        elif part is not None and finite(value) != finite(default):
            several = isinstance(value, (list, tuple))
            text = part.format("+".join(map(str, value)) if several else value)
        # How the networks were made comes after what was done with them.
        (last if field.name in ("preset", "retrain") else parts).extend([text] if text else [])
    return "-".join(parts + last)
