"""Metadata of an export, compared with what stream, evaluation and records really read."""

import json
import sys
import traceback
import typing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sae_lens
import torch

import bridge.activations
import bridge.evaluate.site
import bridge.evaluate.splice
import bridge.explorer.firings
import bridge.nanochat
import bridge.selection
import bridge.settings
import bridge.stream
from bridge import torch_sae
from bridge.neuronpedia import dashboard, sources
from bridge.selection import excluded_ids, kept, recorded_ids
from bridge.training.config import RunConfig
from experiments import evaluate, explore, train

HOOK = "blocks.2.hook_resid_post"
READERS = (bridge.stream, bridge.evaluate.site, bridge.evaluate.splice, bridge.explorer.firings)


class Read(NamedTuple):
    """Tokens of a forward pass, which of them counted, and whether sinks were left out."""

    tokens: np.ndarray
    mask: np.ndarray
    drop_sinks: bool


class Run(NamedTuple):
    """A finished run, and what each module read in it."""

    folder: Path
    config: RunConfig
    reads: dict[str, list[Read]]

    @property
    def metadata(self) -> dict:
        return json.loads((self.folder / "sae" / HOOK / "cfg.json").read_text())["metadata"]


@pytest.fixture(scope="module")
def nano():
    return bridge.nanochat.load("demo")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Chats whose nine special tokens all occur."""
    parts = [{"type": kind, "text": f"{kind} of an answer"} for kind in ("text", "python", "python_output")]
    file = tmp_path_factory.mktemp("text") / "chats.jsonl"
    with file.open("w") as out:
        for i in range(300):
            user = {"role": "user", "content": f"What does function number {i} return, and why? " * 3}
            out.write(json.dumps([user, {"role": "assistant", "content": parts * 3}]) + "\n")
    return file


def callers() -> set[str]:
    """Return the names of the modules that the running code was called from."""
    return {frame.f_globals["__name__"] for frame, _ in traceback.walk_stack(sys._getframe(1))}


@pytest.fixture(scope="module", params=typing.get_args(bridge.settings.ExcludeTokens))
def run(request, chats, tmp_path_factory) -> Run:
    """A run of each choice, explored and evaluated, with a look at every call of `kept`."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    reads: dict[str, list[Read]] = {}
    config = RunConfig(
        data=str(chats),
        exclude_tokens=request.param,
        drop_sinks=request.param == "special",
        num_activations=2050,
        batch_size=500,
        block_size=1000,
        checkpoint_every=1000,
        context_size=64,
        tokens_per_forward=512,
        expansion_factor=1,
        k=(4,),
        heldout_tokens=512,
        output_dir=str(folder),
    )
    with pytest.MonkeyPatch.context() as patch:

        def spy(acts, tokens, excluded, drop_sinks):
            mask = kept(acts, tokens, excluded, drop_sinks)
            for name in callers() & {module.__name__ for module in READERS}:
                reads.setdefault(name, []).append(Read(tokens.numpy().copy(), mask.numpy().copy(), drop_sinks))
            return mask

        patch.setattr(bridge.activations, "kept", spy)
        assert train.main(config) == 0
        explore.main(explore.ExploreConfig(run_dir=str(folder), num_tokens=2000, context_length=32))
        quick = {"heldout_tokens": 512, "probes": False, "labels": False, "plots": False}
        evaluate.main(evaluate.EvaluateConfig(run_dir=str(folder), **quick))
    return Run(folder, config, reads)


def test_the_ids_that_metadata_names_are_those_that_were_left_out_everywhere(run, nano):
    ids = run.metadata["exclude_special_tokens"]
    specials = nano.tokenizer.special_tokens
    assert (
        ids
        == {"bos": [specials["<|bos|>"]], "special": sorted(specials.values()), "nothing": []}[
            run.config.exclude_tokens
        ]
    )
    assert set(run.reads) == {module.__name__ for module in READERS}
    for name, reads in run.reads.items():
        tokens, mask = (np.concatenate([getattr(read, part).ravel() for read in reads]) for part in ("tokens", "mask"))
        assert set(specials.values()) <= set(tokens), name  # all of them were there to be left out
        assert not mask[np.isin(tokens, ids)].any(), name
        assert {read.drop_sinks for read in reads} == {run.metadata["drop_sinks"]} == {run.config.drop_sinks}
        if not run.config.drop_sinks:
            assert mask[~np.isin(tokens, ids)].all(), name
    rule = {"sink_norm_multiple": 10.0, "sink_norm_quantile": 0.9}
    assert {name: run.metadata[name] for name in rule} == (rule if run.config.drop_sinks else dict.fromkeys(rule))


