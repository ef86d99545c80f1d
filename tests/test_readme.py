"""The README: its code runs, its commands and links exist, and its numbers are the records'."""

from __future__ import annotations

import json
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from vfjax import prune, stats

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
RAW = REPOSITORY.replace("https://github.com/", "https://raw.githubusercontent.com/")
RESULTS = ROOT / "experiments" / "results"

Row = Mapping[str, Any]


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------- code


class Yours(nn.Module):
    """A reader's own network."""

    @nn.compact
    def __call__(self, x, train):
        for features in (16, 16, 16):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(features)(x)))
        return nn.Dense(4)(x)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the reader has: a module, two sets of its variables, batches."""
    model = Yours()
    batches = list(jax.random.normal(jax.random.key(0), (3, 20, 5)))
    a, b = (model.init(jax.random.key(seed), batches[0], train=False) for seed in (1, 2))
    return {"model": model, "a": a, "b": b, "batches": batches}


def test_the_examples_run_in_the_order_of_reading(names, tmp_path, monkeypatch):
    merging, looking, pruning = code("python")
    assert len([line for line in merging.splitlines() if line.strip()]) == 10
    model, b, batches = names["model"], names["b"], names["batches"]
    exec(compile(merging, "README.md", "exec"), names)
    assert names["logits"].shape == (20, 4)
    assert names["merged"].cut == 2
    # Permuting does not change what the second network computes.
    np.testing.assert_allclose(
        model.apply(names["b"], batches[0], train=False),
        model.apply(b, batches[0], train=False),
        rtol=1e-4,
        atol=1e-5,
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(looking, "README.md", "exec"), names)
    assert names["report"].advice
    assert "<img" in (tmp_path / "report.html").read_text(encoding="utf-8")
    exec(compile(pruning, "README.md", "exec"), names)
    assert prune.sparsity(names["mask"]) == pytest.approx(0.8, abs=0.01)
    # Each norm of the pruned network now has the statistics of what it reads.
    moments = stats.moments(names["net"], [names["pruned"]], batches, sites="paper")
    first = names["pruned"]["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(first, moments.mean["params/Dense_0/kernel"][0], rtol=1e-3)


@pytest.mark.parametrize("remedy", ["rescale", "repair"])
def test_what_it_says_of_other_remedies(names, remedy):
    call = f"renorm.{remedy}(net, merged, batches, references=[a, b])"
    assert call in README or f"`renorm.{remedy}`" in README
    exec(compile(code("python")[0], "README.md", "exec"), names)
    exec(f"again = {call}", names)
    weights = "align.match_weights(net, a, b, key=jax.random.key(0))"
    assert weights in README
    exec(f"found = {weights}\nplain = merge.interpolate([a, b])", names)
    assert names["found"].permutations and names["again"].cut == 2


# ------------------------------------------------------------------------------------- commands


def test_commands_are_as_promised():
    lines = "\n".join(code("bash")).splitlines()
    assert "pip install . && python experiments/cifar_pfm.py" in lines
    assert 'pip install ".[test]" && pytest' in lines


def test_extras_exist():
    extras = re.findall(r"\"\.\[([\w-]+)\]\"", README)
    assert extras and set(extras) <= set(PROJECT["optional-dependencies"])


def test_named_files_exist():
    for name in re.findall(r"`((?:vfjax|experiments|checkpoints|tests)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name


def test_named_parts_of_the_library_exist():
    import vfjax

    for name in re.findall(r"`((?:vfjax\.)?(?:align|merge|renorm|checkpoint)(?:\.\w+)*)`", README):
        found = vfjax
        for part in name.removeprefix("vfjax.").split("."):
            found = getattr(found, part)


def test_it_is_short_and_links_are_absolute():
    assert len(README.encode()) <= 12_000
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets and all(target.startswith("https://") for target in targets)


def test_links_into_the_repository_lead_to_files():
    own = re.findall(rf"\(({re.escape(REPOSITORY)}|{re.escape(RAW)})/([^)]+)\)", README)
    assert own
    for base, rest in own:
        path = rest.removeprefix("main/" if base == RAW else "blob/main/").partition("#")[0]
        assert path != rest
        target = ROOT / path
        # Pages are written from the records.
        assert target.exists() or list(RESULTS.glob(f"{target.stem}-*.json")), path


def test_links_of_the_notebook():
    text = (ROOT / "experiments" / "notebooks" / "vfjax_colab.ipynb").read_text(encoding="utf-8")
    links = re.findall(r"\]\((https://[^)]+)\)", text)
    assert links
    for link in links:
        path = link.removeprefix(REPOSITORY).removeprefix("/blob/main/")
        assert link.startswith(REPOSITORY) and (ROOT / path).exists(), link


# -------------------------------------------------------------------------------------- numbers


def rows_of(name: str) -> list[Row]:
    """The measured cells of a record."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows with some values; of a tuple, any."""

    def fits(value: Any, of: Any) -> bool:
        return value in of if isinstance(of, tuple) else value == of

    return [row for row in rows if all(fits(row.get(k), of) for k, of in wanted.items())]


