"""Outputs of models with thinking and calls, family by family, and the messages that they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from logitserve.text.families.choose import load_family
from logitserve.text.families.family import Family
from logitserve.text.message_parser import MessageParser
from logitserve.text.parser import Content, Reasoning, TextPart, ToolCall
from logitserve.text.tools import Tool

TOOLS = (
    Tool("get_weather", "Tell the weather.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool(
        "plan",
        "Plan a trip.",
        {
            "type": "object",
            "properties": {
                "days": {"type": "integer"},
                "stops": {"type": "array", "items": {"type": "object"}},
                "options": {"type": "object"},
                "note": {"type": "string"},
            },
        },
    ),
)

CITY = '{"city": "Paris"}'
OTHER_CITY = '{"city":"Oslo"}'
NESTED = '{"days": 3, "stops": [{"at": [1, 2.5]}, {}], "options": {"deep": {"er": null, "yes": true}}}'
ESCAPES = '{"city": "S\\u00e3o \\"Paulo\\"\\n{]}\\\\ 東京 🧪"}'
"""Arguments, as a model may write them."""


@cache
def family_of(name: str) -> Family:
    """Return a family, loaded once."""
    return load_family(name)


@dataclass(frozen=True)
class ModelOutput:
    """What a model wrote, and the message that it is.

    Attributes:
        prompt: the end of the prompt, where it opens the thinking.
        calls: names and arguments. The arguments are compared as text where the family writes JSON.
    """

    name: str
    family: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    prompt: str = ""

    def parser(self, *, parses_calls: bool = True) -> MessageParser:
        """Return a new parser of such an output."""
        return family_of(self.family).parser(self.prompt, tools=TOOLS, parses_calls=parses_calls)

    def parts(self, pieces: Iterable[str] | None = None) -> list[TextPart]:
        """Return the joined parts of the text, pushed in pieces."""
        parser = self.parser()
        found: list[TextPart] = []
        for piece in (self.text,) if pieces is None else pieces:
            found += parser.push(piece)
        return joined([*found, *parser.finish()])


def joined(parts: Iterable[TextPart]) -> list[TextPart]:
    """Return parts with neighbours of the same kind made one, and calls without their ids, which are random."""
    whole: list[TextPart] = []
    for part in parts:
        latest = whole[-1] if whole else None
        if isinstance(part, ToolCall):
            whole.append(replace(part, id=""))
        elif isinstance(latest, Content | Reasoning) and type(latest) is type(part):
            whole[-1] = replace(latest, text=latest.text + part.text)
        else:
            whole.append(part)
    return whole


def texts(parts: Iterable[TextPart], kind: type[Content | Reasoning]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


def calls_in(parts: Iterable[TextPart]) -> list[ToolCall]:
    return [part for part in parts if isinstance(part, ToolCall)]


def _xml(name: str, arguments: str) -> str:
    written = [
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in json.loads(arguments).items()
    ]
    return f"<tool_call>\n<function={name}>\n{''.join(written)}</function>\n</tool_call>"


def _gemma(opening: str, closing: str, quote: str) -> Callable[[str, str], str]:
    def written(value: object) -> str:
        match value:
            case str():
                return f"{quote}{value}{quote}"
            case dict():
                return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
            case list():
                return "[" + ",".join(map(written, value)) + "]"
            case _:
                return json.dumps(value)

    return lambda name, arguments: f"{opening}call:{name}{written(json.loads(arguments))}{closing}"


def _object(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


@dataclass(frozen=True)
class Writing:
    """How a family writes calls and thinking, spelled out apart from the family's file.

    Attributes:
        around: stands around all calls of an answer.
        thinking: before and after the thinking; None where the family has none.
        answer: before and after the answer proper.
    """

    call: Callable[[str, str], str]
    between: str = "\n"
    around: tuple[str, str] = ("", "")
    thinking: tuple[str, str] | None = None
    answer: tuple[str, str] = ("", "")

    def calls(self, *calls: tuple[str, str]) -> str:
        before, after = self.around
        return before + self.between.join(self.call(*call) for call in calls) + after


_START = "<|start|>assistant"

_CHAT_THINKING = ("<think>\n", "\n</think>\n\n")

WRITINGS = {
    "hermes": Writing(
        lambda name, arguments: f"<tool_call>\n{_object(name, arguments)}\n</tool_call>",
        thinking=_CHAT_THINKING,
    ),
    "qwen3_5": Writing(_xml, thinking=_CHAT_THINKING),
    "llama3": Writing(
        lambda name, arguments: f'{{"name": "{name}", "parameters": {arguments}}}', between="; "
    ),
    "mistral": Writing(
        _object, between=", ", around=("[TOOL_CALLS] [", "]"), thinking=("[THINK]", "[/THINK]")
    ),
    "mistral_named": Writing(
        lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{arguments}",
        between="",
        thinking=("[THINK]", "[/THINK]"),
    ),
    "functiongemma": Writing(_gemma("<start_function_call>", "<end_function_call>", "<escape>"), between=""),
    "gemma4": Writing(
        _gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
        between="",
        thinking=("<|channel>thought\n", "\n<channel|>"),
    ),
    "harmony": Writing(
        lambda name, arguments: (
            f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
        ),
        between=_START,
        thinking=("<|channel|>analysis<|message|>", "<|end|>" + _START),
        answer=("<|channel|>final<|message|>", "<|end|>"),
    ),
    "deepseek": Writing(
        lambda name, arguments: (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        ),
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        thinking=_CHAT_THINKING,
    ),
    "deepseek_v3_1": Writing(
        lambda name, arguments: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        between="",
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        thinking=("<think>", "</think>"),
    ),
    "fenced": Writing(lambda name, arguments: f"```json\n{_object(name, arguments)}\n```"),
}


def _outputs_of(family: str, writing: Writing) -> Iterable[ModelOutput]:
    one, two = ("get_weather", CITY), ("get_weather", OTHER_CITY)
    nested, escapes = ("plan", NESTED), ("get_weather", ESCAPES)
    before, after = writing.answer

    def output(name: str, text: str, **message: object) -> ModelOutput:
        return ModelOutput(f"{family}: {name}", family, text, **message)  # type: ignore[arg-type]

    plain = "It rains, {as} <usual>:\n\n- a [list]\n"
    yield output("no call", before + plain + after, content=plain)
    yield output("one call", writing.calls(one), calls=(one,))
    yield output("two calls", writing.calls(one, two), calls=(one, two))
    yield output("nested arguments", writing.calls(nested), calls=(nested,))
    yield output("unicode and escapes", writing.calls(escapes), calls=(escapes,))
    if family != "llama3":
        yield output(
            "text before", "Let me look.\n\n" + writing.calls(one), content="Let me look.", calls=(one,)
        )
        text = writing.calls(one) + "\nThat was it."
        yield output("text after", text, content="That was it.", calls=(one,))
    malformed = writing.calls(one).replace("Paris", '"Pa"ris').replace("city>", "city")
    if "gemma" in family:
        malformed = writing.calls(one).replace("city:", "city")
    shown = malformed
    yield output("malformed", malformed, content=shown)
    yield output("cut", writing.calls(nested)[: -len(writing.calls(nested)) // 3], content="")
    if writing.thinking is None:
        return
    opening, closing = writing.thinking
    thought = "Should I?\n<b>Yes</b>, {I} should."
    thinking = opening + thought + closing
    yield output(
        "thinking, then an answer", thinking + before + plain + after, reasoning=thought, content=plain
    )
    yield output("thinking, then a call", thinking + writing.calls(one), reasoning=thought, calls=(one,))
    yield output("thinking that is cut", opening + thought, reasoning=thought)


_WRITTEN = [output for family, writing in WRITINGS.items() for output in _outputs_of(family, writing)]

_THINKING = "<|im_start|>user\n<think>Hi<|im_end|>\n<|im_start|>assistant\n<think>\n"

_ODD = [
    ModelOutput(
        "a prompt that opens the thinking", "hermes", "Hm.\n</think>\n\nHi!", "Hi!", "Hm.", prompt=_THINKING
    ),
    ModelOutput(
        "a prompt that opens and closes the thinking",
        "hermes",
        "<think> is a tag.",
        "<think> is a tag.",
        prompt=_THINKING + "\n</think>\n\n",
    ),
    ModelOutput("thinking behind text is text", "hermes", "So: <think>no</think>", "So: <think>no</think>"),
    ModelOutput(
        "a closing string within an argument",
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> \\" </tool_call>"}}\n</tool_call>',
        calls=(("f", '{"a": "</tool_call> \\" </tool_call>"}'),),
    ),
    ModelOutput(
        "arguments that are a string of JSON",
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        calls=(("f", '{"a": 1}'),),
    ),
    ModelOutput("no arguments", "hermes", '<tool_call>{"name": "f"}</tool_call>', calls=(("f", "{}"),)),
    ModelOutput(
        "half of a surrogate pair",
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>',
    ),
    ModelOutput("an opening string alone", "hermes", "Write <tool_call> first.", "Write <tool_call> first."),
    ModelOutput(
        "a good call behind a bad one",
        "hermes",
        '<tool_call>bad</tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n',
        "<tool_call>bad</tool_call>",
        calls=(("f", "{}"),),
    ),
    ModelOutput(
        "a fence, as Qwen2.5-Coder writes it",
        "hermes",
        '```json\n{\n  "name": "get_weather",\n  "arguments": {\n    "city": "Paris"\n  }\n}\n```',
        calls=(("get_weather", '{\n    "city": "Paris"\n  }'),),
    ),
    ModelOutput(
        "calls and nothing around them, as Qwen2.5-Coder writes them too",
        "hermes",
        f"{_object('get_weather', CITY)}\n{_object('plan', '{}')}",
        calls=(("get_weather", CITY), ("plan", "{}")),
    ),
    ModelOutput(
        "an object that names no tool",
        "hermes",
        '{"name": "Ann", "arguments": {}}',
        '{"name": "Ann", "arguments": {}}',
    ),
    ModelOutput(
        "a call and text behind it",
        "hermes",
        f"{_object('get_weather', CITY)}\nSo it is.",
        f"{_object('get_weather', CITY)}\nSo it is.",
    ),
    ModelOutput(
        "thinking, and a call in a form that is not read",
        "glm4_5",
        "\n<think>Hm.</think>\nSo:\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        "So:\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        "Hm.",
    ),
    ModelOutput(
        "a fence that names no tool",
        "fenced",
        '```json\n{"name": "Ann", "arguments": {}}\n```\nAnd ```json\n[1]\n```.',
        '```json\n{"name": "Ann", "arguments": {}}\n```\nAnd ```json\n[1]\n```.',
    ),
    ModelOutput(
        "a list in a fence",
        "fenced",
        f"```json\n[{_object('get_weather', CITY)}, {_object('plan', '{}')}]\n```",
        calls=(("get_weather", CITY), ("plan", "{}")),
    ),
    ModelOutput(
        "a python tag",
        "llama3",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {CITY}}}',
        calls=(("get_weather", CITY),),
    ),
    ModelOutput(
        "JSON that is an answer",
        "llama3",
        '{"name": "Ann", "parameters": {}}',
        '{"name": "Ann", "parameters": {}}',
    ),
    ModelOutput(
        "JSON behind text",
        "llama3",
        f'See {{"name": "get_weather", "parameters": {CITY}}}',
        f'See {{"name": "get_weather", "parameters": {CITY}}}',
    ),
    ModelOutput(
        "markers within an argument",
        "mistral_named",
        '[TOOL_CALLS]f[ARGS]{"a": "} [TOOL_CALLS] [ARGS]"}[TOOL_CALLS]g{}',
        calls=(("f", '{"a": "} [TOOL_CALLS] [ARGS]"}'), ("g", "{}")),
    ),
    ModelOutput(
        "a call with an id",
        "mistral_named",
        f"[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{CITY}",
        calls=(("f", CITY),),
    ),
    ModelOutput(
        "an end of the answer for a closing",
        "harmony",
        f"<|channel|>analysis<|message|>Hm.<|end|>{_START} to=functions.f<|channel|>commentary json<|message|>{CITY}",
        reasoning="Hm.",
        calls=(("f", CITY),),
    ),
    ModelOutput(
        "a preamble",
        "harmony",
        f"<|channel|>commentary<|message|>Wait.<|end|>{_START}{WRITINGS['harmony'].calls(('f', CITY))}",
        "Wait.",
        calls=(("f", CITY),),
    ),
    ModelOutput(
        "a prompt that opens the thinking, and a call",
        "deepseek",
        "Hm.\n</think>\n\n" + WRITINGS["deepseek"].calls(("f", CITY)),
        reasoning="Hm.",
        calls=(("f", CITY),),
        prompt="<｜User｜>Hi<｜Assistant｜><think>\n",
    ),
]


def _with_cut_content(output: ModelOutput) -> ModelOutput:
    """A call that is cut is content as it was written."""
    return replace(output, content=output.text) if output.name.endswith(": cut") else output


OUTPUTS: Sequence[ModelOutput] = [*map(_with_cut_content, _WRITTEN), *_ODD]
