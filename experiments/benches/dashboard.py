"""Time to compute the records of a latent, compared with SAEDashboard 0.8.0 on the same activations of one SAE.

SAEDashboard cannot run a nanochat, so the model is a GPT-2 with random weights, run once through TransformerLens; both
sides start from its activations on disk and have the same SAE, tokens and unembedding. Each encodes them, computes for
every latent counts, histograms, the strongest texts and some of each quintile, logit tables, correlations with channels
and latents, and writes the results; jsae also samples texts without the latent, drops texts that repeat and ranks
neighbours. `records` ends there; `files` includes the batch-N.json of Neuronpedia, which both write.

SAEDashboard has its own environment, --peer_env, which is created if it does not exist (pip, about 2 GB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import peers, timing

if TYPE_CHECKING:
    import numpy as np

PEER, OURS = "SAEDashboard", "jsae"
BOS = 0
_INSTALL = (
    (
        "install",
        "-q",
        "sae-dashboard==0.8.0",
        "torch>=2.9,<2.14",
        "pyarrow<21",
    ),  # later versions of pyarrow need a later numpy
    # These are installed with the others, and fail to load beside a torch without CUDA.
    ("uninstall", "-q", "-y", "torchvision", "torchaudio"),
)
_PROOF = "import sae_dashboard.sae_vis_runner"


@dataclass(frozen=True)
class Config:
    """Sizes and rounds of the measurement."""

    prompts: int = flag(512, "Rows of text.")
    length: int = flag(128, "Tokens per row, including BOS.")
    d_model: int = flag(128, "Width of the model.")
    layers: int = flag(2, "Layers of the model; the SAE is at the middle one.")
    vocab_size: int = flag(4096, "Tokens of the model's vocabulary.")
    d_sae: int = flag(256, "Latents.")
    k: int = flag(8, "Active latents per token.")
    rounds: int = flag(2, "Timed rounds, at least 2.")
    threads: int | None = flag(None, "Threads of torch on both sides; none is torch's default.")
    peer_env: FilePath = flag("~/.cache/jsae/saedashboard-0.8.0", "The virtual environment of SAEDashboard.")
    out: FilePath = flag("experiments/results/dashboard_cpu.json", "File for the results.")

    def __post_init__(self) -> None:
        for name in ("prompts", "length", "layers", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if self.d_model < 4 or self.d_model % 4:
            raise ValueError(f"d_model must be a multiple of 4 for 4 heads, got {self.d_model}")
        if not self.k <= self.d_sae:
            raise ValueError(f"k={self.k} is larger than d_sae={self.d_sae}: give a smaller k")
        if not 2 <= self.vocab_size <= 2**16:
            raise ValueError(f"vocab_size must be 2 to 65536, got {self.vocab_size}")

    @property
    def hook(self) -> str:
        """Hook of the SAE."""
        return f"blocks.{self.layers // 2}.hook_resid_post"


def main(config: Config) -> int:
    """Measure both sides in turn, print a table, write the results."""
    import torch
    from rich.console import Console

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    python = peers.environment(Path(config.peer_env).expanduser(), _INSTALL, _PROOF)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _lay_out(config, folder)
        with _peer(python, folder) as (versions, ask):
            records: dict[str, list[float]] = {PEER: [], OURS: []}
            cases = {
                PEER: lambda: records[PEER].append(ask({})["records"]),
                OURS: lambda: records[OURS].append(_ours(config, folder)),
            }
            files = timing.by_turns(cases, config.rounds)
        figures = _figures(config, {name: seconds[1:] for name, seconds in records.items()}, files)
        figures["agreement"] = _agreement(config, folder)
    Console().print(_table(figures))
    settings = timing.settings(config, "peer_env")
    work = " ".join(__doc__.split("\n\n")[1].split())
    document = {"machine": timing.machine("cpu"), "peer": versions, "settings": settings, "work": work, **figures}
    timing.write(config.out, document)
    Console().print(f"figures: {config.out}", soft_wrap=True)
    return 0


def _peer(python: Path | str, folder: Path) -> contextlib.AbstractContextManager[tuple[dict[str, str], peers.Ask]]:
    """Start SAEDashboard's process; yield its versions and a function that has it do the work once."""
    return peers.process(python, Path(__file__).with_name("dashboard_peer.py"), folder, name="SAEDashboard's process")


# ---- this project -------------------------------------------------------------------------------------------------


def _lay_out(config: Config, folder: Path) -> None:
    """Write what both sides read: the job, the tokens, the SAE."""
    import numpy as np

    from jsae import export
    from jsae.architectures import sae_config

    random = np.random.default_rng(0)
    tokens = random.integers(1, config.vocab_size, (config.prompts, config.length))
    tokens[:, 0] = BOS
    np.save(folder / "tokens.npy", tokens)
    rows = random.standard_normal((config.d_sae, config.d_model))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    biases = {"b_enc": np.zeros(config.d_sae), "b_dec": np.zeros(config.d_model)}
    weights = {"W_enc": rows, "W_dec": rows} | biases
    sae = sae_config("topk", config.d_model, config.d_sae, k=config.k)
    export.write(folder / "sae" / config.hook, sae, weights, 1.0, 1.0, {"hook_name": config.hook, "model_name": "toy"})
    job = dataclasses.asdict(config) | {"hook": config.hook, "bos": BOS}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


