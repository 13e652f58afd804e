"""Text with classes, made from the corpus itself, and what model and SAE have to say of it: what `probing` works on."""

import collections
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32

from bridge.evaluate import predicates, syntax
from bridge.evaluate import text as texts
from bridge.evaluate.probing import Examples
from bridge.evaluate.site import Site
from bridge.evaluate.text import Text
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.units import Unit, find_units
from bridge.torch_sae import TorchSAE

CONTEXT = 128
"""Tokens in a passage, BOS among them: as in SAEBench."""
MOST_PACKAGES = 8
_PER_DOCUMENT = 8  # passages
_FEWEST_DOCUMENTS = 10  # in a class, so that some are left for the test
_BYTES_PER_PASSAGE = 512  # a guess that says which packages are large, and nothing else
_TEST_EVERY = 5  # every fifth document is for the test
_MOST_NUMBERS = 2**27  # in a table of examples and latents: half a GiB

TOKEN_CLASSES = ("in a docstring", "in a comment", "in a string", "in a function signature")
_PER_TOKEN_CLASS = 1000


class Passages(NamedTuple):
    """Passages of documents of known class."""

    tokens: Int32[np.ndarray, "n T"]
    """BOS first."""
    kind: Int[np.ndarray, " n"]
    """Index into `classes`."""
    train: Bool[np.ndarray, " n"]
    """By document: no document is in both parts."""
    classes: list[str]


def packages(spec: str, tokenizer: Tokenizer, max_tokens: int) -> Passages | None:
    """Passages of the standard library's largest packages, as many of each; None if the corpus is without it.

    All of the library is used, not what is held out of it: a twentieth of it has too few documents of a package.
    """
    if "stdlib" not in (part.strip() for part in spec.split(",")):
        return None
    rng = np.random.default_rng(0)
    by_package: dict[str, list[Unit]] = collections.defaultdict(list)
    for unit in find_units("stdlib", "all", texts.HELDOUT_FRACTION):
        if package := package_of(unit.name):
            by_package[package].append(unit)
    enough = {name: units for name, units in by_package.items() if len(units) >= _FEWEST_DOCUMENTS}
    classes = sorted(enough, key=lambda name: -_size(enough[name]))[:MOST_PACKAGES]
    each = max(max_tokens // CONTEXT // max(len(classes), 1), 1)
    tokens, kind, train = [], [], []
    for c, name in enumerate(classes):
        units = [enough[name][i] for i in rng.permutation(len(enough[name]))]
        for is_train in (True, False):
            share = [unit for i, unit in enumerate(units) if (i % _TEST_EVERY > 0) == is_train]
            wanted = each * (_TEST_EVERY - 1) // _TEST_EVERY if is_train else max(each // _TEST_EVERY, 1)
            for _, row in zip(range(wanted), _passages(share, tokenizer, rng), strict=False):
                tokens.append(row)
                kind.append(c)
                train.append(is_train)
    return Passages(np.stack(tokens), np.array(kind), np.array(train), classes) if tokens else None


def package_of(unit: str) -> str | None:
    """The package of a unit of the standard library by its name, `text json/decoder.py 0123456789ab`."""
    path = unit.removeprefix("text ").rsplit(" ", 1)[0]
    if path.startswith("topic "):
        return "language reference"
    if path.startswith("help("):
        return "help of compiled modules"
    return path.split("/")[0] if "/" in path else None


def _size(units: list[Unit]) -> int:
    """About how many passages units hold."""
    lengths = (len(document) for unit in units for document in unit.read() if isinstance(document, str))
    return sum(min(length // _BYTES_PER_PASSAGE, _PER_DOCUMENT) for length in lengths)


def _passages(units: list[Unit], tokenizer: Tokenizer, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Some passages of every unit, at random places that do not overlap."""
    for unit in units:
        for document in texts.of_unit(unit, tokenizer):
            count = len(document.ids) // (CONTEXT - 1)
            for i in rng.permutation(count)[:_PER_DOCUMENT]:
                part = document.ids[i * (CONTEXT - 1) : (i + 1) * (CONTEXT - 1)]
                yield np.concatenate([[tokenizer.bos_token_id], part]).astype(np.int32)


@torch.no_grad()
def of_passages(site: Site, sae: TorchSAE, passages: Passages) -> Examples:
    """Each passage by the means of its activations and latents over the tokens that count (not BOS, no sinks)."""
    few = _fewer(len(passages.tokens), sae)
    tokens, kind, train = (column[few] for column in passages[:3])
    acts, latents = [], []
    for _, ids, x, _, mask in site.read(site.batches(tokens, sae.d_sae)):
        weight = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
        f = sae.encode(x[mask].float()) * weight[mask][:, None]
        pooled = f.new_zeros(len(ids), sae.d_sae).index_add_(0, mask.nonzero()[:, 0], f)
        acts.append((x.float() * weight[..., None]).sum(1).cpu().numpy())
        latents.append(pooled.cpu().numpy())
    member = kind[:, None] == np.arange(len(passages.classes))
    return Examples(np.concatenate(acts), np.concatenate(latents), member, train, passages.classes)


@torch.no_grad()
def of_tokens(site: Site, sae: TorchSAE, text: Text) -> Examples | None:
    """Tokens of Python inside and outside of `TOKEN_CLASSES`, one by one; None if nothing here parses as Python.

    Every fifth document is for the test.
    """
    document = text.document.reshape(-1)
    marks, known = predicates.bits(text)
    bit = [np.uint64(1 << syntax.CONTEXTS.index(name)) for name in TOKEN_CLASSES]
    member = np.stack([(marks & b) > 0 for b in bit], axis=1)
    chosen = _balanced(member, known & (document >= 0), _for_training(document))
    chosen = chosen[_fewer(len(chosen), sae)]
    if not len(chosen):
        return None
    wanted = np.zeros(text.tokens.shape, bool)
    wanted.reshape(-1)[chosen] = True
    acts, latents, found = [], [], []
    for start, ids, x, _, mask in site.read(site.batches(text.tokens)):
        here = torch.from_numpy(wanted[start : start + len(ids)]).to(mask.device) & mask
        acts.append(x[here].float().cpu().numpy())
        latents.append(sae.encode(x[here].float()).cpu().numpy())
        found.append(here.flatten().nonzero()[:, 0].cpu().numpy() + start * ids.shape[1])
    index = np.concatenate(found)
    train = _for_training(document)[index]
    return Examples(np.concatenate(acts), np.concatenate(latents), member[index], train, list(TOKEN_CLASSES))


def _balanced(
    member: Bool[np.ndarray, "N C"], known: Bool[np.ndarray, " N"], train: Bool[np.ndarray, " N"]
) -> Int[np.ndarray, " n"]:
    """Tokens, ascending: of each class, in training and test, so many at random, and as many of none of them."""
    rng = np.random.default_rng(0)
    chosen: list[np.ndarray] = []
    for truth in (*member.T, ~member.any(1)):
        for half, most in ((train, _PER_TOKEN_CLASS), (~train, _PER_TOKEN_CLASS // (_TEST_EVERY - 1))):
            chosen.append(rng.permutation(np.flatnonzero(truth & known & half))[:most])
    return np.unique(np.concatenate(chosen))


def _for_training(document: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    return document % _TEST_EVERY > 0


def _fewer(examples: int, sae: TorchSAE) -> np.ndarray:
    """All examples, ascending; of wide SAEs as many at random as a table of all latents may hold."""
    most = max(_MOST_NUMBERS // sae.d_sae, 1)
    return np.sort(np.random.default_rng(1).permutation(examples)[:most])
