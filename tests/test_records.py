"""Records: every statistic against a plain computation, on toy text and on the demo; untrusted stores."""

import dataclasses
import functools
import json
import resource
import shutil
from pathlib import Path

import explorer_toy as toy
import numpy as np
import pytest
import torch
from tiny_nanochat import tiny, tokens
from toy_saes import FORMS, export, toy_sae

import bridge.nanochat
from bridge.explorer import firings, gather, weights
from bridge.hooks import capture, edit, hook_name
from bridge.nanochat.config import GENERATIONS
from jsae.records import recorder as records
from jsae.records.correlation import Moments, correlations
from jsae.records.recorder import Recorder, Settings, distinct_rows, interval, window_hashes
from jsae.records.spill import Spill
from jsae.records.store import COLUMNS, NON_ACTIVATING, TOP, VERSION, Activations, Store, StoreError, Texts, digest
from jsae.settings import ConfigError

SETTINGS = Settings(
    top=toy.EACH,
    per_interval=toy.EACH,
    non_activating=toy.EACH,
    window=toy.LENGTH,
    bins=toy.BINS,
    nearest=toy.NEAREST,
    together_sample=10**6,
)
WITHOUT_CHANCE = ("count", "max", "mean", "hist_range", "hist", "group_share", "together", "together_share")


def moments(acts: np.ndarray) -> Moments:
    """Of latents with nothing in particular; where it is not what is looked at."""
    f = acts.shape[-1]
    return Moments(acts[..., 0].size, np.zeros(3), np.ones(3), np.full(3, 2.0), np.zeros((f, 3)))


def fill(recorder: Recorder, acts: np.ndarray, counted: np.ndarray, batch: int = 7) -> None:
    """Add dense activations (R, T, f), some rows at a time, as sparse codes of the tokens that count."""
    length = acts.shape[1]
    for first in range(0, len(acts), batch):
        cells = np.flatnonzero(counted[first : first + batch]) + first * length
        dense = acts.reshape(-1, acts.shape[-1])[cells]
        token, latent = dense.nonzero()
        recorder.add(cells, np.bincount(token, minlength=len(cells)), latent, dense[token, latent])


