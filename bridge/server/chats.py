"""Chats as tokens, with the message that every token belongs to."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from anyio import to_thread

from bridge.nanochat.tokenizer import Tokenizer
from bridge.server.bodies import Fields, Refusal, refusing
from bridge.server.session import Session

ROLES: Mapping[str, str] = {"user": "user", "assistant": "assistant", "model": "assistant", "system": "system"}
"""nanochat's name of every role that clients send."""
MESSAGES = 64
"""Most messages of a chat."""


@dataclasses.dataclass(frozen=True)
class Span:
    """The message that a token of a chat belongs to: Neuronpedia groups tokens into messages by it.

    Attributes:
      token: its id.
      message: index of the message; None for the marker that begins the answer.
      role: as the client named it.
      section: "header" and "footer" are markers of the template, "content" is the message.
    """

    token: int
    message: int | None
    role: str
    section: str


async def spans(session: Session, messages: Sequence[Fields], answers: bool, continues: bool) -> list[Span]:
    """Return the tokens of a chat.

    Args:
      session: the model.
      messages: objects with `role` and `content`.
      answers: end with the marker that begins the assistant's answer.
      continues: leave a last message of the assistant open, so that it is continued.

    Raises:
      Refusal: the checkpoint was not trained to chat, or the chat is invalid or too long.
    """
    if not session.chat:
        raise Refusal(400, "this checkpoint was not trained to chat and has no chat template: send a prompt instead")
    texts = [(m.choice("role", tuple(ROLES)), m.text("content")) for m in messages]
    session.check_bytes("".join(content for _, content in texts))
    with refusing():
        chat = await to_thread.run_sync(functools.partial(render, session.im.tokenizer, texts))
    if continues and texts and ROLES[texts[-1][0]] == "assistant":
        chat = chat[:-1]
    elif answers:
        chat.append(Span(session.im.tokenizer.special_tokens["<|assistant_start|>"], None, "assistant", "header"))
    session.short([span.token for span in chat])
    return chat


def render(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> list[Span]:
    """Return the tokens of a chat of (role, content), as nanochat renders it.

    Raises:
      ValueError: the messages do not alternate as nanochat's do.
    """
    named = [{"role": ROLES[role], "content": content} for role, content in messages]
    chat: list[Span] = []
    first = 0
    while first < len(messages):
        last = first + (named[first]["role"] == "system")  # a system message is a part of the user's
        ids, _ = tokenizer.render_conversation({"messages": named[: last + 1]}, max_tokens=2**31)
        block = ids[len(chat) :]
        head = 1 + (first == 0)  # BOS, which begins the chat, and the marker of the message
        body = [Span(token, last, messages[last][0], "content") for token in block[head:-1]]
        if last > first:
            body = _divided(tokenizer, body, first, messages[first])
        chat += [Span(token, first, messages[first][0], "header") for token in block[:head]]
        chat += [*body, Span(block[-1], last, messages[last][0], "footer")]
        first = last + 1
    return chat


def _divided(tokenizer: Tokenizer, body: Sequence[Span], system: int, message: tuple[str, str]) -> list[Span]:
    """Return the content of a first message, whose tokens up to the end of the system's text belong to that."""
    role, content = message
    left = len(content.encode())
    divided = []
    for span in body:
        divided.append(dataclasses.replace(span, message=system, role=role) if left > 0 else span)
        left -= len(tokenizer.token_bytes_of(span.token))
    return divided
