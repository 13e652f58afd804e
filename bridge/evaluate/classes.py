"""Build labelled examples from the corpus, with their activations and latents, for the probes of `probing`."""

import collections
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int32

from bridge.evaluate import predicates, random_sae, syntax
from bridge.evaluate import text as texts
from bridge.evaluate.probing import Examples
from bridge.evaluate.site import Site, most_numbers, parts
from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.units import Unit, find_units
from bridge.torch_sae import TorchSAE

CONTEXT = 128
"""Tokens in a passage, including BOS, as in SAEBench."""
MOST_PACKAGES = 8
_PER_DOCUMENT = 8  # passages
_FEWEST_DOCUMENTS = 10  # in a class, so that some are left for testing
_BYTES_PER_PASSAGE = 512  # an estimate, used only to rank packages by size
_TEST_EVERY = 5  # every fifth document is for testing
_MOST_NUMBERS = 2**27  # in a table of examples and latents: half a GiB

TOKEN_CLASSES = ("in a docstring", "in a comment", "in a string", "in a function signature")
_PER_TOKEN_CLASS = 1000
MOST_LETTERS = 8
_PER_LETTER, _LETTER_TOKENS = 400, 65_536


class Passages(NamedTuple):
    """Passages of documents of known class."""

    tokens: Int32[np.ndarray, "n T"]
    """Token ids, BOS first."""
    kind: Int[np.ndarray, " n"]
    """Index into `classes`."""
    train: Bool[np.ndarray, " n"]
    """Whether a passage is for training. The split is by document: no document is in both parts."""
    classes: list[str]
    document: Int[np.ndarray, " n"] | None = None
    """The document of each passage; None: each is its own."""


