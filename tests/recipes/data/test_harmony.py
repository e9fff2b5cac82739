"""Chats as token ids, against `openai-harmony`, with gpt-oss's vocabulary, which the wheel of `bpe-openai` holds."""

import datetime
import gzip
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncoding,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
    load_harmony_encoding,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
from gpt_oss_vision.recipes.data.formats import parse_record
from gpt_oss_vision.recipes.data.pictures import Pictures
from gpt_oss_vision.recipes.data.samples import encode_row
from gpt_oss_vision.recipes.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN

SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
"""Of the published file, which `openai-harmony` checks too."""

WEATHER = ToolDescription.new(
    "get_current_weather",
    "Gets the current weather in the provided location.",
    parameters={
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "days": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["location"],
    },
)
LOCATION = ToolDescription.new("get_location", "Gets the location of the user.")
TOOLS = [
    {"type": "function", "function": each.model_dump(exclude_none=True, include={"name", "description", "parameters"})}
    for each in (LOCATION, WEATHER)
]
SYSTEM = SystemContent.new().with_reasoning_effort(ReasoningEffort.HIGH).with_conversation_start_date("2025-06-28")
SYSTEM_TEXT = """\
You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message."""
CALLS = "\nCalls to these tools must go to the commentary channel: 'functions'."

ASKED = {"role": "user", "content": "What is the weather like in SF? Größe 12345, don't you know? 東京\n\n  ok"}
ANSWERED = {"role": "assistant", "content": "It is sunny: 20°C.\n"}
THOUGHT = {"role": "assistant", "thinking": "The user asks.  Need care.", "content": "It is sunny."}
CALLED = {
    "role": "assistant",
    "thinking": "Need the weather.",
    "tool_calls": [{"function": {"name": "get_current_weather", "arguments": '{"location": "San Francisco"}'}}],
}
LOCATED = {"role": "assistant", "tool_calls": [{"function": {"name": "get_location", "arguments": "{}"}}]}
RETURNED = {"role": "tool", "content": '{"sunny": true, "temperature": 20}'}
THANKS = {"role": "user", "content": "Thanks! And tomorrow?"}

CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASKED, ANSWERED],
    "thinking": [ASKED, THOUGHT],
    "two turns": [ASKED, ANSWERED, THANKS, ANSWERED],
    "thinking in two turns": [ASKED, THOUGHT, THANKS, THOUGHT],
    "a call": [ASKED, CALLED],
    "a call and its result": [ASKED, CALLED, RETURNED],
    "a call and an answer": [ASKED, CALLED, RETURNED, ANSWERED],
    "two calls": [ASKED, LOCATED, {**RETURNED, "name": "get_location"}, CALLED, RETURNED, THOUGHT],
    "a call in an earlier turn": [ASKED, CALLED, RETURNED, ANSWERED, THANKS, THOUGHT],
    "the user's turn last": [ASKED, THOUGHT, THANKS],
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    packed = importlib.metadata.distribution("bpe-openai").locate_file("bpe_openai/data/o200k_base.tiktoken.gz")
    content = gzip.decompress(Path(str(packed)).read_bytes())
    assert hashlib.sha256(content).hexdigest() == SHA256
    (folder / "o200k_base.tiktoken").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def harmony(vocabulary: Path) -> HarmonyEncoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(vocabulary))
        return load_harmony_encoding("HarmonyGptOss")


@pytest.fixture(scope="module")
def processor(vocabulary: Path) -> GPTOSSVisionProcessor:
    """That of gpt-oss: its vocabulary, our pre-tokenization, special tokens and chat template."""
    file = vocabulary / "o200k_base.tiktoken"
    converted = TikTokenConverter(str(file), pattern=SPLIT_PATTERN, extra_special_tokens=SPECIAL_TOKENS).converted()
    tokenizer = GPTOSSVisionTokenizer(tokenizer_object=converted, eos_token="<|return|>", pad_token="<|endoftext|>")
    return GPTOSSVisionProcessor(GPTOSSVisionImageProcessor(), tokenizer)


def opening(kind: str) -> tuple[list[Message], dict[str, Any]]:
    """The messages in front of a chat, and the same for a record of ours: its messages and tools."""
    if kind == "no system message":
        return [], {"messages": []}
    developer = DeveloperContent.new().with_instructions("Be friendly.")
    ours = [{"role": "system", "content": SYSTEM_TEXT}, {"role": "developer", "content": "Be friendly."}]
    record: dict[str, Any] = {"messages": ours}
    if kind == "tools":
        developer = developer.with_function_tools([LOCATION, WEATHER])
        ours[0]["content"] += CALLS
        record["tools"] = TOOLS
    theirs = [(Role.SYSTEM, SYSTEM), (Role.DEVELOPER, developer)]
    return [Message.from_role_and_content(role, content) for role, content in theirs], record


