"""Crosscoders over checkpoints: the stream, a run from flags to files, single SAEs, and the command that compares."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sae_lens
import stage_files
import torch
from several_processes import Processes
from tiny_nanochat import write

from bridge import torch_sae
from bridge.evaluate import Site
from bridge.hooks import hook_name
from bridge.nanochat.contents import DataChangedError
from bridge.nanochat.tokenizer import Tokenizer
from bridge.run import Run
from bridge.stages import loading
from bridge.stages.names import parse
from bridge.stream import ActivationStream
from bridge.training import train
from experiments import diff
from jsae.settings import ConfigError

HOOK = hook_name(1, "resid_post")
STAGES = ("d4-100", "d4-200", "sft")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return stage_files.write_series(tmp_path_factory.mktemp("nanochat"))


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """A copy of the checkpoints, to be spoilt."""
    return Path(shutil.copytree(root, tmp_path / "nanochat"))


# ---- reading --------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of random tokens; row i depends on i alone."""

    row_len = 16

    def __init__(self):
        self.at = 0

    def next_rows(self, n):
        rows = [np.random.default_rng(self.at + i).integers(1, 50, self.row_len) for i in range(n)]
        self.at += n
        return np.stack(rows).astype(np.int32)

    def position(self):
        return {"at": self.at}

    def seek(self, position):
        self.at = position["at"]


def block(models, sites, rows=64) -> tuple:
    """One block of a stream."""
    filling = ActivationStream(models, Rows(), sites, excluded=(), rows_per_forward=2, drop_sinks=False).fill(rows)
    try:
        while True:
            next(filling)
    except StopIteration as done:
        return done.value


def test_every_checkpoint_reads_the_same_tokens_as_it_would_alone():
    models = [stage_files.model(change, seed) for change, seed in ((0.0, 0), (0.3, 1), (0.1, 2))]
    sites = [[HOOK], [hook_name(2, "mlp"), HOOK]]
    first, second = block(models, sites)
    assert [len(parts) for parts in (first, second)] == [3, 6]
    for i, model in enumerate(models):
        (alone,), both = block(model, sites)
        np.testing.assert_array_equal(first[i], alone)
        for part, expected in zip(second[2 * i : 2 * i + 2], both, strict=True):
            np.testing.assert_array_equal(part, expected)
    assert not np.allclose(first[0], first[1])


