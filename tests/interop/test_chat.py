"""Chat templates see what transformers shows them: tools, the date, plain JSON."""

import json
import time

import pytest

from sparsejax import sample
from sparsejax.config import ConfigError
from sparsejax.interop.chat import asked

pytest.importorskip("jinja2", reason="templates need pip install -e .[chat]")

TOOL = {
    "type": "function",
    "function": {"name": "hours", "description": "Which <hours> at Café Ünal's?"},
}
# Written like those of models that call functions.
CALLING = """{{ bos_token }}
{%- if documents is none and tools %}
    {{- "<|system|>Today is " + strftime_now("%d %B %Y") + ".\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) + "\\n" }}
        {{- tool.function | tojson(separators=(",", ":")) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ["user"] %}{% continue %}{% endif %}
    {{- "<|" + message.role + "|>" + message.content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- set who = "nobody" %}
    {%- generation %}{% set who = "assistant" %}{{ "<|" + who + "|>" }}
    {%- endgeneration %}{{ who }}
{%- endif %}
"""


class Spelled:
    """What a template is read from."""

    def __init__(self, template):
        self.about = {"chat_template": template, "bos_token": "<s>"}

    def special(self, name):
        return self.about.get(name)


def today():
    return time.strftime("%d %B %Y")


def test_a_template_gets_tools_and_the_date():
    before = today()
    found = asked(Spelled(CALLING), "Hi", tools=[TOOL])
    whole = json.dumps(TOOL, indent=2, ensure_ascii=False)
    short = json.dumps(TOOL["function"], separators=(",", ":"), ensure_ascii=False)
    end = f".\n{whole}\n{short}<|user|>Hi<|assistant|>nobody"
    assert "<hours> at Café Ünal's?" in found
    assert found in {f"<s><|system|>Today is {x}{end}" for x in (before, today())}


def test_without_tools_none_are_spoken_of():
    assert asked(Spelled(CALLING), "Hi") == "<s><|user|>Hi<|assistant|>nobody"


@pytest.mark.parametrize("tools", [None, [], [TOOL, TOOL]])
def test_a_prompt_is_that_of_transformers(tools):
    transformers = pytest.importorskip("transformers", reason="needs [peers]")
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>"
    )
    theirs.chat_template = CALLING
    message = [{"role": "user", "content": "Hi"}]
    how = {"tokenize": False, "add_generation_prompt": True, "tools": tools}
    before = theirs.apply_chat_template(message, **how)
    found = asked(Spelled(CALLING), "Hi", tools=tools)
    assert found in {before, theirs.apply_chat_template(message, **how)}


def test_of_several_templates_that_for_tools_is_taken_where_there_are_tools():
    both = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    assert [asked(Spelled(both), "Hi", tools=x) for x in (None, [TOOL])] == ["d", "t"]
    assert asked(Spelled(both[:1]), "Hi", tools=[TOOL]) == "d"


def test_a_template_that_refuses_is_quoted():
    template = "{{ raise_exception('one tool at a time') if tools | length > 1 }}"
    with pytest.raises(ConfigError, match="chat template fails: one tool at a time"):
        asked(Spelled(template), "Hi", tools=[TOOL, TOOL])


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("[{}]", [], "are read by the chat template; add --chat"),
        ("{}", ["--chat"], "must be a JSON list of tools, each an object"),
        ("[1]", ["--chat"], "must be a JSON list of tools, each an object"),
        ("[", ["--chat"], "must be a JSON list of tools, each an object"),
    ],
)
def test_a_file_that_holds_no_tools_is_refused(tmp_path, capsys, text, flags, said):
    path = tmp_path / "tools.json"
    path.write_text(text)
    assert sample.main([f"--tools={path}", "--checkpoint=absent", *flags]) == 2
    assert said in capsys.readouterr().err
