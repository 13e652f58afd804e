"""An architecture that lives outside the package: everything about it is declared in the class below."""

import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sae_lens
import torch
from alone import begin, fit, stepping

import jsae
from bridge import torch_sae
from bridge.settings import help_text
from bridge.training.config import RunConfig
from jsae import axes, dead, export, loop, losses, state
from jsae.architectures import ARCHITECTURES, SAE, Context, ReLU, SAEConfig, TopK, config_from_json, find, sae_config
from jsae.checkpoint import Checkpoints
from jsae.config import TrainConfig
from jsae.ops import Codes, Cpu, Reference, choose
from jsae.settings import WEIGHT, ConfigError, number
from jsae.testing import toy

pytestmark = pytest.mark.usefixtures("quickly_compiled")
D, F, N = toy.D_IN, 64, 500
NAME = f"{__name__}:Amplified"


class Amplified(SAE):
    """f = exp(r) ReLU(p)  with  p = (x - b_dec) W_enc^T + b_enc  and a learned r; penalty c mean |f| / (1 + m).

    m is a running mean of the latents' sum per token, with which the penalty falls. It is dense, has an array of
    latents that no architecture of the package has, and a statistic that its loss uses. It leaves as a gated SAE.
    """

    form = "gated"
    sparse = False

    @dataclasses.dataclass(frozen=True)
    class Config(SAEConfig):
        coefficient: float = number(1.0, WEIGHT)
        sizes: tuple[int, ...] = ()

    @classmethod
    def initial_latents(cls, config):
        return {"b_enc": 0.0, "log_gain": 0.4}

    @classmethod
    def initial_statistics(cls, config):
        return {"mass": 0.25}

    def activate(self, x, context):
        return jax.nn.relu(self.pre_activations(x, context)) * jnp.exp(self.log_gain[...]), None

    def penalty(self, forward):
        mass = forward.latents.sum(-1).mean()
        return forward.context.strength * self.config.coefficient * mass / (1 + self.mass[...])

    def batch_statistics(self, forward):
        return {"mass": forward.latents.sum(-1).mean()}

    def inference_arrays(self):
        b, r = self.b_enc[...], self.log_gain[...]
        return {"b_gate": b, "b_mag": b * jnp.exp(r), "r_mag": r}

    def initialize_latents(self, x, ops):
        self.b_enc[...] = self.b_enc - 0.01


CONFIG = Amplified.Config(D, F, coefficient=5.0)
RUN = TrainConfig(num_activations=400 * N, batch_size=N, learning_rate=4e-3)


TestAmplified = jsae.testing.contract(Amplified, coefficient=5.0)


@pytest.fixture(scope="module")
def acts() -> np.ndarray:
    return toy.activations(40 * N)