def test_a_token_counts_where_it_counts_in_all_checkpoints():
    models = [stage_files.model(0.0, 0), stage_files.model(0.3, 1)]
    with torch.no_grad():  # the last token becomes a sink in the second model only
        for name, weight in models[1].named_parameters():
            if "value_embeds" in name:
                weight[7] *= 1e4
    ids = np.full((1, 16), 3)
    ids[0, 15], ids[0, 2] = 7, 4
    (batch,) = Site(models[0], HOOK, (4,), models=tuple(models)).read([ids])
    alone, other = (next(Site(model, HOOK, (4,)).read([ids])) for model in models)
    assert (~alone.mask).nonzero().tolist() == [[0, 2]]
    assert (~batch.mask).nonzero().tolist() == [[0, 2], [0, 15]]
    torch.testing.assert_close(batch.acts, torch.cat([alone.acts, other.acts], dim=-1))


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(*items: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        loading.load(parse(items))


def test_a_step_that_is_missing_is_named_with_those_that_there_are(root):
    refused(f"{root}/base_checkpoints/d4@100", "150", match=r"d4-150: no step 150 in .*; there are 100, 200")


def test_a_checkpoint_that_does_not_exist_is_named(root):
    refused(f"{root}/base_checkpoints/d4", f"sft={root}/none", match="sft: no checkpoint at")


def test_one_checkpoint_under_two_names_is_refused_and_so_is_a_copy(copy):
    base = f"{copy}/base_checkpoints/d4"
    refused(f"a={base}@200", f"b={base}", match=r"a \(.*@200\) and b .* are the same checkpoint: leave out")
    shutil.copytree(base, copy / "base_checkpoints" / "again")
    refused(f"a={base}", f"b={copy}/base_checkpoints/again", match="are the same checkpoint, copies of one file")


@pytest.mark.parametrize(
    ("size", "called"),
    [
        ({"n_embd": 64}, "width"),
        ({"n_layer": 3}, "number of layers"),
        ({"vocab_size": 4160}, "size of the vocabulary"),
    ],
)
def test_models_of_other_sizes_are_refused_before_their_weights_are_read(size, called, copy):
    write(copy / "base_checkpoints" / "other", stage_files.model(0.0, 0, **size), "G7", 5)
    (copy / "base_checkpoints" / "other" / "model_000005.pt").write_bytes(b"not read")
    items = (f"{copy}/base_checkpoints/d4", f"{copy}/base_checkpoints/other")
    refused(*items, match=rf"the {called} of d4 is \d+, that of other {next(iter(size.values()))}: give")


def test_another_tokenizer_is_refused_and_a_missing_one_is_that_of_the_others(copy, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "deep" / "er" / "d4"
    shutil.copytree(copy / "chatsft_checkpoints" / "d4", moved)
    items = (f"base={copy}/base_checkpoints/d4", f"sft={moved}")
    first, second = loading.load(parse(items))
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    shutil.copytree(copy / "tokenizer", moved / "tokenizer")
    tokens = first.tokenizer._bytes[: -len(first.tokenizer.special_tokens)]
    other = Tokenizer({token: i for i, token in enumerate([*tokens[:-2], tokens[-1], tokens[-2]])})
    monkeypatch.setattr(loading, "load_tokenizer", lambda path: other if "elsewhere" in str(path) else first.tokenizer)
    refused(*items, match=r"sft has another tokenizer .* than base")


def test_a_stage_that_seems_to_be_of_another_training_is_pointed_out(copy, capsys):
    other = stage_files.model(0.0, 0)
    other.init_weights(torch.Generator().manual_seed(5))
    with torch.no_grad():
        for weight in other.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    write(copy / "chatsft_checkpoints" / "other", other, "G7", 5)
    loading.load(parse((f"base={copy}/base_checkpoints/d4", f"sft={copy}/chatsft_checkpoints/d4")))
    assert capsys.readouterr().err == ""
    loading.load(parse((f"base={copy}/base_checkpoints/d4", f"sft={copy}/chatsft_checkpoints/other")))
    assert "note: base and sft are as different as two trainings from other seeds" in capsys.readouterr().err


# ---- a run ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "layer": "1",
    "activation": "batchtopk",
    "k": 6,
    "expansion_factor": 4,
    "exclusive_latents": 8,
    "num_activations": 40_960,
    "batch_size": 512,
    "block_size": 4096,
    "context_size": 32,
    "heldout_tokens": 4000,
    "checkpoint_every": 20_480,
    "learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def run(root, tmp_path_factory) -> Run:
    text = tmp_path_factory.mktemp("text")
    for number, file in enumerate(sorted(Path(json.__file__).parents[1].glob("*.py"))[:30]):
        shutil.copy(file, text / f"{number}.txt")
    folder = tmp_path_factory.mktemp("runs") / "stages"
    return train(checkpoints=stage_files.flag(root), data=f"{text}/*.txt", output_dir=str(folder), **SETTINGS)


def test_one_code_explains_all_checkpoints_and_the_export_names_them(run, root):
    assert list(run.exports) == [HOOK]
    sae = run.sae()
    assert (sae.layers, sae.d_in, sae.d_sae) == (3, 3 * stage_files.WIDTH, 4 * stage_files.WIDTH)
    record = sae.metadata["checkpoints"]
    assert [(entry["name"], entry["step"]) for entry in record] == list(zip(STAGES, (100, 200, None), strict=True))
    assert sae.metadata["hook_names"] == [HOOK] * 3
    assert sae.metadata["exclusive_latents"] == 8
    assert run.facts["checkpoints"] == record
    assert 0 < run.evaluation[HOOK]["fvu"] < 0.6
    dedicated = sae.W_dec.reshape(-1, 3, stage_files.WIDTH).norm(dim=2)[:24].reshape(3, 8, 3)
    for stage in range(3):
        assert (dedicated[stage].argmax(1) == stage).all()
        assert (dedicated[stage].sort(dim=1).values[:, :2] == 0).all()


def test_every_checkpoint_has_an_sae_that_saelens_reads(run):
    crosscoder = run.sae()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, stage_files.WIDTH)).astype(np.float32)) * 3
    for name in STAGES:
        folder = run.stage_folder(name, HOOK)
        theirs, ours = sae_lens.SAE.load_from_disk(str(folder)), torch_sae.load(folder)
        assert theirs.cfg.metadata.hook_name == HOOK
        assert ours.metadata["checkpoint"]["name"] == name
        assert ours.d_sae == crosscoder.d_sae
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)