def gathered(
    folder: Path, text: np.ndarray, acts: np.ndarray, settings: Settings = SETTINGS, counted: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return the columns of dense activations."""
    folder.mkdir()
    recorder = Recorder(folder, text, acts.shape[-1], settings)
    fill(recorder, acts, text != toy.ID["<|bos|>"] if counted is None else counted)
    return recorder.finish(moments(acts))


def examples(columns: dict[str, np.ndarray], latent: int) -> list[tuple]:
    """(group, row, position, value, positions, values) of a latent's examples."""
    found = []
    for e in range(*columns["example_offsets"][latent : latent + 2]):
        part = slice(*columns["activation_offsets"][e : e + 2])
        fired = columns["activation_position"][part].tolist(), columns["activation_value"][part].tolist()
        heads = (columns[f"example_{name}"][e].item() for name in ("group", "row", "position", "value"))
        found.append((*heads, *fired))
    return found


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Text and activations of six latents of all densities, values with ties, BOS here and there."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 17, (30, 9)).astype(np.uint16)
    text[:, 0] = toy.ID["<|bos|>"]
    text[rng.integers(0, 30, 5), rng.integers(1, 9, 5)] = toy.ID["<|bos|>"]
    density = np.array([0, 0.01, 0.1, 0.5, 0.9, 1.0])
    values = rng.integers(1, 50, (30, 9, 6)) / 8 * 3.0 ** rng.integers(-9, 9, 6)
    acts = np.where(rng.random((30, 9, 6)) < density, values, 0).astype(np.float32)
    acts[text == toy.ID["<|bos|>"]] = 0
    return text, acts


def plain(text: np.ndarray, acts: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Return the toy's plain statistics of other activations."""
    monkeypatch.setattr(toy, "D_SAE", acts.shape[-1])
    return toy.columns(text, acts)


@pytest.mark.parametrize("case", ["toy", 0, 1, 2, 3])
def test_counts_equal_plain_counting(case, tmp_path, monkeypatch):
    text, acts = (toy.tokens(), toy.activations(toy.tokens())) if case == "toy" else random_case(case)
    found, expected = gathered(tmp_path / "a", text, acts), plain(text, acts, monkeypatch)
    for name in WITHOUT_CHANCE:
        assert found[name].shape == np.shape(expected[name]), name
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)
    for latent in range(acts.shape[-1]):
        ours, theirs = examples(found, latent), examples(expected, latent)
        assert [e for e in ours if e[0] == TOP] == [e for e in theirs if e[0] == TOP]
        assert [e[0] for e in ours] == [e[0] for e in theirs]  # as many of every group


@pytest.mark.parametrize("seed", [4, 5])
def test_examples_are_of_their_group_and_say_all_that_fires_in_their_row(seed, tmp_path):
    text, acts = random_case(seed)
    found = gathered(tmp_path / "a", text, acts)
    for latent in range(6):
        strongest = acts[..., latent].max(1)
        own = examples(found, latent)
        assert len({row for _, row, *_ in own}) == len(own)
        for group, row, position, value, positions, values in own:
            fires = np.flatnonzero(acts[row, :, latent])
            assert positions == fires.tolist()
            assert values == acts[row, fires, latent].tolist()
            assert value == strongest[row] == acts[row, position, latent]
            assert text[row, position] != toy.ID["<|bos|>"]
            if group == NON_ACTIVATING:
                assert value == 0
            else:
                assert position == acts[row, :, latent].argmax()
            if 0 < group < NON_ACTIVATING:
                assert toy._interval(value, strongest.max()) == group
        for group in range(7):  # the strongest first
            values = [e[3] for e in own if e[0] == group]
            assert values == sorted(values, reverse=True)


def test_samples_depend_only_on_the_seed(tmp_path, monkeypatch):
    text, acts = random_case(6)
    first = gathered(tmp_path / "a", text, acts)
    monkeypatch.setattr(records, "Spill", functools.partial(Spill, piece=5))
    blocks = Spill.blocks
    monkeypatch.setattr(Spill, "blocks", lambda self: blocks(self, limit=3))
    in_pieces = gathered(tmp_path / "b", text, acts)
    other = gathered(tmp_path / "c", text, acts, dataclasses.replace(SETTINGS, seed=1))
    for name, column in first.items():
        np.testing.assert_array_equal(column, in_pieces[name], err_msg=name)
    assert not np.array_equal(first["example_row"], other["example_row"])


def test_a_sample_of_its_tokens_tells_who_fires_with_a_latent(tmp_path):
    text = np.ones((100, 20), np.uint16)
    acts = np.zeros((100, 20, 4), np.float32)
    acts[..., 0] = 1  # always
    acts[::2, :, 1] = 1  # on half of it, and this one with it on a half of that
    acts[::2, ::2, 2] = 1
    acts[3, 3, 3] = 1
    settings = dataclasses.replace(SETTINGS, together_sample=500)
    found = gathered(tmp_path / "a", text, acts, settings, np.ones(text.shape, bool))
    assert found["together"][2].tolist() == [1, 2, 2, 2]  # what fires always fires here no more than elsewhere
    assert found["together_share"][2, 0] == 1
    assert found["together"][1, 0] == 2
    assert abs(found["together_share"][1, 0] - 0.5) < 0.07
    assert np.isnan(found["together_share"][0]).all()
    assert found["together"][3].tolist() == [3, 3, 3, 3]


def test_texts_that_look_the_same_are_shown_once(tmp_path):
    text = np.random.default_rng(0).integers(0, 500, (6, 9)).astype(np.uint16)
    text[1, 2:7] = text[0, 2:7]  # the same two tokens around the one that fires
    text[2, 1:6] = text[0, 2:7]  # and also elsewhere in the row
    acts = np.zeros((6, 9, 1), np.float32)
    acts[[0, 1, 2, 3], [4, 4, 3, 4], 0] = [1, 3, 2, 0.5]
    settings = dataclasses.replace(SETTINGS, window=2, top=4)
    found = gathered(tmp_path / "a", text, acts, settings, np.ones(text.shape, bool))
    assert [(group, row) for group, row, *_ in examples(found, 0) if group < NON_ACTIVATING] == [(0, 1), (0, 3)]
    assert found["count"] == [4]
    hashes = window_hashes(text, 2)
    assert hashes[0, 4] == hashes[1, 4] == hashes[2, 3]
    assert len(np.unique(hashes)) == hashes.size - 2


def test_a_latent_that_fires_everywhere_has_no_text_without_it(tmp_path):
    text = np.random.default_rng(0).integers(0, 500, (9, 5)).astype(np.uint16)
    found = gathered(tmp_path / "a", text, np.ones((9, 5, 1), np.float32), counted=np.ones(text.shape, bool))
    groups = found["example_group"].tolist()
    assert groups == [0, 0, 0, 1, 1, 1]
    assert found["count"] == [45]
    assert found["group_share"].tolist() == [[1, 1, 0, 0, 0, 0]]
    assert found["hist"].sum() == 45
    assert found["hist_range"].tolist() == [[1, 1]]


def test_dead_latents_alone_make_a_store(tmp_path):
    store = Store(toy.write_store(tmp_path))
    text = store.texts.tokens
    found = gathered(tmp_path / "a", text, np.zeros((*text.shape, toy.D_SAE), np.float32))
    kept = {name: np.array(store[name]) for name in COLUMNS if name not in found}
    folder = store.path.parent / "dead"
    Store.write(folder, store.header, kept | found)
    dead = Store(folder)
    assert all(dead[name] is not None for name in COLUMNS)
    assert dead["count"].sum() == len(dead["example_row"]) == 0


def test_fifths_hold_their_lower_edge_and_the_uppermost_its_upper_one_too():
    values = np.array([0.1, 1.99, 2, 4, 6, 7.99, 8, 10], np.float32)
    assert interval(values, 10.0).tolist() == [5, 5, 4, 3, 2, 2, 1, 1]


def test_repeated_rows_are_dropped_in_order():
    rows = np.array([[3, 4], [1, 2], [3, 4], [4, 3], [1, 2]], np.uint16)
    assert distinct_rows(rows).tolist() == [[3, 4], [1, 2], [4, 3]]


def test_invalid_codes_are_refused(tmp_path):
    def add(cells=(1, 2), lengths=(1, 0), latents=(0,), values=(1.0,)) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        spill = Spill(folder, 4, 3)
        try:
            spill.add(*map(np.array, (cells, lengths, latents)), np.array(values, np.float32))
        finally:
            spill.close()

    add()
    for wrong, complaint in (
        ({"cells": (2, 1)}, "must ascend from 0"),
        ({"cells": (3, 4)}, "below 4"),
        ({"latents": (3,)}, "0 to 2"),
        ({"latents": (-1,)}, "0 to 2"),
        ({"values": (0.0,)}, "above 0"),
        ({"values": (np.inf,)}, "finite"),
        ({"values": (np.nan,)}, "finite"),
    ):
        with pytest.raises(ValueError, match=complaint):
            add(**wrong)
    with pytest.raises(ConfigError, match="top is 0"):
        Settings(top=0)
    (tmp_path / "none").mkdir()
    recorder = Recorder(tmp_path / "none", np.ones((2, 3), np.uint16), 4, SETTINGS)
    with pytest.raises(ConfigError, match="no token of this text is counted"):
        recorder.finish(moments(np.zeros((2, 3, 4))))


def test_correlation_is_numpys_also_far_from_zero():
    rng = np.random.default_rng(0)
    latents = np.maximum(rng.standard_normal((400, 5)), 0)
    latents[:, 4] = 0
    stream = rng.standard_normal((400, 6)) + latents @ rng.standard_normal((5, 6)) + 1e4 * rng.standard_normal(6)
    stream[:, 5] = 7.0
    shift = stream[:50].mean(0)
    shifted = stream - shift
    sums = Moments(400, shift, shifted.sum(0), (shifted**2).sum(0), latents.T @ shifted)
    found = correlations(sums, latents.sum(0), (latents**2).sum(0))
    pearson = np.corrcoef(latents[:, :4].T, stream[:, :5].T)[:4, 4:]
    cosine = latents.T @ stream / np.linalg.norm(latents[:, :4], axis=0).max()
    order = np.argsort(-pearson, axis=1)[:, :3]
    assert found["correlated_channels"][:4].tolist() == order.tolist()
    np.testing.assert_allclose(found["channel_pearson"][:4], np.take_along_axis(pearson, order, 1), atol=1e-6)
    lengths = np.linalg.norm(latents[:, :4], axis=0)[:, None] * np.linalg.norm(stream, axis=0)
    cosine = np.take_along_axis(latents[:, :4].T @ stream / lengths, order, 1)
    np.testing.assert_allclose(found["channel_cosine"][:4], cosine, atol=1e-6)
    assert np.isnan(found["channel_pearson"][4]).all()  # a dead latent
    assert found["correlated_channels"][4].tolist() == [0, 0, 0]


# ---- what the weights say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_direct_path_is_the_derivative_of_the_last_residual(generation):
    model = tiny(generation).double()
    ids = tokens(8)
    for layer in range(4):
        for site in ("attn", "mlp", "resid_post"):
            silent = {hook_name(later, s): torch.zeros_like for later in range(layer + 1, 4) for s in ("attn", "mlp")}
            if site == "attn":
                silent[hook_name(layer, "mlp")] = torch.zeros_like
            push = torch.zeros(32, dtype=torch.float64)
            push[3] = 1e-3
            hook = hook_name(layer, site)
            up, down = (_last_residual(model, ids, {**silent, hook: by.__add__}) for by in (push, -push))
            factor = weights.direct_path(model, hook)
            expected = torch.zeros_like(up)
            expected[..., 3] = factor
            torch.testing.assert_close((up - down) / 2e-3, expected, rtol=1e-6, atol=1e-6)
            if generation == "G0":
                assert factor == 1


def _last_residual(model, ids, edits) -> torch.Tensor:
    """Return the input of the final norm."""
    seen = []
    blocks = model._blocks
    model._blocks = lambda *args: seen.append(blocks(*args)) or seen[-1]
    try:
        with edit(model, edits):
            model(ids)
    finally:
        del model._blocks
    return seen[-1]


@pytest.mark.parametrize("d_sae", [3, 40])
def test_logits_neighbours_and_channels_are_those_of_the_weights(d_sae, monkeypatch):
    model, hook = tiny("G7"), "blocks.1.hook_resid_post"
    sae = toy_sae("topk", 32, d_sae, k=2)
    monkeypatch.setattr(weights, "_MOST_NUMBERS", 170)  # in blocks of a few latents
    found = weights.columns(model, hook, sae, nearest=5, bins=50)
    W_dec = sae.W_dec.double().numpy()
    logits = weights.direct_path(model, hook) * W_dec @ model.lm_head.weight[:50].double().numpy().T
    order = np.argsort(-logits, axis=1)
    assert found["top_logits"].tolist() == order[:, :20].tolist()
    assert found["bottom_logits"].tolist() == order[:, ::-1][:, :20].tolist()
    np.testing.assert_allclose(found["top_logit_values"], np.take_along_axis(logits, order[:, :20], 1), rtol=1e-4)
    np.testing.assert_allclose(found["logit_range"], np.stack([logits.min(1), logits.max(1)], 1), rtol=1e-4)
    heights = [np.histogram(row, 50)[0].tolist() for row in logits]
    assert found["logit_hist"].tolist() == heights
    cosines = W_dec @ W_dec.T
    np.fill_diagonal(cosines, -2)
    near = np.argsort(-cosines, axis=1)[:, : min(5, d_sae - 1)]
    assert found["neighbours"][:, : near.shape[1]].tolist() == near.tolist()
    np.testing.assert_allclose(
        found["neighbour_cosines"][:, : near.shape[1]], np.take_along_axis(cosines, near, 1), atol=1e-6
    )
    assert np.isnan(found["neighbour_cosines"][:, near.shape[1] :]).all()
    assert (found["neighbours"][:, near.shape[1] :] == np.arange(d_sae)[:, None]).all()
    channels = np.argsort(-W_dec, axis=1)[:, :3]
    assert found["channels"].tolist() == channels.tolist()
    entries = np.take_along_axis(W_dec, channels, 1)
    np.testing.assert_allclose(found["channel_values"], entries, rtol=1e-5)
    np.testing.assert_allclose(found["channel_shares"], abs(entries) / abs(W_dec).sum(1)[:, None], rtol=1e-5)


@pytest.mark.parametrize("sums", [firings._sparse_sums, firings._dense_sums])
def test_the_sum_over_the_firings_of_a_latent_is_the_same_on_a_processor_and_a_gpu(sums):
    random = torch.Generator().manual_seed(0)
    latents, x = torch.randn(60, 40, generator=random).relu(), torch.randn(60, 16, generator=random)
    latents[:, 7] = 0
    token, latent = latents.nonzero(as_tuple=True)
    torch.testing.assert_close(sums(token, latent, latents[token, latent], x, 40), latents.T @ x)
    nothing = token[:0]
    assert not sums(nothing, nothing, x[0, :0], x, 40).any()


@pytest.mark.parametrize("form", FORMS)
def test_recorded_codes_are_those_of_the_sae(form):
    sae = toy_sae(form, 16, 40, k=5)
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((50, 16))).float()
    token, latent, value = firings.codes(sae, x)
    dense = torch.zeros(50, 40)
    dense[token, latent] = value
    assert torch.equal(dense, sae.encode(x).clamp(min=0))  # of AbsTopK the positive side
    assert (value > 0).all()
    assert (token.diff() >= 0).all()
    wide = toy_sae("topk", 16, 8, k=8)
    assert len(firings.codes(wide, x)[0]) == int((wide.encode(x) > 0).sum())


