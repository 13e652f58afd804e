"""Sites: a text is read once for several metrics, and work on many latents is done in parts."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_nanochat import tiny
from toy_saes import toy_sae

from bridge.evaluate import Site, classes, labels, memory, survey
from bridge.evaluate.site import parts, remembering
from bridge.evaluate.text import Text

HOOK = "blocks.1.hook_resid_post"
ROWS = np.random.default_rng(0).integers(0, 50, (5, 12))


@pytest.fixture
def model():
    return tiny("G7")


@pytest.fixture
def passes(model):
    """Tokens of every forward pass of the model."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].numel()))
    return sizes


def tensors(batch):
    return torch.tensor(batch.start), *batch[1:]


@pytest.mark.parametrize("other_hooks", [(), ("blocks.1.hook_mlp_out",), ("blocks.2.hook_resid_post",)])
def test_a_remembered_text_is_read_once_in_any_batches(model, passes, other_hooks):
    plain = Site(model, HOOK, (0,), other_hooks=other_hooks)
    expected = [tensors(batch) for batch in plain.read([ROWS[1:3], ROWS[3:]])]
    passes.clear()
    kept = remembering(plain, ROWS)
    assert kept.unread(ROWS) == ROWS.size
    list(kept.read([ROWS]))
    assert passes == [ROWS.size]
    assert kept.unread(ROWS) == 0
    found = [tensors(batch) for batch in kept.read([ROWS[1:3].astype(np.int32), ROWS[3:]])]
    assert passes == [ROWS.size]
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("hook", [HOOK, "blocks.2.hook_mlp_out"])
def test_passes_to_the_end_begin_at_the_hook_where_a_row_was_read(model, hook):
    plain = Site(model, hook, (0,))
    (expected,) = plain.passes((hook,), [ROWS[1:]], stop=False)
    kept, ran = remembering(plain, ROWS[:4]), []
    list(kept.read([ROWS]))
    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(lambda module, inputs: ran.append(module.layer))
    (found,) = kept.passes((hook,), [ROWS[1:4]], stop=False, first_row=1)
    assert ran == [2, 3]
    assert found.first_row == 1
    torch.testing.assert_close(found.logits, expected.logits[:3])
    torch.testing.assert_close(found.acts[hook], expected.acts[hook][:3])
    ran.clear()
    list(kept.passes((hook,), [ROWS[3:]], stop=False))  # the last row is not of the text
    assert ran == [0, 1, 2, 3]


def test_blocks_are_not_kept_where_there_is_no_space(model, monkeypatch):
    monkeypatch.setattr(memory, "MOST", 2 * ROWS.size * 32 - 1)  # two blocks
    kept = remembering(Site(model, HOOK, (0,)), ROWS)
    list(kept.read([ROWS]))
    assert kept.unread(ROWS) == 0
    assert not kept.memory.outputs


def test_rows_of_another_text_are_read_again_each_time(model, passes):
    kept = remembering(Site(model, HOOK, (0,)), ROWS[:2])
    for _ in range(2):
        starts = [batch.start for batch in kept.read([ROWS[:2], ROWS[2:]])]
    assert starts == [0, 2]
    assert passes == [24, 36, 36]
    assert kept.unread(ROWS) == 36


def test_no_more_is_remembered_than_there_is_space_for(model, passes, monkeypatch):
    monkeypatch.setattr(memory, "MOST", 2 * 12 * 32)
    kept = remembering(Site(model, HOOK, (0,)), ROWS)
    for _ in range(2):
        list(kept.read([ROWS[:2], ROWS[2:]]))
    assert passes == [24, 36, 36]


def test_several_models_are_not_remembered(model):
    with pytest.raises(ValueError, match="activations of 2 models are not kept"):
        remembering(Site(model, HOOK, (0,), models=(model, tiny("G5"))), ROWS)


def test_parts_cover_everything_in_order_and_nothing_is_one_empty_part():
    assert list(parts(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(parts(3, 0)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [range(0)[part] for part in parts(0, 4)] == [range(0)]


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_a_survey_in_parts_is_that_of_the_whole(model, monkeypatch, architecture):
    sae, read = toy_sae(architecture, 32, 64, k=5), Site(model, HOOK, (0,))
    whole = survey.survey(read, sae, [ROWS])
    monkeypatch.setattr(survey, "most_numbers", lambda device: 7 * 64)
    split = survey.survey(read, sae, [ROWS])
    for name, value in whole.sums._asdict().items():
        np.testing.assert_allclose(getattr(split.sums, name), value, rtol=1e-6, err_msg=name)
    assert (split.norm, split.norm_hat) == pytest.approx((whole.norm, whole.norm_hat))
    np.testing.assert_array_equal(split.rows_fired, whole.rows_fired)


def test_firings_and_means_of_passages_in_parts_are_those_of_the_whole(model, monkeypatch):
    sae, read, none = toy_sae("topk", 32, 64, k=5), Site(model, HOOK, (0,)), np.zeros(ROWS.shape, np.int32)
    text = Text(ROWS.astype(np.int32), none, none, [b""])
    passages = classes.Passages(text.tokens, np.arange(5) % 2, np.arange(5) < 3, ["a", "b"])
    whole = labels.firings(read, sae, text), classes.passage_examples(read, sae, passages)
    for module in (labels, classes):
        monkeypatch.setattr(module, "most_numbers", lambda device: 7 * 64)
    split = labels.firings(read, sae, text), classes.passage_examples(read, sae, passages)
    for ours, theirs in zip(split, whole, strict=True):
        for field in dataclasses.fields(theirs):
            expected = getattr(theirs, field.name)
            if isinstance(expected, np.ndarray):
                np.testing.assert_allclose(getattr(ours, field.name), expected, rtol=1e-5, err_msg=field.name)
