"""Flattening and evaluating jaxprs: what runs is what was traced, whatever wrapped it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from helpers import close
from vfjax._jaxpr import MAX_UNROLL, evaluate, flatten, holds_layer
from vfjax._jaxpr.primitives import CUSTOM, INLINE


def graph_of(fn, variables, x):
    leaves, tree = jax.tree.flatten(variables)
    closed = jax.make_jaxpr(lambda leaves, x: fn(jax.tree.unflatten(tree, leaves), x))(leaves, x)
    return flatten(closed, len(leaves))


def run(graph, variables, x, **how):
    env = dict(zip(graph.inputs, [*jax.tree.leaves(variables), *jax.tree.leaves(x)], strict=True))
    values = evaluate(graph, env, graph.output_ids, **how)
    return [values[v] for v in graph.output_ids]


def names(graph):
    return [e.primitive for e in graph.equations]


W = {"a": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.linspace(-1, 2, 16).reshape(4, 4)}
X = jnp.linspace(-2, 2, 6).reshape(2, 3)


@jax.custom_vjp
def straight(w, x):
    return jnp.sin(x @ w)


straight.defvjp(lambda w, x: (straight(w, x), (w, x)), lambda r, c: (r[0], c @ r[0].T))


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defjvp(lambda p, t: (clipped(p[0]), 7 * t[0]))


def test_calls_that_only_delimit_are_inlined():
    def fn(p, x):
        x = jax.jit(lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ p["a"]))(x))(x)
        policy = jax.checkpoint_policies.dots_saveable
        x = jax.checkpoint(lambda x: checkpoint_name(x @ p["b"], "b"), policy=policy)(x)
        return jax.jit(jax.jit(jnp.exp))(x)

    graph = graph_of(fn, W, X)
    assert not set(names(graph)) & (INLINE | CUSTOM)
    assert names(graph).count("dot_general") == 2
    close(run(graph, W, X)[0], fn(W, X))


def test_custom_derivatives_stay_whole_unless_a_layer_is_inside():
    graph = graph_of(lambda p, x: clipped(jax.nn.relu(x @ p["a"])), W, X)
    assert names(graph) == ["dot_general", "custom_jvp_call", "custom_jvp_call"]
    graph = graph_of(lambda p, x: straight(p["a"], x), W, X)
    assert names(graph) == ["dot_general", "sin"]
    # Neither a product of parameters alone nor one of inputs alone is a layer.
    graph = graph_of(lambda p, x: x @ straight(p["b"], p["a"]), W, X)
    assert names(graph) == ["custom_vjp_call", "dot_general"]


@pytest.mark.parametrize("at", [0.0, -2.0, 2.0])
def test_custom_derivatives_are_kept(at):
    x = jnp.full((2, 3), at)

    def fn(p, x):
        return (clipped(x) @ p["a"] + jax.nn.relu(x @ p["a"]) + jnp.abs(x[:, :1])).sum()

    graph = graph_of(fn, W, x)
    ours = jax.jit(jax.grad(lambda x: run(graph, W, x)[0]))(x)
    np.testing.assert_allclose(ours, jax.grad(fn, 1)(W, x), rtol=1e-5)


def test_dead_code_and_constants():
    def fn(p, x):
        jnp.sin(x @ p["a"])
        return x * np.asarray([[1.0, 2.0, 3.0]], np.float32)

    graph = graph_of(fn, W, X)
    assert "sin" not in names(graph) and "dot_general" not in names(graph)
    assert jnp.array_equal(run(graph, W, X)[0], X * jnp.asarray([[1.0, 2.0, 3.0]]))


def stacked(p, x, reverse=False, unroll=1):
    def body(carry, layer):
        carry = jnp.tanh(carry @ layer["w"] + layer["b"][None])
        return carry, carry.sum(0)

    return lax.scan(body, x @ p["in"], p["layers"], reverse=reverse, unroll=unroll)


def stack(length, d=4):
    key = jax.random.key(0)
    return {
        "in": jax.random.normal(key, (3, d)),
        "layers": {"w": jax.random.normal(key, (length, d, d)), "b": jnp.ones((length, d))},
    }


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_scan_over_stacked_layers_is_unrolled(length, reverse):
    p, fn = stack(length), functools.partial(stacked, reverse=reverse)
    graph = graph_of(fn, p, X)
    assert "scan" not in names(graph)
    assert names(graph).count("dot_general") == 1 + length
    for ours, theirs in zip(run(graph, p, X), fn(p, X), strict=True):
        close(ours, theirs)


def test_a_long_scan_stays_whole_and_still_runs():
    p = stack(MAX_UNROLL + 1)
    graph = graph_of(stacked, p, X)
    assert names(graph).count("scan") == 1
    np.testing.assert_allclose(run(graph, p, X)[1], stacked(p, X)[1], rtol=1e-5)


def test_scans_over_time_or_examples_stay_whole():
    recurrent = graph_of(
        lambda p, x: lax.scan(lambda h, t: (jnp.tanh(h @ p["b"] + t @ p["a"]), None),
                              jnp.zeros((5, 4)), x)[0],
        W, jnp.ones((6, 5, 3)),
    )  # fmt: skip
    assert names(recurrent).count("scan") == 1
    mapped = graph_of(lambda p, x: lax.map(lambda row: row @ p["a"], x), W, X)
    assert names(mapped) == ["scan"]


def opaque_layers():
    w = W["b"]
    loop = lambda p, x: lax.while_loop(  # noqa: E731
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p)), (0, x)
    )[1]
    return {
        "scan": lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p), x),
        "while": loop,
        "cond": lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p, lambda: -x),
        "carried": lambda p, x: lax.fori_loop(0, 2, lambda i, c: (c[0], c[1] @ c[0]), (p, x))[1],
    }, w


@pytest.mark.parametrize("kind", ["scan", "while", "cond", "carried"])
def test_layers_inside_loops_and_branches_are_seen(kind):
    fns, w = opaque_layers()
    graph = graph_of(fns[kind], w, jnp.ones((2, 4)))
    depends = graph.depends
    found = [
        e.primitive
        for e in graph.equations
        if holds_layer(e.eqn, [depends[v] if isinstance(v, int) else 0 for v in e.inputs])
        and e.primitive != "dot_general"
    ]
    assert found == ["scan" if kind == "carried" else kind]


def test_loops_without_layers_hold_none():
    def fn(p, x):
        powers = lax.fori_loop(0, 3, lambda i, c: c @ p["b"], p["b"])  # parameters alone
        gram = lax.scan(lambda c, _: (c @ c.T @ c, None), x, None, length=2)[0]  # input alone
        return gram @ p["a"] @ powers

    graph = graph_of(fn, W, X)
    depends = graph.depends
    for e in graph.equations:
        if e.primitive != "dot_general":
            bits = [depends[v] if isinstance(v, int) else 0 for v in e.inputs]
            assert not holds_layer(e.eqn, bits)


def test_dependency_bits():
    graph = graph_of(lambda p, x: (x @ p["a"], p["b"] * 2, x + 1, jnp.arange(3)), W, X)
    assert [graph.depends[v] for v in graph.output_ids] == [3, 1, 2, 0]


def test_evaluation_keeps_name_stacks():
    def fn(p, x):
        with jax.named_scope("outer"):
            x = jax.jit(lambda x: jax.named_scope("inner")(jnp.sin)(x))(x)
        return jax.vmap(jax.named_scope("row")(lambda r: r @ p["a"]))(x)

    graph = graph_of(fn, W, X)
    closed = jax.make_jaxpr(lambda p, x: run(graph, p, x)[0])(W, X)
    stacks = {e.primitive.name: str(e.source_info.name_stack) for e in closed.jaxpr.eqns}
    assert stacks["sin"] == "outer/inner"
    assert "row" in stacks["dot_general"]


def test_a_rule_runs_in_the_name_stack_of_its_equation():
    def fn(p, x):
        with jax.named_scope("here"):
            return jnp.sin(x)

    graph = graph_of(fn, W, X)
    rules = lambda equation, args: jnp.cos if equation.primitive == "sin" else None  # noqa: E731
    closed = jax.make_jaxpr(lambda x: run(graph, W, x, rules=rules)[0])(X)
    assert [(e.primitive.name, str(e.source_info.name_stack)) for e in closed.jaxpr.eqns] == [
        ("cos", "here")
    ]


def test_precision_is_kept():
    def fn(p, x):
        with jax.default_matmul_precision("highest"):
            y = x @ p["a"]
        return y @ p["b"]

    graph = graph_of(fn, W, X)
    closed = jax.make_jaxpr(lambda p, x: run(graph, p, x)[0])(W, X)
    found = [e.params["precision"] for e in closed.jaxpr.eqns]
    assert found[0] is not None and found[1] is None


def test_edits_reach_all_readers_and_operand_edits_one():
    def fn(p, x):
        y = x @ p["a"]
        return jnp.sin(y), jnp.cos(y)

    graph = graph_of(fn, W, X)
    y = graph.equations[0].outputs[0]
    sin = names(graph).index("sin")
    z = X @ W["a"]
    double = lambda v: 2 * v  # noqa: E731
    for how, expected in (
        ({"edits": {y: double}}, (jnp.sin(2 * z), jnp.cos(2 * z))),
        ({"operand_edits": {(sin, 0): double}}, (jnp.sin(2 * z), jnp.cos(z))),
    ):
        for ours, theirs in zip(run(graph, W, X, **how), expected, strict=True):
            close(ours, theirs)


def test_only_what_is_wanted_runs():
    graph = graph_of(lambda p, x: jnp.sin(x @ p["a"]) @ p["b"], W, X)
    first = graph.equations[0].outputs[0]
    env = {graph.inputs[0]: W["a"], graph.inputs[2]: X}  # p["b"] is not there
    assert evaluate(graph, env, [first])[first].shape == (2, 4)
    with pytest.raises(KeyError):
        evaluate(graph, env, graph.output_ids)


def test_where_names_the_user_s_line():
    graph = graph_of(lambda p, x: jax.nn.relu(x @ p["a"]), W, X)
    assert all(e.where.startswith("test_graph.py:") for e in graph.equations)
