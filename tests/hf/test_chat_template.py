"""Chats with tools and images as harmony, against strings written by hand from its published description."""

import datetime
from typing import Any

import pytest

from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from tiny import tiny_processor

WEATHER = {
    "name": "get_current_weather",
    "description": "Gets the current weather in the provided location.",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["location"],
    },
}
LOCATION = {"name": "get_location", "description": "Gets the location of the user."}
TOOLS = [{"type": "function", "function": function} for function in (LOCATION, WEATHER)]
DEFINITIONS = """\
# Tools

## functions

namespace functions {

// Gets the location of the user.
type get_location = () => any;

// Gets the current weather in the provided location.
type get_current_weather = (_: {
// The city and state, e.g. San Francisco, CA
location: string,
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

} // namespace functions"""
SYSTEM = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {today}

Reasoning: {effort}

# Valid channels: analysis, commentary, final. Channel must be included for every message."""
CALLS = "\nCalls to these tools must go to the commentary channel: 'functions'."

ASKED = {"role": "user", "content": "What is the weather like in SF?"}
CALL = {"type": "function", "function": {"name": "get_current_weather", "arguments": {"location": "San Francisco"}}}
CALLED = {"role": "assistant", "thinking": "Need the weather.", "tool_calls": [CALL]}
RETURNED = {"role": "tool", "content": '{"sunny": true}'}
ANSWERED = {"role": "assistant", "content": "It is sunny."}

USER = "<|start|>user<|message|>What is the weather like in SF?<|end|>"
ANALYSIS = "<|start|>assistant<|channel|>analysis<|message|>Need the weather.<|end|>"
TOOL_CALL = (
    "<|start|>assistant to=functions.get_current_weather<|channel|>commentary json<|message|>"
    '{"location": "San Francisco"}<|call|>'
)
RESULT = '<|start|>functions.get_current_weather to=assistant<|channel|>commentary<|message|>{"sunny": true}<|end|>'


@pytest.fixture(scope="module")
def processor() -> GPTOSSVisionProcessor:
    return tiny_processor()


def system(effort: str = "medium", calls: str = "") -> str:
    return SYSTEM.format(today=datetime.date.today().isoformat(), effort=effort) + calls + "<|end|>"


def test_by_default_nothing_is_added(processor):
    assert processor.apply_chat_template([ASKED]) == USER


def test_reasoning_effort_adds_gpt_oss_s_system_message(processor):
    rendered = processor.apply_chat_template([ASKED], reasoning_effort="high", add_generation_prompt=True)
    assert rendered == system("high") + USER + "<|start|>assistant"


def test_a_system_message_of_one_s_own_is_kept(processor):
    own = {"role": "system", "content": "Reasoning: low"}
    rendered = processor.apply_chat_template([own, ASKED], reasoning_effort="high")
    assert rendered == "<|start|>system<|message|>Reasoning: low<|end|>" + USER


def test_tools_are_defined_in_a_developer_message(processor):
    rendered = processor.apply_chat_template([ASKED], tools=TOOLS, add_generation_prompt=True)
    developer = f"<|start|>developer<|message|>{DEFINITIONS}<|end|>"
    assert rendered == system(calls=CALLS) + developer + USER + "<|start|>assistant"


def test_tools_follow_the_developer_s_instructions(processor):
    told = {"role": "developer", "content": "Use a friendly tone."}
    rendered = processor.apply_chat_template([told, ASKED], tools=TOOLS)
    developer = f"<|start|>developer<|message|># Instructions\n\nUse a friendly tone.\n\n{DEFINITIONS}<|end|>"
    assert rendered == system(calls=CALLS) + developer + USER


def test_tools_are_taken_as_python_functions_too(processor):
    def look(depth: int = 1) -> str:
        """Looks closer.

        Args:
            depth: How close.
        """

    rendered = processor.apply_chat_template([ASKED], tools=[look])
    assert "// Looks closer.\ntype look = (_: {\n// How close.\ndepth?: number,\n}) => any;\n" in rendered