def test_rows_are_as_long_as_metadata_says_and_begin_with_bos_as_every_document_does(run, nano):
    rows = np.concatenate([read.tokens for read in run.reads["bridge.stream"]])
    bos = nano.tokenizer.bos_token_id
    assert rows.shape[1] == run.metadata["context_size"] == 64
    assert run.metadata["prepend_bos"] is True
    assert (rows[:, 0] == bos).all()
    assert run.metadata["sequence_separator_token"] == "bos"
    assert run.metadata["disable_concat_sequences"] is False
    user = nano.tokenizer.special_tokens["<|user_start|>"]
    before = rows[:, :-1][rows[:, 1:] == user]
    assert (before == bos).all()  # a chat begins after BOS, also in the middle of a row
    assert (rows[:, 1:] == bos).any()
    assert run.metadata["seqpos_slice"] == [None]


def test_tokens_data_and_model_are_those_of_the_run(run, nano, chats):
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert run.metadata["training_tokens"] == last["step"] * run.config.batch_size == 2000
    facts = json.loads((run.folder / "config.json").read_text())["facts"]
    assert run.metadata["dataset_path"] == str(chats)
    assert run.metadata["dataset_fingerprint"] == facts["data"]
    assert [name for name, _ in facts["data_files"]] == ["chats.jsonl"]
    assert run.metadata["model_fingerprint"] == nano.fingerprint
    assert run.metadata["hook_name"] == HOOK
    assert run.metadata["hf_hook_name"] == "transformer.h.2"
    assert run.metadata["training_architecture"] == run.config.activation
    sae = torch_sae.load(run.folder / "sae" / HOOK)
    assert sae.cfg["normalize_activations"] == "none"
    assert sae.cfg["apply_b_dec_to_input"] is True


def test_saelens_reads_the_same_metadata(run):
    lens = sae_lens.SAE.load_from_disk(str(run.folder / "sae" / HOOK)).cfg.metadata
    for name in ("exclude_special_tokens", "context_size", "prepend_bos", "drop_sinks", "training_tokens"):
        assert getattr(lens, name) == run.metadata[name]


def test_records_evaluation_and_neuronpedias_files_say_the_same(run, nano):
    ids = run.metadata["exclude_special_tokens"]
    (source,) = sources.of_run(run.folder, sources.Wanted())
    store = source.store()
    assert store.header.settings["excluded"] == ids
    assert store.header.settings["drop_sinks"] == run.config.drop_sinks
    counted = sum(int(read.mask.sum()) for read in run.reads["bridge.explorer.firings"])
    assert store.header.tokens == counted
    setting = json.loads((run.folder / "eval.json").read_text())[HOOK]["setting"]
    assert (setting["excluded"], setting["drop_sinks"]) == (ids, run.config.drop_sinks)
    told = dashboard.settings(store, source.ids, source.about)
    assert told["neuronpedia_zero_out_bos_token"] is (nano.tokenizer.bos_token_id in ids)
    assert told["ignore_high_activation_norm_multiple"] == (10.0 if run.config.drop_sinks else None)


def test_the_words_of_the_flag_are_those_of_the_library():
    assert typing.get_args(bridge.settings.ExcludeTokens) == typing.get_args(bridge.selection.ExcludeTokens)


def test_what_other_exports_say_is_read(nano):
    tokenizer, bos = nano.tokenizer, nano.tokenizer.bos_token_id
    nine = sorted(tokenizer.special_tokens.values())
    assert recorded_ids(None, tokenizer) == recorded_ids({}, tokenizer) == (bos,)
    assert recorded_ids({"exclude_special_tokens": True}, tokenizer) == excluded_ids("special", tokenizer)
    assert recorded_ids({"exclude_special_tokens": False}, tokenizer) == ()
    assert recorded_ids({"exclude_special_tokens": [5, 3]}, tokenizer) == (3, 5)
    ours = {"exclude_special_tokens": nine, "sae_lens_training_version": "jsae"}
    assert recorded_ids(ours, tokenizer) == (bos,)  # of a version that said so and left out BOS alone
    assert recorded_ids(ours | {"drop_sinks": True}, tokenizer) == tuple(nine)
    for wrong in ("all", [1.5], [-1], [True]):
        with pytest.raises(ValueError, match="exclude_special_tokens is"):
            recorded_ids({"exclude_special_tokens": wrong}, tokenizer)


def test_kept_leaves_out_every_id_that_is_excluded():
    tokens = torch.tensor([[0, 1, 2, 3, 2]])
    acts = torch.ones(1, 5, 2)
    assert kept(acts, tokens, (0, 2), False).tolist() == [[False, True, False, True, False]]
    assert kept(acts, tokens, (), False).all()
