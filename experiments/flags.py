"""Dataclass to absl flags and back, and how every command starts: help, errors and exit codes."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import textwrap
import time
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from absl import flags

from bridge import launch
from bridge.settings import help_text, settle
from experiments import flagfile, quiet, signals

if typing.TYPE_CHECKING:
    from bridge.nanochat import Nanochat

Config = TypeVar("Config")

# Errors that a user can cause and correct: printed in one line, without a traceback. Anything else is a bug.
EXPECTED_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)

EXIT_CODES = f"""Exit codes: 0 done, 1 failed, 2 wrong flags, {signals.STOPPED} stopped and saved (--resume continues),\
 130 interrupted, 143 terminated."""


_LONGEST_MESSAGE = 2000  # characters


def define(
    config_class: type,
    *,
    defaults: Mapping[str, Any] | None = None,
    renames: Mapping[str, str] | None = None,
    help: Mapping[str, str] | None = None,
    flag_values: flags.FlagValues = flags.FLAGS,
    described: bool = True,
) -> None:
    """Define one flag per field of a dataclass.

    Fields may be bool, int, float, str, a Literal of strings, a tuple of one of these (given as `a,b,c`), or any of
    these or None (given as `none`). A field without a default is a required flag.

    Args:
        config_class: the dataclass; its fields have their help from `bridge.settings.flag`.
        defaults: field name to a default other than the class's.
        renames: field name to flag name, where they differ.
        help: field name to a help other than the metadata's.
        flag_values: where to define the flags.
        described: whether flags get their help; some texts need imports.

    Raises:
        TypeError: a field is of another type.
    """
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = (defaults or {}).get(field.name, _default(field))
        required = default is dataclasses.MISSING
        value = None if required else default
        text = (help or {}).get(field.name) or (help_text(field) if described else "")
        text = f"{text} ({'required' if required else f'default: {_shown(default)}'})".strip()
        name = (renames or {}).get(field.name, field.name)
        parser, serializer = _parser(hints[field.name], field.name)
        if isinstance(
            parser, flags.BooleanParser
        ):  # DEFINE_boolean also accepts --flag and --noflag, which no parser can
            flags.DEFINE_boolean(name, value, text, flag_values, required=required)
        else:
            flags.DEFINE_flag(flags.Flag(parser, serializer, name, value, text), flag_values, required=required)


def parse(
    config_class: type[Config], *, renames: Mapping[str, str] | None = None, flag_values: flags.FlagValues = flags.FLAGS
) -> Config:
    """Return the config that the parsed flags give, after `settle`.

    Raises:
      ValueError: values that the dataclass or `settle` refuses.
    """
    names = {field.name: (renames or {}).get(field.name, field.name) for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    config = config_class(**{field: flag_values[flag].value for field, flag in names.items()})
    settle(config)
    if check := getattr(config, "check_given", None):
        check({field for field, flag in names.items() if flag_values[flag].present})
    return config


def shared(target: type, config: Any) -> dict[str, Any]:
    """Return the values of the fields that a dataclass and a command's config share.

    Args:
      target: the dataclass, an argument of bridge; `target(**shared(target, config))` creates one.
      config: of a command; fields of the same name have the same meaning.
    """
    names = [field.name for field in dataclasses.fields(target)]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def run(
    config_class: type[Config],
    main: Callable[[Config], int | None],
    *,
    defaults: Mapping[str, Any] | None = None,
    renames: Mapping[str, str] | None = None,
    help: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
    after: Callable[[Config], Sequence[str]] | None = None,
) -> typing.NoReturn:
    """Run a command: parse the flags into a frozen config, call main(config), and end the process.

    When main succeeds, the command lines that `after` returns for the config are printed at the end.

    `--help` prints the flags of this command and nothing else. `--flagfile=FILE` reads flags from a file (see
    `experiments.flagfile`); later flags on the line win. `--debug` shows the traceback of an error that is otherwise
    printed in one line.

    Of several processes that a launcher started (`bridge.launch`) the first one prints. Others print errors that only
    they have, and all end at once after an error: the rest would wait for them.

    Exit codes: 0 (or what main returns) after success and `--help`, 1 when main fails, 2 for wrong flags, 75 (what main
    returns) for a run that was stopped and saved, 130 after Ctrl-C and 143 after SIGTERM if nothing was saved.
    """
    argv = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Show this help.", values)
    flags.DEFINE_boolean("debug", False, "Show the traceback of an error.", values)
    asked = any(argument in ("--help", "-help", "-h") for argument in argv[1:])
    define(config_class, defaults=defaults, renames=renames, help=help, flag_values=values, described=asked)
    if asked:
        _show_help(main, values)
        sys.exit(0)
    try:
        rest = values(_joined([argv[0], *flagfile.inline(argv[1:])], values))[1:]
        if rest:
            raise flags.Error(f"unexpected argument {rest[0]!r}: every option is written --name=value")
        config = parse(config_class, renames=renames, flag_values=values)
        launch.detected()
    except (flags.Error, ValueError, OSError) as error:
        _fail(2, error, "Pass --help to see the flags.")
    debug = bool(values["debug"].value)
    with quiet.libraries(debug), signals.handled():
        try:
            code = main(config)
            if not code and after is not None and launch.is_first():
                show_next(after(config))
            sys.exit(code)
        except SystemExit:
            raise
        except BaseException as error:
            _end(error, debug)


def warn_of_base(nano: Nanochat) -> None:
    """Warn if a checkpoint does not appear to be trained to chat."""
    if not nano.is_chat:
        print(
            f"warning: {nano.path} seems to be a base checkpoint, which continues text and was not trained to chat: "
            "its answers may make no sense. Chat checkpoints are in chatsft_checkpoints, chatrl_checkpoints or "
            "mid_checkpoints",
            file=sys.stderr,
            flush=True,
        )


def show_next(lines: Sequence[str]) -> None:
    """Print command lines to try next, if there are any."""
    if lines:
        print("\nnext:", *lines, sep="\n  ", flush=True)


def _end(error: BaseException, debug: bool) -> typing.NoReturn:
    """End the process after an exception; raise an unexpected one again."""
    launched, number = launch.detected(), signals.request()
    if launched is not None:
        _end_one_of_several(launched, error, number, debug)
    if number is not None and not debug:
        signals.end_at_once(number)  # a running jax computation would crash or hang an orderly exit
    if isinstance(error, KeyboardInterrupt) and not debug:
        _fail(130, "interrupted")
    if debug or not isinstance(error, EXPECTED_ERRORS):
        raise error
    _fail(1, error, "Pass --debug to see where.")


def _end_one_of_several(
    launched: launch.Launch, error: BaseException, number: int | None, debug: bool
) -> typing.NoReturn:
    """End one of several processes at once: an orderly exit of jax would wait for the others, which wait for this."""
    code = 1 if number is None else signals.exit_code(number)
    if type(error).__name__ != "SharedError":  # the first process prints it
        if debug or not isinstance(error, (*EXPECTED_ERRORS, KeyboardInterrupt)):
            traceback.print_exception(error)
        text = signals.name(number) if number is not None else _message(error)
        print(f"FATAL process {launched.index} of {launched.count or 'several'}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if launched.index == 0:
        time.sleep(1)  # others end for the same reason; without the first one they could not say so
    os._exit(code)


def _joined(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Return the arguments with `--list A B` written as `--list=A,B`; absl would read only A."""
    lists = {f"--{name}" for name in values if isinstance(values[name].parser, _TupleParser)}
    words: list[str] = []
    reading = False
    for word in argv:
        if reading and not word.startswith("--"):
            words[-1] += ("" if words[-1].endswith("=") else ",") + word
        else:
            reading = word in lists
            words.append(f"{word}=" if reading else word)
    return words