def _subjects(config: Config, folder: Path) -> tuple[Any, Any, np.ndarray]:
    """Return a nanochat with the peer's unembedding, the only part of it that is used; the SAE; the tokens."""
    import numpy as np
    import torch

    from bridge import torch_sae
    from bridge.nanochat.model import GPT, GPTConfig

    heads = {"n_head": 4, "n_kv_head": 4}
    sizes: dict[str, Any] = {
        "n_layer": config.layers,
        "n_embd": config.d_model,
        "vocab_size": config.vocab_size,
    } | heads
    model = GPT(GPTConfig(sequence_len=config.length, **sizes)).requires_grad_(False)
    model.lm_head.weight[: config.vocab_size] = torch.from_numpy(np.load(folder / "unembed.npy"))
    tokens = np.load(folder / "tokens.npy").astype(np.uint16)
    return model, torch_sae.load(folder / "sae" / config.hook), tokens


def _ours(config: Config, folder: Path) -> float:
    """Compute all latents, write records and batch-N.json; return the seconds until the records are written."""
    import torch

    from bridge.explorer import weights
    from bridge.explorer.firings import Gatherer
    from bridge.neuronpedia import dashboard
    from bridge.neuronpedia.about import About
    from bridge.neuronpedia.ids import Ids
    from jsae.records.recorder import Recorder, Settings

    model, sae, tokens = _subjects(config, folder)
    settings = Settings()
    start = time.perf_counter()
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        gatherer = Gatherer(sae, Recorder(Path(scratch), tokens, config.d_sae, settings))
        first = 0
        for file in _in_order(folder / "activations"):
            acts = torch.load(file, weights_only=True)[config.hook]
            rows = tokens[first : first + len(acts)]
            gatherer.add(first * config.length, acts, torch.from_numpy(rows != BOS))
            first += len(acts)
        columns = gatherer.recorder.finish(gatherer.moments())
    columns |= weights.columns(model, config.hook, sae, nearest=settings.nearest, bins=settings.bins)
    store = _write(config, folder, tokens, columns, gatherer.recorder.counted)
    seconds = time.perf_counter() - start
    ids = Ids("toy", "toy", "toy", config.hook)
    dashboard.write(store, folder / "sae" / config.hook, folder / "ours", ids=ids, about=About(config.layers, "t", "d"))
    return seconds


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.glob("model_activations_*.pt"), key=lambda file: int(file.stem.rpartition("_")[2]))


def _write(config: Config, folder: Path, tokens: np.ndarray, columns: dict[str, np.ndarray], counted: int) -> Any:
    """Write the records, and open them."""
    from jsae.records.store import VERSION, Header, Store, Texts, TextsHeader, digest

    names: dict[str, Any] = {"dataset": "toy", "split": "all", "model": "toy", "fingerprint": "", "seed": 0}
    shape: dict[str, Any] = {"rows": config.prompts, "row_length": config.length, "vocab_size": config.vocab_size}
    words = [f" t{i}".encode() for i in range(config.vocab_size)]
    Texts.write(
        folder / "records" / "texts", TextsHeader(VERSION, **shape, bos=BOS, special=[BOS], **names), tokens, words
    )
    header = Header(
        version=VERSION,
        hook=config.hook,
        layer=config.layers // 2,
        d_in=config.d_model,
        d_sae=config.d_sae,
        architecture="topk",
        sae_sha256=digest(folder / "sae" / config.hook),
        tokens=counted,
        direct_path=1.0,
        duplicate_rows=0,
        settings={"num_tokens": tokens.size},
    )
    Store.write(folder / "records" / config.hook, header, columns)
    return Store(folder / "records" / config.hook)


# ---- results ------------------------------------------------------------------------------------------------------


def _figures(config: Config, records: dict[str, list[float]], files: dict[str, list[float]]) -> dict[str, Any]:
    """Return times and ratios of the seconds of every round."""
    cells = config.d_sae * config.prompts * config.length
    seconds = {"records": records, "files": files}

    def spreads(factor: float) -> dict[str, dict[str, dict[str, float]]]:
        return {
            part: {name: timing.spread([factor * t for t in times]) for name, times in sides.items()}
            for part, sides in seconds.items()
        }

    return {
        "seconds": spreads(1),
        "ms_per_latent": spreads(1e3 / config.d_sae),
        "ns_per_latent_and_token": spreads(1e9 / cells),
        "times_faster": {part: timing.ratios(sides, OURS)[PEER] for part, sides in seconds.items()},
    }


def _agreement(config: Config, folder: Path) -> dict[str, float]:
    """Return the fraction of latents on which both sides agree, within the precision of SAEDashboard's output."""
    import numpy as np

    from jsae.records.store import Store

    store = Store(folder / "records" / config.hook)
    files = sorted(folder.glob("batch-*.json"))
    theirs = [f for file in files for f in json.loads(file.read_text(encoding="utf-8"))["features"]]
    words, cells = store.texts.words, config.prompts * config.length
    same: dict[str, list[bool]] = {"count": [], "max": [], "strongest tokens": []}
    for feature in theirs:
        latent = feature["feature_index"]
        same["count"].append(abs(feature["frac_nonzero"] - store["count"][latent] / cells) < 1e-5)
        top = max((a["bin_max"] for a in feature["activations"]), default=0.0)
        same["max"].append(abs(top - float(store["max"][latent])) < 2e-3)
        same["strongest tokens"].append([words[i] for i in store["top_logits"][latent][:10]] == feature["pos_str"])
    return {name: float(np.mean(agrees)) for name, agrees in same.items()}


def _table(figures: dict[str, Any]) -> Any:
    from rich.table import Table

    parts = ("records", "files")
    table = Table("", *(f"{part}, ms per latent" for part in parts), title="dashboards of latents")
    for name in (PEER, OURS):
        table.add_row(name, *(f"{figures['ms_per_latent'][part][name]['median']:.2f}" for part in parts))
    table.add_row("times faster", *(f"{figures['times_faster'][part]['median']:.1f}" for part in parts))
    return table
