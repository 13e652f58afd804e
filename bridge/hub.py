"""Publish a run's exported SAEs on the Hugging Face hub, one folder per hook, with a model card. No torch, no jax.

Pushing needs the extra [hub]; the card and the plan do not. The layout is that of
`sae_lens.SAE.from_pretrained("owner/name", "blocks.2.hook_resid_post")`.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from bridge.run import Run
from jsae import extras, jsons
from jsae.saelens import config as sae_config
from jsae.saelens.settings import CFG, SPARSITY, WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LOG = logging.getLogger(__name__)

_REQUIRED, _OPTIONAL = (CFG, WEIGHTS), (SPARSITY,)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,39}")
_TAGS = ("sparse-autoencoder", "saelens", "interpretability", "nanochat", "jsae")

_METRICS: Mapping[str, str] = {
    "fraction of variance unexplained": "fvu",
    "explained variance": "explained_variance",
    "active latents per token (L0)": "l0",
    "latents that never fire": "dead_fraction",
    "cosine of input and reconstruction": "cosine",
    "relative reconstruction bias": "relative_reconstruction_bias",
    "loss recovered, over zero ablation": "model_performance_preservation.ce_loss_score",
    "loss of the model": "model_performance_preservation.ce_loss_without_sae",
    "loss with the SAE in place": "model_performance_preservation.ce_loss_with_sae",
    "bits per byte of the model": "bits_per_byte.without_sae",
    "bits per byte with the SAE in place": "bits_per_byte.with_sae",
}
"""Dotted paths of metrics in eval.json, by their names on the card."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """One file to upload."""

    path: str
    """Path in the repository."""
    content: Path | bytes
    size: int
    """Size in bytes."""


@dataclasses.dataclass(frozen=True)
class _Export:
    """An exported SAE of a run."""

    hook: str
    folder: Path
    cfg: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        metadata = self.cfg.get("metadata")
        return metadata if isinstance(metadata, dict) else {}


def push(
    run: str | Path,
    repo_id: str,
    *,
    license: str,
    hooks: Sequence[str] | None = None,
    private: bool = False,
    dry_run: bool = False,
    api: "HfApi | None" = None,
    token: str | None = None,
) -> list[Upload]:
    """Upload a run's exports and their card to the hub in one commit, after logging the files and their sizes.

    Only the files of `plan` are sent. Other files in an existing repository are kept.

    Args:
      run: the run directory.
      repo_id: "owner/name".
      license: the hub's identifier of a licence, such as "mit" or "apache-2.0".
      hooks: hooks of the SAEs to upload; None: all of the run.
      private: create a private repository; an existing public one is refused.
      dry_run: log the files, but use no network.
      api: a `huggingface_hub.HfApi`; None: create one with the token.
      token: a write token; None: that of `hf auth login` or HF_TOKEN.

    Returns:
      The files that were, or would be, uploaded.

    Raises:
      ValueError: the hub would refuse the name of the repository or the licence, an export is damaged, there is no
        token, or `private` is set and the repository is public.
      FileNotFoundError: the run has no export, or none of a hook.
      ModuleNotFoundError: the extra [hub] is not installed.
    """
    uploads = plan(run, repo_id, license=license, hooks=hooks)
    for upload in uploads:
        _LOG.info("%s %s: %s bytes", "would send" if dry_run else "sending", upload.path, f"{upload.size:,}")
    if dry_run:
        return uploads
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"pushing to the hub needs huggingface_hub: {extras.advice('hub')}") from error
    if api is None:
        token = token or huggingface_hub.get_token()
        if token is None:
            raise ValueError("no write token for the hub: run `hf auth login`, or set HF_TOKEN")
        api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: the owner's default
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id} is public, but a private one was requested: nothing was sent; make it private first"
        )
    operations = [huggingface_hub.CommitOperationAdd(upload.path, upload.content) for upload in uploads]
    added = [upload.path.partition("/")[0] for upload in uploads if upload.path.endswith(f"/{CFG}")]
    api.create_commit(repo_id, operations, commit_message=f"Add sparse autoencoders of {', '.join(added)}")
    return uploads


def plan(run: str | Path, repo_id: str, *, license: str, hooks: Sequence[str] | None = None) -> list[Upload]:
    """Return the files of `push`: README.md, and the config, weights and densities of every hook.

    Local paths in a config, such as that of the data, are reduced to their last part.

    Raises ValueError and FileNotFoundError as `push`.
    """
    _check_names(repo_id, license)
    exports = _exports(Run(run), hooks)
    text = _card(Run(run), exports, repo_id, license).encode()
    uploads = [Upload("README.md", text, len(text))]
    for export in exports:
        for name in (*_REQUIRED, *_OPTIONAL):
            file = export.folder / name
            if name == CFG:
                content = _cfg(export).encode()
                uploads.append(Upload(f"{export.hook}/{name}", content, len(content)))
            elif file.is_file():
                uploads.append(Upload(f"{export.hook}/{name}", file, file.stat().st_size))
    return uploads


def _cfg(export: _Export) -> str:
    """Return the `cfg.json` that is sent."""
    try:
        return json.dumps(_portable(export.cfg), indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{export.folder / 'cfg.json'} holds numbers that are not finite ({error})") from error


def card(run: str | Path, repo_id: str, *, license: str) -> str:
    """Return the model card of a run: model, data, metrics, usage and licence of its SAEs.

    Raises:
      ValueError: the hub would refuse the name of the repository or the licence, or an export is damaged.
      FileNotFoundError: the run has no export.
    """
    _check_names(repo_id, license)
    return _card(Run(run), _exports(Run(run)), repo_id, license)


def _card(run: Run, exports: Sequence[_Export], repo_id: str, license: str) -> str:
    hooks = [export.hook for export in exports]
    sections = [
        "\n".join(
            ["---", f'license: "{license}"', "library_name: saelens", "tags:", *(f"- {t}" for t in _TAGS), "---"]
        ),
        f"# {repo_id.partition('/')[2]}",
        f"Sparse autoencoders of the activations of a nanochat, {_metadata(exports, 'model_name')}, trained with jsae.",
        _shapes(exports),
        "## Data\n\n" + _data(exports, _json(run.config_file)),
        "## Metrics\n\n" + _metrics(hooks, _json(run.table_file("eval")), _last_line(run.metrics_file)),
        "## The model they belong to\n\n" + _base(exports),
        "## Use\n\n" + _use(repo_id, hooks[0]),
        f"## Licence\n\nThe weights in this repository: `{license}`.",
    ]
    return "\n\n".join(sections) + "\n"


def _check_names(repo_id: str, license: str) -> None:
    """Raise ValueError for names that the hub would refuse."""
    owner, slash, name = repo_id.partition("/")
    part = re.compile(r"[A-Za-z0-9]([\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
    valid = slash and part.fullmatch(owner) and part.fullmatch(name) and len(repo_id) <= 96
    if not valid or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ValueError(
            f"{repo_id!r} is not a repository id: expected owner/name of letters, digits, '-', '_' and '.', "
            "with at most 96 characters, without '--', '..' or '.git' at the end"
        )
    if not _LICENSE.fullmatch(license):
        raise ValueError(
            f"{license!r} is not a licence of the hub: expected an identifier such as mit, apache-2.0 or cc-by-4.0 "
            "(https://huggingface.co/docs/hub/repositories-licenses)"
        )


def _exports(run: Run, hooks: Sequence[str] | None = None) -> list[_Export]:
    """Return the finished exports of a run. Raises FileNotFoundError if there are none, or none of a hook."""
    folders = list(run.exports.values())
    if missing := sorted(set(hooks or ()) - {folder.name for folder in folders}):
        names = ", ".join(folder.name for folder in folders) or "none"
        raise FileNotFoundError(f"{run.path} has no SAE of {', '.join(missing)}; it has {names}")
    exports = [_read(folder) for folder in folders if hooks is None or folder.name in hooks]
    if not exports:
        raise FileNotFoundError(
            f"no exported SAE in {run.saes_folder}: `python -m experiments.train` writes it at the end of a run"
        )
    return exports


def _read(folder: Path) -> _Export:
    """Return an export. Raises ValueError if it is damaged."""
    if not re.fullmatch(r"[\w.-]+", folder.name, re.ASCII):
        raise ValueError(
            f"{folder} is not a valid folder name on the hub: name it blocks.2.hook_resid_post, as the hook"
        )
    if not (folder / _REQUIRED[1]).is_file():
        raise ValueError(f"{folder} is incomplete: {_REQUIRED[1]} is missing; train it again")
    settings = sae_config.read(folder)
    settings.checked()
    return _Export(folder.name, folder, settings.written)


def _portable(value: Any) -> Any:
    """Return JSON values with local paths reduced to their last part."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute() or value.startswith(("~", "..")):
                return kind(value).name
    return value