def messages_of(chat: list[dict[str, Any]]) -> list[Message]:
    """Our messages as those of `openai-harmony`."""
    messages, called = [], ""
    for message in chat:
        if message["role"] == "user":
            messages.append(Message.from_role_and_content(Role.USER, message["content"]))
        elif message["role"] == "tool":
            author = Author.new(Role.TOOL, f"functions.{message.get('name', called)}")
            result = Message.from_author_and_content(author, message["content"])
            messages.append(result.with_recipient("assistant").with_channel("commentary"))
        else:
            if "thinking" in message:
                messages.append(answer(message["thinking"], "analysis"))
            for call in message.get("tool_calls", ()):
                called = call["function"]["name"]
                made = answer(call["function"]["arguments"], "commentary").with_recipient(f"functions.{called}")
                messages.append(made.with_content_type("json"))
            if "content" in message:
                messages.append(answer(message["content"], "final"))
    return messages


def answer(text: str, channel: str) -> Message:
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def tokens_of(processor: GPTOSSVisionProcessor, record: dict[str, Any]) -> list[int]:
    """As a row of data is trained on."""
    return encode_row(parse_record(record, Pictures(Path())), processor)["input_ids"].tolist()


def without_thinking(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "thinking"} for message in chat]


def test_the_special_tokens_have_the_ids_of_harmony(harmony, processor):
    ids = {name: harmony.encode(name, allowed_special="all") for name in SPECIAL_TOKENS if name != "<|endofprompt|>"}
    assert ids == {name: [processor.tokenizer.convert_tokens_to_ids(name)] for name in ids}
    # Harmony names it <|reserved_200018|>; `tiktoken`'s o200k_base and gpt-oss's tokenizer call it <|endofprompt|>.
    assert harmony.encode("<|reserved_200018|>", allowed_special="all") == [200018]
    assert processor.tokenizer.convert_tokens_to_ids("<|endofprompt|>") == 200018


@given(text=st.text(max_size=60) | st.text(alphabet="aB'’sSlLrRe1 2\n\r\t/.,-é東\u0301", max_size=60))
@settings(max_examples=500)
def test_any_text_has_the_tokens_of_harmony(harmony, processor, text):
    assert processor.tokenizer.encode(text, add_special_tokens=False) == harmony.encode(text, disallowed_special=())


@pytest.mark.parametrize("kind", ["no system message", "system and developer message", "tools"])
@pytest.mark.parametrize("name", CHATS)
def test_a_row_has_the_tokens_of_harmony(harmony, processor, name, kind):
    """Where the last answer has no thinking; of other answers both leave it out, unless its call is not answered."""
    chat = [*CHATS[name][:-1], *without_thinking(CHATS[name][-1:])] if "content" in CHATS[name][-1] else CHATS[name]
    theirs, record = opening(kind)
    record["messages"] += chat
    expected = harmony.render_conversation_for_training(Conversation.from_messages([*theirs, *messages_of(chat)]))
    assert tokens_of(processor, record) == expected


@pytest.mark.parametrize("name", [name for name, chat in CHATS.items() if chat[-1].keys() >= {"thinking", "content"}])
def test_the_thinking_of_the_last_answer_is_kept_to_be_learned(harmony, processor, name):
    """Harmony leaves it out by default, as for a prompt; gpt-oss's chat template keeps it, as ours does."""
    *before, last = CHATS[name]
    given = Conversation.from_messages(messages_of([*without_thinking(before), last]))
    kept = harmony.render_conversation_for_training(given, RenderConversationConfig(auto_drop_analysis=False))
    assert tokens_of(processor, {"messages": CHATS[name]}) == kept


@pytest.mark.parametrize("kind", ["no system message", "system and developer message", "tools"])
@pytest.mark.parametrize("name", [name for name, chat in CHATS.items() if chat[-1]["role"] != "assistant"])
def test_a_prompt_has_the_tokens_of_harmony(harmony, processor, name, kind):
    theirs, record = opening(kind)
    given = Conversation.from_messages([*theirs, *messages_of(CHATS[name])])
    text = processor.apply_chat_template(
        record["messages"] + CHATS[name], tools=record.get("tools"), add_generation_prompt=True
    )
    expected = harmony.render_conversation_for_completion(given, Role.ASSISTANT)
    assert processor.tokenizer.encode(text, add_special_tokens=False) == expected


def test_the_system_message_of_gpt_oss_has_the_tokens_of_harmony(harmony, processor):
    today = datetime.date.today().isoformat()
    system = SystemContent.new().with_reasoning_effort(ReasoningEffort.LOW).with_conversation_start_date(today)
    given = [Message.from_role_and_content(Role.SYSTEM, system), *messages_of([ASKED])]
    text = processor.apply_chat_template([ASKED], reasoning_effort="low", add_generation_prompt=True)
    expected = harmony.render_conversation_for_completion(Conversation.from_messages(given), Role.ASSISTANT)
    assert processor.tokenizer.encode(text, add_special_tokens=False) == expected
