"""Settings of fine-tuning an SAE by the output of its model."""

from dataclasses import dataclass
from typing import Literal

from bridge import accelerators
from bridge.locations import Checkpoint, Data, FilePath
from bridge.settings import CONTEXT, LONG_SEED, STEP, ExcludeTokens, flag, settle
from jsae.settings import COUNT, DEAD_AFTER, RATE, TOKENS, Json, at_least, require

Objective = Literal["kl", "ce", "mse"]


@dataclass(frozen=True)
class FinetuneConfig(Json):
    """Settings of fine-tuning. What is not given is as in the run that the SAE belongs to.

    Raises:
      ConfigError: settings that cannot work; names the field, what was given and what is allowed.
    """

    sae: FilePath | None = flag(None, "The SAE: a SAELens directory, hf://owner/name, or a run with one SAE.")
    hook: str | None = flag(
        None, "Which SAE of a run with several; of a SAELens directory that does not name its hook: that hook."
    )
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as for training; none is the run's.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    data: Data | None = flag(None, "Text, as for training; none is the run's.")
    context_size: int | None = flag(
        None, "Tokens of a window of text; none is the run's, or the model's sequence_len.", CONTEXT
    )
    objective: Objective = flag(
        "kl",
        "Added to the squared error: kl, the divergence of the model's output; ce, its cross-entropy on the next "
        "token; mse adds nothing, to compare with.",
    )
    num_activations: int = flag(1_000_000, "Activations to train on; a few percent of the training are enough.", TOKENS)
    batch_size: int = flag(2048, "Tokens per step, in whole windows.", at_least(1, 2**24))
    learning_rate: float | None = flag(
        None, "Rate of the first step, which falls linearly to zero; none is a fraction of that of training.", RATE
    )
    activation: str | None = flag(
        None, "Architecture to train as, where it is not recorded and several have the SAE's form."
    )
    dead_after: int | None = flag(
        None,
        "Activations without firing after which a latent is dead; none is the run's (else 10 million), at least 64 "
        "windows.",
        DEAD_AFTER,
    )
    exclude_tokens: ExcludeTokens | None = flag(
        None, "Special tokens whose activations stay as they are; none is as the SAE was trained."
    )
    drop_sinks: bool | None = flag(
        None, "Do not replace the activations of tokens of extreme norm; none is as the SAE was trained."
    )
    seed: int = flag(1, "Seed of the order of the text; training has 0, so that other windows come first.", LONG_SEED)
    tokens_per_forward: int = flag(
        2048, "Tokens in one forward pass of the model; a GPU wants 16 times as many.", COUNT
    )
    heldout_tokens: int = flag(50_000, "Held-out tokens on which the SAE is measured before and after.", TOKENS)
    log_every: int = flag(50, "Steps between reports.", COUNT)
    device: str = flag("cpu", "Device of torch and jax: cpu, cuda or cuda:N.")
    out: FilePath | None = flag(None, "Directory of the new run, with the export.")

    def __post_init__(self) -> None:
        settle(self)
        accelerators.check_name(self.device)
        require(bool(self.sae), "nothing to fine-tune: give --sae, a SAELens directory or a run")
        require(bool(self.out), "nowhere to write: give --out, a new directory")
        require(
            self.num_activations >= self.batch_size,
            f"--num_activations={self.num_activations} are less than one batch of --batch_size={self.batch_size}",
        )
