"""The tokenizer: gpt-oss's special tokens and pre-tokenizer, in a small vocabulary that is trained here."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gpt_oss_vision.bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
from gpt_oss_vision.recipes.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = ["Which digit is this? It is a seven.", "What's in there? The picture shows a handwritten three."] * 3
GPT_OSS_IDS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|reserved_200013|>": 200013,
    "<|endofprompt|>": 200018,
}


@pytest.fixture(scope="module")
def tokenizer() -> GPTOSSVisionTokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


def test_special_tokens_stand_behind_the_others_at_gpt_oss_s_spacing(tokenizer):
    assert len(tokenizer) == 300
    first = 300 - len(SPECIAL_TOKENS)
    for token, gpt_oss_id in GPT_OSS_IDS.items():
        assert tokenizer.convert_tokens_to_ids(token) == first + gpt_oss_id - 199998
        assert tokenizer(token).input_ids == [first + gpt_oss_id - 199998]
    reserved = [int(token.strip("<|>").removeprefix("reserved_")) for token in SPECIAL_TOKENS if "reserved" in token]
    assert [SPECIAL_TOKENS.index(f"<|reserved_{number}|>") + 199998 for number in reserved] == reserved


def test_roles_of_the_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|startoftext|>",
        "<|return|>",
        "<|endoftext|>",
    )
    ends = tokenizer.convert_tokens_to_ids(["<|return|>", "<|endoftext|>", "<|call|>"])
    generation = tokenizer.generation_config(max_new_tokens=7)
    assert generation.eos_token_id == ends
    assert (generation.bos_token_id, generation.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert generation.max_new_tokens == 7


@pytest.mark.parametrize(
    "text", [*TEXTS[:2], "Ünïcode 日本 🙂\n\n\ttabs  and   spaces ", "", "<|start|>user<|message|>"]
)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_text_is_split_as_gpt_oss_splits_it(tokenizer):
    text = "HTMLParser can't read 1234567 emails/\n\n  now!"
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    pieces = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces]
    assert pieces == ["HTMLParser", " can't", " read", " ", "123", "456", "7", " emails", "/\n\n", " ", " now", "!"]


def test_nothing_is_added_to_a_text(tokenizer):
    encoded = tokenizer("It is")
    assert not set(encoded.input_ids) & set(tokenizer.all_special_ids)
    assert list(encoded) == ["input_ids", "attention_mask"]


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["It is a seven.", "It"], padding=True)
    assert batch.attention_mask[1][0] == 0
    assert batch.input_ids[1][0] == tokenizer.pad_token_id


def test_training_again_gives_the_same_tokenizer():
    once, again = (train_tokenizer(iter(TEXTS), vocab_size=300) for _ in range(2))
    assert again.backend_tokenizer.to_str() == once.backend_tokenizer.to_str()


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = GPTOSSVisionTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.chat_template, loaded.padding_side) == (tokenizer.chat_template, "left")


CALLS = {
    "padding on the right": {"padding": True, "padding_side": "right"},
    "padding to a length": {"padding": "max_length", "max_length": 9, "pad_to_multiple_of": 4},
    "truncation": {"truncation": True, "max_length": 2},
    "both": {"truncation": True, "max_length": 2, "padding": True, "padding_side": "right"},
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_saved_does_not_depend_on_earlier_calls(call, tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "unused")
    tokenizer(["It", "It is a seven."], **call)
    tokenizer.save_pretrained(tmp_path / "used")
    assert files(tmp_path / "used") == files(tmp_path / "unused")
    for name in ("unused", "used"):
        loaded = GPTOSSVisionTokenizer.from_pretrained(tmp_path / name)
        if name == "used":
            loaded(["It", "It is a seven."], **call)
        loaded.save_pretrained(tmp_path / name)
    assert files(tmp_path / "used") == files(tmp_path / "unused")


def test_padding_and_truncation_in_a_file_are_no_defaults(tokenizer, tmp_path):
    """As a tokenizer saved beside a trained model has them."""
    tokenizer.save_pretrained(tmp_path)
    tokenizer.backend_tokenizer.enable_padding(direction="right", length=9)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["padding_side"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = GPTOSSVisionTokenizer.from_pretrained(tmp_path)
    assert loaded.padding_side == "left"
    assert not {"max_length", "stride", "truncation_strategy", "pad_to_multiple_of"} & loaded.init_kwargs.keys()
    assert loaded("It is a seven.").input_ids == tokenizer("It is a seven.").input_ids


@pytest.mark.parametrize("how", ["argument", "attribute"])
def test_a_padding_side_that_was_chosen_is_kept(how, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    chosen = GPTOSSVisionTokenizer.from_pretrained(tmp_path, **{"padding_side": "right"} if how == "argument" else {})
    chosen.padding_side = "right"
    chosen.save_pretrained(tmp_path)
    assert GPTOSSVisionTokenizer.from_pretrained(tmp_path).padding_side == "right"


def test_transformers_own_class_does_the_same_with_the_files(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    batch = ["It is a seven.", "It"]
    assert dict(stock(batch, padding=True)) == dict(tokenizer(batch, padding=True))
    assert stock.response_schema == tokenizer.response_schema


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match=r"^vocab_size must be at least 277, got 276\.$"):
        train_tokenizer(TEXTS, vocab_size=276)
