r"""Chat: messages to token ids, by one template, "plain", whose roles are ordinary text.

    <|endoftext|>system:\nBe brief.\n\nuser:\nHi\n\nassistant:\nHello!<|endoftext|>user:\n...

The end of text stands at the start and closes each answer, so a vocabulary needs no other special
token. Each header ("user:\n" and the blank line before it) and each content is encoded alone. So
the ids of a conversation begin with those of its first messages, and no content yields a special
token. A model learns the answers and the end of text that closes them.

`CHAT_TEMPLATE` is the same for other programs: transformers' `apply_chat_template` renders it. A
tokenizer that has it as its `chat_template` saves it as chat_template.jinja.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gpt2c.files import untrusted
from gpt2c.text.tokenizer import Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "Message",
    "check_messages",
    "check_template",
    "encode_chat",
    "teach_template",
]

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
# The roles that may follow each; None is the start.
_NEXT = {None: (SYSTEM, USER), SYSTEM: (USER,), USER: (ASSISTANT,), ASSISTANT: (USER,)}

CHAT_TEMPLATE = r"""{{- eos_token }}
{%- for message in messages %}
    {%- if not loop.first and messages[loop.index0 - 1]['role'] != 'assistant' %}
        {{- '\n\n' }}
    {%- endif %}
    {{- message['role'] + ':\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- (message['content'] | trim) + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\nassistant:\n' }}
{%- endif %}
"""


class Message(NamedTuple):
    """One message of a conversation.

    Attributes
    ----------
    role : "system", "user" or "assistant"
    content : its text; whitespace at both ends does not count
    """

    role: str
    content: str


def check_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose chat template is another than gpt2c's.

    Raises
    ------
    ValueError : its conversations have another form
    """
    template = tokenizer.chat_template
    if template is not None and template.strip() != CHAT_TEMPLATE.strip():
        raise ValueError(
            "the model has a chat template of its own; gpt2c speaks only its plain one, which"
            " gpt2c sft teaches"
        )


def teach_template(tokenizer: Tokenizer) -> None:
    """Give the tokenizer of a model that learns conversations gpt2c's chat template.

    Raises
    ------
    ValueError : it has another one
    """
    check_template(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE


def check_messages(
    messages: Any, answered: bool = False, place: str = "the conversation"
) -> list[Message]:
    """Return the messages of a conversation: perhaps the system's, then user and assistant in turn.

    Parameters
    ----------
    messages : a list of `Message` or of mappings with role and content, at least one
    answered : whether the last message must be the assistant's, as in training
    place : names the conversation in errors, such as "data.jsonl line 3"

    Raises
    ------
    ValueError : no messages, a message of another form, an unknown role, a role out of turn, an
        empty content, or no answer at the end

    Examples
    --------
    >>> from gpt2c.text.chat import check_messages
    >>> check_messages([{"role": "user", "content": "Hi"}])
    [Message(role='user', content='Hi')]
    >>> check_messages([{"role": "assistant", "content": "Hi"}])
    Traceback (most recent call last):
    ValueError: the conversation: message 1 must be the system's or the user's, not the assistant's
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise ValueError(f"{place} must be a list of messages, got {untrusted.shown(messages)}")
    before = None
    checked = []
    for number, message in enumerate(messages, start=1):
        at = f"{place}: message {number}"
        fields = message._asdict() if isinstance(message, Message) else message
        if not isinstance(fields, Mapping) or not {"role", "content"} <= fields.keys():
            raise ValueError(f"{at} must have a role and a content, got {untrusted.shown(message)}")
        role, content = fields["role"], fields["content"]
        if role not in ROLES:
            known = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
            raise ValueError(f"{at} has the role {untrusted.shown(role)}; {known} is wanted")
        if role not in _NEXT[before]:
            wanted = " or ".join(f"the {role}'s" for role in _NEXT[before])
            raise ValueError(f"{at} must be {wanted}, not the {role}'s")
        if not isinstance(content, str):
            shown = untrusted.shown(content)
            raise ValueError(f"{at}: the content must be a string, got {shown}")
        if not content.strip():
            raise ValueError(f"{at}: the {role}'s content is empty")
        checked.append(Message(role, content))
        before = role
    if not checked:
        raise ValueError(f"{place} has no messages")
    if answered and before != ASSISTANT:
        raise ValueError(f"{place}: the last message must be the assistant's, not the {before}'s")
    return checked


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    answer: bool = False,
    context: Collection[int] = (),
) -> tuple[list[int], list[bool]]:
    r"""Return the token ids of a conversation, and which of them a model learns to write.

    Parameters
    ----------
    tokenizer : its `eot` closes the answers
    messages : see `check_messages`
    answer : whether the header of an answer ends the ids: a model continues with the answer
    context : the places of answers that are not learned, from 0

    Returns
    -------
    (ids, learned) : T token ids, and for each whether it belongs to a learned answer or closes one

    Raises
    ------
    ValueError : see `Tokenizer.encode`

    Examples
    --------
    >>> from gpt2c.text.chat import Message, encode_chat
    >>> tokenizer = gpt2c.Tokenizer.from_name("bytes")
    >>> ids, learned = encode_chat(tokenizer, [Message("user", "Hi"), Message("assistant", "Ho")])
    >>> tokenizer.decode(ids)
    '<|endoftext|>user:\nHi\n\nassistant:\nHo<|endoftext|>'
    >>> tokenizer.decode([token for token, live in zip(ids, learned, strict=True) if live])
    'Ho<|endoftext|>'
    """
    ids, learned = [tokenizer.eot], [False]

    def add(text: str, closed: bool = False, live: bool = False) -> None:
        new = tokenizer.encode(text) + [tokenizer.eot] * closed
        ids.extend(new)
        learned.extend([live] * len(new))

    before = None
    for place, (role, content) in enumerate(messages):
        add(_header(role, before))
        answers = role == ASSISTANT
        add(content.strip(), closed=answers, live=answers and place not in context)
        before = role
    if answer:
        add(_header(ASSISTANT, before))
    return ids, learned


def _header(role: str, before: str | None) -> str:
    """Return the text before a content; `before` is the role of the message before, or None."""
    return ("" if before in (None, ASSISTANT) else "\n\n") + f"{role}:\n"