def test_the_command_says_what_became_of_every_latent(run, capsys):
    diff.main(diff.DiffConfig(run_dir=str(run.path), heldout_tokens=4000))
    shown = capsys.readouterr().out
    table = json.loads(run.table_file("stages").read_text())[HOOK]
    assert [stage["name"] for stage in table["checkpoints"]] == list(STAGES)
    assert len(table["kinds"]) == len(table["latents"]["density"]) == 4 * stage_files.WIDTH
    assert np.shape(table["latents"]["strength"]) == (4 * stage_files.WIDTH, 3)
    assert all(0 < stage["fvu"] < 0.6 for stage in table["checkpoints"])
    for stage in table["checkpoints"]:  # it sees one, not three
        assert 0.95 * stage["fvu"] < stage["own_sae_fvu"] < 1.3 * stage["fvu"] + 0.02
        assert stage["own_sae_l0"] == pytest.approx(6, abs=2)
    assert {event["stage"] for event in table["events"]} <= set(STAGES[1:])
    for name in STAGES:
        assert name in shown
    assert f"{table['summary']['shared']} shared" in shown


def test_a_checkpoint_that_changed_since_is_refused(run, root):
    file = root / "chatsft_checkpoints" / "d4" / "model_000050.pt"
    kept = file.read_bytes()
    try:
        write(file.parent, stage_files.model(0.5, 9), "G7", 50)
        with pytest.raises(ConfigError, match=r"checkpoint sft at .* has other weights than the crosscoder"):
            diff.main(diff.DiffConfig(run_dir=str(run.path)))
    finally:
        file.write_bytes(kept)


def test_one_model_in_memory_gives_the_same_bits_and_the_same_comparison(run, root, tmp_path, capsys):
    data, checkpoints = run.flags["data"], stage_files.flag(root)
    again = train(
        checkpoints=checkpoints, data=data, output_dir=str(tmp_path / "one"), models_in_memory="one", **SETTINGS
    )
    for name in ("W_enc", "W_dec", "b_dec", "b_enc", "threshold"):
        torch.testing.assert_close(getattr(again.sae(), name), getattr(run.sae(), name), rtol=0, atol=0)
    diff.main(diff.DiffConfig(run_dir=str(run.path), heldout_tokens=4000))
    expected = run.table_file("stages").read_text()
    diff.main(diff.DiffConfig(run_dir=str(run.path), heldout_tokens=4000, models_in_memory="one"))
    assert run.table_file("stages").read_text() == expected


def test_models_in_turn_share_their_memory_and_notice_changed_files(copy):
    nanos = loading.load(parse(stage_files.flag(copy)), in_memory="one")
    assert len({id(nano.model) for nano in nanos}) == 1
    models = loading.models(nanos)
    alone = loading.load(parse(stage_files.flag(copy)))
    for _ in range(2):
        for model, nano in zip(models, alone, strict=True):
            for mine, other in zip(model.parameters(), nano.model.parameters(), strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=0)
    write(copy / "chatsft_checkpoints" / "d4", stage_files.model(0.5, 9), "G7", 50)
    with pytest.raises(DataChangedError, match=r"model_000050\.pt has changed since"):
        list(models)


def test_models_that_cannot_share_their_memory_are_refused(copy):
    meta = copy / "chatsft_checkpoints" / "d4" / "meta_000050.json"
    values = json.loads(meta.read_text())
    values["model_config"]["sequence_len"] //= 2
    meta.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"d4-100 and sft differ in sequence_len .*take --models_in_memory=all"):
        loading.load(parse(stage_files.flag(copy)), in_memory="one")


