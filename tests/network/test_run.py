"""Values read and replaced at named sites of a run, and the errors of tracing and running."""

from __future__ import annotations

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import vfjax
from helpers import close, draw, normal

IMAGES = normal(7, 4, 6, 6, 3)
ROWS = normal(8, 4, 3)


class Net(nn.Module):
    batch_norm: bool = True

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True) if self.batch_norm else lambda x: x
        x = nn.max_pool(nn.relu(norm(nn.Conv(4, (3, 3))(x))), (2, 2), (2, 2))
        y = nn.Conv(6, (3, 3), use_bias=False)(x)
        return nn.Dense(2)(nn.relu(y + nn.Conv(6, (1, 1))(x)).mean((1, 2)))


def linen(kind):
    model = Net(kind == "batch")
    return model.apply, draw(jax.eval_shape(model.init, jax.random.key(0), IMAGES)), IMAGES


def test_capture_and_edit():
    fn, variables, x = linen("batch")
    net = vfjax.trace(fn, variables, x)
    sites = [s for layer in net.layers for s in (layer.name, layer.tap)]
    sites += [norm.site for norm in net.norms] + ["input", "output"]
    out, found = jax.jit(lambda v, x: net.run(v, x, capture=sites))(variables, x)
    assert set(found) == set(sites)
    close(out, jax.jit(fn)(variables, x))
    assert jnp.array_equal(found["output"], out)
    for layer in net.layers:
        assert found[layer.name].shape == layer.output_shape
    for norm in net.norms:
        assert found[norm.site].shape == norm.input_shape
    # Putting back what was there changes nothing; anything else shows in the capture.
    same = {s: functools.partial(lambda s, v: found[s], s) for s in sites}
    close(jax.jit(lambda v, x: net.run(v, x, edit=same))(variables, x), out)
    plus = {s: lambda v: v + 1 for s in ("params/Conv_1/kernel", "output")}
    again = jax.jit(lambda v, x: net.run(v, x, edit=plus, capture=sites))(variables, x)[1]
    close(again["params/Conv_1/kernel"], found["params/Conv_1/kernel"] + 1)
    assert not jnp.array_equal(again["output"], out + 1)


def test_an_edit_of_a_norm_s_input_is_seen_by_that_norm_alone():
    class PreActivation(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
            return x + nn.Conv(3, (3, 3))(y)

    model = PreActivation()
    variables = draw(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    net = vfjax.trace(model.apply, variables, IMAGES)
    (norm,) = net.norms
    out, found = net.run(
        variables, IMAGES, edit={norm.site: lambda u: 2 * u}, capture=[norm.site, "input"]
    )
    close(found[norm.site], 2 * IMAGES)
    close(found["input"], IMAGES)
    inner = net.run(variables, 2 * IMAGES) - 2 * IMAGES
    close(out, IMAGES + inner)


def test_edits_may_hand_statistics_out_and_change_trees():
    fn = lambda p, x: x["a"] @ p + x["b"][1]  # noqa: E731
    p, x = jnp.linspace(-1, 1, 9).reshape(3, 3), {"a": ROWS, "b": [jnp.arange(4), 2 * ROWS]}
    net = vfjax.trace(fn, p, x)
    seen = []
    double = lambda tree: jax.tree.map(lambda a: 2 * a, tree)  # noqa: E731
    out, found = net.run(
        p, x, capture=["input", ""],
        edit={"input": double, "": lambda z: (seen.append(z.mean()), z)[1]},
    )  # fmt: skip
    close(out, fn(p, double(x)))
    close(found["input"], double(x))
    close(seen[0], found[""].mean())


def test_sites_may_come_from_an_iterator():
    p, names = jnp.linspace(-1, 1, 9).reshape(3, 3), ["", "input"]
    net = vfjax.trace(lambda p, x: x @ p, p, ROWS)
    _, found = net.run(p, ROWS, capture=(name for name in names))
    assert list(found) == names
    close(found[""], ROWS @ p)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"capture": ["params/Conv_O/kernel"]}, ValueError, r"no site 'params/Conv_O.*params/Conv"),
        (
            {"capture": "input"},
            TypeError,
            "capture must be a sequence of site names, or one of paper, layers, all, taps; "
            "it was 'in",
        ),
        (
            {"capture": 5},
            TypeError,
            "capture must be a sequence of site names, or one of paper, layers, all, taps; "
            "it was 5",
        ),
        ({"edit": {"nowhere": abs}}, ValueError, "no site 'nowhere'"),
        ({"edit": {"input": 3}}, TypeError, r"edit\['input'\] must be a function"),
        ({"edit": ["input"]}, TypeError, "edit must map"),
        ({"capture": [3]}, TypeError, "name sites by strings"),
        ({"edit": {3: abs}}, TypeError, "name sites by strings"),
        ({"edit": {"params/Conv_0/kernel": lambda z: z[0]}}, ValueError, "keep shape and dtype"),
        ({"edit": {"output": lambda z: z.astype(int)}}, ValueError, "keep shape and dtype"),
        ({"edit": {"input": lambda z: z.astype("bfloat16")}}, ValueError, "keep shape and dtype"),
        ({"stop": 4}, ValueError, "stop was 4; this network has 3 layers"),
        ({"stop": -1}, ValueError, "give 0 to 3"),
        ({"stop": True}, TypeError, "stop must be a whole number"),
        ({"stop": 1.0}, TypeError, "stop must be a whole number"),
        ({"start": 1}, ValueError, "start=1 takes the Crossing"),
        ({"start": 9}, ValueError, "start was 9"),
        ({"stop": 1, "capture": ["output"]}, ValueError, "'output' lies in the trunk"),
        ({"stop": 1, "edit": {"params/Dense_0/kernel": abs}}, ValueError, "lies in the trunk"),
    ],
)
def test_errors_of_run(how, error, message):
    fn, variables, x = linen("conv")
    net = vfjax.trace(fn, variables, x)
    with pytest.raises(error, match=message):
        net.run(variables, x, **how)


