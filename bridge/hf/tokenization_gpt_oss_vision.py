# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""The tokenizer: gpt-oss's own, with a chat template for messages with images."""

import os
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig
from transformers.tokenization_utils_tokenizers import TokenizersBackend

IMAGE_TOKEN = "<|reserved_200013|>"

# Harmony, gpt-oss's chat format, with `<image>` for each image. A final assistant turn ends with <|return|>, as in
# training; earlier turns end with <|end|> and without their thinking, unless it led to a tool call that is not answered
# yet. Roles are kept. Tokens of the format in an assistant's message are an error. gpt-oss's own system message, with
# today's date, is added when `tools`, `reasoning_effort` or `model_identity` is set and the conversation has no system
# message.
CHAT_TEMPLATE = """\
{%- macro content_of(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content is mapping -%}
        {{- message.content | tojson -}}
    {%- elif message.content -%}
        {%- for part in message.content -%}
            {%- if part.type == "image" -%}
                {{- "<image>" -}}
            {%- elif part.type == "text" -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception("Unknown type of content: " ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set simple_types = {"integer": "number", "number": "number", "string": "string", "boolean": "boolean",
                        "object": "object", "null": "null"} -%}
{%- macro check(text) -%}
    {%- for token in ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>") -%}
        {%- if token in text -%}
            {{- raise_exception("An assistant message contains " ~ token ~ ", a token of the chat format. "
                ~ "Pass the text of its analysis channel as `thinking` and the text of its final channel as `content`; "
                ~ "`parse_response` makes such a message from generated tokens.") -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro union_of(specs) -%}
    {%- for spec in specs -%}
        {{- ("" if loop.first else " | ") ~ type_of(spec) -}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro type_of(spec) -%}
    {%- if spec.enum -%}
        {%- for value in spec.enum -%}
            {{- ("" if loop.first else " | ") ~ (value | tojson) -}}
        {%- endfor -%}
    {%- elif spec.oneOf or spec.anyOf -%}
        {{- union_of(spec.oneOf or spec.anyOf) -}}
    {%- elif spec.type == "array" -%}
        {%- set item = type_of(spec["items"]) if "items" in spec else "any" -%}
        {{- ("(" ~ item ~ ")" if " | " in item else item) ~ "[]" -}}
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{\\n" ~ fields_of(spec) ~ "}" -}}
    {%- elif spec.type is string or spec.type is not defined -%}
        {{- simple_types.get(spec.type, "any") -}}
    {%- else -%}
        {%- for kind in spec.type -%}
            {{- ("" if loop.first else " | ") ~ type_of({"type": kind}) -}}
        {%- endfor -%}
    {%- endif -%}
    {{- " | null" if spec.nullable -}}
{%- endmacro -%}
{%- macro fields_of(spec) -%}
    {%- for name, field in spec.properties.items() -%}
        {{- "// " ~ field.description ~ "\\n" if field.description -}}
        {{- name ~ ("" if name in (spec.required or []) else "?") ~ ": " ~ type_of(field) ~ "," -}}
        {{- " // default: " ~ (field.default if field.enum else field.default | tojson) if field.default is defined -}}
        {{- "\\n" -}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro definitions_of(tools) -%}
    {{- "# Tools\\n\\n## functions\\n\\nnamespace functions {\\n\\n" -}}
    {%- for tool in tools -%}
        {%- set tool = tool.function or tool -%}
        {{- "// " ~ tool.description ~ "\\n" if tool.description -}}
        {%- set takes = tool.parameters and tool.parameters.properties -%}
        {{- "type " ~ tool.name ~ " = (" ~ ("_: {\\n" ~ fields_of(tool.parameters) ~ "}" if takes else "") -}}
        {{- ") => any;\\n\\n" -}}
    {%- endfor -%}
    {{- "} // namespace functions" -}}
{%- endmacro -%}
{%- set has_system = messages and messages[0].role == "system" -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- set state = namespace(called=none, untold=tools) -%}
{%- if has_system -%}
    {{- "<|start|>system<|message|>" ~ content_of(messages[0]) ~ "<|end|>" -}}
{%- elif tools or reasoning_effort or model_identity -%}
    {{- "<|start|>system<|message|>" -}}
    {{- model_identity or "You are ChatGPT, a large language model trained by OpenAI." -}}
    {{- "\\nKnowledge cutoff: 2024-06\\nCurrent date: " ~ strftime_now("%Y-%m-%d") -}}
    {{- "\\n\\nReasoning: " ~ (reasoning_effort or "medium") -}}
    {{- "\\n\\n# Valid channels: analysis, commentary, final. Channel must be included for every message." -}}
    {{- "\\nCalls to these tools must go to the commentary channel: 'functions'." if tools -}}
    {{- "<|end|>" -}}
{%- endif -%}
{%- if tools and not turns | selectattr("role", "equalto", "developer") | list -%}
    {{- "<|start|>developer<|message|>" ~ definitions_of(tools) ~ "<|end|>" -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == "assistant" -%}
        {{- check(content_of(message)) ~ check(message.thinking or "") -}}
        {{- "<|start|>assistant" -}}
        {%- set later = turns[loop.index:] | selectattr("role", "equalto", "assistant") -%}
        {%- set is_open = not later | rejectattr("tool_calls") | list if message.tool_calls
                          else loop.last and not add_generation_prompt -%}
        {%- generation -%}
            {%- if message.thinking and is_open -%}
                {{- "<|channel|>analysis<|message|>" ~ message.thinking ~ "<|end|><|start|>assistant" -}}
            {%- endif -%}
            {%- if message.tool_calls -%}
                {%- if message.tool_calls | length > 1 -%}
                    {{- raise_exception("A message calls one tool, not " ~ (message.tool_calls | length)) -}}
                {%- endif -%}
                {%- if content_of(message) -%}
                    {{- "<|channel|>commentary<|message|>" ~ content_of(message) ~ "<|end|><|start|>assistant" -}}
                {%- endif -%}
                {%- set call = message.tool_calls[0].function or message.tool_calls[0] -%}
                {%- set state.called = "functions." ~ call.name -%}
                {{- " to=" ~ state.called ~ "<|channel|>commentary json<|message|>" -}}
                {{- (call.arguments if call.arguments is string else call.arguments | tojson) ~ "<|call|>" -}}
            {%- else -%}
                {{- "<|channel|>final<|message|>" ~ content_of(message) -}}
                {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" -}}
                {%- set state.called = none -%}
            {%- endif -%}
        {%- endgeneration -%}
    {%- elif message.role == "tool" -%}
        {%- set name = message.name or state.called or raise_exception("A tool message without the name of a tool") -%}
        {{- "<|start|>" ~ ("" if "." in name else "functions.") ~ name -}}
        {{- " to=assistant<|channel|>commentary<|message|>" ~ content_of(message) ~ "<|end|>" -}}
    {%- elif message.role == "developer" -%}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" ~ content_of(message) -}}
        {{- "\\n\\n" ~ definitions_of(state.untold) if state.untold -}}
        {%- set state.untold = none -%}
        {{- "<|end|>" -}}
    {%- elif message.role in ("system", "user") -%}
        {{- "<|start|>" ~ message.role ~ "<|message|>" ~ content_of(message) ~ "<|end|>" -}}
    {%- else -%}
        {{- raise_exception("Unknown role: " ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|start|>assistant" -}}
{%- endif -%}
"""

