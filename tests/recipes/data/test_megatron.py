"""Chat data in Megatron-Bridge: accepted by its loaders and step, the same at every layout, restored from YAML."""

from gpt_oss_vision.bridge import mcore  # first: it makes Megatron-Bridge importable without Transformer Engine

# isort: split

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from megatron.bridge.data import DatasetBuildContext
from megatron.bridge.data.samplers import build_pretraining_data_loader
from megatron.bridge.data.utils import get_dataset_provider
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.bridge.training.vlm_step import get_batch_from_iterator

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data import megatron
from gpt_oss_vision.recipes.data.findings import Findings, examine
from gpt_oss_vision.recipes.data.lock import lock_of, write_lock
from gpt_oss_vision.recipes.data.megatron import ChatBatches, ChatDatasetProvider, DigitsDatasetProvider
from gpt_oss_vision.recipes.data.rows import Skipped
from gpt_oss_vision.recipes.data.samples import IGNORE_INDEX
from gpt_oss_vision.recipes.data.sources.opening import open_source

SEQ_LENGTH = 40
ROWS = 6


@pytest.fixture
def fields(folder, processor) -> dict[str, Any]:
    """Fields of a provider over six rows, every second one with an image, and one that can't be used."""
    rows = []
    for i in range(ROWS):
        content = [{"type": "text", "text": f"What is {i}?"}]
        content += [{"type": "image", "path": "red.png"}] * (i % 2)
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"one {i}"}]
        rows.append(json.dumps({"messages": messages}))
    rows.insert(3, "{")
    (folder / "train.jsonl").write_text("\n".join(rows))
    processor.save_pretrained(folder / "processor")
    return {
        "path": str(folder / "train.jsonl"),
        "processor_path": str(folder / "processor"),
        "seq_length": SEQ_LENGTH,
        "max_skipped": 0.6,
        "num_workers": 0,
        "pin_memory": False,
    }


def train_set(fields: dict[str, Any], num_samples: int = 12) -> ChatBatches:
    provider = ChatDatasetProvider(**fields)
    provider.finalize()
    train, valid, test = get_dataset_provider(provider)([num_samples, 4, 4], provider)
    assert valid is None
    assert test is None
    return train


def loader(
    dataset: ChatBatches,
    consumed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    micro_batch_size: int = 2,
    workers: int = 0,
) -> Any:
    """Megatron-Bridge's data loader, as its training loop builds it."""
    return build_pretraining_data_loader(
        dataset,
        consumed,
        "single",
        micro_batch_size,
        num_workers=workers,
        data_sharding=True,
        collate_fn=dataset.collate_fn,
        pin_memory=False,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )


def rows_of(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in batch["tokens"].tolist()]


