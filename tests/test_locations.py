"""Paths in flags are expanded in the same way by every command; flagfiles in any encoding, and hostile ones."""

import codecs
import dataclasses
import os
from pathlib import Path

import pytest
from commands import CONFIGS

from bridge import locations
from bridge.run import directory as rundir
from bridge.training.config import RunConfig
from experiments import flagfile, flags
from jsae.settings import ConfigError

NEEDED = {
    "collect": {"out": "runs/x"},
    "steer": {"run_dir": "runs/x", "prompt": "def"},
    "trace": {"run_dir": "runs/x", "prompt": "def"},
    "evaluate": {"run_dir": "runs/x", "steering": True},
    "explore": {"run_dir": "runs/x"},
    "export": {"run_dir": "runs/x"},
    "publish": {"run_dir": "runs/x"},
    "finetune": {"sae": "runs/x", "out": "runs/y"},
    "diff": {"run_dir": "runs/x"},
    "lens": {"run_dir": "runs/x", "prompt": "def"},
    "pretrain": {"watch_layer": ("1",)},
    "provenance": {"run_dir": "runs/x", "latent": (1,)},
    "stability": {"run_dir": "runs/x"},
}
PATHS = [
    (command, name)
    for command, config_class in CONFIGS.items()
    for name in locations._locations(config_class)
    if (command, name)
    not in {
        *(("publish", "folder"), ("evaluate", "compare"), ("evaluate", "sae")),
        *(("train", "checkpoints"), ("diff", "saes"), ("diff", "output_file"), ("diff", "film")),
        *(("lens", "merge"), ("lens", "lens")),
        ("stability", "runs"),
    }
]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "some/where")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_flag_that_names_a_place_is_marked_as_one():
    words = ("dir", "checkpoint", "tokenizer", "data", "out", "folder", "path", "file", "sae", "compare")
    for command, config_class in CONFIGS.items():
        for field in dataclasses.fields(config_class):
            if field.type in ("str", "str | None", "tuple[str, ...]", str) and field.name.split("_")[-1] in words:
                assert field.name in locations._locations(config_class), (command, field.name)


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_home_and_variables_mean_the_same_in_every_flag(command, name, home):
    config_class = CONFIGS[command]

    def given(path: str) -> str:
        return getattr(config_class(**(NEEDED.get(command, {}) | {name: path})), name)

    assert given("~/x") == f"{home}/x"
    assert given("$HOME/x") == given("${HOME}/x") == f"{home}/x"
    assert given("$WHERE/x") == "some/where/x"
    assert given("a/../b") == "a/../b"
    assert given("./demo") == "./demo"
    assert given("hf://owner/$name") == "hf://owner/$name"
    for path, complaint in {
        "~nosuchuser/x": "names the home of ~nosuchuser",
        "$NOWHERE/x": "the environment variable NOWHERE, which is not set",
        "a\0b": "zero byte",
        "a\udcff": "not UTF-8",
    }.items():
        with pytest.raises(ConfigError, match=complaint) as refused:
            given(path)
        assert f"--{name}: " in str(refused.value)


def test_lists_of_places_are_expanded_one_by_one(home):
    assert RunConfig(data="~/a/*.txt, $WHERE/b,stdlib").data == f"{home}/a/*.txt,some/where/b,stdlib"
    assert CONFIGS["evaluate"](compare=("~/a", "$WHERE")).compare == (f"{home}/a", "some/where")
    followed = CONFIGS["diff"](saes=("~/a", "$WHERE"), output_file="~/o")
    assert (followed.saes, followed.output_file) == ((f"{home}/a", "some/where"), f"{home}/o")
    assert RunConfig(checkpoints=("b=~/a@1", "2")).checkpoints == (f"b={home}/a@1", "2")
    both = CONFIGS["publish"](import_to="postgresql://localhost/$db", folder="~/v1")
    assert (both.import_to, both.folder) == ("postgresql://localhost/$db", f"{home}/v1")


def test_a_file_of_that_very_name_is_taken_at_its_word(home):
    (home / "~nosuchuser").mkdir()
    (home / "a$NOWHERE").touch()
    assert locations.expand("~nosuchuser") == "~nosuchuser"
    assert locations.expand("a$NOWHERE") == "a$NOWHERE"


# ---- what is recorded ----------------------------------------------------------------------------------------------


