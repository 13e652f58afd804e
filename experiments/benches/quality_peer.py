"""The other trainers' side of the `quality` measurement. Run by path in an environment of its own, which has no jsae.

Reads one JSON job per line from stdin, trains with the library's own trainer on the rows of `train.npy`, first to last,
writes the SAE as a SAELens directory, and answers with a line of JSON. Lengths that a library counts in steps of its
much longer runs (warm-up, decay, when a latent is dead) are fractions of the run that the job gives.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peer_protocol  # beside this file

CHECKED = 256
"""Rows of `train.npy` whose reconstruction by the library itself is written beside the weights."""


def main(folder: Path) -> None:
    """Answer the jobs on stdin, on the activations in `folder`."""
    answers = peer_protocol.open_answers()
    import numpy as np
    import peer_trainers
    import torch

    acts = torch.from_numpy(np.load(folder / "train.npy"))
    peer_protocol.answer(answers, {"versions": peer_protocol.versions(*peer_trainers.PACKAGES)})
    for job in peer_protocol.jobs():
        if job["threads"] is not None:
            torch.set_num_threads(job["threads"])
        torch.manual_seed(job["seed"])
        start, cpu_start = time.perf_counter(), time.process_time()
        cfg, weights, reconstruct = LIBRARIES[job["library"]](job, acts)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        finite = all(bool(w.isfinite().all()) for w in weights.values())
        if finite:
            with torch.no_grad():
                _write(Path(job["folder"]), job, cfg, weights, reconstruct(acts[:CHECKED]).numpy())
        peer_protocol.answer(answers, {"seconds": seconds, "cpu_seconds": cpu_seconds, "finite": finite})


def _shape(job: dict[str, Any]) -> Any:
    from peer_trainers import Shape

    architecture = job["recipe"].partition(" ")[0]
    return Shape(architecture, job["d_in"], job["d_sae"], job["k"], tuple(job["widths"]), job["batch_size"])


def _steps(job: dict[str, Any], fraction: float) -> int:
    return round(fraction * job["steps"])


def _batches(job: dict[str, Any], acts: Any) -> Iterator[Any]:
    """Yield the batches of a run: copies of the rows in their order."""
    for number in range(job["steps"]):
        yield acts[number * job["batch_size"] : (number + 1) * job["batch_size"]].clone()


def _write(
    folder: Path, job: dict[str, Any], cfg: dict[str, Any], weights: dict[str, Any], reconstruction: Any
) -> None:
    """Write a SAELens directory, and the library's own reconstruction of the first rows."""
    import numpy as np
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    common = {"d_in": job["d_in"], "d_sae": job["d_sae"], "dtype": "float32", "device": "cpu"}
    (folder / "cfg.json").write_text(json.dumps({**common, **cfg}), encoding="utf-8")
    exact = {name: w.detach().float().contiguous().clone() for name, w in weights.items()}
    save_file(exact, folder / "sae_weights.safetensors")
    np.save(folder / "made.npy", reconstruction)


Trained = tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any]]
"""cfg.json without the widths, weights by SAELens's names, and the library's own reconstruction."""


# ---- SAELens ------------------------------------------------------------------------------------------------------


def _saelens(job: dict[str, Any], acts: Any) -> Trained:
    """Train with SAETrainer: activations scaled as its documentation advises, rate to zero over the last fifth."""
    import itertools

    import peer_trainers

    norm_batches = min(job["steps"], 16)
    trainer = peer_trainers.saelens(
        _shape(job),
        job["steps"],
        itertools.chain(itertools.islice(_batches(job, acts), norm_batches), _batches(job, acts)),
        {"normalize_activations": "expected_average_only_in", **_saelens_penalty(job)},
        lr_warm_up_steps=_steps(job, job["warmup"]),
        lr_decay_steps=_steps(job, job["decay"]),
        dead_feature_window=_steps(job, job["dead"]),
        n_batches_for_norm_estimate=norm_batches,
        **({} if job["rate"] is None else {"lr": job["rate"]}),
    )
    trainer.fit()
    sae = trainer.sae
    weights = sae.state_dict()
    sae.process_state_dict_for_saving_inference(weights)
    cfg = {**sae.cfg.get_inference_sae_cfg_dict(), "metadata": {}}
    return cfg, weights, _saelens_reconstruction(cfg, weights)


