"""A dataclass becomes flags and comes back; what goes wrong is told in one line, with an exit code."""

import dataclasses
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from absl import flags as absl_flags

from experiments import flags

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sample:
    """One field of every kind."""

    k: int = field(default=32, metadata={"help": "Active latents."})
    rate: float = 1e-3
    name: str = "a"
    quick: bool = False
    slow: bool = True
    kind: Literal["topk", "relu"] = "topk"
    layers: tuple[int, ...] = (1, 2)
    words: tuple[str, ...] = ()
    limit: int | None = None
    label: str | None = "x"
    maybe: bool | None = None

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")


@dataclass(frozen=True)
class Needy:
    """A field without a default."""

    out: str
    steps: int = 3


def parsed(*arguments: str, config_class: type = Sample, **options):
    """The config that run gives to main."""
    seen = []
    with pytest.raises(SystemExit) as stop:
        flags.run(config_class, seen.append, argv=["program", *arguments], **options)
    assert not stop.value.code, stop.value.code
    return seen[0]


def refused(*arguments: str, config_class: type = Sample, main=lambda config: None) -> int:
    with pytest.raises(SystemExit) as stop:
        flags.run(config_class, main, argv=["program", *arguments])
    return stop.value.code


def test_without_flags_the_defaults_stand():
    assert parsed() == Sample()


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        (["--k=5"], {"k": 5}),
        (["--k", "5"], {"k": 5}),
        (["--rate=2e-4"], {"rate": 2e-4}),
        (["--rate=1"], {"rate": 1.0}),
        (["--name=b c"], {"name": "b c"}),
        (["--quick"], {"quick": True}),
        (["--quick=false"], {"quick": False}),
        (["--noslow"], {"slow": False}),
        (["--kind=relu"], {"kind": "relu"}),
        (["--layers=3"], {"layers": (3,)}),
        (["--layers=3, 4,5"], {"layers": (3, 4, 5)}),
        (["--layers="], {"layers": ()}),
        (["--words=a,b"], {"words": ("a", "b")}),
        (["--limit=7"], {"limit": 7}),
        (["--limit=7", "--limit=none"], {"limit": None}),
        (["--label=none"], {"label": None}),
        (["--maybe"], {"maybe": True}),
        (["--nomaybe"], {"maybe": False}),
        (["--k=5", "--k=6"], {"k": 6}),
    ],
)
def test_each_kind_of_field_is_read(arguments, change):
    assert parsed(*arguments) == dataclasses.replace(Sample(), **change)


def test_a_list_may_be_written_in_several_words():
    config = parsed("--words", "a", "b,c", "--layers", "3", "4", "--k", "5")
    assert (config.words, config.layers, config.k) == (("a", "b", "c"), (3, 4), 5)


def test_a_word_after_a_flag_that_is_no_list_is_refused(capsys):
    assert refused("--k", "5", "6") == 2
    assert "'6'" in capsys.readouterr().err


def test_numbers_keep_their_types():
    config = parsed("--k=5", "--rate=1", "--layers=3")
    assert (type(config.k), type(config.rate), type(config.layers[0])) == (int, float, int)


def test_defaults_and_names_may_be_others():
    options = {"defaults": {"k": 4}, "renames": {"k": "active"}}
    assert parsed(**options).k == 4
    assert parsed("--active=9", **options).k == 9


def test_what_a_config_shares_with_another_dataclass_is_handed_on():
    @dataclass(frozen=True)
    class Part:
        k: int
        words: tuple[str, ...] = ("own",)
        other: str = "own"

    assert Part(**flags.shared(Part, Sample(k=3))) == Part(3, (), "own")


@pytest.mark.parametrize(
    ("target", "config", "own"),
    [
        ("bridge.run.subjects.Choice", "evaluate.EvaluateConfig", {"paths", "run", "own_runs_first", "transcoders"}),
        ("bridge.run.subjects.Choice", "explore.ExploreConfig", {"paths", "run", "own_runs_first", "transcoders"}),
        ("bridge.evaluate.evaluation.Extent", "evaluate.EvaluateConfig", set()),
        ("bridge.exploration.Extent", "explore.ExploreConfig", set()),
        ("bridge.neuronpedia.sources.Wanted", "export.ExportConfig", set()),
        ("experiments.prompt_loop.Settings", "steer.SteerConfig", set()),
    ],
)
def test_commands_have_a_flag_for_every_field_that_bridge_takes(target, config, own):
    """Else the field would silently keep its default, whatever the user says."""
    target, config = (pkgutil.resolve_name(name) for name in (target, f"experiments.{config}"))
    flagless = {"hook", "context_size", "encoder", "encoder_k"} if config.__name__ == "ExploreConfig" and own else set()
    fields, known = ({field.name for field in dataclasses.fields(of)} for of in (target, config))
    assert fields - known == own | flagless