def test_a_run_is_resumed_from_another_directory_by_an_equivalent_spelling(home, monkeypatch):
    (home / "texts").mkdir()
    run = home / "run"
    with rundir.claimed(run, RunConfig(output_dir="run", data="texts/*.txt,stdlib", checkpoint="models/d4")):
        rundir.record(run, RunConfig(output_dir="run", data="texts/*.txt,stdlib", checkpoint="models/d4"), {})
    recorded = rundir.read(run)["flags"]
    assert recorded["data"] == f"{home}/texts/*.txt,stdlib"
    assert recorded["checkpoint"] == f"{home}/models/d4"
    assert recorded["output_dir"] == str(run)
    (home / "elsewhere").mkdir()
    (home / "link").symlink_to(home / "texts")
    monkeypatch.chdir(home / "elsewhere")
    for data in ("~/texts/*.txt,stdlib", "../texts/*.txt, stdlib", "$HOME/link/*.txt,stdlib"):
        with rundir.claimed(run, RunConfig(output_dir="../run", data=data, checkpoint="~/models/d4", resume=True)):
            pass
    other = RunConfig(output_dir="../run", data="texts/*.txt,stdlib", checkpoint="~/models/d4", resume=True)
    with pytest.raises(ConfigError, match=r"was started with --data=.*texts"), rundir.claimed(run, other):
        pass


def test_words_are_recorded_as_they_are(home):
    rundir.record(home, RunConfig(), {})
    assert {name: rundir.read(home)["flags"][name] for name in ("checkpoint", "data", "tokenizer")} == {
        "checkpoint": "demo",
        "data": "stdlib",
        "tokenizer": None,
    }


# ---- flagfiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"--k=8\n--seed=3\n",
        b"--k=8\r\n--seed=3\r\n",
        codecs.BOM_UTF8 + b"--k=8\n--seed=3",
        "\ufeff--k=8\n--seed=3\n".encode("utf-16-le"),
        "\ufeff--k=8\r\n--seed=3\r\n".encode("utf-16-be"),
        "# ümlaut\n// another\n\n  --k=8  \n--seed=3".encode(),
    ],
)
def test_a_flagfile_is_read_in_any_encoding_that_says_what_it_is(data, home):
    (home / "a.flags").write_bytes(data)
    expected = ["--seed=1", "--k=8", "--seed=3", "--k=9"]
    assert flagfile.inline(["--seed=1", "--flagfile=~/a.flags", "--k=9"]) == expected
    assert flagfile.inline(["--seed=1", "--flagfile", "$HOME/a.flags", "--k=9"]) == expected


def chain(folder: Path, length: int, last: str) -> str:
    for i in range(length):
        (folder / f"{i}.flags").write_text(f"--flagfile={folder}/{i + 1}.flags\n" if i < length - 1 else last)
    return f"--flagfile={folder}/0.flags"


def refusals(folder: Path) -> dict[str, tuple[str, str]]:
    """Flagfiles that are none: what is given, and the complaint."""
    (folder / "binary").write_bytes(bytes(range(256)) * 10)
    (folder / "zeros").write_bytes(b"--k=8\n\0\0")
    (folder / "large").write_bytes(b"#" * (2**20 + 1))
    (folder / "half").write_bytes(codecs.BOM_UTF16_LE + b"-")
    (folder / "self").write_text(f"--flagfile={folder}/self\n")
    (folder / "one").write_text(f"--flagfile={folder}/two\n")
    (folder / "two").write_text(f"--flagfile={folder}/sub/../one\n")
    (folder / "sub").mkdir()
    (folder / "many").write_text("--flagfile=none\n" * 1001)
    (folder / "none").touch()
    (folder / "bare").write_text("--flagfile\n--k=3\n")
    os.mkfifo(folder / "pipe")
    names = {
        "binary": "is not text in UTF-8",
        "zeros": "contains zero bytes",
        "large": "is larger than",
        "half": "is not text in UTF-16",
        "self": "includes itself",
        "one": "includes itself by way of",
        "sub": "is a directory",
        "many": "at most 1000",
        "nowhere": "cannot be read: No such file",
        "pipe": "is not a plain file",
        "bare": "needs the name of a file",
        "~nosuchuser": "names the home of ~nosuchuser",
        "x" * 5000: "cannot be read",
    }
    given = {name: (f"--flagfile={name}", complaint) for name, complaint in names.items()}
    return given | {"": ("--flagfile=", "needs the name"), "last": ("--flagfile", "needs the name")}


def test_flagfiles_that_are_none_are_refused_in_one_line(home, capsys):
    for argument, complaint in refusals(home).values():
        assert refused(argument) == 2
        told = capsys.readouterr().err
        assert complaint in told, argument
        assert told.startswith("FATAL ")
        assert told.count("\n") == 2


def test_a_chain_of_1500_flagfiles_is_refused_and_one_of_50_is_read(home, capsys):
    assert flagfile.inline([chain(home, 50, "--k=4")]) == ["--k=4"]
    assert refused(chain(home, 1500, "--k=4")) == 2
    told = capsys.readouterr().err
    assert "in a chain: at most 100" in told
    assert "Traceback" not in told


def refused(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        flags.run(RunConfig, pytest.fail, argv=["program", *arguments])
    return stop.value.code
