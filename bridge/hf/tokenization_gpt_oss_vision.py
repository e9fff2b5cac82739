# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""The tokenizer: gpt-oss's, with a chat template that knows images, and a way to train a small one of the same kind."""

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig
from transformers.tokenization_utils_tokenizers import TokenizersBackend

# In gpt-oss these follow the ordinary tokens, from id 199998. Names keep gpt-oss's ids in a smaller vocabulary too.
SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|reserved_200000|>",
    "<|reserved_200001|>",
    "<|return|>",
    "<|constrain|>",
    "<|reserved_200004|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|reserved_200009|>",
    "<|reserved_200010|>",
    "<|reserved_200011|>",
    "<|call|>",
    "<|reserved_200013|>",
    "<|reserved_200014|>",
    "<|reserved_200015|>",
    "<|reserved_200016|>",
    "<|reserved_200017|>",
    "<|endofprompt|>",
)
IMAGE_TOKEN = "<|reserved_200013|>"

# Where o200k splits text before merging: words with their case changes and English contractions, up to three digits,
# punctuation with the line ends behind it, line ends, other space.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Harmony, gpt-oss's chat format, with `<image>` where a message has an image. A conversation that ends with the
# assistant ends with <|return|>, as in training; earlier turns end with <|end|> and have lost their thinking, unless it
# led to a call of a tool that is not answered yet. Messages keep the role that they are given. gpt-oss's own system
# message, which has today's date, is there when it is asked for, by `tools`, `reasoning_effort` or `model_identity`, in
# a conversation that brings no system message.
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


class GPTOSSVisionTokenizer(TokenizersBackend):
    r"""
    gpt-oss's byte-level BPE. A stock gpt-oss tokenizer loads as it is; `<|reserved_200013|>` is the image placeholder,
    which only [`GPTOSSVisionProcessor`] knows how to fill in. Batches are padded on the left, ready for `generate`.

    Example:

    ```python
    >>> tokenizer = GPTOSSVisionTokenizer.train_from_texts(["Which digit is this?", "It is a seven."], vocab_size=300)
    >>> tokenizer.decode(tokenizer("It is a seven.").input_ids)
    'It is a seven.'
    >>> tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    '<|endofprompt|>'
    ```"""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - as in transformers
    padding_side = "left"

    @classmethod
    def train_from_texts(cls, texts: Iterable[str], vocab_size: int, **kwargs: Any) -> "GPTOSSVisionTokenizer":
        """
        Trains a byte-level BPE on `texts`, split as gpt-oss splits. The special tokens follow the ordinary ones, in
        gpt-oss's order and at its spacing.

        Args:
            texts (`Iterable[str]`): What to learn merges from. The same texts give the same tokenizer.
            vocab_size (`int`):
                All tokens, special ones included, so at least 277. Too little text gives a smaller vocabulary.
            kwargs: Passed on to the constructor.

        Raises:
            ValueError: when `vocab_size` has no room for the 256 bytes and the special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        num_ordinary = vocab_size - len(SPECIAL_TOKENS)
        if num_ordinary < len(alphabet):
            raise ValueError(f"vocab_size must be at least {len(alphabet) + len(SPECIAL_TOKENS)}, got {vocab_size}.")
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(vocab_size=num_ordinary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
        fields = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
        }
        return cls(tokenizer_object=tokenizer, **(fields | kwargs))

    def generation_config(self, **kwargs: Any) -> GenerationConfig:
        """What a checkpoint with this tokenizer needs in order to stop: gpt-oss's end tokens, under this one's ids."""
        ends = ("<|return|>", "<|endoftext|>", "<|call|>")
        fields = {
            "bos_token_id": self.convert_tokens_to_ids("<|startoftext|>"),
            "eos_token_id": [self.convert_tokens_to_ids(token) for token in ends],
            "pad_token_id": self.convert_tokens_to_ids("<|endoftext|>"),
        }
        return GenerationConfig(**(fields | kwargs))


GPTOSSVisionTokenizer.register_for_auto_class()

__all__ = ["GPTOSSVisionTokenizer"]