# ---- the whole, on the demo ----------------------------------------------------------------------------------------

HOOKS = ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def nano():
    return bridge.nanochat.load("demo")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Files that are quick to read, one of them twice."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        shutil.copy(path, folder)
    shutil.copy(folder / "decoder.py", folder / "again.py")
    return f"{folder}/*.py"


@pytest.fixture(scope="module")
def parts(nano, text, tmp_path_factory):
    """SAEs of two hooks and two forms, their digests, and a plan."""
    folder = tmp_path_factory.mktemp("sae")
    saes = {
        hook: toy_sae(form, nano.config.n_embd, 64, i, hook_name=hook)
        for i, (hook, form) in enumerate(zip(HOOKS, ("standard", "topk"), strict=True))
    }
    digests = {hook: digest(export(sae, folder / hook)) for hook, sae in saes.items()}
    return (
        saes,
        digests,
        gather.Plan(
            text, "all", 20_000, 64, True, True, Settings(top=5, nearest=6), excluded=(nano.tokenizer.bos_token_id,)
        ),
    )


@pytest.fixture(scope="module")
def folder(nano, parts, tmp_path_factory) -> Path:
    """Records of them."""
    folder = tmp_path_factory.mktemp("run") / "explorer" / "records"
    gather.gather(nano, *parts[:2], folder, parts[2])
    return folder


