"""Messages name flags that the command which prints them has."""

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import CONFIGS

from jsae.extras import advice as extras_advice

ROOT = Path(__file__).resolve().parents[1]
EVERYWHERE = {"help", "debug", "flagfile", "name"}  # --name=value says how flags are written
DATA = (
    *(f"bridge.nanochat.{name}" for name in ("contents", "corpus", "documents", "library", "lines", "pages", "shards")),
    "bridge.nanochat.units",
    "bridge.evaluate.text",
    "bridge.explorer.gather",
)
_FLAG = re.compile(r"(?<![\w-])--(?:no)?([a-z][a-z0-9_]+)")
_FILES = [path for room in ("bridge", "experiments", "jsae") for path in sorted((ROOT / room).rglob("*.py"))]


def flags_of(command: str) -> set[str]:
    return {field.name for field in dataclasses.fields(CONFIGS[command])} | EVERYWHERE


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): ast.parse(path.read_text()) for path in _FILES}


def messages(tree: ast.Module) -> Iterator[str]:
    """Yield what is raised, required or printed, f-strings without their fields."""
    calls = ("require", "print", "_fail", "warn")
    for node in ast.walk(tree):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Raise) or name in calls:
            parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            yield " ".join(parts)


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, at its head or later."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def reached(name: str) -> set[str]:
    """A module, and all that it imports, directly or not; but not another command that it calls."""
    seen, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += [other for other in imports(current) if other.removeprefix("experiments.") not in CONFIGS]
    return seen


REACHED = {command: reached(f"experiments.{command}") | {f"experiments.{command}"} for command in CONFIGS}


# Benches have flags of their own, and run commands of other trainers.
@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("experiments.bench")])
def test_every_flag_that_a_message_names_exists(name):
    users = [command for command in CONFIGS if name in REACHED[command]]
    allowed = set().union(*map(flags_of, users or CONFIGS))
    for message in messages(MODULES[name]):
        named = set(_FLAG.findall(message))
        for other in re.findall(r"experiments\.(\w+)", message):  # python -m experiments.train --output_dir=...
            named -= flags_of(other)
        foreign = {"logdir"} if "tensorboard" in message else set()
        assert named <= allowed | foreign, message


def test_every_extra_that_a_message_names_exists_and_is_installed_from_a_clone():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = [n for tree in MODULES.values() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    named = {ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "extras.advice"}
    assert {"eval", "hub", "neuronpedia", "pretrain", "wandb", "web"} <= named <= set(extras)
    assert extras_advice("web") == 'run pip install -e ".[web]" in the clone of jsae'
    assert not [path for path in _FILES if "jsae[" in path.read_text()]


@pytest.mark.parametrize("name", DATA)
def test_messages_about_data_name_flags_of_all_commands_that_read_it(name):
    users = [command for command in CONFIGS if name in REACHED[command]]
    assert users
    for message in messages(MODULES[name]):
        for command in users:
            assert set(_FLAG.findall(message)) <= flags_of(command), message


def test_every_command_that_reads_text_has_a_flag_for_it():
    readers = [command for command in CONFIGS if "bridge.nanochat.units" in REACHED[command]]
    assert {"train", "pretrain", "evaluate", "explore"} <= set(readers)
    assert all("data" in flags_of(command) for command in ("train", "pretrain", "evaluate", "explore"))