def batches(acts: np.ndarray):
    return itertools.cycle(np.split(acts, len(acts) // N))


@pytest.fixture(scope="module")
def states(acts) -> list[state.TrainState]:
    """The states before the first step and after the last."""
    start = begin(CONFIG, RUN, acts)
    first = jax.device_get(start)
    *_, (_, last, _) = fit(CONFIG, RUN, start, batches(acts))
    return [first, jax.device_get(last)]


def test_it_is_found_by_its_module_and_class_and_comes_back_from_json():
    assert Amplified.name == CONFIG.architecture == NAME
    assert find(NAME) is Amplified
    assert Amplified not in ARCHITECTURES.values()
    config = dataclasses.replace(CONFIG, sizes=(1, 2))
    told = json.loads(json.dumps(config.to_json()))
    assert told["architecture"] == NAME
    assert config_from_json(told) == Amplified.Config.from_json(told) == config
    assert hash(config_from_json(told)) == hash(config)
    assert sae_config(NAME, D, F, coefficient=5.0) == CONFIG


def test_it_starts_as_it_says(states):
    first = states[0].sae
    np.testing.assert_array_equal(first.log_gain[...], np.full(F, 0.4, np.float32))
    assert (np.asarray(first.b_enc[...]) == np.float32(-0.01)).all()  # after the encoder was scaled
    assert float(first.mass[...]) == 0.25


def test_it_learns_with_its_own_array_and_unit_decoder_rows(states, acts):
    first, last = states[0], states[-1]
    assert float(np.abs(np.asarray(last.sae.log_gain[...]) - 0.4).max()) > 0.05
    np.testing.assert_allclose(np.linalg.norm(last.sae.W_dec[...], axis=1), 1, atol=1e-5)
    assert toy.recovery(np.asarray(last.sae.W_dec[...]), toy.directions()) > 0.9

    def error(one) -> float:
        sae, x = jax.tree.map(jnp.asarray, one.sae), jnp.asarray(acts) * one.scale
        return float(losses.squared_error(x, sae.decode(sae.encode(x), x)))

    assert error(last) < 0.2 * error(first)


@pytest.mark.parametrize("inner", [None, optax.adamw(1e-3, weight_decay=0.5)], ids=["adam", "weight decay"])
def test_its_statistic_is_the_running_mean_over_batches_and_no_gradient_and_no_decay_moves_it(inner, acts):
    """Its loss depends on it, and a step goes through the batch in parts."""
    assert choose().sum_chunk(N * 4, D, F, gradients=True) < N * 4
    how, acts = dataclasses.replace(RUN, num_activations=100 * 4 * N, batch_size=4 * N), acts[: 4 * N]
    last, expected = begin(CONFIG, how, acts, inner), 0.25
    before = jax.device_get(last.sae)
    for step, last, _ in itertools.islice(fit(CONFIG, how, last, itertools.repeat(acts), inner), 8):  # noqa: B020
        pre = (acts * np.asarray(last.scale) - before.b_dec[...]) @ before.W_enc[...].T + before.b_enc[...]
        mass = float((np.maximum(pre, 0) * np.exp(before.log_gain[...])).sum(1).mean())
        expected += max(1 / 5, 1 / step) * (mass - expected)
        assert float(last.sae.mass[...]) == pytest.approx(expected, rel=1e-4)
        before = jax.device_get(last.sae)


def test_every_implementation_takes_the_same_step_with_it(acts):
    from jsae import loop

    members, found = [loop.Member(CONFIG, RUN)], []
    for ops in (Reference(), Cpu(tokens=100), Cpu()):
        states = loop.init(members, (acts[:N],), ops)
        found.append(loop.Programs(members, ops).at(1)(states, (acts[:N],)))
    for ours in found[1:]:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_resampling_starts_its_array_anew(states, acts):
    last = jax.tree.map(jnp.asarray, states[-1])
    is_dead, x = jnp.arange(F) % 5 == 0, jnp.asarray(acts[:N]) * last.scale
    renewed, moments = dead.resample(last.sae, last.opt, is_dead, x, x, jax.random.key(0), choose())
    gone = np.asarray(is_dead)
    np.testing.assert_array_equal(np.asarray(renewed.log_gain[...])[gone], np.full(gone.sum(), 0.4, np.float32))
    np.testing.assert_array_equal(np.asarray(renewed.log_gain[...])[~gone], np.asarray(last.sae.log_gain[...])[~gone])
    assert not np.asarray(moments.mu.log_gain[...])[gone].any()
    assert np.asarray(moments.mu.log_gain[...])[~gone].any()
    assert float(renewed.mass[...]) == float(last.sae.mass[...])


def test_its_array_is_cut_along_the_latents_and_a_sharded_step_is_the_whole_one(acts):
    mesh = axes.make_mesh(latent=2)
    member, whole = loop.Member(CONFIG, RUN), begin(CONFIG, RUN, acts)
    (sharded,) = loop.init([member], (acts,), mesh=mesh)
    assert sharded.sae.log_gain[...].sharding.spec == sharded.opt.mu.log_gain[...].sharding.spec == axes.spec(("f",))
    assert sharded.sae.mass[...].sharding.is_fully_replicated
    program, on_mesh = stepping(CONFIG, RUN), loop.Programs([member], mesh=mesh).at(RUN.num_steps)
    for batch in itertools.islice(batches(acts), 3):
        whole, _ = program(whole, batch)
        (sharded,), _ = on_mesh((sharded,), (jax.device_put(batch, jax.NamedSharding(mesh, axes.BATCH)),))
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_gives_back_every_number(states, acts, tmp_path):
    last = jax.tree.map(jnp.asarray, states[-1])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(400, (last,), {}, fvu=0.1)
        checkpoints.wait()
        found = checkpoints.restore(jax.eval_shape(lambda: (begin(CONFIG, RUN, jnp.asarray(acts)),)))
    for ours, theirs in zip(jax.tree.leaves(found.states), jax.tree.leaves(last), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_it_leaves_as_the_form_that_it_declares(states, acts, tmp_path):
    last = jax.tree.map(jnp.asarray, states[-1])
    export.write(tmp_path / "sae", CONFIG, last.sae.arrays(), float(last.scale), float(last.scale), {})
    ours, lens = torch_sae.load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    assert ours.architecture == lens.cfg.architecture() == "gated"
    x, scaled = torch.from_numpy(acts[:N]), jnp.asarray(acts[:N]) * last.scale
    expected = np.asarray(last.sae.decode(last.sae.encode(scaled), scaled) / last.scale)
    with torch.no_grad():
        for reader in (ours, lens):
            assert np.abs(reader(x).numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_run_takes_it_by_its_name():
    config = RunConfig(activation=NAME, expansion_factor=2)
    assert config.sae_config(D) == Amplified.Config(D, 2 * D)
    assert RunConfig.from_json(config.to_json()) == config
    with pytest.raises(
        ConfigError, match=rf"--k means nothing to {NAME}: leave it out. {NAME} has --sparsity_warmup_fraction"
    ):
        RunConfig(activation=NAME, k=(16,))


def test_a_dense_penalty_is_told_which_latents_are_dead(acts):
    """Its batch goes in parts, and every term of its loss is a mean over them."""

    def penalty(self, forward):
        return 1000.0 * forward.context.dead.sum()

    plain, counting = (
        whole(penalty=p, initial_statistics=None, batch_statistics=None).Config(D, F)
        for p in (lambda self, forward: jnp.zeros(()), penalty)
    )
    losses = []
    for config in (plain, counting):
        start = begin(config, RUN, acts)
        start = start._replace(since_fired=start.since_fired.at[:7].set(RUN.dead_window))
        losses.append(float(stepping(config, RUN)(start, acts[: 4 * N])[1].loss) / (4 * N))
    assert losses[1] - losses[0] == pytest.approx(7000, rel=1e-4)


# ---- what is refused -----------------------------------------------------------------------------------------------


def whole(**changes) -> type[SAE]:
    """A class of its own with the parts of `Amplified`, some of them changed."""
    parts = {name: value for name, value in vars(Amplified).items() if not name.startswith("_") and name != "name"}

    @dataclasses.dataclass(frozen=True)
    class Config(SAEConfig):
        pass

    parts = parts | {"Config": Config, "__module__": __name__} | changes
    return type("Own", (SAE,), {name: value for name, value in parts.items() if value is not None})


BAD_CLASSES = {
    "a form that SAELens does not have": ({"form": "relu"}, "form is 'relu': SAELens knows standard, topk, abstopk"),
    "no form": ({"form": None}, "Own is no whole architecture: it lacks form"),
    "no encoder and no penalty": ({"activate": None, "penalty": None}, "it lacks activate, penalty"),
    "another's settings": ({"Config": TopK.Config}, r"Own.Config must be a class of its own, derived from SAEConfig"),
    "settings that are none": ({"Config": dict}, r"Own.Config must be a class of its own"),
    "a name of its own": ({"name": "topk"}, f"Own is called {__name__}:Own: leave out its name"),
}


@pytest.mark.parametrize("what", BAD_CLASSES)
def test_a_class_that_does_not_declare_everything_is_refused_where_it_is_defined(what):
    changes, complaint = BAD_CLASSES[what]
    with pytest.raises(TypeError, match=complaint):
        whole(**changes)
    assert TopK.Config.sae is TopK


BAD_STEPS = {
    "another form of latents": (
        {"sparse": True},
        rf"{__name__}:Own declares sparse=True, but activate returned",
    ),
    "a statistic that it does not return": (
        {"batch_statistics": lambda self, forward: {}},
        r"declares the statistics \['mass'\], but returned \[\]",
    ),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_class_that_does_something_else_than_it_declares_is_refused_in_its_first_step(what, acts):
    changes, complaint = BAD_STEPS[what]
    config = whole(penalty=lambda self, forward: jnp.zeros(()), **changes).Config(D, F)
    with pytest.raises(TypeError, match=complaint):
        stepping(config, RUN)(begin(config, RUN, acts), acts[:N])


BAD_NAMES = {
    "no such name": (
        "mine",
        "unknown activation 'mine': choose one of topk, .*jumprelu, or give your own as module:",
    ),
    "no such module": ("no_such_module:Amplified", "cannot be imported .ModuleNotFoundError"),
    "no module": (":Amplified", "cannot be imported"),
    "no such class": (f"{__name__}:Other", "cannot be imported .AttributeError"),
    "no class": (f"{__name__}:CONFIG", "is no architecture: it must be a subclass"),
    "an abstract class": ("jsae.architectures:SAE", "is no architecture"),
}


@pytest.mark.parametrize("what", BAD_NAMES)
def test_what_is_no_architecture_is_refused_by_its_name(what):
    name, complaint = BAD_NAMES[what]
    with pytest.raises(ConfigError, match=complaint):
        find(name)
    with pytest.raises(ConfigError, match=complaint):
        RunConfig(activation=name)


def test_a_module_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "own_that_fails.py").write_text("raise KeyError('mine')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'own_that_fails:X' cannot be imported \(KeyError: 'mine'\)"):
        find("own_that_fails:X")


def test_reading_settings_imports_no_module(tmp_path, monkeypatch):
    """A file may be another's, and a module runs code."""
    (tmp_path / "own_of_another.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is of a module that is not loaded: import own_of_another"):
        config_from_json({"architecture": "own_of_another:X", "d_in": 4, "d_sae": 8})
    assert "own_of_another" not in sys.modules


BAD_SETTINGS = {
    "no architecture": ({"d_in": 4, "d_sae": 8}, "needs an architecture: topk, "),
    "an architecture that is no name": ({"architecture": 3, "d_in": 4, "d_sae": 8}, "needs an architecture"),
    "a setting that it does not have": ({"architecture": "relu", "d_in": 4, "d_sae": 8, "k": 3}, "has no field k"),
    "no width": ({"architecture": "relu", "d_sae": 8}, "needs d_in"),
    "a penalty that pulls": ({"architecture": NAME, "d_in": 4, "d_sae": 8, "coefficient": -1}, "coefficient is -1"),
    "a penalty that is no number": (
        {"architecture": NAME, "d_in": 4, "d_sae": 8, "coefficient": float("nan")},
        "coefficient is nan: it must be finite and not negative",
    ),
}


@pytest.mark.parametrize("what", BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused(what):
    values, complaint = BAD_SETTINGS[what]
    with pytest.raises(ConfigError, match=complaint):
        config_from_json(values)


def test_settings_of_another_architecture_are_refused():
    with pytest.raises(ConfigError, match="these settings are of 'topk'"):
        ReLU.Config.from_json(sae_config("topk", 4, 8, k=2).to_json())
    with pytest.raises(ConfigError, match=r"read them with jsae\.architectures\.config_from_json"):
        SAEConfig.from_json(sae_config("topk", 4, 8, k=2).to_json())


# ---- the house's own -----------------------------------------------------------------------------------------------


def test_classes_are_abstract_or_final_and_override_nothing_but_hooks():
    hooks = {"initial_statistics", "batch_statistics", "initialize_latents", "own_arrays", "loss_of_dead"}
    for architecture in ARCHITECTURES.values():
        assert not any("Config" in vars(base) for base in architecture.__mro__[1:] if base is not SAE)
        for base in architecture.__mro__[: architecture.__mro__.index(SAE)]:
            methods = {n for n, v in vars(base).items() if callable(v) or isinstance(v, classmethod | property)}
            for name in methods - hooks - {"Config", "__init_subclass__"}:
                above = next((vars(b)[name] for b in base.__mro__[1:] if name in vars(b)), None)
                assert name.startswith("_") or above is None or getattr(above, "__isabstractmethod__", False), name


def test_the_flags_and_the_help_know_every_architecture(monkeypatch):
    monkeypatch.setattr("jsae.architectures.ARCHITECTURES", ARCHITECTURES | {"amplified": Amplified})
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    helps = {name: help_text(field) for name, field in fields.items()}
    defaults = {n: value[0] if isinstance(value, tuple) and value else value for n, value in vars(RunConfig()).items()}
    assert f": {', '.join(ARCHITECTURES)}, amplified, or your own class" in helps["activation"]
    of_some = ("k", "nested_widths", "l1_coefficient", "sparsity_penalty", "l0_coefficient", "jump_recipe", "bandwidth")
    for name in (*of_some, "target_l0"):
        having = [n for n, sae in ARCHITECTURES.items() if name in {f.name for f in dataclasses.fields(sae.Config)}]
        assert having
        assert helps[name].endswith(f" ({', '.join(having)}).")
    for name, architecture in ARCHITECTURES.items():
        for field in dataclasses.fields(architecture.Config):
            if field.name in fields and field.name not in ("nested_widths", "target_l0", "skip"):
                assert defaults[field.name] == field.default, (name, field.name)


def test_inference_and_training_of_codes_differ_where_they_are_declared_to(acts):
    """Sparse in training does not mean sparse afterwards."""
    batch = begin(sae_config("batchtopk", D, F, k=3), RUN, acts)
    x = jnp.asarray(acts[:N]) * batch.scale
    assert isinstance(batch.sae.activate(x, Context(choose(), training=True))[0], Codes)
    assert batch.sae.encode(x).shape == (N, F)
