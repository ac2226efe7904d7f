"""Chat templates: a user's message as the model was trained to read it."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sparsejax.config import ConfigError

__all__ = ["asked"]

Tool = Mapping[str, Any]


def asked(tokenizer: Any, text: str, *, tools: Sequence[Tool] | None = None) -> str:
    """Write a user's message, and how an answer begins, by the checkpoint's template.

    It is rendered as transformers' ``apply_chat_template`` does.

    Args:
        tools: that an answer may call, each a JSON schema; a template that knows of
            none passes them over.

    Raises:
        ConfigError: if jinja2 is not installed, or there is no template, or it fails.
    """
    try:
        world = _world()
    except ImportError:
        raise ConfigError(
            "--chat: needs jinja2; pip install 'sparsejax[chat]'"
        ) from None
    about = getattr(tokenizer, "about", {})
    template = about.get("chat_template")
    if isinstance(template, list):  # of several by name
        named = {x["name"]: x["template"] for x in template}
        default = named.get("default")
        template = default if tools is None else named.get("tool_use", default)
    if not isinstance(template, str):
        raise ConfigError(
            "--chat: the checkpoint has no chat template (chat_template.jinja, or"
            " chat_template in tokenizer_config.json); leave --chat out"
        )
    named = {k: tokenizer.special(k) for k in about if k.endswith("_token")}
    given = {k: v for k, v in named.items() if v is not None}
    given |= {"messages": [{"role": "user", "content": text}], "documents": None}
    given |= {"tools": tools, "add_generation_prompt": True}
    try:
        return world.from_string(template).render(given)
    except Exception as error:  # a template is a program
        raise ConfigError(f"--chat: the chat template fails: {error}") from error


def _world() -> Any:
    """Give what templates are written for: what transformers has beside jinja2's own.

    Raises:
        ImportError: if jinja2 is not installed.
    """
    from jinja2 import nodes  # noqa: PLC0415
    from jinja2.ext import Extension  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Generation(Extension):
        """Read ``{% generation %}``, which marks an answer, for what is in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    world = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    world.globals |= {"raise_exception": _refuse, "strftime_now": time.strftime}
    world.filters["tojson"] = _json
    return world


def _refuse(message: str) -> None:
    raise ValueError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON with all characters as they are; jinja2's own is made for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