# ---- types --------------------------------------------------------------------------------------------------------


class _TupleParser(flags.ArgumentParser):
    syntactic_help = "a comma-separated list"

    def __init__(self, item: flags.ArgumentParser):
        self._item = item

    def parse(self, argument: Any) -> tuple:
        items = [part.strip() for part in argument.split(",")] if isinstance(argument, str) else argument
        return tuple(self._item.parse(item) for item in items if item != "")

    def flag_type(self) -> str:
        return "list"


class _OptionalParser(flags.ArgumentParser):
    def __init__(self, inner: flags.ArgumentParser):
        self._inner = inner
        self.syntactic_help = inner.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument in (None, "none", "None", "") else self._inner.parse(argument)

    def flag_type(self) -> str:
        return f"{self._inner.flag_type()} or none"


class _IntegerParser(flags.IntegerParser):
    def convert(self, argument: Any) -> int:
        try:
            return super().convert(argument)
        except (TypeError, ValueError):
            raise ValueError("it must be a whole number, such as 1000000") from None  # absl puts the flag's name before


_SCALARS = {int: _IntegerParser, float: flags.FloatParser, str: flags.ArgumentParser, bool: flags.BooleanParser}


def _parser(kind: Any, field: str) -> tuple[flags.ArgumentParser, flags.ArgumentSerializer]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind](), flags.ArgumentSerializer()
    if origin is Literal and all(isinstance(arg, str) for arg in args):
        return flags.EnumParser(list(args)), flags.ArgumentSerializer()
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _TupleParser(_parser(args[0], field)[0]), _TupleSerializer()
    if origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner, serializer = _parser(next(arg for arg in args if arg is not type(None)), field)
        return inner if isinstance(inner, flags.BooleanParser) else _OptionalParser(inner), serializer
    raise TypeError(f"field {field} has type {kind}, which no flag can hold")


class _TupleSerializer(flags.ArgumentSerializer):
    def serialize(self, value: tuple) -> str:
        return ",".join(map(str, value))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# ---- output -------------------------------------------------------------------------------------------------------


def _show_help(main: Callable, values: flags.FlagValues) -> None:
    """Print the command's module docstring and its flags with their defaults."""
    lines = [inspect.getdoc(sys.modules[main.__module__]) or "", "", "Flags:"]
    names = [name for name in values if name not in ("help", "debug")]
    for name in (*names, "help", "debug"):
        flag = values[name]
        no = "[no]" if flag.boolean and name in names else ""
        choices = "|".join(getattr(flag.parser, "enum_values", ())) or flag.flag_type()
        lines.append(f"  --{no}{name}" + ("" if flag.boolean else f"=<{choices}>"))
        lines += textwrap.wrap(flag.help, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["  --flagfile=<file>", "      Read flags from a file, one per line; later flags win."]
    lines += ["", EXIT_CODES]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe; discard what is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _shown(default: Any) -> str:
    """Return a default as a user would write it."""
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else repr(default)


def _fail(code: int, error: object, hint: str | None = None) -> typing.NoReturn:
    """End the process with a one-line error, and a hint below it."""
    if code != 2 or _prints():  # wrong flags are wrong in every process
        print(f"FATAL {_message(error)}" + (f"\n{hint}" if hint else ""), file=sys.stderr)
    sys.exit(code)


def _prints() -> bool:
    """Return whether this process prints for all."""
    try:
        return launch.is_first()
    except ValueError:  # the launcher's variables make no sense
        return True


def _message(error: object) -> str:
    """Return the text of an error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)  # it may quote foreign files: no control characters
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE // 2]} … {text[-_LONGEST_MESSAGE // 2 :]}"
    return text
