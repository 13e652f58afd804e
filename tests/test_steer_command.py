"""The commands that steer and that measure it, as their users run them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_nanochat import tiny, write
from toy_saes import export, toy_sae

import bridge.nanochat
from bridge.nanochat import tokenizer as tokenizers
from bridge.run import directory as rundir
from bridge.runtime import InterpretableModel, Steer, load_saes
from experiments import flags, steer, steer_view
from experiments.train import RunConfig

ROOT = Path(__file__).resolve().parents[1]
HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"
SHORT = {"max_tokens": 12, "temperature": 0.7, "seed": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny nanochat that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("nanochat")
    tokenizer = tokenizers.Tokenizer({bytes([i]): i for i in range(256)})
    tokenizers.save(tokenizer, folder / "tokenizer")
    return write(folder / "d4", tiny("G7", vocab_size=tokenizer.vocab_size), "G7", step=5)


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory) -> Path:
    """A run that trained one SAE on it."""
    return make_run(checkpoint, tmp_path_factory.mktemp("runs") / "one", HOOK)


def make_run(checkpoint: Path, run: Path, *hooks: str) -> Path:
    fingerprint = bridge.nanochat.load(checkpoint).fingerprint
    for name in hooks:
        sae = toy_sae("topk", 32, 64, k=6, hook_name=name, model_fingerprint=fingerprint)
        export(sae, run / "sae" / name)
    rundir.record(run, RunConfig(checkpoint=str(checkpoint), step=5), {"model": fingerprint})
    return run


@pytest.fixture(scope="module")
def im(checkpoint, run) -> InterpretableModel:
    return InterpretableModel.from_nanochat(bridge.nanochat.load(checkpoint), load_saes(run))


def command(run: Path, **settings: object) -> list[str]:
    settings = SHORT | {"run_dir": run} | settings
    return ["steer", *(f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items())]


def process(arguments: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{arguments[0]}", *arguments[1:]],
        cwd=ROOT,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            "PATH": "",
            "COLUMNS": "160",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
        },
    )


def here(arguments: list[str], capsys) -> tuple[int, str, str]:
    """The command in this process, which has torch already: exit code, output, errors."""
    with pytest.raises(SystemExit) as ended:
        flags.run(steer.SteerConfig, steer.main, argv=arguments)
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def text_of(im: InterpretableModel, prompt: str, steers: list[Steer], **settings: object) -> str:
    stop = [im.tokenizer.bos_token_id]
    tokens = im.generate(prompt, steers, stop_tokens=stop, echo=True, **(SHORT | settings))
    return steer_view.shown("".join(token.text for token in tokens))


def panel(output: str, column: int) -> str:
    """The text of a panel, without its frame and without white space."""
    lines = [line.split("│") for line in output.splitlines() if line.startswith("│") and line.count("│") in (2, 4)]
    return re.sub(r"\s", "", "".join(line[1 + 2 * column] for line in lines if len(line) > 1 + 2 * column))


def answers(output: str) -> list[str]:
    """Return the output after each "> " that asked for a line."""
    told = [""]
    for line in output.splitlines(keepends=True):
        while line.startswith("> "):
            told.append("")
            line = line[2:]
        told[-1] += line
    return told[1:]


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_it_shows_both_continuations_and_what_the_push_did(run, im):
    done = process(command(run, prompt="def ", feature="7,9", strength="30,-20", mode="clamp", positions="generated"))
    assert done.returncode == 0, done.stderr
    steers = [Steer(HOOK, 7, "clamp", 30.0, "generated"), Steer(HOOK, 9, "clamp", -20.0, "generated")]
    shown, _, _ = done.stdout.partition("┏")
    assert "default" in shown
    assert panel(shown, 0) == squeezed(text_of(im, "def ", []))
    assert panel(shown, 1) == squeezed(text_of(im, "def ", steers))
    rows = [line for line in done.stdout.splitlines() if "clamp (generated)" in line]
    ids = torch.tensor([im.tokenizer.encode("def ", prepend_bos=True)])
    for row, request in zip(rows, steers, strict=True):
        cells = [cell.strip() for cell in row.split("│")]
        assert cells[1] == str(request.feature)
        assert cells[4] == f"{im.relative_strength(request, ids):.3f}"
    fired = re.search(r"(\d+) of 17 tokens, at most [\d.]+ │$", rows[0])
    assert int(fired[1]) >= 11


def test_without_a_feature_it_tells_what_fires(run, capsys):
    code, out, _ = here(command(run, prompt="import os", max_tokens=3), capsys)
    assert code == 0
    assert "steered" not in out
    assert f"what fires at {HOOK}" in out
    assert len(re.findall(r"│ \d+ +│ +[\d.]+ +│", out)) == 10


def test_tokens_are_coloured_by_what_fires_on_them(im):
    push = [Steer(HOOK, 7, "clamp", 30.0, "generated")]
    tokens = list(im.generate("def ", push, echo=True, **SHORT))
    (left,) = steer_view.side_by_side([tokens], push).columns[0].cells
    spans = left.renderable.spans
    tokens = [token for token in tokens if token.text]  # a part of a character has nothing to colour
    assert len(spans) == len(tokens)
    for token, span in zip(tokens, spans, strict=True):
        assert (span.style.bgcolor is not None) == (7 in dict(token.features[HOOK]))
    strongest = max(tokens, key=lambda token: dict(token.features[HOOK]).get(7, 0))
    assert spans[tokens.index(strongest)].style.bgcolor.triplet == (255, 150, 0)


def test_a_terminal_is_told_nothing_it_would_obey():
    assert steer_view.shown("a\x1b[2J\x07\x9b\r\n\tb\x7f") == "a␛[2J␇\ufffd␍\n\tb␡"


def test_a_chat_is_rendered_as_the_engine_does(run, im, capsys):
    code, out, _ = here(command(run, prompt="hi", feature=7, chat=True), capsys)
    assert code == 0
    assert panel(out, 0).startswith("<|bos|><|user_start|>hi<|user_end|><|assistant_start|>")


def test_the_loop_prompts_steers_explains_and_survives_mistakes(run, im):
    lines = [
        "/why", "def ", "/top 3", "/why  x", "/why", "/steer", "/steer 7", "/steer 9 -4.5 scale", "/steer", "a\\nb",
        "/steer 64", "/steer seven", "/steer 7 nan", "/steer 7 1 push", "/push", "/help", "", "/top 1", "/clear",
        "/steer", "/steer 7 1 clamp all", "/quit", "never read",
    ]  # fmt: skip
    done = process(command(run, interactive=True), "\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = answers(done.stdout)
    assert "there is no prompt yet" in told[0]
    assert panel(told[1], 0) == squeezed(text_of(im, "def ", []))
    assert len(re.findall(r"│ \d+ +│ +[\d.]+ +│", told[2])) == 3
    assert "activation x gradient for ' '" in told[3]  # of the token " ", not of "x"
    assert "activation x gradient for" in told[4]
    assert len(re.findall(r"[+-]\d\.\d{4}", told[4])) == 10
    assert "nothing is pushed" in told[5]
    assert f"feature 7 of {HOOK}: additive 8, positions all" in told[6]
    assert told[8].count(HOOK) == 2
    assert "feature 9 of blocks.1.hook_resid_post: scale -4.5" in told[8]
    steers = [Steer(HOOK, 7, "additive", 8.0), Steer(HOOK, 9, "scale", -4.5)]
    assert panel(told[9], 1) == squeezed(text_of(im, "a\nb", steers))
    assert "a factor" in told[9]
    assert "this SAE has features 0 to 63" in told[10]
    assert "'seven' is not a whole number" in told[11]
    assert "must be a finite number" in told[12]
    assert "no steering mode 'push': choose one of additive" in told[13]
    assert "no command /push: there are /steer, /clear, /top, /why, /help and /quit" in told[14]
    assert all(f"/{name}" in told[15] for name in ("steer", "clear", "top", "why", "help", "quit"))
    assert told[16] == ""
    default = im.generate("a\nb", echo=True, stop_tokens=[im.tokenizer.bos_token_id], **SHORT)
    assert f"{max(value for token in default for _, value in token.features[HOOK]):.3f}" in told[17]
    assert told[18] == ""
    assert "nothing is pushed" in told[19]
    assert "/steer takes FEATURE [STRENGTH [MODE]], not 4 words" in told[20]
    assert "never read" not in done.stdout


def test_the_loop_refuses_numbers_out_of_range_and_keeps_what_was_pushed(run):
    lines = ["/steer 7 1e6 orthogonal", "/steer 7 1e-320", "/steer 7 1000 scale", "/steer 7 1000 orthogonal",
             "/steer 7 2 scale", "/steer", "x", "/top 0", "/quit"]  # fmt: skip
    done = process(command(run, interactive=True), "\n".join(lines))
    assert done.returncode == 0, done.stderr
    told = answers(done.stdout)
    assert "is a factor in the mode orthogonal, is 1000000.0: expected" in told[0]
    assert "which float32 rounds to 0" in told[1]
    assert "scale 1000" in told[2]
    assert told[3].count(HOOK) == 2
    assert "the product of the factors of orthogonal and scale is 2e+06" in told[4]
    assert told[5].count(HOOK) == 2
    assert "/top 0: give how many features to show, at least 1" in told[7]


def test_the_end_of_the_input_ends_the_loop(run):
    done = process(command(run, interactive=True, prompt="def "), "/top 1\n")
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout


def test_of_several_saes_one_is_chosen(checkpoint, tmp_path, capsys):
    run = make_run(checkpoint, tmp_path / "two", HOOK, OTHER)
    code, _, err = here(command(run, prompt="def "), capsys)
    assert code == 1
    assert f"has several SAEs: choose one with --hook={HOOK}|{OTHER}" in err
    code, out, _ = here(command(run, prompt="def ", hook=OTHER), capsys)
    assert code == 0
    assert f"what fires at {OTHER}" in out


def test_an_export_by_itself_needs_only_its_checkpoint(run, checkpoint, capsys):
    folder = run / "sae" / HOOK
    code, _, err = here(command(folder, prompt="def "), capsys)
    assert code == 1
    assert "is not a run: it has no config.json" in err
    code, out, _ = here(command(folder, prompt="def ", checkpoint=checkpoint), capsys)
    assert code == 0
    assert "what fires" in out


BAD = {
    "no prompt": ({"prompt": ""}, 2, "the prompt is empty"),
    "a feature out of range": ({"feature": 64}, 1, f"{HOOK}: no feature 64: this SAE has features 0 to 63"),
    "a negative feature": ({"feature": -1}, 1, "features are numbered from 0"),
    "a strength that is not finite": (
        {"feature": 7, "strength": "inf"},
        2,
        "--strength is (inf,): give finite numbers",
    ),
    "strengths for other features": ({"feature": "1,2", "strength": "1,2,3"}, 2, "3 values for 2 features"),
    "an unknown mode": ({"mode": "push"}, 2, "additive|orthogonal|projection_cap|clamp|scale|ablate"),
    "a prompt beyond the context": ({"prompt": "x" * 4000}, 1, "exceed the model's 4000 positions"),
    "a hook without SAE": ({"hook": OTHER}, 1, f"no SAE at '{OTHER}': choose one of {HOOK}"),
    "no such run": ({"run_dir": "nowhere"}, 1, "nowhere is not a run"),
    "no such checkpoint": ({"checkpoint": "nowhere/d20"}, 1, "no checkpoint at nowhere/d20"),
    "an unknown flag": ({"layer": 3}, 2, "Unknown command line flag 'layer'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_one_line(what, run, capsys):
    settings, expected, complaint = BAD[what]
    code, out, err = here(command(run, **({"prompt": "def ", "feature": 3} | settings)), capsys)
    assert code == expected
    assert complaint in err
    assert "Traceback" not in err
    assert "default" not in out


def test_the_sae_of_another_checkpoint_is_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    tokenizers.save(tokenizers.Tokenizer({bytes([i]): i for i in range(256)}), other / "tokenizer")
    write(other / "d4", tiny("G6", vocab_size=265), "G6")
    code, _, err = here(command(run, prompt="def ", checkpoint=other / "d4"), capsys)
    assert code == 1
    assert "was trained on the checkpoint with sha256" in err


def test_no_jax_is_loaded(run):
    start = "sys.modules['jax'] = None; from experiments import flags, steer; flags.run(steer.SteerConfig, steer.main)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {start}", *command(run, prompt="def ", feature=7)[1:]],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "steered" in done.stdout


# ---- the measurement -----------------------------------------------------------------------------------------------


def test_the_runtime_bench_measures_every_case(tmp_path):
    small = {"depths": 2, "batches": "1,2", "vocab_size": 300, "tokens": 3, "rounds": 2, "k": 4, "device": "cpu"}
    told = [f"--{name}={value}" for name, value in small.items()]
    done = process(["bench", "runtime", *told, f"--out={tmp_path}/new/{{device}}.json"])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert [(r["depth"], r["batch"]) for r in found["results"]] == [(2, 1), (2, 2)]
    assert found["machine"]["threads"] >= 1
    for result in found["results"]:
        assert set(result["ms_per_step"]) == {"bare", "tracked", "tracked, read every token", "additive", "SAELens"}
        assert result["ratio_to_bare"]["bare"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
        assert all(spread["q1"] <= spread["median"] <= spread["q3"] for spread in result["ms_per_step"].values())
    assert "d2, batch 2" in done.stdout


def test_the_bench_knows_what_it_can_measure():
    done = process(["bench", "nothing"])
    assert done.returncode == 2
    assert "'nothing' is not a measurement: choose one of ablations, alarms, " in done.stderr


def test_a_chat_with_a_base_checkpoint_warns(checkpoint, run, tmp_path, capsys):
    code, _, err = here(command(run, prompt="hi", chat=True, max_tokens=2), capsys)
    assert code == 0, err
    assert f"warning: {checkpoint}" in err.replace("\n", "")
    assert "base checkpoint" in err
    assert here(command(run, prompt="hi", max_tokens=2), capsys)[2] == ""
    chat = shutil.copytree(checkpoint.parent, tmp_path / "chatsft_checkpoints" / "all") / checkpoint.name
    assert here(command(run, prompt="hi", chat=True, max_tokens=2, checkpoint=chat), capsys)[2] == ""
