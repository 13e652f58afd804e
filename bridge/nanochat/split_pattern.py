"""Check the regular expression of an untrusted tokenizer before a regex engine compiles it.

A split pattern is an alternation of runs of character classes. Some regular expressions take gigabytes to compile,
and tiktoken panics on patterns that match the empty string. So patterns are parsed here and their cost is estimated.
"""

import re
from typing import final

MAX_CHARS = 2048
_MAX_COST = 2048  # character classes after expanding counted repetitions; each takes up to 60 KB
_MAX_COUNT = 64  # of a counted repetition
_MAX_DEPTH = 16
_ESCAPE = re.compile(r"\\(?:[pP](?:\{\^?[\w=: -]{1,40}\}|\w)|[sSwWdDrntfvhH]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^\w\s])")
_ESCAPE_LONG = re.compile(r"\\[xu]\{[0-9a-fA-F]{1,6}\}")
_ANCHOR = re.compile(r"[\^$]|\\[bBAzZ]")
_GROUP = re.compile(r"\((?:\?(?:[imsu]*(?:-[imsu]+)?:|=|!|>|<=|<!))?")
_FLAGS = re.compile(r"\(\?[imsu]+\)")
_COUNTED = re.compile(r"\{(\d{1,6})(?:(,)(\d{0,6}))?\}")


def check(pattern: str) -> None:
    """Raise ValueError for a split pattern that is too costly, matches the empty string, or has unsupported syntax."""
    if len(pattern) > MAX_CHARS:
        raise ValueError(f"the split pattern has {len(pattern)} characters; at most {MAX_CHARS} are read")
    parser = _Parser(pattern)
    try:
        may_be_empty, cost, _ = parser.alternation(0)
        if parser.position < len(pattern):
            raise ValueError(f"unmatched parenthesis at {parser.position}")
        if cost > _MAX_COST:
            raise ValueError(f"expanded it has {cost} character classes; at most {_MAX_COST} are read")
        if may_be_empty:
            raise ValueError("it matches the empty string")
    except ValueError as error:
        raise ValueError(f"jsae refuses the split pattern {_shown(pattern)}: {error}") from error


@final
class _Parser:
    """A parser of one pattern. Its methods return (may match the empty string, cost, has an unbounded repetition)."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def alternation(self, depth: int) -> tuple[bool, int, bool]:
        """Parse branches up to a closing parenthesis or the end."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
        empty, cost, unbounded = self._branch(depth)
        while self._next() == "|":
            self.position += 1
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
                raise ValueError("unclosed parenthesis")
            self.position += 1
            return empty or match[0].endswith(("=", "!")), cost, unbounded
        if text[self.position] == "[":
            self._character_class()
        elif text[self.position] == "\\":
            if not (self._skip(_ESCAPE) or self._skip(_ESCAPE_LONG)):
                raise ValueError(f"{text[self.position : self.position + 2]!r} is not supported in a split pattern")
        elif text[self.position] in "*+?{":
            raise ValueError(f"nothing to repeat at {self.position}")
        else:
            self.position += 1
        return False, 1, False

    def _repeated(self, empty: bool, cost: int, unbounded: bool) -> tuple[bool, int, bool]:
        """Parse the quantifier of an atom, including a following ? or + (lazy or possessive)."""
        sign = self._next()
        if sign in ("*", "+", "?") and sign:
            self.position += 1
            low, high = (1 if sign == "+" else 0), (1 if sign == "?" else None)
        elif match := self._skip(_COUNTED):
            low = int(match[1])
            high = low if not match[2] else int(match[3]) if match[3] else None
            if max(low, high or 0) > _MAX_COUNT:
                raise ValueError(f"it has the repetition {match[0]}; at most {_MAX_COUNT} times are read")
            cost *= max(low, high or low + 1, 1)
        else:
            return empty, cost, unbounded
        if self._next() in ("?", "+") and self._next():
            self.position += 1
        if self._next() in ("*", "+", "?", "{") and self._next():
            raise ValueError(f"repetition of a repetition at {self.position}")
        if high is None and unbounded:
            raise ValueError("it nests unbounded repetitions, whose matching may take exponential time")
        return empty or low == 0, cost, unbounded or high is None

    def _character_class(self) -> None:
        """Parse [...], with nested classes."""
        depth, position, text = 0, self.position, self.text
        while position < len(text):
            if text[position] == "\\":
                position += 1
            elif text[position] == "[":
                depth += 1
                if depth > 3:
                    raise ValueError("its character classes are nested too deep")
                position += text.startswith("^", position + 1)
                position += text.startswith("]", position + 1)  # a bracket that comes first is a character
            elif text[position] == "]":
                depth -= 1
                if depth == 0:
                    self.position = position + 1
                    return
            position += 1
        raise ValueError("unclosed bracket")

    def _skip(self, regex: re.Pattern) -> re.Match | None:
        match = regex.match(self.text, self.position)
        if match:
            self.position = match.end()
        return match

    def _next(self) -> str:
        return self.text[self.position : self.position + 1]


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")