def packages(spec: str, tokenizer: Tokenizer, max_tokens: int) -> Passages | None:
    """Return passages of the standard library's largest packages, equally many of each.

    The whole library is used, not only its held-out part: a twentieth of it has too few documents per package.

    Args:
      spec: the corpus, as for `units.find_units`.
      tokenizer: the model's.
      max_tokens: tokens of all passages together.

    Returns:
      The passages, or None if the corpus does not contain the standard library.
    """
    if "stdlib" not in (part.strip() for part in spec.split(",")):
        return None
    rng = np.random.default_rng(0)
    by_package: dict[str, list[Unit]] = collections.defaultdict(list)
    for unit in find_units("stdlib", "all", texts.HELDOUT_FRACTION):
        if package := package_of(unit.name):
            by_package[package].append(unit)
    usable = {name: units for name, units in by_package.items() if len(units) >= _FEWEST_DOCUMENTS}
    classes = sorted(usable, key=lambda name: -_size(usable[name]))[:MOST_PACKAGES]
    per_class = max(max_tokens // CONTEXT // max(len(classes), 1), 1)
    tokens, kind, train, document = [], [], [], []
    for class_index, name in enumerate(classes):
        units = [usable[name][i] for i in rng.permutation(len(usable[name]))]
        for is_train in (True, False):
            share = [unit for i, unit in enumerate(units) if (i % _TEST_EVERY > 0) == is_train]
            wanted = per_class * (_TEST_EVERY - 1) // _TEST_EVERY if is_train else max(per_class // _TEST_EVERY, 1)
            for _, (name_of_unit, row) in zip(range(wanted), _passages(share, tokenizer, rng), strict=False):
                tokens.append(row)
                kind.append(class_index)
                train.append(is_train)
                document.append(name_of_unit)
    if not tokens:
        return None
    return Passages(
        np.stack(tokens), np.array(kind), np.array(train), classes, np.unique(document, return_inverse=True)[1]
    )


def package_of(unit: str) -> str | None:
    """Return the package of a unit of the standard library, named like `text json/decoder.py 0123456789ab`."""
    path = unit.removeprefix("text ").rsplit(" ", 1)[0]
    if path.startswith("topic "):
        return "language reference"
    if path.startswith("help("):
        return "help of compiled modules"
    return path.split("/")[0] if "/" in path else None


def _size(units: list[Unit]) -> int:
    """Return an estimate of the number of passages in units."""
    lengths = (len(document) for unit in units for document in unit.read() if isinstance(document, str))
    return sum(min(length // _BYTES_PER_PASSAGE, _PER_DOCUMENT) for length in lengths)


def _passages(units: list[Unit], tokenizer: Tokenizer, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yield some passages of every unit with its name, at random positions, without overlap."""
    for unit in units:
        for document in texts.unit_documents(unit, tokenizer):
            count = len(document.ids) // (CONTEXT - 1)
            for i in rng.permutation(count)[:_PER_DOCUMENT]:
                part = document.ids[i * (CONTEXT - 1) : (i + 1) * (CONTEXT - 1)]
                yield unit.name, np.concatenate([[tokenizer.bos_token_id], part]).astype(np.int32)


@torch.no_grad()
def passage_examples(site: Site, sae: TorchSAE, passages: Passages) -> Examples:
    """Return passages as means of their activations and latents over the tokens that count (no BOS, no sinks).

    The random SAE of the baseline has the mean and the L0 of the first forward pass.
    """
    sample = _subsample(len(passages.tokens), sae)
    tokens, kind, train = (column[sample] for column in passages[:3])
    acts: list[np.ndarray] = []
    latents: list[np.ndarray] = []
    random: list[np.ndarray] = []
    baseline: TorchSAE | None = None
    for _, ids, x, _, mask in site.read(site.batches(tokens, sae.d_sae)):
        weight = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
        counted = x[mask].float()
        baseline = random_sae.like(sae, counted) if baseline is None else baseline
        acts.append((x.float() * weight[..., None]).sum(1).cpu().numpy())
        for encoder, pooled in ((sae, latents), (baseline, random)):
            sums = counted.new_zeros(len(ids), sae.d_sae)
            for part in parts(len(counted), most_numbers(counted.device) // sae.d_sae):
                values = encoder.encode(counted[part]) * weight[mask][part, None]
                sums.index_add_(0, mask.nonzero()[part, 0], values)
            pooled.append(sums.cpu().numpy())
    member = kind[:, None] == np.arange(len(passages.classes))
    document = None if passages.document is None else passages.document[sample]
    columns = (np.concatenate(acts), np.concatenate(latents), member, train, passages.classes)
    return Examples(*columns, np.concatenate(random), document)


@torch.no_grad()
def letter_examples(site: Site, sae: TorchSAE, text: Text, tokenizer: Tokenizer) -> Examples | None:
    """Return single tokens with the concepts of `absorption`: their first letter, and whether they are capitalised.

    The `MOST_LETTERS` most frequent letters are taken, in the first `_LETTER_TOKENS` tokens of the text. Every fifth
    document is for testing. None if no token has a concept.
    """
    rows = max(_LETTER_TOKENS // text.tokens.shape[1], 1)
    part = Text(text.tokens[:rows], text.document[:rows], text.place[:rows], text.sources)
    tables = predicates.vocabulary(tokenizer)
    flat = part.tokens.reshape(-1)
    letters = [name for name in tables if name.startswith("begins with the letter ")]
    frequent = sorted(letters, key=lambda name: -int(tables[name][flat].sum()))[:MOST_LETTERS]
    names = [*sorted(frequent), "capitalised word"]
    member = np.stack([tables[name][flat] for name in names], axis=1)
    return _tokens(site, sae, part, names, member, part.document.reshape(-1) >= 0, _PER_LETTER)


def token_examples(site: Site, sae: TorchSAE, text: Text) -> Examples | None:
    """Return single tokens of Python code inside and outside of `TOKEN_CLASSES`; None if no document parses as Python.

    Every fifth document is for testing.
    """
    marks, known = text.syntax
    class_bits = [np.uint64(1 << syntax.CONTEXTS.index(name)) for name in TOKEN_CLASSES]
    member = np.stack([(marks & bit) > 0 for bit in class_bits], axis=1)
    known &= text.document.reshape(-1) >= 0
    return _tokens(site, sae, text, list(TOKEN_CLASSES), member, known, _PER_TOKEN_CLASS)


@torch.no_grad()
def _tokens(
    site: Site,
    sae: TorchSAE,
    text: Text,
    names: list[str],
    member: Bool[np.ndarray, "N C"],
    known: Bool[np.ndarray, " N"],
    per_class: int,
) -> Examples | None:
    """Return single tokens of a text as examples, equally many of each class; None if there are none.

    The random SAE of the baseline has the mean and the L0 of the examples.
    """
    document = text.document.reshape(-1)
    chosen = _balanced(member, known, _for_training(document), per_class)
    chosen = chosen[_subsample(len(chosen), sae)]
    if not len(chosen):
        return None
    wanted = np.zeros(text.tokens.shape, bool)
    wanted.reshape(-1)[chosen] = True
    acts, latents, indices = [], [], []
    for start, ids, x, _, mask in site.read(site.batches(text.tokens)):
        selected = torch.from_numpy(wanted[start : start + len(ids)]).to(mask.device) & mask
        acts.append(x[selected].float().cpu().numpy())
        latents.append(sae.encode(x[selected].float()).cpu().numpy())
        indices.append(selected.flatten().nonzero()[:, 0].cpu().numpy() + start * ids.shape[1])
    index = np.concatenate(indices)
    inputs = np.concatenate(acts)
    baseline = _encoded(random_sae.like(sae, torch.from_numpy(inputs).to(site.device)), inputs, site)
    columns = (inputs, np.concatenate(latents), member[index], _for_training(document)[index], names)
    return Examples(*columns, baseline, document[index])


def _encoded(sae: TorchSAE, inputs: Float32[np.ndarray, "n d"], site: Site) -> Float32[np.ndarray, "n f"]:
    """Return the latents of single activations."""
    parts = torch.from_numpy(inputs).split(site.tokens_per_forward)
    return np.concatenate([sae.encode(part.to(site.device)).cpu().numpy() for part in parts])


def _balanced(
    member: Bool[np.ndarray, "N C"], known: Bool[np.ndarray, " N"], train: Bool[np.ndarray, " N"], per_class: int
) -> Int[np.ndarray, " n"]:
    """Return indices of random tokens, ascending: equally many of each class and of none, in training and test."""
    rng = np.random.default_rng(0)
    chosen: list[np.ndarray] = []
    for in_class in (*member.T, ~member.any(1)):
        for part, most in ((train, per_class), (~train, per_class // (_TEST_EVERY - 1))):
            chosen.append(rng.permutation(np.flatnonzero(in_class & known & part))[:most])
    return np.unique(np.concatenate(chosen))


def _for_training(document: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Return whether each token's document is for training."""
    return document % _TEST_EVERY > 0


def _subsample(examples: int, sae: TorchSAE) -> np.ndarray:
    """Return the indices of all examples, ascending, or of a sample if the table of latents would be too large."""
    most = max(_MOST_NUMBERS // sae.d_sae, 1)
    return np.sort(np.random.default_rng(1).permutation(examples)[:most])
