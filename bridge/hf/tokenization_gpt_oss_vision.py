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
# assistant ends with <|return|>, as in training; earlier turns end with <|end|> and have lost their thinking.
CHAT_TEMPLATE = """\
{%- macro content_of(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
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
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {{- "<|start|>assistant" -}}
        {%- generation -%}
            {%- if loop.last and message.thinking -%}
                {{- "<|channel|>analysis<|message|>" ~ message.thinking ~ "<|end|><|start|>assistant" -}}
            {%- endif -%}
            {{- "<|channel|>final<|message|>" ~ content_of(message) -}}
            {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" -}}
        {%- endgeneration -%}
    {%- elif message.role == "tool" -%}
        {{- "<|start|>" ~ message.name ~ " to=assistant<|channel|>commentary<|message|>" -}}
        {{- content_of(message) ~ "<|end|>" -}}
    {%- elif message.role == "developer" -%}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" ~ content_of(message) ~ "<|end|>" -}}
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
