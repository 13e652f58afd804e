"""Every pair of options of a training trains, is restored and is exported, or is refused by name."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge import torch_sae
from bridge.training.config import RunConfig
from jsae import export, loop
from jsae.architectures import SAEConfig
from jsae.checkpoint import Checkpoints
from jsae.config import TrainConfig
from jsae.settings import ConfigError
from jsae.state import Acts, input_and_target

pytestmark = pytest.mark.usefixtures("quickly_compiled")  # programs run for five steps
WIDTH, STEPS = 8, 5
KINDS = {
    "autoencoder": {},
    "transcoder": {"hook_type": "mlp_in", "target_hook": "mlp"},
    "skip": {"hook_type": "mlp_in", "target_hook": "mlp", "skip": True},
    "crosscoder": {"crosscoder": True, "layer": ("0", "1"), "exclusive_latents": 3},
    "aligned": {"aligned": True},
}
# Every flag that changes what is trained: its default and another value.
OPTIONS: dict[str, tuple] = {
    "activation": ("topk", "batchtopk", "matryoshka", "abstopk", "relu", "gated", "jumprelu"),
    "kind": tuple(KINDS),
    "expansion_factor": (8, 5),
    "k": ((32,), (3,)),
    "hierarchical_k": ((), (1, 2)),
    "nested_widths": ((), (4, 16)),
    "l1_coefficient": ((5.0,), (0.0,)),
    "l0_coefficient": ((5.0,), (0.1,)),
    "sparsity_penalty": ("log", "l1"),
    "jump_recipe": ("tanh", "l0"),
    "bandwidth": (None, 0.05),
    "target_l0": ((), (2.5,)),
    "batch_size": (16, 12),
    "learning_rate": ((), (0.01,)),
    "warmup_fraction": (0.02, 0.0),
    "decay_fraction": (0.2, 0.9),
    "sparsity_warmup_fraction": (0.05, 0.0),
    "k_start": (None, 34),
    "k_anneal_fraction": (0.1, 0.7),
    "average_fraction": (None, 0.5),
    "dead_after": (None, 20),
    "matmul_dtype": ("float32", "bfloat16"),
    "resample_every": (None, 32),
    "seed": ((0,), (7,)),
}
TOPK, DENSE = ("topk", "batchtopk", "matryoshka", "abstopk"), ("relu", "gated", "jumprelu")
# What a value other than the default needs. All other pairs must train.
NEEDS: dict[tuple[str, object], tuple[str, tuple]] = {
    ("k", (3,)): ("activation", TOPK),
    ("k_start", 34): ("activation", TOPK),
    ("k_anneal_fraction", 0.7): ("activation", TOPK),
    ("hierarchical_k", (1, 2)): ("activation", ("topk",)),
    ("nested_widths", (4, 16)): ("activation", ("matryoshka",)),
    ("l1_coefficient", (0.0,)): ("activation", ("relu", "gated")),
    ("l0_coefficient", (0.1,)): ("activation", ("jumprelu",)),
    ("sparsity_penalty", "l1"): ("activation", ("relu",)),
    ("jump_recipe", "l0"): ("activation", ("jumprelu",)),
    ("bandwidth", 0.05): ("activation", ("jumprelu",)),
    ("target_l0", (2.5,)): ("activation", DENSE),
    ("sparsity_warmup_fraction", 0.0): ("activation", DENSE),
    ("kind", "transcoder"): ("activation", ("batchtopk", "matryoshka", "relu", "jumprelu")),
    ("kind", "skip"): ("activation", ("batchtopk", "matryoshka", "relu", "jumprelu")),
}
Choice = tuple[str, object]


def needed(choice: Choice) -> tuple[str, ...]:
    """The architectures that take a value of an option."""
    return NEEDS.get(choice, ("activation", OPTIONS["activation"]))[1]


def possible(a: Choice, b: Choice) -> bool:
    """Return whether some training has both."""
    if {a, b} == {("k_start", None), ("k_anneal_fraction", 0.7)}:
        return False
    both = set(needed(a)) & set(needed(b))
    wanted = {value for name, value in (a, b) if name == "activation"}
    return bool(both & wanted) if wanted else bool(both)


PAIRS = list(itertools.combinations([(name, value) for name, values in OPTIONS.items() for value in values], 2))
PAIRS = [(a, b) for a, b in PAIRS if a[0] != b[0]]


def run_config(chosen: dict[str, object]) -> RunConfig:
    flags = {name: value for name, value in chosen.items() if name != "kind"} | KINDS[chosen["kind"]]
    batch = chosen["batch_size"]
    return RunConfig(**flags, num_activations=STEPS * batch, block_size=64 * batch, checkpoint_every=batch)


def configs(chosen: dict[str, object]) -> tuple[SAEConfig, TrainConfig]:
    """Return the configs of these options, as far as the command gets without a model.

    Raises:
      ConfigError: it refuses them.
    """
    config = run_config(chosen)
    sae = config.sae_config(WIDTH, 2 if config.crosscoder else 1)
    export.architecture(sae)
    config.train_config().anneals(sae)
    return sae, config.train_config()


def covering() -> list[dict[str, object]]:
    """A few choices of all options that have every possible pair among them: the greedy way, always the same one."""
    missing = {frozenset(pair) for pair in PAIRS if possible(*pair)}
    rows = []
    while missing:
        first = min(missing, key=lambda pair: sorted(map(str, pair)))
        row = dict(sorted(first, key=str))
        for name, values in sorted(OPTIONS.items(), key=lambda option: (option[0] != "activation", -len(option[1]))):
            if name not in row:
                row[name] = max(values, key=functools.partial(gain, row, name, missing))
        rows.append(row)
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
    return rows


def gain(row: dict[str, object], name: str, missing: set, value: object) -> int:
    """Return the number of missing pairs that a value adds to a row; -1 if they exclude each other."""
    new = [((name, value), other) for other in row.items()]
    if not all(possible(*pair) for pair in new) or not fits({**row, name: value}):
        return -1
    return sum(frozenset(pair) in missing for pair in new)


def fits(row: dict[str, object]) -> bool:
    """Return whether an architecture takes everything in a row."""
    takers = set(OPTIONS["activation"]).intersection(*(needed(choice) for choice in row.items()))
    return bool(takers & {row["activation"]} if "activation" in row else takers)


ROWS = covering()


def test_all_pairs_are_covered_and_by_few_runs():
    found = {frozenset(pair) for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    assert {frozenset(pair) for pair in PAIRS if possible(*pair)} <= found
    assert len(ROWS) <= 40, len(ROWS)


def test_the_options_are_all_that_change_a_training():
    told = set(RunConfig.__dataclass_fields__)
    other = {"checkpoint", "step", "tokenizer", "data", "layer", "data_seed", "context_size", "tokens_per_forward"} | {
        *(
            "block_size",
            "exclude_tokens",
            "drop_sinks",
            "heldout_tokens",
            "checkpoint_every",
            "log_every",
            "device",
            "output_dir",
        ),
        *("deterministic", "jax_memory_fraction", "compile_model", "resume", "wandb_project", "prepare_neuronpedia"),
        *("model_id", "source_set", "latent_shards", "data_shards", "activations"),
        *("init_from", "find_lr"),  # test_continue_command.py, test_find_lr.py
        *("num_activations", "hook_type", "target_hook", "skip", "crosscoder", "aligned"),
        *("checkpoints", "models_in_memory", "exclusive_latents"),  # test_stages.py
    }
    assert told - other == set(OPTIONS) - {"kind"}


@pytest.mark.parametrize("activation", OPTIONS["activation"])
def test_an_option_that_an_architecture_does_not_read_is_refused_by_name(activation):
    base = {name: values[0] for name, values in OPTIONS.items()} | {"activation": activation}
    configs(base)
    for choice in [(name, value) for name, values in OPTIONS.items() for value in values[1:] if name != "activation"]:
        chosen = base | dict([choice])
        if choice[0] == "k_anneal_fraction":
            chosen["k_start"] = 34 if activation in TOPK else None
        if activation in needed(choice):
            configs(chosen)
        else:
            with pytest.raises(ConfigError) as refused:
                configs(chosen)
            name = "transcoder" if choice[0] == "kind" else choice[0].removesuffix("_coefficient")
            assert name in str(refused.value).replace("nested widths", "nested_widths")
            assert activation in str(refused.value) or "matryoshka" in str(refused.value)


def test_k_anneals_only_from_a_start():
    with pytest.raises(ConfigError, match="--k_anneal_fraction needs --k_start, which is not given"):
        RunConfig(k_anneal_fraction=0.7)


def acts(sae: SAEConfig, n: int, seed: int) -> Acts:
    """Activations that are off the origin and of another scale than 1."""
    parts = 2 if sae.is_transcoder else sae.layers
    draws = np.random.default_rng(seed).normal(3, 5, (parts, n, WIDTH)).astype(np.float32)
    return tuple(map(jnp.asarray, draws)) if parts > 1 else jnp.asarray(draws[0])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['activation']}-{row['kind']}-{ROWS.index(row)}")
def test_a_pair_of_options_trains_is_restored_and_exported(row, tmp_path):
    sae, config = configs(row)
    members = [loop.Member(sae, config)]
    programs = loop.Programs(members)
    first = loop.init(members, (acts(sae, 64, 0),))
    shapes = jax.eval_shape(lambda: first)
    batches = [acts(sae, config.batch_size, i) for i in range(STEPS)]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, (state,), (sums,) in loop.fit(members, first, ((batch,) for batch in batches), programs):  # noqa: B007 - the last are wanted
            if step == STEPS - 1:
                checkpoints.save(step, (state,), {}, fvu=0.5)
                checkpoints.wait()
        restored = checkpoints.restore(shapes).states
    loop.check_finite(state, sums)
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored)  # of no device: compiled already
    *_, (step, (again,), _) = loop.fit(members, restored, iter([(batches[-1],)]), programs)
    assert step == STEPS
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert np.isfinite(leaf).all(), path
    jax.tree.map(np.testing.assert_array_equal, again, state)

    weights = state.exported.arrays()
    export.write(tmp_path / "sae", sae, weights, np.asarray(state.scale), np.asarray(state.scale_out), {})
    read, wanted = input_and_target(sae, batches[0])
    with torch.no_grad():
        made = torch_sae.load(tmp_path / "sae").reconstruct
        found = made(
            torch_sae.load(tmp_path / "sae").encode(torch.tensor(np.asarray(read))), torch.tensor(np.asarray(read))
        )
    assert found.shape == wanted.shape
    assert math.isfinite(float(found.square().sum()))