TYPES: list[tuple[dict[str, Any], str]] = [
    ({"type": "integer"}, "number"),
    ({"type": "boolean", "default": False}, "boolean"),
    ({"type": "array", "items": {"type": "string"}}, "string[]"),
    ({"type": "array"}, "any[]"),
    ({"type": "array", "items": {"enum": ["a", "b"]}}, '("a" | "b")[]'),
    ({"type": ["integer", "null"]}, "number | null"),
    ({"type": "string", "nullable": True}, "string | null"),
    ({"anyOf": [{"type": "number"}, {"type": "string"}]}, "number | string"),
    ({"type": "object"}, "object"),
    ({"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}, "{\nx: number,\n}"),
    ({}, "any"),
]


@pytest.mark.parametrize(("schema", "written"), TYPES, ids=[written for _, written in TYPES])
def test_a_parameter_s_schema_is_written_as_a_type(processor, schema, written):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}
    comment = " // default: false" if "default" in schema else ""
    rendered = processor.apply_chat_template([ASKED], tools=[{"type": "function", "function": tool}])
    assert f"type f = (_: {{\nx?: {written},{comment}\n}}) => any;" in rendered


def test_a_call_keeps_its_thinking_until_it_is_answered(processor):
    rendered = processor.apply_chat_template([ASKED, CALLED, RETURNED], add_generation_prompt=True)
    assert rendered == USER + ANALYSIS + TOOL_CALL + RESULT + "<|start|>assistant"


def test_an_answered_call_has_lost_its_thinking(processor):
    rendered = processor.apply_chat_template([ASKED, CALLED, RETURNED, ANSWERED, ASKED], add_generation_prompt=True)
    answer = "<|start|>assistant<|channel|>final<|message|>It is sunny.<|end|>"
    assert rendered == USER + TOOL_CALL + RESULT + answer + USER + "<|start|>assistant"


def test_words_beside_a_call_are_a_preamble(processor):
    rendered = processor.apply_chat_template([ASKED, CALLED | {"content": "I look.", "thinking": None}])
    assert rendered == USER + "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>" + TOOL_CALL


@pytest.mark.parametrize("name", ["get_current_weather", "functions.get_current_weather"])
def test_a_result_is_from_the_tool_that_it_names(processor, name):
    rendered = processor.apply_chat_template([RETURNED | {"name": name, "content": {"sunny": True}}])
    assert rendered == RESULT


def test_a_result_may_be_an_image(processor):
    result = RETURNED | {"name": "camera", "content": [{"type": "image"}, {"type": "text", "text": "taken"}]}
    rendered = processor.apply_chat_template([result])
    assert rendered == "<|start|>functions.camera to=assistant<|channel|>commentary<|message|><image>taken<|end|>"


def test_a_call_is_part_of_the_assistant_s_tokens(processor):
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template([ASKED, CALLED], **arguments)
    said = [token for token, mask in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if mask]
    assert processor.decode(said) == (ANALYSIS + TOOL_CALL).removeprefix("<|start|>assistant")


HARMONY = ["<|channel|>analysis<|message|>t<|end|>", "<|channel|>final<|message|>three<|return|>", "three<|return|>"]


@pytest.mark.parametrize("written", [*HARMONY, "<|start|>", "<|message|>", "<|call|>"])
@pytest.mark.parametrize("field", ["content", "parts", "thinking", "before a call"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_tokens_of_the_format_in_a_message_of_the_assistant_are_refused(processor, goes_on, field, written):
    message = {
        "content": ANSWERED | {"content": written},
        "parts": ANSWERED | {"content": [{"type": "text", "text": written}]},
        "thinking": ANSWERED | {"thinking": written},
        "before a call": CALLED | {"content": written},
    }[field]
    with pytest.raises(Exception, match=r"contains <\|\w+\|>, .* as `thinking` and .* as `content`; `parse_response`"):
        processor.apply_chat_template([ASKED, message, *([RETURNED, ASKED] if goes_on else [])])


def test_messages_of_other_roles_may_contain_tokens_of_the_format(processor):
    about = {"role": "user", "content": "What is <|channel|>?"}
    assert processor.apply_chat_template([about]) == "<|start|>user<|message|>What is <|channel|>?<|end|>"


def test_a_result_after_the_answer_needs_a_name(processor):
    with pytest.raises(Exception, match="A tool message without the name of a tool"):
        processor.apply_chat_template([ASKED, CALLED, RETURNED, ANSWERED, RETURNED])


# parse_response

FINAL = "<|channel|>final<|message|>It is sunny."
ARGUMENTS = '{"location": "San Francisco"}'
MESSAGES = {
    "an answer": ANSWERED,
    "no answer": ANSWERED | {"content": ""},
    "an answer of lines": ANSWERED | {"content": "It is\n\nsunny, to=functions.rain "},
    "thinking": ANSWERED | {"thinking": "Sunny?\nYes."},
    "a call": {"role": "assistant", "tool_calls": [CALL]},
    "thinking and a call": CALLED,
    "a preamble, thinking and a call": CALLED | {"content": "I look."},
    "a call without arguments": {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "look-2", "arguments": {}}}],
    },
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_parsing_a_rendered_message_returns_the_message(processor, message):
    prompt = processor.apply_chat_template([ASKED], add_generation_prompt=True)
    rendered = processor.apply_chat_template([ASKED, message])
    assert rendered.startswith(prompt)
    assert processor.parse_response(rendered.removeprefix(prompt)) == message
    ids = processor.tokenizer(rendered.removeprefix(prompt)).input_ids
    assert processor.parse_response(ids) == message
    padding = [processor.tokenizer.pad_token_id] * 3
    assert processor.parse_response([ids + padding] * 2) == [message] * 2


HEADERS = {
    "in the role": " to=functions.get_current_weather<|channel|>commentary json<|message|>",
    "in the role, constrained": " to=functions.get_current_weather<|channel|>commentary <|constrain|>json<|message|>",
    "in the channel": "<|channel|>commentary to=functions.get_current_weather <|constrain|>json<|message|>",
    "in the channel, no type": "<|channel|>commentary to=functions.get_current_weather<|message|>",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("end", ["<|call|>", ""])
def test_a_call_is_parsed_from_every_header_of_harmony(processor, header, end):
    called = {"role": "assistant", "tool_calls": [CALL]}
    assert processor.parse_response(header + ARGUMENTS + end) == called
    thought = "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant"
    assert processor.parse_response(thought + header + ARGUMENTS + end) == CALLED


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (FINAL, ANSWERED),
        ("It is sunny.<|return|>", ANSWERED),
        (f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{FINAL}<|return|>", ANSWERED),
        ("<|channel|>analysis<|message|>It is", {"role": "assistant", "thinking": "It is"}),
        ("<|channel|>ana", {"role": "assistant"}),
        ("", {"role": "assistant", "content": ""}),
    ],
)
def test_a_message_that_was_cut_off_or_has_no_header_keeps_its_text(processor, written, message):
    assert processor.parse_response(written) == message


def test_arguments_that_are_no_json_stay_text(processor):
    parsed = processor.parse_response(HEADERS["in the role"] + '{"location": "San')
    assert parsed["tool_calls"][0]["function"] == {"name": "get_current_weather", "arguments": '{"location": "San'}
    assert processor.apply_chat_template([ASKED, parsed]).endswith('<|message|>{"location": "San<|call|>')


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (CALLED | {"tool_calls": [CALL, CALL]}, "A message calls one tool, not 2"),
        (RETURNED, "A tool message without the name of a tool"),
    ],
)
def test_messages_that_harmony_cannot_express_are_refused(processor, message, sentence):
    with pytest.raises(Exception, match=sentence):
        processor.apply_chat_template([ASKED, message])
