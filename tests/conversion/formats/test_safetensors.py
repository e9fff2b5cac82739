"""Odd Hugging Face folders: their tensors are those that transformers loads, or a sentence names the file at fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from checkpoints import edit_config, load_hf, save_tiny
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.conversion.formats.hf_source import open_source
from tiny import randomise

FILE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models in fp32: `first` in one file and `first_shards`, `second` in one file."""
    folder = tmp_path_factory.mktemp("made")
    model = model_of(save_tiny(folder / "first"))
    model.save_pretrained(folder / "first_shards", max_shard_size="100KB")
    randomise(model, seed=1)
    model.save_pretrained(folder / "second")
    return folder


def model_of(folder: Path) -> GPTOSSVisionForCausalLM:
    return GPTOSSVisionForCausalLM.from_pretrained(folder)


def shards_of(folder: Path) -> list[Path]:
    shards = sorted(folder.glob(SHARD))
    assert len(shards) > 3
    return shards


def edit_index(folder: Path, edit: Callable[[str, str], str | None]) -> None:
    """Change the file that an index gives for a tensor; None leaves the tensor out."""
    index = json.loads((folder / INDEX).read_text())
    edited = {tensor: edit(tensor, file) for tensor, file in index["weight_map"].items()}
    index["weight_map"] = {tensor: file for tensor, file in edited.items() if file}
    (folder / INDEX).write_text(json.dumps(index))


def index_of_one_file(folder: Path, *others: str) -> None:
    """An index that names the one file, and other files for some of its tensors."""
    files = dict.fromkeys(load_file(folder / FILE), FILE) | dict(zip(load_file(folder / FILE), others, strict=False))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def move_shards(folder: Path, target: str) -> None:
    """Move the shards to another folder, and name it in the index."""
    (folder / target).mkdir()
    for shard in shards_of(folder):
        shard.rename(folder / target / shard.name)
    edit_index(folder, lambda _, file: f"{target}/{file}")


def save_twice(folder: Path) -> None:
    """Save the first tensor of the first shard, with other values, in the second shard too."""
    first, second = shards_of(folder)[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second, metadata={"format": "pt"})


def link_to_blobs(folder: Path) -> None:
    """Replace every file by a link, as in the cache of the Hub."""
    (folder.parent / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder.parent / "blobs" / str(number))
        file.symlink_to(f"../blobs/{number}")