def percent(rows: Sequence[Row], *, spread: bool = True, **wanted: Any) -> str:
    """Mean accuracy, and the standard deviation where there are several runs."""
    values = [100 * row["accuracy"] for row in select(rows, **wanted)]
    assert values, wanted
    several = spread and len(values) > 1
    more = f" ± {statistics.stdev(values):.1f}" if several else ""
    return f"{statistics.mean(values):.1f}{more}"


def merged_line(name: str, of: str, layers: int, remedy: str) -> str:
    """A line on a merge of two networks."""
    rows = rows_of(name)
    at = {"network": "PFM", "layers": layers}
    alone = percent(rows, network=("model 1", "model 2"), spread=False)
    plain = percent(rows, match="none", remedy="none", **at)
    matched = percent(rows, match="activation", remedy="none", **at)
    repaired = percent(rows, match="activation", remedy=remedy, **at)
    cost = f"{select(rows, **at)[0]['params_ratio']:.2f}"
    page = f"[cifar_pfm]({REPOSITORY}/blob/main/experiments/results/cifar_pfm.md)"
    cells = [of, cost, alone, plain, matched, f"{repaired} ({remedy.upper()})", page]
    return f"| {' | '.join(cells)} |"


def pruned_line(name: str, of: str, sparsity: int) -> str:
    """A line on pruning by global magnitude."""
    rows = rows_of(name)
    at = {"method": "magnitude", "sparsity": sparsity, "samples": None}
    alone = percent(rows, method=None, remedy="none", spread=False)
    plain, repaired = (percent(rows, remedy=remedy, **at) for remedy in ("none", "reset"))
    page = f"[pruning]({REPOSITORY}/blob/main/experiments/results/pruning.md)"
    cells = [of, "", alone, plain, "", f"{repaired} (RESET)", page]
    return f"| {' | '.join(cells)} |"


def results_table() -> str:
    """The README's table of results, from the records."""
    vgg = "cifar_pfm-cifar10-vgg16-w0.25-3pairs"
    resnet, pruned = "cifar_pfm-cifar10-resnet20-w0.5", "pruning-cifar10-vgg16-bn-w0.125"
    heads = "what", "parameters", "one network", "plain", "matched", "renormalised", "page"
    return "\n".join(
        [
            f"| {' | '.join(heads)} |",
            f"| :-- |{' --: |' * 5} :-- |",
            merged_line(vgg, "two VGG16, all layers merged", 0, "repair"),
            merged_line(vgg, "two VGG16, 8 of 14 layers apart", 8, "repair"),
            merged_line(vgg, "two VGG16, 12 of 14 layers apart", 12, "repair"),
            merged_line(resnet, "two ResNet20 (BatchNorm), all layers merged", 0, "reset"),
            pruned_line(pruned, "VGG16 (BatchNorm), 80% of the weights pruned", 80),
        ]
    )


def test_the_table_of_results_is_that_of_the_records():
    """Where it is not, the line to paste is in the message."""
    shown = README.partition("<!-- results -->\n")[2].partition("\n<!-- /results -->")[0]
    assert shown == results_table(), results_table()


def test_what_it_says_about_reaching_the_single_networks():
    """Eight layers apart are not enough, twelve are."""
    rows = rows_of("cifar_pfm-cifar10-vgg16-w0.25-3pairs")
    alone = float(percent(rows, network=("model 1", "model 2"), spread=False))
    for layers, enough in ((8, False), (12, True)):
        at = {"network": "PFM", "layers": layers, "match": "activation"}
        found = [float(percent(rows, spread=False, remedy=r, **at)) for r in ("repair", "rescale")]
        assert all((accuracy >= alone) is enough for accuracy in found)
