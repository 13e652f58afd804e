"""The streaming loop on a GPU: activations are what the model gives, and steps wait neither for torch nor for jax."""

from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from card import distance

import bridge.nanochat
from bridge.hooks import capture
from bridge.nanochat.corpus import Corpus
from bridge.stream import ActivationStream, forbid_waiting
from jsae import loop
from jsae.architectures import sae_config
from jsae.config import TrainConfig
from jsae.data import Shuffled

pytestmark = pytest.mark.xdist_group("stream")

HOOK = "blocks.2.hook_resid_post"
BATCH, PER_BLOCK = 1024, 4


@pytest.fixture(scope="module")
def nano(device) -> bridge.nanochat.Nanochat:
    return bridge.nanochat.load("demo", device=device)


def text(nano) -> Corpus:
    return Corpus("stdlib", nano.tokenizer, split="train", row_len=128)


def source(nano, drop_sinks: bool = True) -> ActivationStream:
    settings = {"excluded": (nano.tokenizer.bos_token_id,), "rows_per_forward": 8, "drop_sinks": drop_sinks}
    return ActivationStream(nano.model, text(nano), [[HOOK]], **settings)


def returned(generator: Generator[Any, None, Any]) -> Any:
    """Return what a generator returns at its end."""
    while True:
        try:
            next(generator)
        except StopIteration as done:
            return done.value


def test_a_block_holds_the_models_activations(nano, device):
    ids = torch.from_numpy(text(nano).next_rows(8).astype(np.int64)).to(device)
    with torch.no_grad(), capture(nano.model, [HOOK], stop=True) as acts:
        nano.model(ids)
    expected = acts[HOOK].flatten(0, 1)[ids.flatten() != nano.tokenizer.bos_token_id].float().cpu().numpy()
    filling = source(nano, drop_sinks=False).fill(ids.numel())
    ((block,),) = returned(filling)
    assert len(block) == ids.numel() > len(expected)
    assert distance(block[: len(expected)], expected) < 0.01


def test_between_reports_neither_torch_nor_jax_waits(nano):
    member = loop.Member(
        sae_config("topk", nano.config.n_embd, 1024, k=16),
        TrainConfig(BATCH * PER_BLOCK * 6, BATCH, matmul_dtype="bfloat16"),
    )
    batches = Shuffled(source(nano), batch_size=BATCH, batches_per_block=PER_BLOCK, seed=0)
    steps = loop.fit([member], loop.init([member], batches.peek()), batches)
    for _ in range(2 * PER_BLOCK):  # compiles everything
        _, states, _ = next(steps)
    jax.block_until_ready(states)
    with forbid_waiting():
        for _ in range(2 * PER_BLOCK + 1):
            number, states, sums = next(steps)
    assert number == 4 * PER_BLOCK + 1
    assert float(sums[0].loss) > 0
    assert int(states[0].bad_step) == -1
