"""Labels for latents that have none yet: the evaluation's labelling on a part of the text, in a bounded time."""

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
"""Of as many tokens as are gathered, one in `SHARE` is read for labels, within the next two bounds."""
FEWEST_TOKENS, MOST_TOKENS = 10_000, 100_000


def write(
    run: Run,
    nano: Nanochat,
    saes: Mapping[str, TorchSAE],
    plan: Plan,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Label the latents of SAEs without labels, and add them to `labels.json` of the run as an evaluation does.

    Args:
      run: the run.
      nano: the model with its tokenizer.
      saes: the SAEs of the run by hook name.
      plan: which text is read, in rows of which length, and which tokens count.
      seconds: reading of activations stops at the first batch after so many; None reads all of the part.
      clock: returns seconds that never decrease.

    Returns:
      `bridge.evaluate.labels.summary` of every SAE that was labelled here.

    Raises:
      FileNotFoundError, ValueError: the text is not at hand, or does not fill one row; `labels.json` is broken.
    """
    missing = [hook for hook in saes if hook not in automatic_hooks(run.path)]
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
        named = labels.label(firings, read, nano.tokenizer)
        tables[hook], summaries[hook] = labels.table(named), labels.summary(named)
    file = run.table_file("labels")
    before = jsons.read(file, LARGEST_TABLE) if file.is_file() else {}
    files.write(file, json.dumps(before | tables, allow_nan=False) + "\n")
    return summaries