def test_records_of_the_demo_match_its_activations(nano, parts, folder):
    saes, digests, plan = parts
    texts = Texts(folder / "texts")
    ids = torch.from_numpy(texts.tokens.astype(np.int64))
    with torch.no_grad(), capture(nano.model, HOOKS) as acts:
        nano.model(ids)
    counted = (ids != nano.tokenizer.bos_token_id).flatten()
    for hook, sae in saes.items():
        store = Store(folder / hook, digests[hook])
        x = acts[hook].flatten(0, 1)
        latents = torch.where(counted[:, None], sae.encode(x), 0).numpy()
        assert store.header.tokens == int(counted.sum())
        np.testing.assert_array_equal(store["count"], (latents > 0).sum(0))
        np.testing.assert_allclose(store["max"], latents.max(0), rtol=1e-4)
        used = np.flatnonzero(store["count"] > 50)
        i = int(used[0])
        cells, values = store.all.activations_of_latent(i)
        np.testing.assert_array_equal(cells, np.flatnonzero(latents[:, i]))
        np.testing.assert_allclose(values, latents[cells, i], rtol=2e-3)
        pearson = np.corrcoef(latents[counted.numpy(), i], x[counted].numpy().T)[0, 1:]
        np.testing.assert_allclose(store["channel_pearson"][i], np.sort(pearson)[::-1][:3], atol=1e-4)
        assert {store.path.name, store.header.hook} == {hook}
        assert store.header.settings["num_tokens"] == plan.num_tokens
        for name in COLUMNS:
            assert store[name].dtype == COLUMNS[name][0]