# ---- sections of the card ----------------------------------------------------------------------------------------


def _shapes(exports: Sequence[_Export]) -> str:
    rows = []
    for e in exports:
        tokens = e.metadata.get("training_tokens")
        sizes = (e.cfg["architecture"], e.cfg["d_in"], e.cfg["d_sae"], e.cfg.get("k", "–"))
        rows.append((f"`{e.hook}`", *sizes, f"{tokens:,}" if isinstance(tokens, int) else "–"))
    return _table(("folder and hook", "architecture", "d_in", "d_sae", "k", "activations seen in training"), rows)


def _data(exports: Sequence[_Export], config: Mapping[str, Any]) -> str:
    names = _metadata(exports, "dataset_path")
    lines = [f"- trained on activations over: {names or 'text that the files do not name'}"]
    if lengths := _metadata(exports, "context_size"):
        lines.append(f"- tokens in a row: {lengths}; each row begins with BOS")
    for ids in dict.fromkeys(map(_excluded, exports)):
        if ids is not None:
            lines.append(f"- token ids left out of training and measurement: {ids or 'none'}")
    facts = config.get("facts")
    if isinstance(facts, dict) and isinstance(facts.get("data"), str):
        lines.append(f"- fingerprint of the text: `{_cell(facts['data'])}`")
    return "\n".join(lines)