def test_trees_that_are_not_the_network_s():
    fn, variables, x = linen("conv")
    net = vfjax.trace(fn, variables, x)
    message = r"leaves \['extra'\] that the traced network does not have"
    with pytest.raises(ValueError, match=message):
        net.run({**variables, "extra": x}, x)
    with pytest.raises(ValueError, match=r"lacks \['params/Dense_0/bias'\], which this part"):
        params = {**variables["params"], "Dense_0": {"kernel": jnp.ones((6, 2)), "bias": None}}
        net.run({"params": params}, x)
    with pytest.raises(ValueError, match="no layer 'Conv_0'.*params/Conv_0/kernel"):
        net.layer("Conv_0")
    with pytest.raises(ValueError, match="no norm 'x'"):
        net.norm("x")


def test_keys_that_the_trees_lack():
    fn = lambda p, x: x["image"] @ p["w"]  # noqa: E731
    p, x = {"w": jnp.ones((3, 2))}, {"image": ROWS}
    message = r"raised KeyError 'w'\. If that is a key of .*variables has 'params/w', x has 'image'"
    with pytest.raises(ValueError, match=message):
        vfjax.trace(fn, {"params": p}, x)
    with pytest.raises(ValueError, match="KeyError 'w'.*variables is empty, x has 'image'"):
        vfjax.trace(fn, {}, x)
    net = vfjax.trace(fn, p, x)
    with pytest.raises(ValueError, match="KeyError 'image'.*variables has 'w', x has 'picture'"):
        net.run(p, {"picture": ROWS})
    with pytest.raises(
        ValueError, match="KeyError 'w'.*variables is a single array, x has 'image'"
    ):
        vfjax.trace(lambda p, x: fn({"v": p}, x), p["w"], x)


def test_other_keys_that_apply_fn_looks_up():
    class Unregistered(KeyError):
        """An error of the function's own."""

    def of_its_own(p, x):
        raise Unregistered("gelu")

    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="KeyError 'gelu'. If that is a key of variables or x"):
        vfjax.trace(lambda p, x: {"relu": jax.nn.relu}["gelu"](x @ p), jnp.eye(3), x)
    with pytest.raises(Unregistered, match="gelu"):
        vfjax.trace(of_its_own, jnp.eye(3), x)


def test_errors_of_trace():
    x = jnp.ones((4, 3))
    with pytest.raises(TypeError, match="apply_fn must be a function"):
        vfjax.trace(eqx.partition(3, lambda _: False)[0], x, x)
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"eqx\.partition"):
        vfjax.trace(lambda m, x: jax.vmap(m)(x), module, x)
    with pytest.raises(TypeError, match="variables has a str at 'name'"):
        vfjax.trace(lambda p, x: x, {"name": "net"}, x)
    with pytest.raises(TypeError, match="x has a str"):
        vfjax.trace(lambda p, x: x, {}, {"image": x, "name": "cat"})


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_weights_closed_over(wrap):
    w, x = jnp.ones((3, 3)), jnp.ones((4, 3))
    frozen = wrap(lambda x: x @ w)
    with pytest.raises(ValueError, match=r"\(3, 3\) at test_run.py:\d+: the weights are clo"):
        vfjax.trace(lambda p, x: frozen(x) * p, jnp.float32(1), x)
    with pytest.warns(UserWarning, match=r"constant arrays \(3, 3\).*no merge can reach"):
        net = vfjax.trace(lambda p, x: frozen(x) @ p, w, x)
    assert len(net.layers) == 1


def test_no_layers():
    with pytest.warns(UserWarning, match="no layers"):
        net = vfjax.trace(lambda p, x: x * p, jnp.float32(2), jnp.ones((4, 3)))
    assert net.depth == 0 and net.layers == () and net.residual is False
    close(net.run(jnp.float32(2), jnp.ones((4, 3)), stop=0).values, (jnp.ones((4, 3)),))
    loop = lambda p, x: lax.fori_loop(0, 3, lambda _, c: c @ p, x)  # noqa: E731
    with pytest.warns(UserWarning, match=r"no layers.*inside \[\('scan'"):
        vfjax.trace(loop, jnp.ones((3, 3)), jnp.ones((4, 3)))


def test_constants_that_are_computed_are_no_weights():
    fn = lambda p, x: x @ jnp.eye(3) @ p @ jnp.ones((3, 3))  # noqa: E731
    assert len(vfjax.trace(fn, jnp.ones((3, 3)), jnp.ones((4, 3))).layers) == 1


def test_an_edit_of_a_layer_s_input_is_seen_by_that_layer_alone():
    """Two layers read one value; what one of them reads is doubled."""
    p = {"w": draw(jnp.zeros((3, 4)), 1), "v": draw(jnp.zeros((4, 2)), 2), "u": jnp.ones((4, 2))}

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return h @ p["v"] + h @ p["u"]

    net = vfjax.trace(apply_fn, p, ROWS)
    edit = {"v:in": lambda h: 2 * h}
    out, found = net.run(p, ROWS, capture=["w:in", "v:in", "u:in", "w:act"], edit=edit)
    h = jnp.tanh(ROWS @ p["w"])
    close(found, {"w:in": ROWS, "v:in": 2 * h, "u:in": h, "w:act": h})
    close(out, 2 * h @ p["v"] + h @ p["u"])
