"""Unusable numbers are reported where they arise, with advice that fits; others train."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import python_text
import torch
from alone import begin, fit
from tiny_nanochat import tiny
from toy_saes import export as export_toy
from toy_saes import toy_sae

import bridge.nanochat
from bridge import finite
from bridge.hooks import hook_name
from bridge.nanochat import engine
from bridge.run import exports
from bridge.stream import ActivationStream
from bridge.training.config import RunConfig
from bridge.training.finish import UnusableError
from bridge.training.text import heldout_rows, texts
from experiments import evaluate, explore, train
from experiments.evaluate import EvaluateConfig
from experiments.explore import ExploreConfig
from jsae import data, health, loop, metrics
from jsae.architectures import sae_config
from jsae.config import TrainConfig
from jsae.health import ActivationsError, DegenerateError, DivergedError, Extent, Watch
from jsae.loop import Member

D, N = 8, 512
TOPK = sae_config("topk", D, 32, k=4)
SHORT = TrainConfig(num_activations=40 * 64, batch_size=64, learning_rate=3e-3)


def normal(seed: int = 0, n: int = N, d: int = D) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(1, 4, d) + 2).astype(np.float32)


# ---- the sample that a training starts from ------------------------------------------------------------------------

LOST = {
    "nothing but zeros": (np.zeros((N, D)), DegenerateError, "are all zero"),
    "denormal numbers": (normal() * 1e-41, DegenerateError, "are all zero, or too small for float32"),
    "numbers near 1e-30": (normal() * 1e-30, DegenerateError, "root mean square of 3.*e-30"),
    "numbers near 1e30": (normal() * 1e30, DegenerateError, r"root mean square of 3.*e\+30"),
    "one token over and over": (np.tile(normal(n=1), (N, 1)), DegenerateError, "the same for every token"),
    "all but constant": (np.tile(normal(n=1), (N, 1)) + 1e-6 * normal(), DegenerateError, "the same for every token"),
    "a NaN": (np.where(np.arange(N)[:, None] == 7, np.nan, normal()), ActivationsError, "8 numbers .* are not finite"),
    "an infinity": (np.where(np.arange(N)[:, None] == 7, np.inf, normal()), ActivationsError, "are not finite"),
}


@pytest.mark.parametrize("what", LOST)
def test_a_sample_that_nothing_can_be_learned_from_is_named(what):
    acts, kind, told = LOST[what]
    with pytest.raises(kind, match=told) as refused:
        loop.init([Member(TOPK, SHORT)], (jnp.asarray(acts.astype(np.float32)),))
    assert "learning rate" not in str(refused.value)


ODD = {
    "of scale 1e-9": lambda x: x * 1e-9,
    "of scale 1e9": lambda x: x * 1e9,
    "with a dead dimension": lambda x: x * np.where(np.arange(D) == 3, 0, 1),
}


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("what", ODD)
@pytest.mark.usefixtures("quickly_compiled")
def test_odd_activations_that_can_be_learned_from_train(architecture, what):
    acts = jnp.asarray(ODD[what](normal(n=64 * 40)).astype(np.float32))
    own = {"relu": {"l1_coefficient": 0.1}, "jumprelu": {"l0_coefficient": 0.1}}.get(architecture, {"k": 4})
    sae = sae_config(architecture, D, 32, **own)
    sums = None
    for step, state, new in fit(sae, SHORT, begin(sae, SHORT, acts), acts.reshape(40, 64, D)):
        sums = new if sums is None or step < 30 else metrics.add(sums, new)
        last = state
    loop.check_finite(last, sums)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))
    assert health.unusable(metrics.summarize(sums)) is None


def test_the_scale_is_the_plain_formula_bit_by_bit_and_holds_far_beyond_it():
    for seed in range(8):
        x = normal(seed, 100 + seed) * np.float32(10.0**seed)
        plain = jax.jit(lambda x: jnp.sqrt(D / jnp.square(x).sum(-1).mean(0)))(jnp.asarray(x))
        assert float(jax.jit(data.scale_of)(jnp.asarray(x))) == float(plain)
    one = float(data.scale_of(jnp.asarray(normal())))
    for power in (-100, 100):
        assert float(data.scale_of(jnp.asarray(normal() * np.float32(2.0**power)))) == one * 2.0**-power
    two = np.concatenate([normal() * np.float32(2.0**100), normal()], axis=1)
    np.testing.assert_array_equal(data.scale_of(jnp.asarray(two), 2), np.repeat(np.float32([one * 2.0**-100, one]), D))


def test_a_part_of_a_transcoder_or_a_crosscoder_is_named():
    transcoder = sae_config("relu", D, 32, d_out=D)
    with pytest.raises(DegenerateError, match=r"activations \(part 2 of 2\) are all zero"):
        loop.init([Member(transcoder, SHORT)], ((jnp.asarray(normal()), jnp.zeros((N, D))),))


def test_metrics_of_nan_are_not_reported_as_an_empty_set():
    x = normal()
    x[3] = np.nan
    sums = metrics.batch_sums(
        x,
        x - 1,
        l0=(x != 0).sum(),
        l1=abs(x).sum(),
        fired=(x != 0).sum(0),
        loss=np.float32(1),
        nonfinite=(~np.isfinite(x)).sum(),
    )
    summary = metrics.summarize(sums)
    assert summary["tokens"] == N
    assert health.unusable(summary) == "not finite: fvu, mse, cosine"


def test_the_summary_of_an_sae_says_whether_it_is_of_use():
    good = {"fvu": 0.999, "mse": 1.0, "l0": 0.0, "cosine": 0.1}
    assert health.unusable(good) is None
    assert health.unusable(good | {"fvu": 2e17}) == "FVU 2e+17, no better than predicting the mean"
    assert health.unusable(good | {"fvu": float("nan")}) == "not finite: fvu"


# ---- divergence ----------------------------------------------------------------------------------------------------


def test_a_run_diverges_when_it_is_far_off_for_long():
    watch = Watch()
    for step in range(50, 1001, 50):  # far off every other window: this may still become something
        watch.observe("", step - 49, step, 1e9 if step % 100 else 0.5)
    watch.observe("", 1001, 1050, 101.0)
    assert watch.all_suspect
    with pytest.raises(DivergedError, match=r"has diverged: from step 1001 to 1100 the FVU .* lower --learning_rate"):
        watch.observe("", 1051, 1100, float("nan"))


def test_a_diverging_run_is_reported_once_while_another_continues():
    watch = Watch(2)
    assert watch.observe("a", 1, 100, 0.5) is None
    assert watch.observe("b", 1, 100, 1e3).startswith("the training of b has diverged: from step 1 to 100")
    assert watch.observe("b", 101, 200, 1e3) is None
    assert not watch.all_suspect
    with pytest.raises(DivergedError, match="of a has diverged"):
        watch.observe("a", 101, 200, 1e3)


# ---- the model and its text ----------------------------------------------------------------------------------------

NAME, ROW = hook_name(1, "resid_post"), 16


def rows(n: int = 8, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(1, 49, (n, ROW)).astype(np.int32)
    tokens[:, 0] = 0
    return tokens


def check(model, tokens: np.ndarray) -> None:
    parts = [tokens[:4], tokens[4:]]
    finite.check_text(
        model, [NAME], parts, excluded=(0,), drop_sinks=True, called="this text", decode=lambda ids: f"<{ids}>"
    )


def test_weights_that_are_not_finite_are_named_with_their_rows():
    model = tiny("G7")
    assert finite.broken_weights(model) == []
    with torch.no_grad():
        model.transformer.wte.weight[7] = torch.nan
        model.transformer.wte.weight[9, 0] = torch.inf
    (told,) = finite.broken_weights(model)
    assert told.startswith("33 numbers of transformer.wte.weight in rows 7, 9 of ")


def test_text_with_a_token_that_has_no_numbers_is_named_by_hook_token_and_place():
    model, tokens = tiny("G7"), rows()
    check(model, tokens)
    tokens[5, 9] = 49
    with torch.no_grad():
        model.transformer.wte.weight[49] = torch.nan
    with pytest.raises(ActivationsError) as refused:
        check(model, tokens)
    told = str(refused.value)
    assert "in this text, rows 4 and on: " in told
    assert f" of 60 tokens have activations at {NAME} that are NaN" in told
    assert "it begins with token 49, '<[49]>', at position 9 of its row, after" in told


def test_text_of_one_token_is_named():
    model, tokens = tiny("G7"), np.full((8, ROW), 5, np.int32)
    for block in model.transformer.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
    with torch.no_grad():
        model.smear_lambda.zero_()
    with pytest.raises(DegenerateError, match="the same for every token"):
        finite.check_text(model, [NAME], [tokens], excluded=(0,), drop_sinks=True, called="this text")


class Text:
    """A source that repeats the same rows."""

    row_len = ROW

    def next_rows(self, n):
        return rows(n)

    def position(self):
        return {}

    def seek(self, position):
        pass


@pytest.mark.parametrize(
    ("dtype", "told"), [(torch.float16, "infinite: the largest torch.float16 is 6.55e"), (torch.float32, "as large as")]
)
def test_an_overflow_is_named_with_the_type_that_overflows(dtype, told):
    model = tiny("G7").to(dtype)
    factor = 1e6 if dtype == torch.float16 else 1e20
    handle = model.transformer.h[1].register_forward_hook(lambda m, i, o: o * factor)
    source = ActivationStream(model, Text(), [[NAME]], excluded=(0,), rows_per_forward=4, drop_sinks=False)
    try:
        with pytest.raises(ActivationsError, match=told):
            for _ in source.fill(64):
                pass
    finally:
        handle.remove()


def test_generation_from_logits_that_are_not_numbers_is_an_error_and_no_token():
    model = tiny("G7")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(engine.NotFiniteError, match="logits are not finite"):
        next(engine.generate(model, [0, 5], max_tokens=3))


# ---- the commands --------------------------------------------------------------------------------------------------

HOOK = "blocks.2.hook_resid_post"
SMALL = {
    "num_activations": 20_000,
    "batch_size": 250,
    "block_size": 2_500,
    "context_size": 64,
    "checkpoint_every": 2_500,
    "log_every": 10,
    "heldout_tokens": 3_000,
    "expansion_factor": 1,
    "k": (8,),
    "dead_after": 2_000,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return python_text.copied(tmp_path_factory.mktemp("text"), 60)


def config(run: Path, text: str, **flags: object) -> RunConfig:
    return RunConfig(**{**SMALL, "data": text, "output_dir": str(run), **flags})


def broken_demo(folder: Path, token: int) -> Path:
    """A copy of the demo whose embedding of one token is not a number."""
    shutil.copytree(Path(bridge.nanochat.__file__).parent / "demo", folder)
    (file,) = folder.glob("model_*.pt")
    state = torch.load(file, weights_only=True)
    state["transformer.wte.weight"][token] = torch.nan
    torch.save(state, file)
    return folder


def test_a_token_of_the_held_out_text_without_numbers_ends_a_run_before_it_trains(text, tmp_path, capsys):
    nano = bridge.nanochat.load("demo")
    asked = config(tmp_path / "run", text)
    heldout = texts(asked, nano)[1]
    counts = np.bincount(heldout_rows(asked, heldout).ravel(), minlength=nano.config.vocab_size)
    rare = int(np.flatnonzero(counts == 1)[0])
    with pytest.raises(ActivationsError, match=rf"in the held-out part of .* it begins with token {rare}, "):
        train.main(config(tmp_path / "run", text, checkpoint=str(broken_demo(tmp_path / "broken", rare))))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "warning: 128 numbers of transformer.wte.weight in rows" in capsys.readouterr().err


def test_a_token_of_the_training_text_without_numbers_is_named_and_so_again_by_resume(text, tmp_path):
    nano = bridge.nanochat.load("demo")
    asked = config(tmp_path / "run", text, num_activations=100_000)
    corpus, heldout = texts(asked, nano)
    measured = np.bincount(heldout_rows(asked, heldout).ravel(), minlength=nano.config.vocab_size)
    rows = np.concatenate([corpus.next_rows(1) for _ in range(600)])
    first = {int(token): row for row, ids in reversed(list(enumerate(rows))) for token in ids}
    late = next(
        token for token, row in sorted(first.items(), key=lambda item: item[1]) if row > 200 and not measured[token]
    )
    flags = {"checkpoint": str(broken_demo(tmp_path / "broken", late)), "num_activations": 100_000}
    for resume in (False, True):
        with pytest.raises(ActivationsError) as refused:
            train.main(config(tmp_path / "run", text, **flags, resume=resume))
        told = str(refused.value)
        step = int(told.split("the activations are not finite at step ")[1].split(";")[0])
        saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
        assert f"it begins with token {late}, " in told
        assert f"the checkpoint of step {max(saved)} is from before; --resume would end here again" in told
        assert "start anew with a repaired model, or without that text in --data" in told
        assert max(saved) < step
        assert "learning rate" not in told


def test_a_learning_rate_without_reason_is_marked_and_an_error_and_named_in_a_sweep(text, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(UnusableError) as refused:
        train.main(config(run, text, learning_rate=(1e-3, 1000.0)))
    told = str(refused.value)
    assert told.startswith("1 of 2 exported SAEs are of no use: lr1000 blocks.2.hook_resid_post (FVU ")
    good, bad = (run / name for name in ("lr0.001", "lr1000"))
    assert "problem" not in json.loads((good / "eval.json").read_text())[HOOK]
    problem = json.loads((bad / "eval.json").read_text())[HOOK]["problem"]
    assert json.loads((bad / "sae" / HOOK / "cfg.json").read_text())["metadata"]["problem"] == problem
    assert "no better than predicting the mean" in problem

    capsys.readouterr()
    small = {"heldout_tokens": 1000, "probes": False, "labels": False, "plots": False}
    assert evaluate.main(EvaluateConfig(run_dir=str(bad), **small)) == 0
    assert "this SAE is of no use: FVU" in capsys.readouterr().err
    assert "no better" in json.loads((bad / "eval.json").read_text())[HOOK]["problem"]
    assert explore.main(ExploreConfig(run_dir=str(bad), num_tokens=2000, context_length=64)) == 0
    assert "is marked as of no use: FVU" in capsys.readouterr().err


def test_a_run_that_diverges_is_stopped_early_and_keeps_no_checkpoint_of_it(text, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"has diverged: from step \d+ to 1\d\d .* no checkpoint was saved"):
        train.main(config(run, text, learning_rate=(1000.0,), num_activations=200_000))
    assert not (run / "sae").exists()
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_useless_sae_is_reported_wherever_it_is_read(tmp_path, capsys):
    folder = export_toy(toy_sae("topk", 32, 64, problem="FVU 3 \x1b[31m"), tmp_path / "sae")
    plain = export_toy(toy_sae("topk", 32, 64), tmp_path / "plain")
    assert exports.warn_of_marked([plain, folder, tmp_path / "nowhere"]) == [folder]
    assert capsys.readouterr().err == f"warning: {folder} is marked as of no use: FVU 3 ?[31m\n"


def test_an_extent_is_what_it_says():
    found = finite._Sums()
    x = torch.from_numpy(normal() * 1e6)
    found.add(x[:100])
    found.add(x[100:])
    extent = found.extent()
    assert extent.largest == pytest.approx(float(x.abs().max()))
    assert extent.rms == pytest.approx(float(x.double().square().mean().sqrt()))
    spread = (x - x.mean(0)).double().square().mean()
    assert extent.variance == pytest.approx(float(spread / x.double().square().mean()))
    assert health.degenerate(extent, "x") is None
    assert health.degenerate(Extent(1.0, 1.0, 1.0, 3), "x").startswith("3 numbers of the x are not finite")
