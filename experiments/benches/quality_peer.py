"""The other trainers' side of the `quality` measurement. Run by path in an environment of its own, which has no jsae.

Reads a job a line from stdin, trains with the library's own trainer on the rows of `train.npy`, first to last, writes
what was learned as a SAELens directory, and answers with a line of JSON. Lengths that a library counts in steps of its
much longer runs (warm-up, decay, when a latent is dead) are the same parts of the run for all.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

CHECKED = 256
"""Rows of `train.npy` whose reconstruction by the library itself is written beside the weights."""


def main(folder: Path) -> None:
    """Serves the jobs on stdin, on the activations in `folder`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes where errors go
    import numpy as np
    import torch

    acts = torch.from_numpy(np.load(folder / "train.npy"))
    _tell(answers, {"versions": _versions()})
    for line in sys.stdin:
        job = json.loads(line)
        if job["threads"] is not None:
            torch.set_num_threads(job["threads"])
        torch.manual_seed(job["seed"])
        start, worked = time.perf_counter(), time.process_time()
        cfg, weights, reconstruct = LIBRARIES[job["library"]](job, acts)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        finite = all(bool(w.isfinite().all()) for w in weights.values())
        if finite:
            with torch.no_grad():
                _write(Path(job["folder"]), job, cfg, weights, reconstruct(acts[:CHECKED]).numpy())
        _tell(answers, {"seconds": seconds, "cpu_seconds": worked, "finite": finite})


def _tell(answers: TextIO, told: dict[str, Any]) -> None:
    print(json.dumps(told), file=answers, flush=True)


def _steps(job: dict[str, Any], part: float) -> int:
    return round(part * job["steps"])


def _batches(job: dict[str, Any], acts: Any) -> Iterator[Any]:
    """The batches of a run: views of the rows in their order."""
    for number in range(job["steps"]):
        yield acts[number * job["batch_size"] : (number + 1) * job["batch_size"]].clone()


def _write(folder: Path, job: dict[str, Any], cfg: dict[str, Any], weights: dict[str, Any], made: Any) -> None:
    """A SAELens directory, and what the library itself makes of the first rows."""
    import numpy as np
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    same = {"d_in": job["d_in"], "d_sae": job["d_sae"], "dtype": "float32", "device": "cpu"}
    (folder / "cfg.json").write_text(json.dumps({**same, **cfg}), encoding="utf-8")
    exact = {name: w.detach().float().contiguous().clone() for name, w in weights.items()}
    save_file(exact, folder / "sae_weights.safetensors")
    np.save(folder / "made.npy", made)


Trained = tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any]]
"""cfg.json beside widths, weights by SAELens's names, and the library's own reconstruction."""


# ---- SAELens ------------------------------------------------------------------------------------------------------


def _saelens(job: dict[str, Any], acts: Any) -> Trained:
    """SAETrainer with activations scaled as the documentation advises; learning rate to zero over the last fifth."""
    import itertools

    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind, own = _SAELENS[job["recipe"]]
    settings = own(job)
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=job["d_in"],
        d_sae=job["d_sae"],
        normalize_activations="expected_average_only_in",
        **settings,
    )
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    scaled_on = min(job["steps"], 16)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=job["steps"] * job["batch_size"],
            train_batch_size_samples=job["batch_size"],
            lr_warm_up_steps=_steps(job, job["warmup"]),
            lr_decay_steps=_steps(job, job["decay"]),
            dead_feature_window=_steps(job, job["dead"]),
            n_batches_for_norm_estimate=scaled_on,
            lr_end=1e-5,  # must be there; a constant rate does not use it
            **({} if job["rate"] is None else {"lr": job["rate"]}),
        ),
        sae,
        itertools.chain(itertools.islice(_batches(job, acts), scaled_on), _batches(job, acts)),
    )
    trainer.fit()
    weights = sae.state_dict()
    sae.process_state_dict_for_saving_inference(weights)
    cfg = {**sae.cfg.get_inference_sae_cfg_dict(), "metadata": {}}
    return cfg, weights, _saelens_reconstruction(cfg, weights)