def test_the_same_run_gives_the_same_records(nano, parts, folder, tmp_path):
    gather.gather(nano, *parts[:2], tmp_path / "records", parts[2])
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "records") for p in (tmp_path / "records").rglob("*") if p.is_file()
    )
    assert all((folder / file).read_bytes() == (tmp_path / "records" / file).read_bytes() for file in files)


def test_texts_are_the_rows_each_once_and_the_vocabulary_as_bytes(nano, parts, folder):
    texts = Texts(folder / "texts")
    assert texts.header.row_length == 64
    assert texts.header.fingerprint == nano.fingerprint
    assert len(np.unique(texts.tokens, axis=0)) == texts.header.rows
    assert (texts.tokens[:, 0] == nano.tokenizer.bos_token_id).all()
    assert "".join(texts.spell(texts.tokens[3].tolist())) == nano.tokenizer.decode(texts.tokens[3].tolist())
    assert texts.vocabulary == [nano.tokenizer.token_bytes_of(i) for i in range(nano.config.vocab_size)]


def test_records_that_fit_are_distinguished_from_those_that_do_not(nano, parts, folder, tmp_path):
    saes, digests, plan = parts

    def why(digests=digests, **other) -> str | None:
        return gather.mismatch(folder, digests, nano, dataclasses.replace(plan, **other))

    assert why() is None
    assert why(keep_activations=False) is None
    assert "num_tokens was 20000" in why(num_tokens=30_000)
    assert "seed was 0" in why(records=Settings(top=5, nearest=6, seed=3))
    assert "trained again" in why(dict.fromkeys(HOOKS, "0" * 64))
    assert "does not hold the records of every SAE" in why(digests | {"blocks.3.hook_mlp_out": "0" * 64})
    without = tmp_path / "explorer" / "records"
    gather.gather(nano, saes, digests, without, dataclasses.replace(plan, keep_activations=False, num_tokens=64))
    assert not (without / HOOKS[0] / "all").exists()
    lean = dataclasses.replace(plan, num_tokens=64)
    assert gather.mismatch(without, digests, nano, dataclasses.replace(lean, keep_activations=False)) is None
    assert gather.mismatch(without, digests, nano, lean) is not None