@pytest.mark.parametrize("architecture", ["topk", "matryoshka", "relu", "gated", "jumprelu"])
def test_crosscoders_of_every_architecture_read_checkpoints(architecture, run, root, tmp_path):
    few = SETTINGS | {"activation": architecture, "num_activations": 8192, "checkpoint_every": 8192}
    few |= {"exclusive_latents": 4, "heldout_tokens": 1000}
    if architecture in ("relu", "gated", "jumprelu"):
        del few["k"]
    made = train(checkpoints=stage_files.flag(root), data=run.flags["data"], output_dir=str(tmp_path / "run"), **few)
    diff.main(diff.DiffConfig(run_dir=str(made.path), heldout_tokens=1000))
    table = json.loads(made.table_file("stages").read_text())[HOOK]
    crosscoder = made.sae()
    x = torch.randn(50, stage_files.WIDTH, generator=torch.Generator().manual_seed(0)) * 3
    for stage in table["checkpoints"]:
        folder = made.stage_folder(stage["name"], HOOK)
        theirs, ours = sae_lens.SAE.load_from_disk(str(folder)), torch_sae.load(folder)
        assert ours.architecture == crosscoder.architecture
        with torch.no_grad():
            torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
        assert stage["own_sae_fvu"] < 1.3 * stage["fvu"] + 0.1


def test_two_processes_train_as_one_does(run, root, tmp_path):
    words = [f"--{name}={value}" for name, value in SETTINGS.items()]
    words += [f"--checkpoints={','.join(stage_files.flag(root))}", f"--data={run.flags['data']}"]
    with Processes(["-m", "experiments.train", *words, f"--output_dir={tmp_path / 'two'}"], 2) as processes:
        results = processes.finish(400)
    assert [code for code, *_ in results] == [0, 0], results
    ours, theirs = Run(tmp_path / "two"), run
    for name in ("W_enc", "W_dec", "threshold"):
        mine, other = getattr(ours.sae(), name), getattr(theirs.sae(), name)
        assert torch.linalg.norm(mine - other) / torch.linalg.norm(other) < 1e-2, name
    for stage in STAGES:
        assert (ours.stage_folder(stage, HOOK) / "sae_weights.safetensors").is_file()


def test_a_run_without_checkpoints_is_refused(tmp_path, run):
    other = shutil.copytree(run.path, tmp_path / "run")
    cfg = other / "sae" / HOOK / "cfg.json"
    values = json.loads(cfg.read_text())
    del values["metadata"]["checkpoints"]
    cfg.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="does not name the checkpoints that it reads"):
        diff.main(diff.DiffConfig(run_dir=str(other)))


def test_a_resumed_run_gives_the_same_bits(run, root, tmp_path):
    data = run.flags["data"]
    again = train(checkpoints=stage_files.flag(root), data=data, output_dir=str(tmp_path / "again"), **SETTINGS)
    shutil.rmtree(max((again.path / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdecimal() else -1))
    train(checkpoints=stage_files.flag(root), data=data, output_dir=str(again.path), resume=True, **SETTINGS)
    for name in ("W_enc", "W_dec", "b_dec", "b_enc", "threshold"):
        torch.testing.assert_close(getattr(again.sae(), name), getattr(run.sae(), name), rtol=0, atol=0)


# ---- the cheap way --------------------------------------------------------------------------------------------------


def test_latents_survive_from_an_sae_to_the_one_that_continues_it(run, root, tmp_path, capsys):
    settings = {
        name: value for name, value in SETTINGS.items() if name not in ("exclusive_latents", "expansion_factor")
    }
    settings |= {"data": run.flags["data"], "checkpoint": f"{root}/base_checkpoints/d4"}
    train(step=100, output_dir=str(tmp_path / "a"), expansion_factor=2, **settings)
    short = settings | {"num_activations": 4096, "checkpoint_every": 4096, "learning_rate": 1e-3}
    train(step=200, output_dir=str(tmp_path / "b"), init_from=str(tmp_path / "a"), **short)
    report = tmp_path / "survival.json"
    diff.main(diff.DiffConfig(saes=(str(tmp_path / "a"), str(tmp_path / "b")), output_file=str(report)))
    (step,) = json.loads(report.read_text())["steps"]
    assert step["survived"] > 0.5 * step["alive"] > 0
    assert step["kept_index"] > 0.9 * step["survived"]  # the one was the other's start
    assert f"{step['survived']:,}" in capsys.readouterr().out