def _excluded(export: _Export) -> str | None:
    """Return the ids of the excluded tokens as text; None if the export does not contain them."""
    ids = export.metadata.get("exclude_special_tokens")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        return None
    return ", ".join(map(str, ids[:20])) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")


def _metrics(hooks: Sequence[str], evaluation: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Return a table of the evaluation's metrics, a column per hook; without evaluation, of the last training step."""
    hooks = [hook for hook in hooks if isinstance(evaluation.get(hook), dict)]
    if hooks:
        rows = [
            (label, *(_number(_find(evaluation[hook], path)) for hook in hooks))
            for label, path in _METRICS.items()
            if any(_find(evaluation[hook], path) is not None for hook in hooks)
        ]
        rows.append(("tokens measured", *(_number(_find(evaluation[hook], "tokens")) for hook in hooks)))
        return _table(("of the exported weights, on held-out text", *(f"`{hook}`" for hook in hooks)), rows)
    rows = [(label, _number(_find(last, path))) for label, path in _METRICS.items() if _find(last, path) is not None]
    if rows:
        return _table(("at the end of training, not on held-out text", ""), rows)
    return "None were measured."


def _base(exports: Sequence[_Export]) -> str:
    name, fingerprint = _metadata(exports, "model_name"), _metadata(exports, "model_fingerprint")
    return (
        f"{name or 'A nanochat'}{f', sha256 of the checkpoint {fingerprint}' * bool(fingerprint)}. These "
        "autoencoders are of that checkpoint's activations only; its weights are not in this repository."
    )


def _metadata(exports: Sequence[_Export], name: str) -> str:
    """Return the distinct values of a metadata field of the exports, comma-separated."""
    values = (e.metadata[name] for e in exports if isinstance(e.metadata.get(name), str | int))
    return ", ".join(f"`{_cell(_portable(value))}`" for value in dict.fromkeys(values))


def _use(repo_id: str, hook: str) -> str:
    return f"""With [SAELens](https://github.com/decoderesearch/SAELens):

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{hook}")
```

With jsae, which runs the nanochat too:

```python
import huggingface_hub

from bridge import nanochat
from bridge.runtime import InterpretableModel, load_saes

saes = load_saes(huggingface_hub.snapshot_download("{repo_id}"))
im = InterpretableModel.from_nanochat(nanochat.load("path/to/its/checkpoint"), saes)
```"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Return text without characters that would break the layout of the card."""
    printable = str(value).encode("utf-8", "replace").decode()  # replaces lone surrogates
    return re.sub(r"[\s`|<>\[\]*]+", " ", printable).strip()[:200]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"


def _find(values: Mapping[str, Any], path: str) -> float | None:
    """Return the finite number at a dotted path, or None."""
    value: Any = values
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if jsons.is_finite(value) else None


def _json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no file. Raises ValueError for other contents."""
    if not file.is_file():
        return {}
    value = jsons.read(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file} contains {type(value).__name__}, expected an object")
    return value


def _last_line(file: Path) -> dict[str, Any]:
    """Return the last complete object in a file of JSON lines, {} if there is none."""
    last: dict[str, Any] = {}
    for _, line in jsons.objects(file):
        last = line or last
    return last
