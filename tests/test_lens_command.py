"""The command for lenses as its users run it: fit, continue, merge, show, measure."""

import contextlib
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_nanochat import tiny, write
from toy_saes import export, toy_sae, toy_transcoder

import bridge.nanochat
from bridge import lenses
from bridge.lenses import fitting, jacobian, lens_file, tuned
from bridge.nanochat import tokenizer as tokenizers
from bridge.run import directory as rundir
from bridge.training.config import RunConfig
from experiments import flags, lens, signals

ROOT = Path(__file__).resolve().parents[1]
RESID, LENGTH = "blocks.1.hook_resid_post", 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny nanochat that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("nanochat")
    tokenizer = tokenizers.Tokenizer({bytes([i]): i for i in range(256)})
    tokenizers.save(tokenizer, folder / "tokenizer")
    return write(folder / "d2", tiny("G7", n_layer=2, vocab_size=tokenizer.vocab_size, sequence_len=40), "G7", step=5)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text that goes on\n" for i in range(1500)))
    return tmp_path / "text.txt"


@pytest.fixture
def run(checkpoint, text, tmp_path) -> Path:
    folder, fingerprint = tmp_path / "run", bridge.nanochat.load(checkpoint).fingerprint
    export(toy_sae("topk", 32, 64, hook_name=RESID, model_fingerprint=fingerprint), folder / "sae" / RESID)
    config = RunConfig(checkpoint=str(checkpoint), step=5, layer=("1",), data=str(text))
    rundir.record(folder, config, {"model": fingerprint})
    return folder