def save_adapters(folder: Path) -> None:
    """Save adapters beside the weights; `from_pretrained` then loads both."""
    adapted = get_peft_model(model_of(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)


def save_second(folder: Path, name: str) -> None:
    """Save the tensors of the second model under a file name."""
    tensors = load_hf(folder.parent / "second")
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(tensors, folder / name) if name.endswith(".bin") else save_file(tensors, folder / name)


Edit = Callable[[Path], object]

READ: dict[str, tuple[str, Edit]] = {
    "one file": ("first", lambda folder: None),
    "shards": ("first_shards", lambda folder: None),
    "one file saved over shards": (
        "first_shards",
        lambda folder: model_of(folder.parent / "second").save_pretrained(folder),
    ),
    "one file and its index": ("first", index_of_one_file),
    "a pickled model beside one file": ("first", lambda folder: save_second(folder, "pytorch_model.bin")),
    "a pickled model beside shards": ("first_shards", lambda folder: save_second(folder, "pytorch_model.bin")),
    "a variant": ("first_shards", lambda folder: save_second(folder, "model.fp16.safetensors")),
    "the original weights in a subfolder": ("first", lambda folder: save_second(folder, f"original/{FILE}")),
    "shards in a subfolder": ("first_shards", lambda folder: move_shards(folder, "weights")),
    "names with ./": ("first_shards", lambda folder: edit_index(folder, lambda _, file: f"./{file}")),
    "two spellings of a name": (
        "first_shards",
        lambda folder: edit_index(folder, lambda tensor, file: f"./{file}" if "bias" in tensor else file),
    ),
    "a tensor that the index leaves out": (
        "first_shards",
        lambda folder: edit_index(folder, lambda tensor, file: None if tensor.endswith("q_proj.bias") else file),
    ),
    "links to one file": ("first", link_to_blobs),
    "links to shards": ("first_shards", link_to_blobs),
}

REFUSED: dict[str, tuple[str, Edit, str]] = {
    "shards saved over one file": (
        "first",
        lambda folder: model_of(folder.parent / "second").save_pretrained(folder, max_shard_size="100KB"),
        rf"holds two models, {FILE} and model-00001-of-\d+\.safetensors with its index",
    ),
    "one file beside some of the shards": (
        "first_shards",
        lambda folder: (save_second(folder, FILE), shards_of(folder)[0].unlink()),
        rf"holds two models, {FILE} and model-00002-of-\d+\.safetensors with its index",
    ),
    "an index that names the one file and others": (
        "first",
        lambda folder: (save_second(folder, "more.safetensors"), index_of_one_file(folder, "more.safetensors")),
        rf"holds two models, {FILE} and more\.safetensors with its index",
    ),
    "an index that names the one file and one that is absent": (
        "first",
        lambda folder: index_of_one_file(folder, "more.safetensors"),
        r"lacks more\.safetensors; copy",
    ),
    "adapters": ("first", save_adapters, r"holds adapters .*adapter_config\.json.* beside its weights"),
    "adapters beside shards": ("first_shards", save_adapters, r"holds adapters .*adapter_config\.json"),
    "a config that names another file": (
        "first",
        lambda folder: (
            save_second(folder, "more.safetensors"),
            edit_config(folder, transformers_weights="more.safetensors"),
        ),
        rf"config\.json says transformers_weights=more\.safetensors; .*{FILE}",
    ),
    "a pickled model alone": (
        "first",
        lambda folder: (folder / FILE).rename(folder / "pytorch_model.bin"),
        r"has its weights in pytorch_model\.bin; save them as safetensors",
    ),
    "shards without an index": ("first_shards", lambda folder: (folder / INDEX).unlink(), rf"without {INDEX}"),
    "a shard that is absent": (
        "first_shards",
        lambda folder: shards_of(folder)[1].unlink(),
        r"lacks model-00002-of-\d+\.safetensors; copy the checkpoint again",
    ),
    "a tensor in two shards": (
        "first_shards",
        save_twice,
        r"holds \S+ twice, in model-00001-of-\d+\.safetensors and model-00002-of-\d+\.safetensors",
    ),
    "a tensor in another shard than the index says": (
        "first_shards",
        lambda folder: edit_index(
            folder, lambda tensor, file: shards_of(folder)[0].name if tensor == "lm_head.weight" else file
        ),
        rf"{INDEX} and its files disagree about lm_head\.weight",
    ),
    "a tensor that is in no file": (
        "first_shards",
        lambda folder: edit_index(folder, lambda tensor, file: file) or save_file({}, shards_of(folder)[0]),
        rf"{INDEX} and its files disagree about \S+",
    ),
    "shards outside the folder": (
        "first_shards",
        lambda folder: move_shards(folder, "../elsewhere"),
        rf"{INDEX} names \.\./elsewhere/model-\d+-of-\d+\.safetensors in place of a file in the folder",
    ),
    "shards by absolute names": (
        "first_shards",
        lambda folder: edit_index(folder, lambda _, file: str(folder / file)),
        rf"{INDEX} names /\S+/model-\d+-of-\d+\.safetensors in place of a file in the folder",
    ),
    "a link to nothing": (
        "first",
        lambda folder: ((folder / FILE).unlink(), (folder / FILE).symlink_to("gone")),
        rf"lacks {FILE}",
    ),
    "the base model alone": (
        "first",
        lambda folder: model_of(folder).model.save_pretrained(folder),
        r"nothing reads: embed_tokens\.weight, layers\.0",
    ),
}


@pytest.mark.parametrize(("start", "edit"), READ.values(), ids=READ)
def test_the_tensors_are_those_that_transformers_loads(start: str, edit: Edit, made: Path, tmp_path: Path):
    folder = shutil.copytree(made, tmp_path / "made") / start
    edit(folder)
    expected, found = model_of(folder).state_dict(), open_source(folder).tensors
    assert found.keys() == expected.keys()
    for name, stored in found.items():
        data = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
        assert data == expected[name].numpy().tobytes(), name


@pytest.mark.parametrize(("start", "edit", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_one_whole_model_is_refused_by_name(
    start: str, edit: Edit, sentence: str, made: Path, tmp_path: Path
):
    folder = shutil.copytree(made, tmp_path / "made") / start
    edit(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as failure:
        open_source(folder)
    assert "\n" not in str(failure.value)
