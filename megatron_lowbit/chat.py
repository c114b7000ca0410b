"""Chat prompts: a checkpoint's own Jinja template applied to messages, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    now: datetime | None = None,
) -> str:
    """The prompt that `template` (Jinja, as in Hugging Face's `chat_template`) makes of `messages`.

    Each message is a mapping with "role" and "content" of plain JSON values. Templates may use `raise_exception`,
    `tojson`, `strftime_now` (of `now`, by default the clock), loop controls and `{% generation %}` blocks. The
    result holds the names of special tokens: encode it with `add_bos=False, parse_special=True`.

    ValueError, with the reason, for messages that are not plain JSON, for a template with an error, for one that
    rejects these messages, and for one that reaches for anything outside the sandbox. The sandbox bounds a range
    (100,000) and this function the prompt (16 Mi characters), but not time or memory inside the template: nested
    loops and repeated strings can still use up both. Where templates come from strangers, render them in a process
    that may be killed.
    """
    try:
        # A round trip leaves exact JSON types only: the sandbox knows no dangerous methods of other objects.
        plain_messages = json.loads(json.dumps(list(messages)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Chat messages must be plain JSON (objects, lists, text, numbers): {error}.") from error
    if not all(isinstance(message, dict) for message in plain_messages):
        raise ValueError('Chat messages must be objects such as {"role": "user", "content": "Hi"}.')
    try:
        pieces = (
            _environment(now)
            .from_string(template)
            .generate(
                messages=plain_messages,
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        )
        prompt: list[str] = []
        length = 0
        for piece in pieces:
            prompt.append(piece)
            length += len(piece)
            if length > MAX_PROMPT_CHARACTERS:
                raise ValueError(f"the prompt grew beyond {MAX_PROMPT_CHARACTERS} characters")
    except jinja2.exceptions.SecurityError as error:
        raise ValueError(
            f"The chat template is unsafe: {error}. Use the template of a source that you trust."
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template is not valid Jinja: {error.message} (line {error.lineno}).") from error
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # Jinja runs a template as Python, so a template's slip may surface as any of these.
        reason = str(error) or type(error).__name__
        raise ValueError(f"The chat template cannot render these {len(plain_messages)} messages: {reason}.") from error
    return "".join(prompt)


def _environment(now: datetime | None) -> ImmutableSandboxedEnvironment:
    """Jinja set up as chat templates expect it: block trimming, loop controls, and three helpers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _clock(now)
    environment.globals["namespace"] = _GuardedNamespace
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}`: marks replies for training; a prompt just holds what is inside."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _GuardedNamespace(Namespace):
    """Jinja's namespace without underscore names, so that a template cannot plant special methods."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _GuardedNamespace._check(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _GuardedNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _clock(now: datetime | None) -> Callable[[str], str]:
    return lambda layout: (now or datetime.now()).strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter, which models never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
