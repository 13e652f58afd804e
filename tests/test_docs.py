"""Documentation is true: its links, files, flags and imports exist. The site itself is built by `.ci/run`."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from absl import flags as absl_flags

from experiments import flags
from experiments.bench import BENCHES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for folder in (".", "docs", "docs/*")
    for path in sorted(ROOT.glob(f"{folder}/*.md"))
    if path.name != "CHANGELOG.md"
]
COMMANDS = {
    path.stem: match[1]
    for path in (ROOT / "experiments").glob("*.py")
    if (match := re.search(r"flags\.run\((\w+),", path.read_text(encoding="utf-8")))
}
OF_EVERY_COMMAND = {"flagfile", "help", "debug"}


@functools.cache
def known_flags(command: str) -> set[str]:
    """Return the flags of a command, or of `bench NAME`."""
    _, _, bench = command.partition(" ")
    module = importlib.import_module(BENCHES[bench] if bench else f"experiments.{command}")
    values = absl_flags.FlagValues()
    flags.define(getattr(module, "Config" if bench else COMMANDS[command]), flag_values=values)
    return set(values) | {f"no{name}" for name in values} | OF_EVERY_COMMAND


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of these languages."""
    text = page.read_text(encoding="utf-8")
    return [code for language, code in re.findall(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S) if language in languages]


def exists(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_pages_are_found():
    names = {name_of(page) for page in PAGES}
    assert {
        "README.md",
        "WORKSPACE.md",
        "docs/tutorial.md",
        "docs/guides/arrays.md",
        "docs/examples/arrays.md",
    } <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [file for file in files if file and not (page.parent / file).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_the_flags_that_are_shown(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for command, rest in re.findall(r"python -m experiments\.(bench [a-z]+|\w+)([^\n`#|]*)", text):
        given = {word[2:].partition("=")[0] for word in shlex.split(rest) if word.startswith("--")}
        if given or command != "bench":
            assert given <= known_flags(command), command
    in_prose = set(re.findall(r"`--(\w+)", text))
    assert in_prose <= set().union(*map(known_flags, [*COMMANDS, *(f"bench {name}" for name in BENCHES)]))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_is_shown_imports_what_exists(page):
    written = re.findall(r"^%%writefile (\w+)\.py", page.read_text(encoding="utf-8"), re.M)
    for code in blocks(page, "python", "{code-cell}"):
        for node in ast.walk(ast.parse(re.sub(r"\A(?:[:%]\S.*\n)+", "", code))):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom) and node.module not in written:
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not exists(module, name.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for kind, name in re.findall(r"(automodule|autofunction|autoclass):: ([\w.]+)", text):
        module, _, last = (name, "", "") if kind == "automodule" else name.rpartition(".")
        assert not last or hasattr(importlib.import_module(module), last), name
        importlib.import_module(module)
    for path in re.findall(r"`((?:jsae|bridge|experiments|tests|docs)/[\w/.]+\w)`", text):
        assert (ROOT / path).exists(), path


def test_files_on_the_map_exist():
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    chosen = text.partition("## Map")[2].partition("\n## ")[0]
    parts = re.split(r"^    (\w+)/ ", chosen, flags=re.M)
    for folder, part in zip(parts[1::2], parts[2::2], strict=True):
        names = set(re.findall(r"(?<![*\w])\w+\.py\b", part))
        assert names <= {path.name for path in (ROOT / folder).rglob("*.py")}, folder


def test_the_front_page_is_short_and_has_its_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    for marker, language in (("main command", "sh"), ("test command", "sh"), ("ten lines", "python")):
        assert re.search(rf"<!-- {marker} -->\n```{language}\n[^`]+\n```", text), marker