def test_megatron_bridges_step_takes_the_batches(fields):
    dataset = train_set(fields)
    batch = next(iter(loader(dataset, micro_batch_size=ROWS)))
    with cpu.runtime():
        taken = get_batch_from_iterator(iter([batch]), is_first_pp_stage=True, is_last_pp_stage=True)
    assert taken["visual_inputs"].normalized_for_model()["pixel_values"].shape == (ROWS // 2, 3, 8, 8)
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        assert taken[key].shape == (ROWS, SEQ_LENGTH)
    assert (taken["labels"][taken["loss_mask"] == 0] == IGNORE_INDEX).all()


def test_a_later_pipeline_stage_gets_tokens_and_no_pixels(fields):
    batch = next(iter(loader(train_set(fields), micro_batch_size=ROWS)))
    with cpu.runtime():
        taken = get_batch_from_iterator(iter([batch]), is_first_pp_stage=False, is_last_pp_stage=False)
    assert taken["visual_inputs"].normalized_for_model().keys() == {"padding_mask"}
    assert taken["tokens"].shape == (ROWS, SEQ_LENGTH)


def test_a_micro_batch_without_images_gives_the_model_no_pixels(fields):
    dataset = train_set(fields)
    texts = [sample for sample in (dataset[i] for i in range(ROWS)) if sample["pixel_values"] is None]
    assert dataset.collate_fn(texts)["visual_inputs"].normalized_for_model().keys() == {"padding_mask"}


def test_every_number_of_ranks_trains_on_the_same_global_batches(fields):
    dataset = train_set(fields)
    alone = rows_of(loader(dataset, micro_batch_size=4))
    halves = zip(*(loader(dataset, rank=rank, ranks=2) for rank in range(2)), strict=True)
    assert rows_of(batch for pair in halves for batch in pair) == alone


def test_a_resumed_run_goes_on_where_it_stopped(fields):
    straight = rows_of(loader(train_set(fields)))
    assert rows_of(loader(train_set(fields), consumed=8)) == straight[8:]


def test_a_finished_run_can_be_resumed(fields):
    assert len(rows_of(loader(train_set(fields, num_samples=12), consumed=12))) > 0


def test_rows_that_cannot_be_used_are_named(fields, capsys):
    train_set(fields)
    said = capsys.readouterr().out
    assert said.startswith(f"Skipped: {fields['path']}: 1 of 7 rows can't be used (14.3%): line 4: malformed JSON")


def test_all_ranks_leave_out_the_same_rows(fields):
    found = cpu.run_ranks(2, _skipped_on_this_rank, fields)
    assert found[0] == found[1] == [4]


@pytest.fixture
def mixed(fields, folder) -> dict[str, Any]:
    """The six rows with weight 3, and two texts with weight 1."""
    (folder / "texts.jsonl").write_text('{"text": "one two"}\n{"text": "two one"}\n')
    sources = [{"path": fields["path"], "weight": 3}, {"path": str(folder / "texts.jsonl"), "weight": 1}]
    return fields | {"path": None, "sources": sources}


def kinds(batches: list[dict[str, Any]], dataset: ChatBatches) -> list[bool]:
    """Whether each row is a chat."""
    start = dataset.dataset.processor.tokenizer.convert_tokens_to_ids("<|start|>")
    return [start in row for batch in batches for row in batch["tokens"].tolist()]


def test_a_mixture_has_the_shares_of_its_weights_in_every_epoch(mixed):
    dataset = train_set(mixed, num_samples=40)
    assert (dataset.order.rows, dataset.order.per_epoch) == ((6, 2), (6, 2))
    found = kinds(list(loader(dataset)), dataset)
    assert [sum(found[start : start + 8]) for start in range(0, 40, 8)] == [6] * 5


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_a_mixture_is_the_same_at_any_number_of_ranks_and_workers_and_after_a_resume(mixed, ranks, workers):
    whole = [row.tolist() for batch in loader(train_set(mixed, 48), micro_batch_size=1) for row in batch["tokens"]]
    dataset, options = train_set(mixed, 48), {"ranks": ranks, "micro_batch_size": 1, "workers": workers}
    read = [list(loader(dataset, consumed=16, rank=rank, **options)) for rank in range(ranks)]
    joined = [batch["tokens"][0].tolist() for batches in zip(*read, strict=True) for batch in batches]
    assert joined == whole[16:]


def test_rows_that_cannot_be_used_are_counted_for_each_source(mixed, folder):
    (folder / "texts.jsonl").write_text('{"text": "one two"}\n' + "{\n" * 2)
    with pytest.raises(UserError, match=r"texts.jsonl: 2 of 3 rows can't be used .*line 2: malformed"):
        train_set(mixed)


def test_the_images_of_a_source_may_be_in_another_folder(fields, folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    (folder / "red.png").rename(tmp_path / "pictures" / "red.png")
    source = {"path": fields["path"], "image_folder": str(tmp_path / "pictures")}
    assert len(train_set(fields | {"path": None, "sources": [source]}).dataset) == 6
    assert len(train_set(fields | {"image_folder": str(tmp_path / "pictures")}).dataset) == 6


@pytest.mark.parametrize("packing", [False, True])
def test_other_weights_say_which_samples_are_read_again_or_left_out(mixed, packing):
    saved = {"sources": [mixed["sources"][0] | {"weight": 1}, mixed["sources"][1]]}
    provider = ChatDatasetProvider(**mixed, packing=packing)
    provider.finalize()
    said = provider.describe_change(saved, 2 if packing else 40)
    if packing:
        assert len(said) <= 2
    else:  # of 40 samples 20 were of the first source, and 30 would have been
        assert said[0] == "the next 10 samples of train.jsonl are left out"
        assert said[1] == "the last 10 samples of texts.jsonl are read again"
    assert provider.describe_change({"sources": mixed["sources"]}, 40) == []


@pytest.mark.parametrize("source", [0, 1])
def test_other_usable_rows_than_those_of_the_checkpoint_are_refused(mixed, folder, source):
    provider = ChatDatasetProvider(**mixed)
    context = DatasetBuildContext(train_samples=4, valid_samples=0, test_samples=0)
    provider.build_datasets(context)
    before = provider.usable_rows
    assert [each.split()[0] for each in before] == ["6", "2"]
    provider.rows_before = before[:1]  # the other source is new
    provider.build_datasets(context)
    provider.rows_before = before
    if source:
        (folder / "texts.jsonl").write_text('{"text": "one two"}\n{"text": "two"}\n')
        said = "2 rows of texts.jsonl were usable .*, and now as many are, but others or of other lengths"
    else:
        (folder / "red.png").unlink()
        said = "6 rows of train.jsonl were usable when the checkpoint was saved, and now 3 are"
    for read in (provider.training_data, lambda: provider.build_datasets(context)):
        with pytest.raises(UserError, match=said):
            read()


def test_training_takes_up_a_lock_and_does_not_check_again(fields, processor):
    path, source = Path(fields["path"]), open_source(fields["path"])
    processor = ChatDatasetProvider(**fields).processor()
    found = examine(source, processor)
    found.lengths[0] = 0  # something that a check would not find
    found.skipped.insert(0, Skipped(0, str(path), 1, "left out by hand"))
    write_lock(lock_of(path), source, found, processor, decode_images=False)
    dataset = train_set(fields).dataset
    assert next(iter(dataset.skipped)).reason == "left out by hand"
    assert len(dataset) == ROWS - 1
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"train.jsonl.lock does not fit: .*train.jsonl has"):
        train_set(fields)


def test_ranks_take_up_a_lock(fields):
    source, processor = open_source(fields["path"]), ChatDatasetProvider(**fields).processor()
    alone = [sample["input_ids"].tolist() for sample in train_set(fields).dataset]
    write_lock(lock_of(fields["path"]), source, examine(source, processor), processor, decode_images=False)
    assert cpu.run_ranks(2, _tokens_of_all_samples, fields, timeout=60) == [alone] * 2


def _tokens_of_all_samples(fields: dict[str, Any]) -> list[list[int]]:
    torch.distributed.init_process_group("gloo")
    return [sample["input_ids"].tolist() for sample in train_set(fields).dataset]


def test_a_path_and_sources_contradict_each_other(fields):
    with pytest.raises(UserError, match="both set"):
        train_set(fields | {"sources": ["a.jsonl"]})


def test_a_file_that_one_rank_cannot_read_stops_all_ranks(fields):
    with pytest.raises(OSError, match=r"Rank 1 can't check the dataset: .*nowhere.jsonl"):
        cpu.run_ranks(2, _lost_on_rank_1, fields, timeout=60)


def test_any_failure_of_the_check_on_one_rank_stops_all_ranks(fields, monkeypatch):
    def fails(*_: object, numbers: range, **__: object) -> Findings:
        if numbers.start == 1:
            raise TemplateError("no such filter")
        return Findings.of_rows(numbers)

    monkeypatch.setattr(megatron, "examine", fails)
    found = cpu.run_ranks(2, _failure_on_this_rank, fields, timeout=60)
    assert found == ["Rank 1 can't check the dataset: TemplateError: no such filter"] * 2


def _failure_on_this_rank(fields: dict[str, Any]) -> str:
    torch.distributed.init_process_group("gloo")
    with pytest.raises(RuntimeError) as caught:
        train_set(fields)
    return str(caught.value)


def _skipped_on_this_rank(fields: dict[str, Any]) -> list[int]:
    torch.distributed.init_process_group("gloo")
    return [row.line for row in train_set(fields).dataset.skipped]


def _lost_on_rank_1(fields: dict[str, Any]) -> None:
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        fields["path"] = str(Path(fields["path"]).with_name("nowhere.jsonl"))
    train_set(fields)


def test_validation_and_test_files_become_datasets(fields):
    provider = ChatDatasetProvider(**fields, valid_path=fields["path"], test_path=fields["path"])
    _, valid, test = provider.build_datasets(DatasetBuildContext(train_samples=0, valid_samples=8, test_samples=0))
    assert len(valid) > 8
    assert test is None


def test_the_configuration_survives_yaml(fields, tmp_path):
    mcore.register()
    config = ConfigContainer(
        model=None,
        train=TrainingConfig(),
        optimizer=OptimizerConfig(),
        scheduler=SchedulerConfig(),
        dataset=ChatDatasetProvider(**fields),
        logger=LoggerConfig(),
        tokenizer=TokenizerConfig(),
        checkpoint=CheckpointConfig(),
    )
    config.to_yaml(str(tmp_path / "run_config.yaml"))
    assert ConfigContainer.from_yaml(str(tmp_path / "run_config.yaml")).dataset == config.dataset


@pytest.mark.parametrize("dataloader_type", ["cyclic", "batch", None])
def test_other_loaders_are_refused(fields, dataloader_type):
    with pytest.raises(ValueError, match="'single'"):
        ChatDatasetProvider(**fields, dataloader_type=dataloader_type).finalize()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("path", "dataset.path is not set; name the data with data.path=FILE"),
        ("processor_path", "dataset.processor_path is not set; name a folder with tokenizer and image processor"),
    ],
)
def test_a_path_that_is_not_set_is_refused_before_and_when_datasets_are_built(fields, field: str, said: str):
    provider = ChatDatasetProvider(**fields | {field: None})
    context = DatasetBuildContext(train_samples=4, valid_samples=0, test_samples=0)
    for refuse in (provider.finalize, lambda: provider.build_datasets(context)):
        with pytest.raises(UserError, match=said):
            refuse()