def test_a_flagfile_is_read_and_later_flags_win(tmp_path):
    (tmp_path / "inner.flags").write_text("--name=inner\n--rate=0.5\n")
    (tmp_path / "a.flags").write_text(
        f"# a comment\n--k=8\n--flagfile={tmp_path}/inner.flags\n\n--quick\n--rate=0.25\n"
    )
    config = parsed(f"--flagfile={tmp_path}/a.flags", "--k=9")
    assert config == Sample(k=9, name="inner", rate=0.25, quick=True)
    assert parsed("--k=9", f"--flagfile={tmp_path}/a.flags").k == 8


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--kk=5", "Unknown command line flag 'kk'"),
        ("--nam=5", "Did you mean: name ?"),
        ("--k=five", "flag --k=five"),
        ("--rate=fast", "flag --rate=fast"),
        ("--kind=gated", "value should be one of <topk|relu>"),
        ("--layers=1,x", "flag --layers=1,x"),
        ("--limit=many", "flag --limit=many"),
        ("--k=0", "k must be at least 1, got 0"),
        ("--flagfile=nowhere.flags", "nowhere.flags"),
        ("k=5", "unexpected argument 'k=5'"),
    ],
)
def test_flags_that_are_wrong_end_with_code_2_and_one_message(argument, told, capsys):
    assert refused(argument, main=pytest.fail) == 2
    message = capsys.readouterr().err
    assert message.startswith("FATAL ")
    assert told in message
    assert "Traceback" not in message


def test_a_typo_in_a_flagfile_is_an_error(tmp_path, capsys):
    (tmp_path / "a.flags").write_text("--kk=8\n")
    assert refused(f"--flagfile={tmp_path}/a.flags", main=pytest.fail) == 2
    assert "Unknown command line flag 'kk'" in capsys.readouterr().err


def test_a_field_without_a_default_must_be_given(capsys):
    assert parsed("--out=there", config_class=Needy) == Needy("there")
    assert refused("--steps=4", config_class=Needy, main=pytest.fail) == 2
    assert "--out must have a value" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("k is 99"), FileNotFoundError("no model there"), ImportError("rustbpe")])
def test_expected_errors_of_main_are_one_line_and_code_1(error, capsys):
    def main(config):
        raise error

    assert refused(main=main) == 1
    assert capsys.readouterr().err == f"FATAL {error}\nPass --debug to see where.\n"


def test_debug_shows_the_traceback():
    def main(config):
        raise ValueError("k is 99")

    with pytest.raises(ValueError, match="k is 99"):
        flags.run(Sample, main, argv=["program", "--debug"])


def test_our_own_mistakes_are_not_hidden():
    def main(config):
        return config.nothing_of_the_kind

    with pytest.raises(AttributeError):
        flags.run(Sample, main, argv=["program"])


def test_ctrl_c_ends_without_a_traceback(capsys):
    def main(config):
        raise KeyboardInterrupt

    assert refused(main=main) == 130
    assert capsys.readouterr().err == "FATAL interrupted\n"


def test_what_main_returns_is_the_exit_code():
    assert refused(main=lambda config: 3) == 3


def main_for_help(config: Sample) -> None:
    """Lives in this module, whose docstring heads the help."""


@pytest.mark.parametrize("ask", ["--help", "-h", "-help"])
def test_help_shows_the_commands_own_flags(ask, capsys):
    with pytest.raises(SystemExit) as stop:
        flags.run(Sample, main_for_help, argv=["program", "--k=5", ask])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("A dataclass becomes flags and comes back")
    assert "  --k=<int>\n      Active latents. (default: 32)" in shown
    assert "  --kind=<topk|relu>\n      (default: 'topk')" in shown
    assert "  --[no]slow\n      (default: true)" in shown
    assert "  --layers=<list>\n      (default: 1,2)" in shown
    assert "(default: none)" in shown
    assert "--flagfile=<file>" in shown
    assert "alsologtostderr" not in shown


def test_help_says_what_is_required(capsys):
    with pytest.raises(SystemExit):
        flags.run(Needy, main_for_help, argv=["program", "--help"])
    assert "  --out=<string>\n      (required)" in capsys.readouterr().out


def test_help_into_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m experiments.pretrain --help | head -n 1"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Train a small nanochat")
    assert done.stderr == ""


def test_flags_may_be_defined_where_one_likes():
    values = absl_flags.FlagValues()
    flags.define(Sample, defaults={"k": 3}, flag_values=values)
    values(["program", "--name=z"])
    assert flags.parse(Sample, flag_values=values) == Sample(k=3, name="z")


def test_a_field_that_no_flag_can_hold_is_a_type_error():
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match="field table has type"):
        flags.define(Odd, flag_values=absl_flags.FlagValues())
