"""Chat prompts: as transformers renders them, and nothing beyond the sandbox."""

import json
from datetime import datetime

import pytest
import tokenizers
import transformers

from megatron_lowbit import chat
from megatron_lowbit.chat import render_chat

MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": '  <b>Grüße</b> & "quotes" 😀 '},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"x": [1, 2.5, None, True]}}]},
    {"role": "user", "content": "Bye"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "blocks": (
        "{{ bos_token }}\n{% if tools %}\n  tools\n{% endif %}\n{%- for m in messages %}\n"
        "    {% if m.role == 'system' %}\n        {% continue %}\n    {% endif %}\n  {% generation %}\n"
        "  {{ m.content }}{{ eos_token }}\n  {% endgeneration %}\n"
        "    {% if loop.index > 3 %}\n{% break %}{% endif %}\n{% endfor %}\n"
    ),
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}\n{% endfor %}{{ documents is none }}",
    "namespace": (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.last = m.role %}"
        "{% endfor %}{{ ns.n }}{{ ns.last }}{{ dict(a=1) | tojson }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_agrees_with_transformers(name, add_generation_prompt):
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="</s>"))
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>")
    expected = oracle.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert render_chat(TEMPLATES[name], MESSAGES, "<s>", "</s>", add_generation_prompt) == expected


def test_the_date_can_be_given():
    template = "{{ strftime_now('%d %b %Y') }}"
    assert render_chat(template, [], "", "", now=datetime(2024, 7, 26)) == "26 Jul 2024"
    assert render_chat(template, [], "", "") == datetime.now().strftime("%d %b %Y")


def test_a_template_may_refuse_messages():
    with pytest.raises(ValueError, match="cannot render these 4 messages: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", MESSAGES, "", "")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ render.__globals__ }}{{ strftime_now.__globals__['x'] }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}{{ ('{0.__class__}' | attr('format'))(1).x.y }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{% set ns = namespace({'_x': 1}) %}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ lipsum.__globals__['os'] }}",
    ],
)
def test_unsafe_templates_are_refused(template):
    with pytest.raises(ValueError, match="chat template"):
        render_chat(template, MESSAGES, "", "")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[9].content }}", "cannot render"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(10**6) %}x{% endfor %}", "Range too big"),
        ("{% include 'other' %}", "cannot render"),
        ("{{ x | nosuchfilter }}", "not valid Jinja"),
    ],
)
def test_errors_say_the_reason(template, reason):
    with pytest.raises(ValueError, match=reason):
        render_chat(template, MESSAGES, "", "")


def test_an_endless_prompt_is_cut_off(monkeypatch):
    monkeypatch.setattr(chat, "MAX_PROMPT_CHARACTERS", 1000)
    with pytest.raises(ValueError, match="grew beyond 1000 characters"):
        render_chat("{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}", [], "", "")


@pytest.mark.parametrize("messages", [[object()], [{"content": {1, 2}}], ["text"], [["role", "user"]]])
def test_messages_must_be_plain(messages):
    with pytest.raises(ValueError, match="Chat messages must be"):
        render_chat(TEMPLATES["chatml"], messages, "", "")


def test_messages_are_left_alone():
    before = json.dumps(MESSAGES)
    render_chat(TEMPLATES["chatml"], MESSAGES, "", "")
    assert json.dumps(MESSAGES) == before
