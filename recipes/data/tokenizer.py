"""Training of a small tokenizer like gpt-oss's, for toy models."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from ...bridge.hf.tokenization_gpt_oss_vision import CHAT_TEMPLATE, GPTOSSVisionTokenizer
from .tokens import without_threads

# gpt-oss's special tokens by id. They follow the ordinary tokens, in a smaller vocabulary too.
_NAMES = {199998: "startoftext", 199999: "endoftext", 200002: "return", 200003: "constrain", 200005: "channel"}
_NAMES |= {200006: "start", 200007: "end", 200008: "message", 200012: "call", 200018: "endofprompt"}
SPECIAL_TOKENS = [f"<|{_NAMES.get(token, f'reserved_{token}')}|>" for token in range(199998, 200019)]

# The pre-tokenization of o200k: words with their case changes and English contractions, up to three digits,
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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> GPTOSSVisionTokenizer:
    """A byte-level BPE with gpt-oss's pre-tokenization; its special tokens follow the ordinary ones.

    Args:
        texts: the training text. The same texts give the same tokenizer.
        vocab_size: all tokens, special ones included, so at least 277. Too little text gives a smaller vocabulary.

    Raises:
        ValueError: when `vocab_size` is too small for the 256 bytes and the special tokens.
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
    with without_threads():
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return GPTOSSVisionTokenizer(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