@pytest.mark.parametrize("stage", ["running the model", "counting"])
def test_an_interrupted_gathering_leaves_earlier_records(stage, nano, parts, folder, tmp_path):
    saes, digests, plan = parts
    there = tmp_path / "records"
    shutil.copytree(folder, there)
    before = {path: path.read_bytes() for path in there.rglob("*.json")}
    (tmp_path / "records.partial" / "texts").mkdir(parents=True)  # of a process that was killed

    def interrupt(what: str, share: float) -> None:
        if what.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather.gather(nano, saes, digests, there, plan, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["records"]
    assert {path: path.read_bytes() for path in there.rglob("*.json")} == before
    shutil.rmtree(there)
    with pytest.raises(KeyboardInterrupt):
        gather.gather(nano, saes, digests, there, plan, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_turned_direct_path_is_warned_of_and_turns_the_logits(nano, parts, tmp_path, monkeypatch):
    saes, digests, plan = parts
    plan = dataclasses.replace(plan, num_tokens=64)
    gather.gather(nano, saes, digests, tmp_path / "a", plan)
    right = weights.direct_path(nano.model, HOOKS[1])
    monkeypatch.setattr(weights, "direct_path", lambda model, hook: -right)
    with pytest.warns(UserWarning, match="direct path to the logits by -"):
        gather.gather(nano, saes, digests, tmp_path / "b", plan)
    up, down = (Store(tmp_path / name / HOOKS[1]) for name in "ab")
    assert down.header.direct_path == -right
    np.testing.assert_array_equal(up["top_logits"], down["bottom_logits"])


def test_rows_and_vocabularies_that_do_not_fit_are_refused(nano, parts, tmp_path):
    saes, digests, plan = parts

    def refused(nano=nano, **other) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            gather.gather(nano, saes, digests, tmp_path / "records", dataclasses.replace(plan, **other))
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    assert "this model takes 2 to 5120" in refused(context_length=6000)
    assert "this model takes 2 to 5120" in refused(context_length=1)
    assert "nowhere" in refused(data="nowhere/*.txt")
    large = dataclasses.replace(nano, config=dataclasses.replace(nano.config, vocab_size=65_537))
    assert "up to 65536" in refused(large)


def test_activations_that_are_not_finite_are_refused(nano, parts, tmp_path):
    saes, digests, plan = parts
    with (
        edit(nano.model, {"blocks.0.hook_mlp_out": lambda x: x * torch.nan}),
        pytest.raises(FloatingPointError, match="not finite"),
    ):
        gather.gather(nano, saes, digests, tmp_path / "records", plan)


# ---- stores that are not to be trusted ------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> Path:
    return toy.write_store(tmp_path)


def test_a_store_reads_its_own_files(store):
    opened = Store(store, digest(store.parents[2] / "sae" / toy.HOOK))
    assert opened.texts.words[toy.ID["é0"]] == "\N{REPLACEMENT CHARACTER}"
    assert opened.texts.spell([toy.ID["é0"], toy.ID["é1"], toy.ID[""], toy.ID["é0"]]) == ["", "é", "", "\ufffd"]
    assert opened.texts.spell([]) == []
    example = opened.examples(toy.ONCE)[0]
    assert [x.tolist() for x in opened.activations(example)] == [[9], [opened["max"][toy.ONCE]]]
    cells, values = opened.all.activations_of_latent(toy.ONCE)
    assert (cells.tolist(), values.tolist()) == ([7 * toy.LENGTH + 9], [opened["max"][toy.ONCE]])


def test_activations_beyond_half_precision_stay_finite(tmp_path, store):
    from jsae.records.store import ActivationsWriter, AllHeader

    writer = ActivationsWriter(tmp_path / "all")
    writer.append(np.array([0, 5]), np.array([1e6, 2.0], np.float32))
    writer.append(np.array([1]), np.array([3.0], np.float32))
    writer.finish(AllHeader(VERSION, 2, 2, 3, "ab"), np.array([2, 1]))
    found = Activations(tmp_path / "all")
    assert found.activations_of_latent(0)[1].tolist() == [65504, 2]
    assert found.activations_of_latent(1)[0].tolist() == [1]


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"k": 3}, True),
        ({"normalize_activations": "expected_average_only_in"}, True),
        ({"apply_b_dec_to_input": False}, True),
        ({"rescale_acts_by_decoder_norm": False}, True),
        ({"dtype": "float16"}, True),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, True),
        ({"metadata": {"problem": "worse than the mean", "hook_name": toy.HOOK}}, False),
        ({"device": "cuda"}, False),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_records_of_an_sae_whose_settings_changed_are_refused(store, change, counts):
    sae = store.parents[2] / "sae" / toy.HOOK
    cfg = json.loads((sae / "cfg.json").read_text())
    change = change | {"metadata": cfg["metadata"] | change.get("metadata", {})}
    (sae / "cfg.json").write_text(json.dumps(dict(reversed((cfg | change).items()))))
    if counts:
        with pytest.raises(StoreError, match="trained again or its settings changed since"):
            Store(store, digest(sae))
    else:
        assert Store(store, digest(sae)).header.d_sae == toy.D_SAE