def called(capfd, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        flags.run(lens.LensConfig, lens.main, argv=["lens", *map(str, arguments)], after=lens.next_commands)
    out, err = capfd.readouterr()
    return stop.value.code or 0, out, err


def fit(capfd, run: Path, *more: str) -> tuple[int, str, str]:
    return called(capfd, f"--run_dir={run}", "--fit=jacobian", f"--context_length={LENGTH}", *more)


def refused(capfd, *arguments: str) -> str:
    code, _, err = called(capfd, *arguments)
    assert code in (1, 2)
    assert err.startswith("FATAL ")
    assert err.count("\n") == 2
    return err


# ---- fitting --------------------------------------------------------------------------------------------------------


def test_parts_of_a_fit_merge_to_the_whole_and_are_shown(run, tmp_path, capfd):
    for name, words in {
        "whole": ["--prompts=4"],
        "a": ["--prompts=2"],
        "b": ["--prompts=2", "--first_prompt=2"],
    }.items():
        code, out, err = fit(capfd, run, f"--out={tmp_path}/{name}.pt", *words)
        assert code == 0, err
    assert "2 prompts, pieces 2 to 3 of the text" in out
    assert f"--lens={tmp_path}/b.pt" in out
    code, out, _ = called(capfd, f"--merge={tmp_path}/a.pt,{tmp_path}/b.pt", f"--out={run}/lenses/jacobian.pt")
    assert (code, out) == (0, f"jacobian lens   {run}/lenses/jacobian.pt: 4 prompts\n")
    whole, merged = lenses.load(tmp_path / "whole.pt"), lenses.load(run / "lenses" / "jacobian.pt")
    for layer in whole.layers:
        torch.testing.assert_close(merged.matrices[layer], whole.matrices[layer], atol=5e-3, rtol=2e-3)
    assert "were fitted on the same text" in refused(
        capfd, f"--merge={tmp_path}/a.pt,{tmp_path}/whole.pt", f"--out={tmp_path}/c.pt"
    )
    assert "exists: give another --out" in refused(
        capfd, f"--merge={tmp_path}/a.pt,{tmp_path}/b.pt", f"--out={tmp_path}/a.pt"
    )

    code, out, _ = called(capfd, f"--run_dir={run}", "--prompt=ab\x1b", "--top=2")
    assert code == 0
    for name in ("logit", "direct", "jacobian"):
        assert f"{name} lens, most likely next token" in out
    assert "\x1b[31m" not in out
    code, out, _ = called(capfd, f"--run_dir={run}", "--latent=3")
    assert code == 0
    assert "jacobian: raised" in out
    assert "4 prompts; of the ten most raised tokens it shares" in out
    code, out, _ = called(capfd, f"--run_dir={run}", "--measure", "--rows=1", "--show=direct,jacobian")
    assert code == 0
    assert "direct" in out
    assert "logit" not in out


def test_a_stopped_fit_continues_to_the_same_lens(checkpoint, text, tmp_path):
    nano = bridge.nanochat.load(checkpoint)
    source, settings = fitting.Text(str(text), "train", LENGTH), jacobian.Settings(max_prompts=5)
    fitting.fit_jacobian(nano, tmp_path / "whole.pt", source, settings)
    out = tmp_path / "parts.pt"

    @contextlib.contextmanager
    def at_once():
        yield [signal.SIGINT]

    for resume in (False, True):
        with pytest.raises(fitting.Stopped):
            fitting.fit_jacobian(nano, out, source, settings, resume=resume, stop_requests=at_once)
        assert not out.exists()
    assert lenses.load(fitting.unfinished(out)).n_prompts == 2
    lens = fitting.fit_jacobian(nano, out, source, settings, resume=True)
    assert not fitting.unfinished(out).exists()
    assert lens.provenance["prompts"] == [0, 5]
    assert out.read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_a_stopped_fit_of_a_tuned_lens_continues_to_the_same_bytes(checkpoint, text, tmp_path):
    nano = bridge.nanochat.load(checkpoint)
    source, settings = fitting.Text(str(text), "train", LENGTH), tuned.Settings(steps=5, weight_decay=0.01)
    fitting.fit_tuned(nano, tmp_path / "whole.pt", source, settings, rows=2)
    out = tmp_path / "parts.pt"

    @contextlib.contextmanager
    def at_once():
        yield [signal.SIGINT]

    for resume in (False, True, True):
        with pytest.raises(fitting.Stopped):
            fitting.fit_tuned(nano, out, source, settings, rows=2, resume=resume, stop_requests=at_once)
        assert not out.exists()
    state = fitting.unfinished(out)
    assert lenses.load(state).provenance["steps_taken"] == 3
    with pytest.raises(ValueError, match=r"is an unfinished fit: continue it with --resume"):
        fitting.fit_tuned(nano, out, source, settings, rows=2)
    with pytest.raises(ValueError, match=r"has steps 5, this one 6: give the same model, text and settings"):
        fitting.fit_tuned(nano, out, source, tuned.Settings(steps=6, weight_decay=0.01), rows=2, resume=True)
    fitting.fit_tuned(nano, out, source, settings, rows=2, resume=True)
    assert not state.exists()
    assert out.read_bytes() == (tmp_path / "whole.pt").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": {"turn": 0}}, "the position is of another corpus"),
        ({"position": "x"}, "cannot be continued"),
        ({"steps_taken": 10**9}, "steps_taken is 1000000000"),
        ({"steps_taken": None}, "steps_taken is None"),
    ],
)
def test_a_broken_unfinished_fit_of_a_tuned_lens_is_refused(checkpoint, text, tmp_path, change, message):
    nano, out = bridge.nanochat.load(checkpoint), tmp_path / "x.pt"
    source, settings = fitting.Text(str(text), "train", LENGTH), tuned.Settings(steps=5)

    @contextlib.contextmanager
    def at_once():
        yield [signal.SIGINT]

    with pytest.raises(fitting.Stopped):
        fitting.fit_tuned(nano, out, source, settings, stop_requests=at_once)
    lens, moments = lens_file.load_unfinished(fitting.unfinished(out))
    changed = dataclasses.replace(lens, provenance={**lens.provenance, **change})
    lens_file.save(changed, fitting.unfinished(out), torch.float32, moments)
    with pytest.raises(ValueError, match=message):
        fitting.fit_tuned(nano, out, source, settings, resume=True)
    lens_file.save(lens, fitting.unfinished(out))
    with pytest.raises(ValueError, match="is no unfinished fit of a tuned lens"):
        fitting.fit_tuned(nano, out, source, settings, resume=True)


