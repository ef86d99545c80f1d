"""The README: its code runs, its commands exist, its generated parts are up to date."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from vfjax import diagnose, prune, stats

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


class Yours(nn.Module):
    """A reader's own network."""

    @nn.compact
    def __call__(self, x):
        for features in (16, 16, 16):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(4)(x)


def test_the_examples_merge_a_flax_model_and_look_at_it(tmp_path, monkeypatch):
    example, mix, look, thin, fisher = code("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) == 10
    model = Yours()
    batches = list(jax.random.normal(jax.random.key(0), (3, 20, 5)))
    a, b = (model.init(jax.random.key(seed), batches[0]) for seed in (1, 2))
    names = {"model": model, "a": a, "b": b, "batches": batches}
    exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (20, 4)
    assert names["merged"].cut == 2
    # Permuting does not change what the second network computes.
    np.testing.assert_allclose(
        model.apply(names["b"], batches[0]), model.apply(b, batches[0]), rtol=1e-4, atol=1e-5
    )
    # In the order of reading: from here on `merged` is another merge, of the same two networks.
    exec(compile(mix, "README.md", "exec"), names)
    assert names["several"].heads
    assert names["ours"].shape == names["theirs"].shape == (20, 4)
    monkeypatch.chdir(tmp_path)
    exec(compile(look, "README.md", "exec"), names)
    assert names["report"].advice
    # Held against the mapped networks, which a network's first layer is mapped exactly to.
    mapped = names["maps"].apply(names["net"], [names["a"], names["b"]])
    wanted = diagnose.report(names["net"], names["merged"], batches, references=list(mapped))
    first = names["report"].layers[0].relative
    np.testing.assert_allclose(first, wanted.layers[0].relative, rtol=1e-4)
    assert "<img" in (tmp_path / "report.html").read_text(encoding="utf-8")
    exec(compile(thin, "README.md", "exec"), names)
    assert prune.sparsity(names["mask"]) == pytest.approx(0.9, abs=0.01)
    moments = stats.moments(names["net"], [names["a"], names["pruned"]], batches[:1], sites="paper")
    for before, after in moments.var.values():
        alive = np.asarray(after) > 0
        np.testing.assert_allclose(after[alive], before[alive], rtol=1e-3)
    exec(compile(fisher, "README.md", "exec"), names)
    assert prune.sparsity(names["mask"]) == pytest.approx(0.9, abs=0.01)
    assert not np.asarray(names["pruned"]["params"]["Dense_0"]["kernel"])[
        ~np.asarray(names["mask"]["params"]["Dense_0"]["kernel"])
    ].any()


def test_commands_are_as_promised():
    commands = "\n".join(code("bash"))
    assert "pip install . && python experiments/cifar_pfm.py" in commands
    assert 'pip install ".[test]" && pytest' in commands


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\"\.\[(\w+)\]\"", README):
        assert extra in project["optional-dependencies"]


def test_named_files_exist():
    for name in re.findall(r"`((?:vfjax|experiments|checkpoints|tests)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name