def test_records_of_another_hook_or_more_rows_than_there_are_are_refused(store):
    told = json.loads((store / "records.json").read_text())
    (store / "records.json").write_text(json.dumps(told | {"hook": "../../elsewhere"}))
    with pytest.raises(StoreError, match=r"are of '../../elsewhere', not of blocks\.2"):
        Store(store, hook=toy.HOOK)
    (store / "records.json").write_text(json.dumps(told))
    texts = store.parent / "texts"
    header = json.loads((texts / "texts.json").read_text())
    (texts / "texts.json").write_text(json.dumps(header | {"rows": 2**62}))
    with pytest.raises(StoreError, match=r"tokens\.npy is uint16"):
        Texts(texts)


def test_statistics_that_scale_the_input_are_part_of_an_sae(store):
    sae = store.parents[2] / "sae" / toy.HOOK
    found = {digest(sae)}
    for name in ("activation_scaler.json", "activation_whitening.safetensors"):
        for content in ("a", "b"):
            (sae / name).write_text(content)
            found.add(digest(sae))
    assert len(found) == 5


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "[1]", "\udcff", '{"k": 1' + "0" * 5000 + "}"], ids=range(6)
)
def test_broken_settings_have_no_digest(store, content):
    sae = store.parents[2] / "sae" / toy.HOOK
    (sae / "cfg.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"cfg\.json is broken"):
        digest(sae)


def test_another_version_or_sae_is_refused(store):
    with pytest.raises(StoreError, match="trained again"):
        Store(store, "0" * 64)
    told = json.loads((store / "records.json").read_text())
    for wrong in (told | {"version": VERSION + 1}, told | {"version": str(VERSION)}, told | {"version": 1}, [1], 7):
        (store / "records.json").write_text(json.dumps(wrong))
        with pytest.raises(StoreError, match=rf"has version .*; this version of jsae reads {VERSION}"):
            Store(store)
    for wrong, complaint in (
        (told | {"more": 1}, "no field more"),
        ({k: v for k, v in told.items() if k != "d_sae"}, "needs d_sae"),
        (told | {"d_sae": "8"}, "d_sae is '8'"),
        (told | {"d_sae": -1}, "d_sae is -1"),
        (told | {"d_sae": True}, "d_sae is True"),
        (told | {"settings": []}, "settings is"),
        (told | {"hook": None}, "hook is None"),
        (told | {"direct_path": None}, "direct_path is None"),
    ):
        (store / "records.json").write_text(json.dumps(wrong))
        with pytest.raises(StoreError, match=complaint):
            Store(store)
    (store / "records.json").write_text("{")
    with pytest.raises(StoreError, match="is broken"):
        Store(store)
    (store / "records.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"experiments\.explore"):
        Store(store)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("example_row", toy.ROWS),
        ("example_position", toy.LENGTH),
        ("example_group", 7),
        ("activation_position", 60_000),
        ("top_logits", len(toy.VOCABULARY)),
        ("neighbours", toy.D_SAE),
        ("together", 2**32 - 1),
        ("channels", toy.D_IN),
    ],
)
def test_pointers_out_of_range_are_refused(name, value, store):
    column = np.load(store / f"{name}.npy")
    column.flat[-1] = value
    np.save(store / f"{name}.npy", column)
    with pytest.raises(StoreError, match=f"{name} contains {value}, but must be below"):
        Store(store)[name]


