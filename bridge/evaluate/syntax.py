"""Mark every byte of Python source with its syntactic contexts, by Python's own tokenizer and parser."""

import ast
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt64

CONTEXTS = (
    "in a docstring",
    "in a comment",
    "in a string",
    "in an f-string",
    "in a number",
    "in a function signature",
    "in a class header",
    "in a decorator",
    "in an import",
    "in a return statement",
    "in a raise statement",
    "in an assert",
    "in an if or while condition",
    "in a for or with header",
    "in an except clause",
    "in parentheses",
    "in square brackets",
    "in braces",
    "in nested brackets",
    "name of a function that is defined",
    "name of a class that is defined",
    "attribute name",
    "name that is called",
    "parameter name",
    "keyword argument name",
    "annotation",
    "target of an assignment",
    "in a subscript",
    "in a comprehension",
    "in a lambda",
    "in call arguments",
    "in a comparison",
    "in a class body, outside of functions",
    "in a function body",
    "in a nested function",
    "at module level",
)
"""The names of the bits of `contexts`, lowest first."""

_BIT = {name: np.uint64(1 << i) for i, name in enumerate(CONTEXTS)}
_STATEMENTS = {
    "@": "in a decorator",
    "import": "in an import",
    "from": "in an import",
    "return": "in a return statement",
    "raise": "in a raise statement",
    "assert": "in an assert",
}
_HEADERS = {
    "def": "in a function signature",
    "class": "in a class header",
    "if": "in an if or while condition",
    "elif": "in an if or while condition",
    "while": "in an if or while condition",
    "for": "in a for or with header",
    "with": "in a for or with header",
    "except": "in an except clause",
}
_BRACKETS = {"(": "in parentheses", "[": "in square brackets", "{": "in braces"}
_FSTRING_START, _FSTRING_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Bits = UInt64[np.ndarray, " bytes"]
Span = tuple[int, int]


def contexts(source: bytes) -> UInt64[np.ndarray, " bytes_and_end"] | None:
    """Return the contexts of every byte: bit i of an entry says whether `CONTEXTS[i]` holds at that byte.

    A pair of brackets is outside of its own span, the quotes of a string are inside.

    Returns:
      One entry per byte and one for the end; None if the source does not parse with this version of Python.
    """
    try:
        text = source.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the source
            tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    if re.search(r"\r(?!\n)", text):  # ends a line for the parser, but not for the tokenizer
        return None
    bits = np.zeros(len(source) + 1, np.uint64)
    starts = np.cumsum([0, *map(len, source.split(b"\n"))]) + np.arange(source.count(b"\n") + 2)
    mark = _marker(bits)
    _mark_tree(tree, mark, lambda line, column: int(starts[line - 1]) + column)
    _mark_tokens(tokens, mark, _byte_offsets(text.split("\n"), starts))
    # A docstring does not also count as a string.
    bits[(bits & _BIT["in a docstring"]) > 0] &= ~_BIT["in a string"]
    return bits


def _marker(bits: UInt64[np.ndarray, " n"]) -> Callable[[str, Span], None]:
    """Return a function that sets the bit of a context in a span."""

    def mark(name: str, span: Span) -> None:
        bits[span[0] : span[1]] |= _BIT[name]

    return mark


def _byte_offsets(lines: Sequence[str], starts: np.ndarray) -> Callable[[tuple[int, int]], int]:
    """Return a function from (line, character) positions of `tokenize` to byte offsets."""
    ascii_only = [line.isascii() for line in lines]

    def offset(at: tuple[int, int]) -> int:
        line, column = at
        if line > len(lines):
            return int(starts[-1]) - 1
        if not ascii_only[line - 1]:
            column = len(lines[line - 1][:column].encode("utf-8"))
        return int(starts[line - 1]) + column

    return offset


# ---- contexts from the tokenizer -----------------------------------------------------------------------------------