def test_an_interrupted_command_says_how_to_continue(run, tmp_path):
    words = [f"--run_dir={run}", "--fit=jacobian", f"--out={tmp_path}/x.pt", "--min_prompts=100000", "--prompts=100000"]
    # A short text would end before the signal: the standard library is long.
    command = [sys.executable, "-m", "experiments.lens", *words, "--data=stdlib", f"--context_length={LENGTH}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()  # progress: the fit has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == signals.STOPPED, line + err
    assert "stopped; continue with: python -m experiments.lens" in out
    assert out.rstrip().endswith("--resume")
    assert lenses.load(tmp_path / "x.pt.fit").n_prompts >= 1


def test_what_cannot_be_continued_is_refused(run, text, tmp_path, capfd):
    out = f"--out={tmp_path}/x.pt"
    assert "there is no unfinished fit at" in refused(
        capfd, f"--run_dir={run}", "--fit=jacobian", out, "--resume", f"--context_length={LENGTH}"
    )
    lens = lenses.JacobianLens({i: torch.eye(32) for i in range(2)}, 2, {"prompts": [0, 2], "text": "another 24"})
    lenses.save(lens, tmp_path / "x.pt.fit")
    code, _, err = fit(capfd, run, out)
    assert code == 1
    assert "is an unfinished fit: continue it with --resume" in err
    code, _, err = fit(capfd, run, out, "--resume")
    assert code == 1
    assert "has model_fingerprint None, this one" in err


def test_a_tuned_lens_is_fitted_and_shown(run, capfd):
    code, out, err = called(
        capfd, f"--run_dir={run}", "--fit=tuned", "--steps=3", "--rows=2", f"--context_length={LENGTH}"
    )
    assert code == 0, err
    assert f"tuned lens      {run}/lenses/tuned.pt" in out
    assert lenses.load(run / "lenses" / "tuned.pt").provenance["tokens"] == 3 * 2 * LENGTH
    code, out, _ = called(capfd, f"--run_dir={run}", "--prompt=a", "--show=tuned", "--layers=0")
    assert code == 0
    assert "tuned lens" in out
    assert "exists: give another --out" in refused(
        capfd, f"--run_dir={run}", "--fit=tuned", "--steps=3", f"--context_length={LENGTH}"
    )


# ---- showing --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_needs_no_run(checkpoint, capfd):
    code, out, err = called(
        capfd, f"--checkpoint={checkpoint}", "--prompt=a long prompt of more columns", "--show=direct"
    )
    assert code == 0, err
    assert out.count("output") > 1, "columns that do not fit are printed below"


def test_a_latent_of_a_transcoder_is_what_it_writes(checkpoint, tmp_path, capfd):
    fingerprint = bridge.nanochat.load(checkpoint).fingerprint
    sae = toy_transcoder(1, 32, 64, model_fingerprint=fingerprint)
    export(sae, tmp_path / "run" / "sae" / sae.metadata["hook_name"])
    rundir.record(tmp_path / "run", RunConfig(checkpoint=str(checkpoint), step=5), {"model": fingerprint})
    code, out, err = called(capfd, f"--run_dir={tmp_path}/run", "--latent=3")
    assert code == 0, err
    assert "written at blocks.1.hook_mlp_out" in out
    assert "jacobian lens   none: fit one" in out


BAD = {
    "no model": ([], "no model: give --run_dir, or --checkpoint"),
    "nothing to do": (["--run_dir=x"], "give one of --prompt, --latent, --fit, --merge and --measure"),
    "two things": (["--run_dir=x", "--prompt=a", "--measure"], "got --prompt and --measure"),
    "one lens": (["--merge=a", "--out=x"], "--merge needs at least two lenses"),
    "nowhere": (["--merge=a,b"], "nowhere to write: give --out"),
    "no run": (["--checkpoint=demo", "--fit=tuned"], "nowhere to write"),
    "a latent of no run": (["--checkpoint=demo", "--latent=1"], "--latent is of a run"),
    "an unknown lens": (["--run_dir=x", "--prompt=a", "--show=best"], "show has 'best': choose from logit"),
    "of another action": (["--run_dir=x", "--prompt=a", "--steps=3"], "--steps does nothing with --prompt"),
    "of another fit": (["--run_dir=x", "--fit=tuned", "--prompts=3"], "--prompts does nothing with --fit=tuned"),
    "a rate of 0": (["--run_dir=x", "--fit=tuned", "--learning_rate=0"], "learning_rate is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_flags_that_do_not_go_together_are_refused(name, capfd):
    words, complaint = BAD[name]
    code, out, err = called(capfd, *words)
    assert (code, out) == (2, "")
    assert complaint in err


def test_what_is_not_there_is_refused_in_one_line(run, tmp_path, capfd):
    at = f"--run_dir={run}"
    assert "there is no tuned lens: fit one with --fit=tuned" in refused(capfd, at, "--prompt=a", "--show=tuned")
    assert "no lens at" in refused(capfd, at, "--prompt=a", f"--lens={tmp_path}/none.pt")
    assert "the SAE has latents 0 to 63" in refused(capfd, at, "--latent=64")
    assert "layers has 2: the last is 1" in refused(capfd, at, "--prompt=a", "--layers=2")
    assert "has 41 tokens, BOS included: the model's context is 40" in refused(capfd, at, f"--prompt={'a' * 40}")
    (tmp_path / "bad.pt").write_bytes(b"x" * 100)
    assert "is not a lens that can be read" in refused(capfd, at, "--prompt=a", f"--lens={tmp_path}/bad.pt")
    lenses.save(lenses.JacobianLens({0: torch.eye(8)}, 1), tmp_path / "narrow.pt")
    assert "has width 8" in refused(capfd, at, "--prompt=a", f"--lens={tmp_path}/narrow.pt")
    (tmp_path / "short.txt").write_text("too short")
    short = [f"--data={tmp_path}/short.txt", "--split=all", f"--out={tmp_path}/s.pt"]
    assert "no prompt of at least 18 tokens" in refused(capfd, at, "--fit=jacobian", *short)
