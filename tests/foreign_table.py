"""Load checkpoints of other formats and compare them with goldens: `python -m tests.foreign_table` prints a table."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bridge import nanochat

FOREIGN = Path("../shared/nanochat/foreign")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one address of a case."""

    opened: str
    loaded: bool
    message: str
    """The error, or the warnings."""
    gap: float | None
    """The largest difference of the logits from the golden's."""
    faults: list[str]
    """Deviations from what the case expects; empty if there are none."""


def cases(folder: Path) -> list[Path]:
    """Return the folders of the cases."""
    return sorted(p.parent for p in folder.glob("*/case.json"))


def outcomes(case: Path) -> list[Outcome]:
    """Open everything that a case names; in a separate process if it sets environment variables."""
    settings = json.loads((case / "case.json").read_text())
    if "env" in settings and not os.environ.get("JSAE_FOREIGN_CASE"):
        env = os.environ | settings["env"] | {"JSAE_FOREIGN_CASE": "1"}
        if "HF_HUB_CACHE" in settings["env"]:
            env["HF_HUB_CACHE"] = str((case / settings["env"]["HF_HUB_CACHE"]).absolute())
        command = [sys.executable, "-m", "tests.foreign_table", "--json", str(case.absolute())]
        run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if run.returncode:
            raise RuntimeError(run.stderr)
        return [Outcome(**outcome) for outcome in json.loads(run.stdout)]
    opened = settings["open"] if isinstance(settings["open"], list) else [settings["open"]]
    return [_outcome(case, settings, path) for path in opened]


def _outcome(case: Path, settings: dict[str, Any], path: str) -> Outcome:
    where = path if path.startswith("hf://") else case / path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            nano = nanochat.load(where, **settings.get("kwargs", {}))
        except (ValueError, OSError) as error:
            nano, message = None, str(error)
        else:
            message = "; ".join(str(warning.message) for warning in caught)
    faults = [
        f"{name} exists: foreign code ran" for name in settings.get("must_not_exist", []) if (case / name).exists()
    ]
    if nano is None:
        if settings["right"] == "load":
            faults.append("it was refused")
        faults += [f"{p!r} is not in the message" for p in settings.get("message", []) if not _found(p, message)]
        faults += ["the message has several lines"] * ("\n" in message)
        return Outcome(path, False, message, None, faults)
    if settings["right"] == "refuse":
        return Outcome(path, True, message, None, [*faults, "it was loaded"])
    golden = load_file(case / "golden.safetensors")
    with torch.no_grad():
        gap = (nano.model(golden["tokens"]) - golden["logits"]).abs().max().item()
    faults += _differences(nano, settings)
    if "warning" in settings and not _found(settings["warning"], message):
        faults.append(f"no warning has {settings['warning']!r}")
    faults += [f"logits differ by {gap:.2g}"] * (not gap <= settings["atol"])
    return Outcome(path, True, message, gap, faults)


def _differences(nano: nanochat.Nanochat, settings: dict[str, Any]) -> list[str]:
    """Return the differences between the loaded model and what the case expects."""
    expected = dict(settings.get("expect", {}))
    faults = []
    for name, value in (expected.pop("config", {}) | expected).items():
        if name == "generation":
            actual = nano.generation
        elif name == "tokenizer":
            actual = nano.tokenizer and nano.tokenizer.vocab_size
        else:
            actual = getattr(nano.config, name, value)
        faults += [f"{name} is {actual!r} and not {value!r}"] * (actual != value)
    for text, ids in settings.get("tokenizer_golden", []):
        actual = nano.tokenizer.encode(text)
        faults += [f"{text!r} is encoded as {actual}"] * (actual != ids)
    return faults


def _found(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None


def main() -> None:
    """Print a line per address, or the outcomes of one case as JSON."""
    if "--json" in sys.argv:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes(Path(sys.argv[-1]))]))
        return
    print("| case | right | result | | logits differ by | message |\n|---|---|---|---|---|---|")
    for case in cases(Path(sys.argv[1]) if len(sys.argv) > 1 else FOREIGN):
        expected = json.loads((case / "case.json").read_text())["right"].replace("_", " ")
        for outcome in outcomes(case):
            name = case.name if not outcome.opened.startswith("hf://") else outcome.opened
            result, gap = "loaded" if outcome.loaded else "refused", f"{outcome.gap:.1e}" if outcome.loaded else ""
            verdict = "; ".join(outcome.faults) or "right"
            print(f"| {name} | {expected} | {result} | {verdict} | {gap} | {outcome.message.replace('|', '/')} |")


if __name__ == "__main__":
    main()
