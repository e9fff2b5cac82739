"""Training under transformers: `Trainer`, gradient checkpointing, and LoRA through PEFT on attention and experts."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from gpt_oss_vision.bridge.hf import register_auto_classes
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.samples import IGNORE_INDEX, collate_for_trainer
from tiny import tiny_batch, tiny_config, tiny_model, tiny_processor

ATTENTION = r".*\.self_attn\.[qkvo]_proj"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "both": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
}


@pytest.fixture(scope="module")
def processor() -> GPTOSSVisionProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def dataset(processor, tmp_path_factory) -> ChatDataset:
    """Dark images are a three and light ones a seven; every third row has no image."""
    folder = tmp_path_factory.mktemp("data")
    for shade in (20, 230):
        Image.new("L", (8, 8), shade).save(folder / f"{shade}.png")
    rows = []
    for shade, word in ((20, "three"), (230, "seven"), (None, "What?")) * 4:
        image = [{"type": "image", "path": f"{shade}.png"}] if shade else []
        content = [*image, {"type": "text", "text": "Which digit is this?"}]
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": word}]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ChatDataset(folder / "rows.jsonl", processor, seq_length=128)


def model_for(processor: GPTOSSVisionProcessor) -> GPTOSSVisionForCausalLM:
    return tiny_model(tiny_config(vocab_size=len(processor.tokenizer), image_token_id=processor.image_token_id))


def losses(model: torch.nn.Module, dataset: ChatDataset, out: Path, **options: object) -> list[float]:
    """The loss of each step of a short run of `Trainer`."""
    fields: dict[str, object] = {
        "max_steps": 20,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(out, **(fields | options))
    collate = partial(collate_for_trainer, pad_token_id=dataset.processor.tokenizer.pad_token_id)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_lowers_the_loss(processor, dataset, tmp_path):
    run = losses(model_for(processor), dataset, tmp_path)
    assert run[-1] < 0.3 * run[0]


def test_gradient_checkpointing_changes_nothing(processor, dataset, tmp_path):
    plain = losses(model_for(processor), dataset, tmp_path)
    checkpointed = losses(model_for(processor), dataset, tmp_path, gradient_checkpointing=True)
    assert checkpointed == pytest.approx(plain, rel=1e-4)


def test_smoothed_labels_are_shifted_as_the_model_shifts_them(processor, dataset, tmp_path):
    register_auto_classes()  # the Trainer decides by the name of the class whether to shift
    model = model_for(processor)
    batch = collate_for_trainer(list(dataset), processor.tokenizer.pad_token_id)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    smoothed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    options = {"max_steps": 1, "per_device_train_batch_size": len(dataset), "label_smoothing_factor": 0.1}
    assert losses(model, dataset, tmp_path, **options) == [pytest.approx(smoothed.item(), rel=1e-4)]


@pytest.mark.parametrize("per_modality", [False, True])
def test_the_reported_loss_does_not_depend_on_gradient_accumulation(per_modality, processor, dataset, tmp_path):
    options = {"max_steps": 1, "learning_rate": 0.0}
    fields = {"vocab_size": len(processor.tokenizer), "image_token_id": processor.image_token_id}
    fields |= {"output_router_logits": True, "router_aux_loss_coef": 0.5, "router_aux_loss_per_modality": per_modality}
    model = tiny_model(tiny_config(**fields))
    (at_once,) = losses(model, dataset, tmp_path, **options, per_device_train_batch_size=12)
    split = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    (accumulated,) = losses(model, dataset, tmp_path, **options, **split)
    (plain,) = losses(model_for(processor), dataset, tmp_path, **options, per_device_train_batch_size=12)
    assert at_once > plain + 0.4
    assert accumulated == pytest.approx(at_once, rel=0.02)  # each batch has a balance of its own


def test_unused_columns_may_be_removed(processor, dataset, tmp_path):
    """The default of `TrainingArguments`: what the model has no argument for is dropped from the samples."""
    options = {"max_steps": 2}
    kept = losses(model_for(processor), dataset, tmp_path, **options)
    assert losses(model_for(processor), dataset, tmp_path, **options, remove_unused_columns=True) == kept


def test_the_best_model_is_loaded_whole_at_the_end(processor, dataset, tmp_path):
    model = model_for(processor)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # At this learning rate every step makes the model worse, so the first checkpoint is the best one.
    losses(model, dataset, tmp_path, **steps, max_steps=2, learning_rate=3.0, load_best_model_at_end=True)
    best = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    last = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in best.items())
    assert not torch.equal(best["lm_head.weight"], last["lm_head.weight"])


def test_only_the_assistant_s_words_are_labels(dataset, processor):
    batch = collate_for_trainer([dataset[0], dataset[2]], processor.tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    said = [
        processor.decode(ids[labels != IGNORE_INDEX])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert said == [f"<|channel|>final<|message|>{word}<|return|>" for word in ("three", "What?")]
    is_label = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])
    assert not (batch["labels"] == processor.image_token_id).any()
    assert len(batch["pixel_values"]) == 1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_lora_lowers_the_loss_and_leaves_the_model_alone(adapter, processor, dataset, tmp_path):
    model = model_for(processor)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, **ADAPTERS[adapter]))
    run = losses(tuned, dataset, tmp_path, gradient_checkpointing=adapter == "both")
    assert run[-1] < 0.8 * run[0]
    after = tuned.unload().state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_lora_loads_as_it_was_and_merges_without_a_difference(adapter, tmp_path):
    model, batch = tiny_model(), tiny_batch(tiny_config())
    tuned = get_peft_model(model, LoraConfig(r=4, **ADAPTERS[adapter])).eval()
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        logits = tuned(**batch).logits
        assert (logits - tiny_model()(**batch).logits).abs().max() > 0.1
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-4)
    assert type(merged) is GPTOSSVisionForCausalLM