def _saelens_reconstruction(cfg: dict[str, Any], weights: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the inference form, as SAELens itself computes it."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(cfg["architecture"])
    sae = kind(config.from_dict(cfg))
    sae.load_state_dict(weights)
    return sae


def _saelens_penalty(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the penalty of L0 or L1, if the recipe has one."""
    architecture, _, variant = job["recipe"].partition(" ")
    warm_up_steps = _steps(job, job["sparsity_warmup"])
    if architecture in ("relu", "gated"):
        return {"l1_coefficient": job["coefficient"], "l1_warm_up_steps": warm_up_steps}
    if architecture != "jumprelu":
        return {}
    settings: dict[str, Any] = {"l0_coefficient": job["coefficient"], "l0_warm_up_steps": warm_up_steps}
    if variant == "tanh":
        settings |= {
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 3e-6,
            "l0_warm_up_steps": job["steps"],
        }
    return settings


# ---- dictionary_learning ------------------------------------------------------------------------------------------


class _Restarting:
    """Batches that start again for every loop over them: the norm is estimated on the first ones."""

    def __init__(self, job: dict[str, Any], acts: Any):
        self._job, self._acts = job, acts

    def __iter__(self) -> Iterator[Any]:
        return _batches(self._job, self._acts)


def _dictionary_learning(job: dict[str, Any], acts: Any) -> Trained:
    """Train with trainSAE and scaled activations, as its demo does."""
    import tempfile

    import peer_trainers
    from dictionary_learning import training

    architecture, _, variant = job["recipe"].partition(" ")
    make, settings = peer_trainers.dictionary_learning(_shape(job), job["steps"], variant)
    penalty = {"sparsity_warmup_steps": _steps(job, job["sparsity_warmup"])}
    if architecture in ("relu", "gated"):
        settings |= {"l1_penalty": job["coefficient"], **penalty}
    elif architecture == "jumprelu":
        settings |= {"sparsity_penalty": job["coefficient"], "target_l0": float(job["k"]), **penalty}
    else:
        # The running mean of the threshold spans a fiftieth of the run and starts halfway through it.
        settings |= {"threshold_start_step": job["steps"] // 2, "threshold_beta": 1 - 50 / max(job["steps"], 100)}

    def make_trainer(**config: Any) -> Any:
        trainer = make(**config)
        trainer.dead_feature_threshold = _steps(job, job["dead"]) * job["batch_size"]
        return trainer

    config = {
        "trainer": make_trainer,
        "seed": job["seed"],
        "warmup_steps": _steps(job, job["warmup"]),
        "decay_start": job["steps"] - _steps(job, job["decay"]),
        **settings,
        **({} if job["rate"] is None else {"lr": job["rate"]}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        training.trainSAE(
            _Restarting(job, acts), [config], job["steps"], save_dir=scratch, normalize_activations=True, device="cpu"
        )
        return _loaded(job, Path(scratch) / "trainer_0")


def _loaded(job: dict[str, Any], folder: Path) -> Trained:
    """Load what dictionary_learning saved, its scale folded in, by SAELens's names."""
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
    """Train with its Trainer, on a model that looks the activations up."""
    import tempfile

    import peer_trainers
    import torch
    from sparsify import SparseCoder

    rows = torch.arange(job["steps"] * job["batch_size"]).split(job["batch_size"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = peer_trainers.sparsify(
            _shape(job),
            job["steps"],
            [{"input_ids": row} for row in rows],
            lambda input_ids: acts[input_ids],
            optimizer=job["recipe"].removeprefix("topk "),
            seed=job["seed"],
            lr=job["rate"],
            lr_warmup_steps=_steps(job, job["warmup"]),
            dead_feature_threshold=_steps(job, job["dead"]) * job["batch_size"],
            save_dir=scratch,
            run_name="run",
        )
        trainer.fit()
        coder = SparseCoder.load_from_disk(Path(scratch) / "run" / "site")
    cfg = {"architecture": "topk", "k": job["k"], "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": True}
    weights = {"W_enc": coder.encoder.weight.T, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    return cfg, weights, lambda x: coder(x).sae_out


LIBRARIES: dict[str, Callable[[dict[str, Any], Any], Trained]] = {
    "SAELens": _saelens,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