# What `parse_response` reads from the tokens that follow `<|start|>assistant`: the first analysis message, the final
# message or else a preamble in the commentary channel, and the calls of functions, whose name is in the header of
# either the role or the channel. Arguments that are not JSON stay a string. Text without any header is content.
_STARTS = r"(?:^|<\|start\|>assistant)"
_ENDS = r"(?:<\|end\|>|<\|return\|>|<\|call\|>|<\|endoftext\|>|$)"
_FINAL = rf".*{_STARTS}<\|channel\|>final<\|message\|>"
_PREAMBLE = rf".*?{_STARTS}<\|channel\|>commentary<\|message\|>"
RESPONSE_SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": "string", "x-regex": rf"(?:{_FINAL}|{_PREAMBLE}|^(?! to=|<\|))(.*?){_ENDS}"},
        "thinking": {"type": "string", "x-regex": rf"{_STARTS}<\|channel\|>analysis<\|message\|>(.*?){_ENDS}"},
        "tool_calls": {
            "type": "array",
            "x-regex-iterator": rf"{_STARTS}(?:<\|channel\|>\w+)? to=functions\.(.*?){_ENDS}",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string", "x-regex": r"^([^\s<]+)"},
                            "arguments": {
                                "x-regex": r"<\|message\|>(.*)",
                                "x-parser": "json",
                                "x-parser-args": {"allow_non_json": True},
                            },
                        },
                    },
                },
            },
        },
    },
}


class GPTOSSVisionTokenizer(TokenizersBackend):
    r"""
    gpt-oss's byte-level BPE. A stock gpt-oss tokenizer loads as it is; `<|reserved_200013|>` is the image placeholder,
    which [`GPTOSSVisionProcessor`] writes. Batches are padded on the left, as `generate` needs; what is saved does not
    depend on the padding and truncation of earlier calls.

    Example:

    ```python
    >>> tokenizer = GPTOSSVisionTokenizer.from_pretrained("openai/gpt-oss-20b")
    >>> tokenizer.convert_ids_to_tokens(200013)
    '<|reserved_200013|>'
    ```"""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - as in transformers
    padding_side = "left"

    def __init__(self, *args: Any, **kwargs: Any):
        # Only arguments are saved; a loader without this class would use defaults of its own.
        defaults = {"padding_side": self.padding_side, "model_input_names": self.model_input_names}
        super().__init__(*args, **(defaults | {"response_schema": RESPONSE_SCHEMA} | kwargs))

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """
        As in transformers for a class without an `__init__`: `tokenizer.json` is loaded whole. Padding and truncation
        in it are those of the last call before it was saved; transformers would make them defaults.
        """
        file = kwargs.get("tokenizer_file")
        if file is None or not os.path.isfile(file):
            return super().convert_to_native_format(**kwargs)
        kwargs["tokenizer_object"] = tokenizer = Tokenizer.from_file(kwargs.pop("tokenizer_file"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return kwargs

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        # Each call sets both; they would be written to tokenizer.json.
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        return super()._save_pretrained(*args, **kwargs)

    def generation_config(self, **kwargs: Any) -> GenerationConfig:
        """A generation configuration that stops at gpt-oss's end tokens, with the ids of this vocabulary."""
        ends = ("<|return|>", "<|endoftext|>", "<|call|>")
        fields = {
            "bos_token_id": self.convert_tokens_to_ids("<|startoftext|>"),
            "eos_token_id": [self.convert_tokens_to_ids(token) for token in ends],
            "pad_token_id": self.convert_tokens_to_ids("<|endoftext|>"),
        }
        return GenerationConfig(**(fields | kwargs))


GPTOSSVisionTokenizer.register_for_auto_class()

__all__ = ["GPTOSSVisionTokenizer"]
