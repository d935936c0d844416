"""The chat template: whose variables a request may set, and what becomes of a developer and of an open turn."""

from __future__ import annotations

from typing import Any

import pytest
from logitserve.errors import BadRequestError
from logitserve.text.chat_template import ChatTemplate, Turns

EVERY = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
OPTIONS = (
    "{% if style is not defined %}{% set style = 'plain' %}{% endif %}"
    "{% if messages %}{% set inner = 1 %}{% endif %}"
    "{{ bos_token }}{{ style }}{{ thinking }}{{ inner }}{{ tools }}{{ strftime_now('%Y') | length }}"
    "{% for n in range(2) %}{{ namespace(x=n).x }}{% endfor %}{{ tokenize }}{{ chat_template }}"
)


def turns(*contents: tuple[str, str], **options: Any) -> Turns:
    messages = [{"role": role, "content": content} for role, content in contents]
    return Turns(messages, **{"add_generation_prompt": True, **options})


def test_a_request_may_set_what_the_template_leaves_open_and_nothing_else() -> None:
    assert ChatTemplate(OPTIONS, {"bos_token": "<s>"}).variables == {"style", "thinking"}


@pytest.mark.parametrize(
    "name", ["tools", "tokenize", "chat_template", "bos_token", "inner", "range", "styel", "messages"]
)
def test_another_variable_is_refused_by_name(name: str) -> None:
    template = ChatTemplate(OPTIONS, {"bos_token": "<s>"})
    with pytest.raises(BadRequestError, match=f"'chat_template_kwargs.{name}'.*style, thinking") as refusal:
        template.render(turns(("user", "x"), variables={name: 1}))
    assert refusal.value.param == f"chat_template_kwargs.{name}"


def test_a_variable_reaches_the_template() -> None:
    template = ChatTemplate(OPTIONS, {"bos_token": "<s>"})
    assert template.render(turns(("user", "x"))).startswith("<s>plain1")
    assert template.render(turns(("user", "x"), variables={"thinking": "T"})).startswith("<s>plainT1")


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (EVERY, "system"),
        ("{# developer #}" + EVERY, "system"),
        (EVERY + "{% if messages[0].role == 'developer' %}{% endif %}", "developer"),
        (EVERY + "{% if messages[0].role in ['system', 'developer'] %}{% endif %}", "developer"),
    ],
)
def test_a_developer_is_the_system_where_the_template_names_no_developer(template: str, role: str) -> None:
    assert ChatTemplate(template, {}).render(turns(("developer", "x"))).startswith(f"[{role}]x")


@pytest.mark.parametrize("said", ["The answer is", "The answer is ", "", "a\nb"])
def test_an_open_turn_ends_with_its_own_text(said: str) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    rendered = ChatTemplate(EVERY, {}).render(turns(("user", "x"), ("assistant", said), **options))
    assert rendered == f"[user]x\n[assistant]{said}"


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[9].x.y }}"]
)
def test_a_template_that_fails_is_a_refusal(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(BadRequestError, match="template refuses these 'messages'"):
        template.render(turns(("user", "x")))
    assert template.variables == frozenset()
