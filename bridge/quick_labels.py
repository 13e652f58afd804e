"""Label latents that have no labels yet, as the evaluation does, but on a part of the text and in bounded time."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from bridge.evaluate import Site, labels, text
from bridge.explorer.gather import Plan
from bridge.nanochat import Nanochat
from bridge.run import Run
from bridge.run.labels import automatic_hooks
from bridge.run.tables import LARGEST_TABLE
from bridge.torch_sae import TorchSAE
from jsae import files, jsons

SHARE = 10
"""One in `SHARE` of the gathered tokens is read for labels, within the next two bounds."""
FEWEST_TOKENS, MOST_TOKENS = 10_000, 100_000


def write(
    run: Run,
    nano: Nanochat,
    saes: Mapping[str, TorchSAE],
    plan: Plan,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    *,
    anew: bool = False,
) -> dict[str, dict[str, Any]]:
    """Label the latents of SAEs without labels, and add the labels to the run's `labels.json`, as an evaluation does.

    Args:
      run: the run.
      nano: the model with its tokenizer.
      saes: the SAEs of the run by hook name.
      plan: the text, the length of its rows, and which tokens count.
      seconds: time after which no further batch is read; None reads the whole part.
      clock: returns seconds that never decrease.
      anew: whether SAEs that have labels get others.

    Returns:
      `bridge.evaluate.labels.summary` of every SAE that was labelled, by hook name.

    Raises:
      FileNotFoundError, ValueError: the text does not exist or does not fill one row, or `labels.json` is broken.
    """
    missing = [hook for hook in saes if anew or hook not in automatic_hooks(run.path)]
    if not missing:
        return {}
    size = min(plan.num_tokens, max(FEWEST_TOKENS, min(plan.num_tokens // SHARE, MOST_TOKENS)))
    documents = text.documents(plan.data, plan.split, nano.tokenizer)
    read = text.read(documents, nano.tokenizer, plan.context_length, size)
    tables, summaries = {}, {}
    for hook in missing:
        site = Site(nano.model, hook, plan.excluded, plan.drop_sinks)
        end = None if seconds is None else clock() + seconds / len(missing)
        firings = labels.firings(site, saes[hook], read, lambda end=end: end is not None and clock() >= end)
        simple, combined = labels.describe(firings, labels.Material.of_text(read, nano.tokenizer))
        tables[hook], summaries[hook] = labels.table(combined, simple), labels.summary(combined, simple)
    file = run.table_file("labels")
    earlier = jsons.read(file, LARGEST_TABLE) if file.is_file() else {}
    files.write(file, json.dumps(earlier | tables, allow_nan=False) + "\n")
    return summaries