def _saelens_reconstruction(cfg: dict[str, Any], weights: dict[str, Any]) -> Callable[[Any], Any]:
    """The inference form, as SAELens itself computes it."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(cfg["architecture"])
    sae = kind(config.from_dict(cfg))
    sae.load_state_dict(weights)
    return sae


_SAELENS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "topk": ("TopK", lambda job: {"k": job["k"]}),
    "batchtopk": ("BatchTopK", lambda job: {"k": float(job["k"])}),
    "matryoshka": ("MatryoshkaBatchTopK", lambda job: {"k": float(job["k"]), "matryoshka_widths": job["widths"]}),
    "relu": ("Standard", lambda job: _l1(job)),
    "gated": ("Gated", lambda job: _l1(job)),
    "jumprelu step": ("JumpReLU", lambda job: _l0(job)),
    "jumprelu tanh": (
        "JumpReLU",
        lambda job: (
            _l0(job)
            | {
                "jumprelu_sparsity_loss_mode": "tanh",
                "jumprelu_bandwidth": 2.0,
                "jumprelu_init_threshold": 0.1,
                "jumprelu_ste_to_input": True,
                "pre_act_loss_coefficient": 3e-6,
                "l0_warm_up_steps": job["steps"],
            }
        ),
    ),
}


def _l1(job: dict[str, Any]) -> dict[str, Any]:
    return {"l1_coefficient": job["coefficient"], "l1_warm_up_steps": _steps(job, job["sparsity_warmup"])}


def _l0(job: dict[str, Any]) -> dict[str, Any]:
    return {"l0_coefficient": job["coefficient"], "l0_warm_up_steps": _steps(job, job["sparsity_warmup"])}


# ---- dictionary_learning ------------------------------------------------------------------------------------------


class _Again:
    """Batches that start anew for every loop over them: the norm is estimated on the first ones."""

    def __init__(self, job: dict[str, Any], acts: Any):
        self._of = job, acts

    def __iter__(self) -> Iterator[Any]:
        return _batches(*self._of)


def _dictionary_learning(job: dict[str, Any], acts: Any) -> Trained:
    """TrainSAE with activations scaled, as its demo does."""
    import tempfile

    from dictionary_learning import training
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    schedule = {"warmup_steps": _steps(job, job["warmup"]), "decay_start": job["steps"] - _steps(job, job["decay"])}
    penalty = {"sparsity_warmup_steps": _steps(job, job["sparsity_warmup"])}
    # The threshold's running mean has a memory of a fiftieth of the run, and starts when it is a half over.
    threshold = {"threshold_start_step": job["steps"] // 2, "threshold_beta": 1 - 50 / max(job["steps"], 100)}
    fractions = [(b - a) / job["d_sae"] for a, b in zip([0, *job["widths"][:-1]], job["widths"], strict=True)]
    trainer, settings = {
        "topk": (top_k.TopKTrainer, {"k": job["k"], **threshold}),
        "batchtopk": (batch_top_k.BatchTopKTrainer, {"k": job["k"], **threshold}),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            {"k": job["k"], "group_fractions": fractions, **threshold},
        ),
        "relu": (standard.StandardTrainer, {"l1_penalty": job["coefficient"], **penalty}),
        "relu april": (
            standard.StandardTrainerAprilUpdate,
            {"l1_penalty": job["coefficient"], **penalty},
        ),
        "gated": (gdm.GatedSAETrainer, {"l1_penalty": job["coefficient"], **penalty}),
        "jumprelu": (
            jumprelu.JumpReluTrainer,
            {"sparsity_penalty": job["coefficient"], "target_l0": float(job["k"]), **penalty},
        ),
    }[job["recipe"]]

    def make(**config: Any) -> Any:
        made = trainer(**config)
        made.dead_feature_threshold = _steps(job, job["dead"]) * job["batch_size"]
        return made

    config = {
        "trainer": make,
        "steps": job["steps"],
        "activation_dim": job["d_in"],
        "dict_size": job["d_sae"],
        "layer": 0,
        "lm_name": "nanochat",
        "seed": job["seed"],
        "device": "cpu",
        **schedule,
        **settings,
        **({} if job["rate"] is None else {"lr": job["rate"]}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        training.trainSAE(
            _Again(job, acts), [config], job["steps"], save_dir=scratch, normalize_activations=True, device="cpu"
        )
        return _loaded(job, Path(scratch) / "trainer_0")


def _loaded(job: dict[str, Any], folder: Path) -> Trained:
    """What dictionary_learning saved, with its scale in it, by SAELens's names."""
    import torch
    from dictionary_learning.utils import load_dictionary

    ae, _ = load_dictionary(str(folder), "cpu")
    own = dict(ae.state_dict())
    cfg: dict[str, Any] = {"apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {}}
    if "encoder.weight" in own:
        weights = {"W_enc": own["encoder.weight"].T, "W_dec": own["decoder.weight"].T}
    else:
        weights = {"W_enc": own["W_enc"], "W_dec": own["W_dec"]}
    kind = type(ae).__name__
    if kind == "GatedAutoEncoder":
        weights |= {"b_dec": own["decoder_bias"], "b_gate": own["gate_bias"], "r_mag": own["r_mag"]}
        return cfg | {"architecture": "gated"}, weights | {"b_mag": own["mag_bias"]}, ae
    weights["b_dec"] = own["bias"] if "bias" in own else own["b_dec"]
    weights["b_enc"] = own["encoder.bias"] if "encoder.bias" in own else own["b_enc"]
    if kind == "AutoEncoder":
        return cfg | {"architecture": "standard"}, weights, ae
    if kind == "AutoEncoderTopK":
        return cfg | {"architecture": "topk", "k": job["k"], "rescale_acts_by_decoder_norm": False}, weights, ae
    if kind == "JumpReluAutoEncoder":  # subtracts nothing from its input
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    weights["threshold"] = own["threshold"] * torch.ones(job["d_sae"])
    return cfg | {"architecture": "jumprelu"}, weights, ae


# ---- sparsify -----------------------------------------------------------------------------------------------------


def _sparsify(job: dict[str, Any], acts: Any) -> Trained:
    """Its Trainer, with a model that looks the activations up."""
    import tempfile

    import torch
    from replay import Replay  # beside this file
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    with tempfile.TemporaryDirectory() as scratch:
        config = TrainConfig(
            SparseCoderConfig(num_latents=job["d_sae"], k=job["k"]),
            batch_size=1,
            optimizer=job["recipe"].removeprefix("topk "),
            lr=job["rate"],
            lr_warmup_steps=_steps(job, job["warmup"]),
            dead_feature_threshold=_steps(job, job["dead"]) * job["batch_size"],
            hookpoints=["site"],
            init_seeds=[job["seed"]],
            log_to_wandb=False,
            save_every=job["steps"] + 2,
            save_dir=scratch,
            run_name="run",
        )
        rows = torch.arange(job["steps"] * job["batch_size"]).split(job["batch_size"])
        Trainer(config, [{"input_ids": row} for row in rows], Replay(lambda rows: acts[rows])).fit()
        coder = SparseCoder.load_from_disk(Path(scratch) / "run" / "site")
    cfg = {"architecture": "topk", "k": job["k"], "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": True}
    weights = {"W_enc": coder.encoder.weight.T, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    return cfg, weights, lambda x: coder(x).sae_out


LIBRARIES: dict[str, Callable[[dict[str, Any], Any], Trained]] = {
    "SAELens": _saelens,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("sae-lens", "dictionary-learning", "eai-sparsify", "torch", "numpy")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
