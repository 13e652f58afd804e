"""Every generation of nanochat, guarded without the goldens: fixed logits, caches, files, precision."""

import itertools

import pytest
import torch
from golden_table import TOLERANCES, capture, gap
from safetensors.torch import load_file
from tiny_nanochat import (
    SIZES,
    tiny,
    tokens,
    write,
)
from upstream_table import CONTINUATION, FILE, LENGTH, PROMPT, outputs

from bridge import nanochat
from bridge.nanochat.config import GENERATIONS
from bridge.nanochat.engine import chat, generate
from bridge.nanochat.loss import bits_per_byte, cross_entropy
from bridge.nanochat.model import GPT, GPTConfig

every_generation = pytest.mark.parametrize("generation", list(GENERATIONS))
WINDOWED = [name for name, differences in GENERATIONS.items() if "window" in differences]


@pytest.fixture(scope="module")
def g7():
    return tiny("G7")


@pytest.fixture(scope="module")
def upstream():
    """Outputs of upstream's own code on the tiny nanochats, by generation and name; they need no ../shared."""
    table = {}
    for name, output in load_file(FILE).items():
        generation, _, name = name.partition(".")
        table.setdefault(generation, {})[name] = output
    return table


def test_every_generation_has_outputs_of_upstream(upstream):
    assert list(upstream) == sorted(GENERATIONS)
    assert FILE.stat().st_size < 300_000


@every_generation
def test_every_output_of_a_tiny_nanochat_is_upstreams(upstream, generation):
    golden, model = upstream[generation], tiny(generation)
    ours = outputs(model)
    differences = {name: gap(ours[name], golden[name]) for name in ours}
    assert {name: gap for name, gap in differences.items() if gap > TOLERANCES[name]} == {}
    ids = tokens(LENGTH + 1)
    assert gap(cross_entropy(model, ids[:, :-1], ids[:, 1:])[1], golden["loss"]) < TOLERANCES["loss"]
    columns = generate(model, tokens(PROMPT)[0].tolist(), max_tokens=CONTINUATION, temperature=0)
    assert [column[0] for column in columns] == golden["greedy"].tolist()


def test_no_two_generations_agree(upstream):
    for a, b in itertools.combinations(GENERATIONS, 2):
        if (a, b) != ("G0", "G1"):  # these differ in how the vocabulary is padded, not in arithmetic
            assert gap(upstream[a]["logits"], upstream[b]["logits"]) > 0.01, (a, b)


@every_generation
@pytest.mark.parametrize("chunks", [(300,), (1,) * 8 + (292,), (201, 1, 1, 97), (128, 2, 1, 169)], ids=str)
def test_a_cache_gives_the_logits_of_the_full_forward(generation, chunks):
    model, ids = tiny(generation), tokens(300)
    cache = model.new_cache(2)
    pieces = [model(piece, cache=cache) for piece in ids.split(chunks, dim=1)]
    assert cache.position == 300
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-4, rtol=0)


@every_generation
def test_a_repeated_cache_continues_every_row(generation):
    model, ids = tiny(generation), tokens(40)
    cache = model.new_cache(1, 40)
    model(ids[:1, :30], cache=cache)
    rows = cache.repeat(3)
    again = model(ids[:1, 30:].expand(3, -1), cache=rows)
    assert (cache.position, rows.position, rows.batch_size, rows.max_len) == (30, 40, 3, 40)
    torch.testing.assert_close(again, model(ids[:1])[:, 30:].expand(3, -1, -1), atol=1e-4, rtol=0)


@every_generation
def test_files_of_a_generation_are_read_as_that_generation(generation, tmp_path):
    model = tiny(generation)
    nano = nanochat.load(write(tmp_path, model, generation))
    assert nano.generation == generation
    assert nano.config == model.config
    assert torch.equal(nano.model(tokens(20)), model(tokens(20)))


@every_generation
def test_bfloat16_stays_near_and_gives_float32_logits(generation):
    model, ids = tiny(generation), tokens(300)
    full = model(ids)
    half, acts = capture(model.to(torch.bfloat16), lambda: model(ids))
    assert half.dtype == torch.float32
    assert {name: out.dtype for name, out in acts.items()} == dict.fromkeys(acts, torch.bfloat16)
    assert (half - full).pow(2).mean() < 0.002 * full.var()