def _mark_tokens(
    tokens: list[tokenize.TokenInfo], mark: Callable[[str, Span], None], offset: Callable[[tuple[int, int]], int]
) -> None:
    open_brackets: list[tuple[str, int]] = []
    strings: list[int] = []
    header: tuple[str, int] | None = None  # of the current line: its context and its start
    first = True  # whether the token is the first of a logical line
    for before, token, after in zip(_shift(tokens, -1), tokens, _shift(tokens, 1), strict=True):
        span = offset(token.start), offset(token.end)
        text = token.string
        if token.type == tokenize.COMMENT:
            mark("in a comment", span)
        elif token.type == tokenize.STRING:
            mark("in a string", span)
            if "f" in text[:3].split(text[-1])[0].lower():
                mark("in an f-string", span)
        elif token.type == _FSTRING_START and _FSTRING_START is not None:
            strings.append(span[0])
        elif token.type == _FSTRING_END and _FSTRING_END is not None and strings:
            start = strings.pop()
            mark("in a string", (start, span[1]))
            mark("in an f-string", (start, span[1]))
        elif token.type == tokenize.NUMBER:
            mark("in a number", span)
        elif token.type == tokenize.NAME:
            _mark_name(before, token, after, span, mark)
        elif text in _BRACKETS and token.type == tokenize.OP:
            open_brackets.append((text, span[1]))
        elif text in (")", "]", "}") and token.type == tokenize.OP and open_brackets:
            kind, start = open_brackets.pop()
            mark(_BRACKETS[kind], (start, span[0]))
            if open_brackets:
                mark("in nested brackets", (start, span[0]))
        if first and text in (_STATEMENTS | _HEADERS):
            header = ((_STATEMENTS | _HEADERS)[text], span[0])
        is_end = token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
        if header and (is_end or (text == ":" and not open_brackets and header[0] in _HEADERS.values())):
            mark(header[0], (header[1], span[0]))
            header = None
        if token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            first = is_end or (first and text == "async")


def _mark_name(
    before: tokenize.TokenInfo | None,
    token: tokenize.TokenInfo,
    after: tokenize.TokenInfo | None,
    span: Span,
    mark: Callable[[str, Span], None],
) -> None:
    previous = before.string if before else ""
    if previous == "def":
        mark("name of a function that is defined", span)
    elif previous == "class":
        mark("name of a class that is defined", span)
    elif keyword.iskeyword(token.string):
        return
    elif after is not None and after.string == "(":
        mark("name that is called", span)
    if previous == ".":
        mark("attribute name", span)


def _shift(tokens: list[tokenize.TokenInfo], by: int) -> list[tokenize.TokenInfo | None]:
    return [None, *tokens[:-1]] if by < 0 else [*tokens[1:], None]


# ---- contexts from the parser --------------------------------------------------------------------------------------


def _mark_tree(tree: ast.Module, mark: Callable[[str, Span], None], offset: Callable[[int, int], int]) -> None:
    def span(node: ast.AST) -> Span:
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    for node in ast.walk(tree):
        for name, part in _parts(node):
            mark(name, span(part))
        if isinstance(node, ast.keyword) and node.arg:
            start, _ = span(node)
            mark("keyword argument name", (start, start + len(node.arg.encode("utf-8"))))
        elif isinstance(node, ast.arg):
            start, _ = span(node)
            mark("parameter name", (start, start + len(node.arg.encode("utf-8"))))
    for name, part in _bodies(tree, functions=0, in_class=False):
        mark(name, span(part))


def _parts(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the parts of a node that are in a context, with the name of the context."""
    if isinstance(node, (ast.Module, *_DEFINITIONS)) and ast.get_docstring(node, clean=False) is not None:
        yield "in a docstring", node.body[0]
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield "annotation", node.annotation
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
        yield "annotation", node.returns
    if isinstance(node, ast.Assign):
        yield from (("target of an assignment", target) for target in node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        yield "target of an assignment", node.target
    elif isinstance(node, ast.Subscript):
        yield "in a subscript", node.slice
    elif isinstance(node, _COMPREHENSIONS):
        yield "in a comprehension", node
    elif isinstance(node, ast.Lambda):
        yield "in a lambda", node
    elif isinstance(node, ast.Call):
        yield from (("in call arguments", argument) for argument in (*node.args, *node.keywords))
    elif isinstance(node, ast.Compare):
        yield "in a comparison", node


def _bodies(node: ast.AST, functions: int, in_class: bool) -> Iterator[tuple[str, ast.AST]]:
    """Yield every statement that is not a definition, with the kind of body that it is in."""
    for child in getattr(node, "body", []):
        if isinstance(child, _DEFINITIONS):
            is_class = isinstance(child, ast.ClassDef)
            yield from _bodies(child, functions if is_class else functions + 1, is_class)
        elif in_class:
            yield "in a class body, outside of functions", child
        elif functions:
            yield "in a function body", child
            if functions > 1:
                yield "in a nested function", child
        else:
            yield "at module level", child
