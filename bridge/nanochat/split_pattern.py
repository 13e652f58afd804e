"""Checks the regular expression of a tokenizer, which comes from a file, before a regex engine compiles it.

A split pattern is an alternation of runs of character classes. Some regular expressions take gigabytes to compile,
others match the empty string, over which tiktoken panics. So a pattern is parsed here, and what it costs is counted.
"""

import re
from typing import final

MAX_CHARS = 2048
_MAX_COST = 2048  # character classes after counted repetitions are written out; each takes up to 60 KB
_MAX_COUNT = 64  # of a counted repetition
_MAX_DEPTH = 16
_ESCAPE = re.compile(r"\\(?:[pP](?:\{\^?[\w=: -]{1,40}\}|\w)|[sSwWdDrntfvhH]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^\w\s])")
_ESCAPE_LONG = re.compile(r"\\[xu]\{[0-9a-fA-F]{1,6}\}")
_ANCHOR = re.compile(r"[\^$]|\\[bBAzZ]")
_GROUP = re.compile(r"\((?:\?(?:[imsu]*(?:-[imsu]+)?:|=|!|>|<=|<!))?")
_FLAGS = re.compile(r"\(\?[imsu]+\)")
_COUNTED = re.compile(r"\{(\d{1,6})(?:(,)(\d{0,6}))?\}")


def check(pattern: str) -> None:
    """Raise ValueError for a split pattern that is too costly, may match nothing, or is of a form that is not read."""
    if len(pattern) > MAX_CHARS:
        raise ValueError(f"the split pattern has {len(pattern)} characters, at most {MAX_CHARS} are read")
    parser = _Parser(pattern)
    try:
        may_be_empty, cost, _ = parser.alternation(0)
        if parser.place < len(pattern):
            raise ValueError(f"a parenthesis too many at {parser.place}")
        if cost > _MAX_COST:
            raise ValueError(f"written out it has {cost} character classes, and at most {_MAX_COST} are read")
        if may_be_empty:
            raise ValueError("it matches the empty string")
    except ValueError as error:
        raise ValueError(f"jsae refuses the split pattern {_shown(pattern)}: {error}") from error


@final
class _Parser:
    """A reader of one pattern. Its methods return (may match nothing, cost, has an unbounded repetition)."""

    def __init__(self, text: str):
        self.text = text
        self.place = 0

    def alternation(self, depth: int) -> tuple[bool, int, bool]:
        """Read branches up to a closing parenthesis or the end."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        empty, cost, unbounded = self._branch(depth)
        while self._next() == "|":
            self.place += 1
            other = self._branch(depth)
            empty, cost, unbounded = empty or other[0], cost + other[1], unbounded or other[2]
        return empty, cost, unbounded

    def _branch(self, depth: int) -> tuple[bool, int, bool]:
        empty, cost, unbounded = True, 0, False
        while self._next() not in ("", "|", ")"):
            atom = self._repeated(*self._atom(depth))
            empty, cost, unbounded = empty and atom[0], cost + atom[1], unbounded or atom[2]
            if cost > 2**20:
                raise ValueError("it repeats too much")
        return empty, cost, unbounded

    def _atom(self, depth: int) -> tuple[bool, int, bool]:
        text = self.text
        if self._skip(_FLAGS) or self._skip(_ANCHOR):
            return True, 0, False
        if match := self._skip(_GROUP):
            empty, cost, unbounded = self.alternation(depth + 1)
            if self._next() != ")":
                raise ValueError("a parenthesis is not closed")
            self.place += 1
            return empty or match[0].endswith(("=", "!")), cost, unbounded
        if text[self.place] == "[":
            self._character_class()
        elif text[self.place] == "\\":
            if not (self._skip(_ESCAPE) or self._skip(_ESCAPE_LONG)):
                raise ValueError(f"{text[self.place : self.place + 2]!r} is not read in a split pattern")
        elif text[self.place] in "*+?{":
            raise ValueError(f"a repetition of nothing at {self.place}")
        else:
            self.place += 1
        return False, 1, False

    def _repeated(self, empty: bool, cost: int, unbounded: bool) -> tuple[bool, int, bool]:
        """Read what repeats an atom, with a ? or + behind it that makes it lazy or possessive."""
        sign = self._next()
        if sign in ("*", "+", "?") and sign:
            self.place += 1
            low, high = (1 if sign == "+" else 0), (1 if sign == "?" else None)
        elif match := self._skip(_COUNTED):
            low = int(match[1])
            high = low if not match[2] else int(match[3]) if match[3] else None
            if max(low, high or 0) > _MAX_COUNT:
                raise ValueError(f"it repeats {match[0]}, and at most {_MAX_COUNT} are read")
            cost *= max(low, high or low + 1, 1)
        else:
            return empty, cost, unbounded
        if self._next() in ("?", "+") and self._next():
            self.place += 1
        if self._next() in ("*", "+", "?", "{") and self._next():
            raise ValueError(f"a repetition of a repetition at {self.place}")
        if high is None and unbounded:
            raise ValueError("it repeats a repetition without bounds, which may take forever")
        return empty or low == 0, cost, unbounded or high is None

    def _character_class(self) -> None:
        """Read [...], in which a class may be nested once."""
        depth, place, text = 0, self.place, self.text
        while place < len(text):
            if text[place] == "\\":
                place += 1
            elif text[place] == "[":
                depth += 1
                if depth > 3:
                    raise ValueError("its character classes are nested too deep")
                place += text.startswith("^", place + 1)
                place += text.startswith("]", place + 1)  # a bracket that comes first is a character
            elif text[place] == "]":
                depth -= 1
                if depth == 0:
                    self.place = place + 1
                    return
            place += 1
        raise ValueError("a bracket is not closed")

    def _skip(self, what: re.Pattern) -> re.Match | None:
        match = what.match(self.text, self.place)
        if match:
            self.place = match.end()
        return match

    def _next(self) -> str:
        return self.text[self.place : self.place + 1]


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")