def test_offsets_that_do_not_partition_are_refused(store):
    for name in ("example_offsets", "activation_offsets"):
        good = np.load(store / f"{name}.npy")
        for at, value in ((0, 1), (-1, good[-1] + 1), (2, good[-1] + 5), (1, -4)):
            bad = good.copy()
            bad[at] = value
            np.save(store / f"{name}.npy", bad)
            with pytest.raises(StoreError, match="does not partition"):
                Store(store)[name]
    texts = store.parent / "texts"
    np.save(texts / "token_offsets.npy", np.load(texts / "token_offsets.npy")[::-1].copy())
    with pytest.raises(StoreError, match=r"token_bytes.npy is uint8\(89,\), expected uint8\(0,\)"):
        _ = Store(store).texts.vocabulary
    np.save(store / "all" / "cell.npy", np.load(store / "all" / "cell.npy")[:-1])
    with pytest.raises(StoreError, match="does not partition"):
        Store(store).all.activations_of_latent(0)


def test_columns_of_other_kinds_are_refused(store):
    def refused(column: np.ndarray, name: str = "max") -> None:
        np.save(store / f"{name}.npy", column, allow_pickle=True)
        with pytest.raises(StoreError, match=f"{name}.npy"):
            Store(store)[name]

    refused(np.zeros(toy.D_SAE))
    refused(np.zeros(toy.D_SAE + 1, np.float32))
    refused(np.zeros((toy.D_SAE, 1), np.float32))
    refused(np.array([print] * toy.D_SAE, object))
    refused(np.zeros(3, np.uint8), "example_group")  # not as long as the other columns of examples
    (store / "max.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(StoreError, match="missing or broken"):
        Store(store)["max"]
    (store / "max.npy").unlink()
    with pytest.raises(StoreError, match="missing or broken"):
        Store(store)["max"]


def test_a_zip_in_the_place_of_a_column_and_a_header_nested_too_deeply_are_broken(store):
    with (store / "max.npy").open("wb") as file:
        np.savez(file, max=np.zeros(toy.D_SAE, np.float32))
    with pytest.raises(StoreError, match=r"max\.npy is missing or broken \(the magic string is not correct"):
        Store(store)["max"]
    (header,) = store.glob("*.json")
    header.write_text("[" * 100_000)
    with pytest.raises(StoreError, match="is broken: it is nested too deeply"):
        Store(store)


def test_too_many_open_files_are_not_reported_as_broken_records(store):
    found = Store(store)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            found["max"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