@pytest.mark.parametrize("generation", ["G0", "G4e", "G7"])
def test_a_bfloat16_load_keeps_scalars_exact_and_the_stream_in_bfloat16(generation, tmp_path):
    model = tiny(generation)
    nano = nanochat.load(write(tmp_path, model, generation), dtype=torch.bfloat16)
    for name, weight in nano.model.named_parameters():
        assert weight.dtype == (torch.float32 if weight.ndim == 1 else torch.bfloat16), name
    logits, acts = capture(nano.model, lambda: nano.model(tokens(300)))
    assert acts["resid_post"].dtype == acts["final_norm"].dtype == torch.bfloat16
    assert (logits - model(tokens(300))).pow(2).mean() < 0.002 * logits.var()
    cache = nano.model.new_cache(2)
    cached = torch.cat([nano.model(piece, cache=cache) for piece in tokens(300).split((250, 1, 49), dim=1)], dim=1)
    assert (logits - cached).pow(2).mean() < 0.002 * logits.var()


@pytest.mark.parametrize("generation", ["G0", "G1", "G2", "G3", "G4", "G4e", "G5", "G6"])
def test_a_window_of_w_shows_the_token_w_back_and_no_further(generation):
    window = 8 + (generation == "G4e")  # a bigram tells of the token before it too
    model = tiny(generation, n_layer=1, sequence_len=8)
    ids = tokens(20, rows=1)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 50
    sees = (model(ids) != model(other)).any(dim=-1)[0].nonzero()[:, 0].tolist()
    assert sees == list(range(window + 1 if generation in WINDOWED else 20))


def test_short_windows_are_of_the_lengths_that_upstream_computes():
    def short(generation, length):
        sizes = GPTConfig.of_generation(
            generation, sequence_len=length, vocab_size=9, n_layer=2, n_head=1, n_kv_head=1, n_embd=32
        ).window_sizes
        assert sizes[1] == length or sizes == (None, None)
        return sizes[0]

    assert [short(name, 2048) for name in ("G2", "G3", "G4", "G5", "G6", "G7")] == [None, 1024, 1024, 1024, 768, 512]
    assert [short("G6", length) for length in (100, 384, 385, 1024)] == [128, 128, 256, 384]
    assert [short("G7", length) for length in (100, 512, 513, 1024)] == [128, 128, 256, 256]


def test_value_embeddings_are_in_every_other_layer_and_in_the_last():
    for n_layer, layers in ((4, [1, 3]), (5, [0, 2, 4])):
        model = tiny("G4", n_layer=n_layer)
        assert list(model.value_embeds) == [str(i) for i in layers]
        assert [i for i, block in enumerate(model.transformer.h) if hasattr(block.attn, "ve_gate")] == layers


@every_generation
def test_fresh_weights_start_at_the_loss_of_knowing_nothing_and_learn(generation):
    model = GPT(GPTConfig.of_generation(generation, **SIZES))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = tokens(65, rows=4)
    batch = ids[:, :-1], ids[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = cross_entropy(model, *batch).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
        optimizer.step()
    assert losses[0] == pytest.approx(torch.tensor(50.0).log().item(), abs=0.05)
    assert losses[-1] < losses[0] - 0.1


def test_fresh_weights_come_from_the_generator_alone():
    def fresh(seed):
        model = GPT(tiny("G7").config)
        model.init_weights(torch.Generator().manual_seed(seed))
        return torch.cat([weight.flatten() for weight in model.parameters()])

    assert torch.equal(fresh(0), fresh(0))
    assert not torch.equal(fresh(0), fresh(1))


def test_a_mask_first_made_in_inference_mode_serves_training():
    model = tiny("G3", sequence_len=34).requires_grad_(True)
    with torch.inference_mode():
        model(tokens(33))
    model(tokens(33)).sum().backward()
    assert model.transformer.h[0].attn.c_q.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0, 50]]), "from 0 to 49"),
        (torch.tensor([[-1]]), "from 0 to 49"),
        (torch.zeros(1, 0, dtype=torch.long), "B, T >= 1"),
        (torch.zeros(0, 3, dtype=torch.long), "B, T >= 1"),
        (torch.zeros(1, 4001, dtype=torch.long), "at most 4000 .* have positions"),
    ],
    ids=["too large", "negative", "empty", "no rows", "too long"],
)
def test_tokens_that_make_no_sense_are_refused(g7, ids, message):
    with pytest.raises(ValueError, match=message):
        g7(ids)


def test_tokens_of_another_kind_are_refused(g7):
    with pytest.raises(TypeError):
        g7(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="int64 or int32"):
        g7._check(torch.zeros(1, 3, dtype=torch.bool), None, 0)
    assert torch.equal(g7(tokens(9).int()), g7(tokens(9)))


