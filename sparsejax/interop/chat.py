"""Chat templates: a user's message as the model was trained to read it."""

from typing import Any

from sparsejax.config import ConfigError

__all__ = ["asked"]


def asked(tokenizer: Any, text: str) -> str:
    """Write a user's message, and how an answer begins, by the checkpoint's template.

    It is rendered as transformers' ``apply_chat_template`` does.

    Raises:
        ConfigError: if jinja2 is not installed, or there is no template, or it fails.
    """
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "--chat: needs jinja2; pip install 'sparsejax[chat]'"
        ) from None
    about = getattr(tokenizer, "about", {})
    template = about.get("chat_template")
    if isinstance(template, list):  # of several by name
        template = {x["name"]: x["template"] for x in template}.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            "--chat: the checkpoint has no chat template (chat_template.jinja, or"
            " chat_template in tokenizer_config.json); leave --chat out"
        )
    world = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    world.globals["raise_exception"] = _refuse
    named = {k: tokenizer.special(k) for k in about if k.endswith("_token")}
    tokens = {k: v for k, v in named.items() if v is not None}
    messages = [{"role": "user", "content": text}]
    try:
        made = world.from_string(template)
        return made.render(messages=messages, add_generation_prompt=True, **tokens)
    except Exception as error:  # a template is a program
        raise ConfigError(f"--chat: the chat template fails: {error}") from error


def _refuse(message: str) -> None:
    raise ValueError(message)