# --- the digits --------------------------------------------------------------------------------------------------


def built_digits(provider: DigitsDatasetProvider) -> tuple[int, int, list[int]]:
    """Numbers of rows for training and validation, and the first tokens; on two ranks, or in this process."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    context = DatasetBuildContext(train_samples=4, valid_samples=4, test_samples=0)
    train, valid, test = provider.build_datasets(context)
    assert test is None
    return len(train.dataset), len(valid.dataset), train[0]["input_ids"].tolist()


def test_digits_are_written_by_one_rank_and_read_by_all(tmp_path: Path):
    provider = DigitsDatasetProvider(folder=str(tmp_path / "digits"), seq_length=32)
    first, second = cpu.run_ranks(2, built_digits, provider)
    assert first == second
    assert first[:2] == (1630, 297)
    alone = DigitsDatasetProvider(folder=str(tmp_path / "alone"), seq_length=32)
    assert built_digits(alone) == first
    assert {file.name for file in tmp_path.iterdir()} == {"digits", "alone"}


def test_a_rank_that_cannot_write_the_digits_stops_all(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    provider = DigitsDatasetProvider(folder=str(tmp_path), seq_length=32)
    found = cpu.run_ranks(2, _refusal, provider, timeout=60)
    assert found == [f"{tmp_path} holds other files; name an empty or a new folder for the digits"] * 2


def _refusal(provider: DigitsDatasetProvider) -> str:
    with pytest.raises(FileExistsError) as caught:
        built_digits(provider)
    return str(caught.value)


def test_own_rows_are_read_with_the_processor_of_the_digits(fields, tmp_path: Path):
    del fields["processor_path"]
    provider = DigitsDatasetProvider(**fields | {"folder": str(tmp_path / "digits"), "seq_length": 128})
    train, valid, _ = provider.build_datasets(DatasetBuildContext(train_samples=4, valid_samples=0, test_samples=0))
    assert len(train.dataset) == ROWS
    assert valid is None


def test_digits_without_a_folder_are_refused():
    with pytest.raises(
        UserError, match=r"dataset\.folder is not set; name a folder for the digits with data\.folder=DIR"
    ):
        DigitsDatasetProvider(seq_length=32).finalize()