def test_int32_tokens_have_the_bigrams_of_int64_tokens():
    sizes = {"vocab_size": 60000, "n_embd": 32, "n_head": 1, "n_kv_head": 1, "n_layer": 1}
    model, ids = tiny("G4e", **sizes), torch.tensor([[59999, 59998, 3, 59997]])
    assert torch.equal(model(ids.int()), model(ids))


def test_a_full_cache_says_so_and_stays_usable(g7):
    ids, cache = tokens(10), g7.new_cache(2, 10)
    g7(ids[:, :8], cache=cache)
    with pytest.raises(ValueError, match="2 rows of 10 tokens, 8 of them used"):
        g7(ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match="2 rows"):
        g7(tokens(1, rows=1), cache=cache)
    torch.testing.assert_close(g7(ids[:, 8:], cache=cache), g7(ids)[:, 8:], atol=1e-4, rtol=0)


def test_a_cache_that_a_hook_broke_off_is_as_before(g7):
    ids, cache = tokens(10), g7.new_cache(2, 10)
    g7(ids[:, :4], cache=cache)

    def stop(*_):
        raise KeyboardInterrupt

    handle = g7.transformer.h[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        g7(ids[:, 4:7], cache=cache)
    handle.remove()
    assert cache.position == 4
    torch.testing.assert_close(g7(ids[:, 4:], cache=cache), g7(ids)[:, 4:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("batch_size", "max_len"), [(0, 8), (1, 0), (1, 4001)])
def test_a_cache_of_impossible_size_is_refused(g7, batch_size, max_len):
    with pytest.raises(ValueError, match="1 to 4000 tokens"):
        g7.new_cache(batch_size, max_len)


def test_only_a_single_row_can_be_repeated(g7):
    with pytest.raises(ValueError, match="one row"):
        g7.new_cache(2).repeat(2)
    with pytest.raises(ValueError, match="n=0"):
        g7.new_cache(1).repeat(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 3}, "even whole head size"),
        ({"n_head": 32}, "even whole head size"),
        ({"n_kv_head": 3}, "multiple of n_kv_head 3"),
        ({"n_layer": 0}, "n_layer must be a whole number from 1"),
        ({"vocab_size": 10**9}, "vocab_size must be a whole number"),
        ({"sequence_len": 2**17, "n_head": 1, "n_kv_head": 1, "n_embd": 128}, "memory of the rope tables"),
        ({"window_pattern": "SSX"}, "letters S and L"),
        ({"window_pattern": ""}, "letters S and L"),
        ({"softcap": 0}, "softcap must be a positive number"),
        ({"rope_base": float("nan")}, "rope_base must be a positive number"),
        ({"n_embd": 16, "ve": "none"}, "smear reads 24 channels"),
        ({"n_embd": 8}, "ve_gate_channels must be from 1 to n_embd 8"),
        ({"bigram": True, "lambdas": False}, "needs lambdas=True"),
        ({"window": "none"}, "needs a window"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_a_config_that_makes_no_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny("G7", **fields)


@pytest.mark.parametrize("field", ["rope_table", "window", "ve"])
def test_a_choice_that_does_not_exist_is_refused(field):
    # Under the tests' type checks it is the annotation that refuses, else the config itself.
    with pytest.raises((TypeError, ValueError)):
        tiny("G7", **{field: "other"})


def test_an_unknown_generation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no generation 'G8' of nanochat; known are G0, G1"):
        GPTConfig.of_generation("G8")


def test_greedy_tokens_are_those_of_the_full_forward(g7):
    prompt = tokens(20)[0].tolist()
    ids = list(prompt)
    for _ in range(12):
        ids.append(g7(torch.tensor([ids]))[0, -1].argmax().item())
    columns = list(generate(g7, prompt, max_tokens=12, temperature=0, num_samples=2))
    assert columns == [[token, token] for token in ids[20:]]


def test_sampling_follows_its_seed_and_every_row_goes_its_own_way(g7):
    def sample(**kwargs):
        return list(generate(g7, [1, 2, 3], max_tokens=10, num_samples=3, **kwargs))

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    rows = list(zip(*sample(seed=1), strict=True))
    assert len(set(rows)) == 3
    assert sample(top_k=1) == sample(temperature=0) == sample(temperature=1e-45) == sample(top_k=999, temperature=1e-9)


def test_samples_have_the_probabilities_of_the_model(g7):
    probs = g7(torch.tensor([[4, 5]]))[0, -1].softmax(-1)
    (column,) = generate(g7, [4, 5], max_tokens=1, num_samples=20000, seed=0)
    found = torch.bincount(torch.tensor(column), minlength=50) / 20000
    assert (found - probs).abs().max() < 0.015


def test_top_k_leaves_the_k_likeliest_tokens(g7):
    best = g7(torch.tensor([[4, 5]]))[0, -1].topk(3).indices.tolist()
    (column,) = generate(g7, [4, 5], max_tokens=1, num_samples=2000, top_k=3, temperature=50.0)
    assert set(column) == set(best)


def test_a_row_ends_at_a_stop_token_and_the_others_go_on(g7):
    def run(**kwargs):
        return list(generate(g7, [1, 2], max_tokens=30, num_samples=3, seed=5, **kwargs))

    free = run()
    stop = free[3][1]
    columns = run(stop_tokens={stop})
    for row in range(3):
        ids = [column[row] for column in free]
        end = ids.index(stop) if stop in ids else len(ids)
        got = [column[row] for column in columns]
        assert got == (ids[:end] + [None] * len(ids))[: len(got)]
        assert len(got) >= end
    assert any(token is not None for token in columns[-1])


def test_generation_leaves_the_gradient_mode_of_its_caller_alone(g7):
    for _ in generate(g7, [1], max_tokens=2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt_ids": []}, "prompt is empty"),
        ({"max_tokens": 0}, "at least 1"),
        ({"num_samples": 0}, "at least 1"),
        ({"prompt_ids": [1] * 4001}, "exceed the model's 4000 positions"),
        ({"prompt_ids": [1] * 3000, "max_tokens": 1001}, "exceed the model's 4000 positions"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:30],
)
def test_settings_that_make_no_sense_are_refused_before_the_first_token(g7, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(g7, **({"prompt_ids": [1], "max_tokens": 4} | kwargs))


class ByteTokenizer:
    """Raw bytes that decode the way nanochat's tokenizer does; ids 40 and 41 end an answer."""

    def __init__(self):
        self.special_tokens = {"<|assistant_start|>": 42, "<|assistant_end|>": 40, "<|bos|>": 41}
        self.table = ["Zoë — ".encode()[i : i + 1] for i in range(9)]

    def render_conversation(self, conversation, max_tokens):
        return [41, *(len(message["content"]) % 40 for message in conversation["messages"])][:max_tokens], []

    def decode(self, ids):
        return b"".join(self.table[i % 9] for i in ids).decode(errors="replace")


def test_chat_streams_whole_characters_and_stops_where_the_assistant_does(g7, monkeypatch):
    answer = [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 0]
    script = iter([*answer, 40, 5])
    monkeypatch.setattr("bridge.nanochat.engine._sample", lambda logits, *_: torch.tensor([next(script)]))
    pieces = list(chat(g7, ByteTokenizer(), [{"role": "user", "content": "hello"}], max_tokens=30))
    # A lead byte that is followed by no continuation is held back with what comes, and shown as U+FFFD.
    assert pieces == ["Z", "o", "ë", " ", "—", " ", "\ufffdZ"]


def test_chat_wants_the_last_word_to_be_the_users(g7):
    for messages in ([], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]):
        with pytest.raises(ValueError, match="last message must be the user's"):
            chat(g7, ByteTokenizer(), messages, max_tokens=3)


def test_losses_of_ignored_targets_are_zero_and_bits_count_bytes(g7):
    ids = tokens(30)
    targets = ids.roll(-1, dims=1)
    targets[:, -1], targets[1, 4] = -1, -100
    losses = cross_entropy(g7, ids, targets)
    logprobs = g7(ids).log_softmax(-1)
    assert losses[:, -1].tolist() == [0, 0]
    assert losses[1, 4] == 0
    assert losses[0, 3].item() == pytest.approx(-logprobs[0, 3, targets[0, 3]].item(), abs=1e-5)
    lengths = torch.arange(50) % 4  # every fourth token is special
    kept = (targets >= 0) & (lengths[targets.clamp(min=0)] > 0)
    expected = losses[kept].sum() / lengths[targets[kept]].sum() / torch.tensor(2.0).log()
    for table in (lengths, lengths.numpy()):
        assert bits_per_byte(g7, [(ids, targets)], table) == pytest.approx(expected.item(), rel=1e-6)
    parts = list(zip(ids.split((1, len(ids) - 1)), targets.split((1, len(ids) - 1)), strict=True))
    assert bits_per_byte(g7, parts, lengths) == pytest.approx(expected.item(), rel=1e-6)
    assert bits_per_byte(g7, [(ids, targets)], torch.zeros(50, dtype=torch.long)) == float("inf")
