"""examples/rl/grpo.py as a user runs it, shorter, and what TRL 1.16.0 does with this model."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.data.tiny import tiny_config, tiny_processor

trl = pytest.importorskip("trl", reason="needs TRL: `uv sync --extra rl`")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's and accelerate's own

SCRIPT = Path(__file__).parents[2] / "examples/rl/grpo.py"
specification = importlib.util.spec_from_file_location("grpo_example", SCRIPT)
example = importlib.util.module_from_spec(specification)
specification.loader.exec_module(example)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example needs of a quickstart's folder: the digits, and a model that reads most of them."""
    folder = tmp_path_factory.mktemp("rl")
    digits, processor = write_digits(folder / "digits"), tiny_processor()
    rows = [json.loads(line)["messages"] for line in digits.train_path.open()]
    chats = [[{**user, "content": [with_path(part, folder) for part in user["content"]]}, said] for user, said in rows]
    chats = [chat for chat in chats if any(part["type"] == "image" for part in chat[0]["content"])]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    torch.manual_seed(0)
    model = GPTOSSVisionForCausalLM(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        some = torch.randint(len(chats), (64,))
        logits = model(**{name: tensor[some] for name, tensor in inputs.items()}).logits
        loss = cross_entropy(logits[:, -6:-1].flatten(0, 1), inputs["input_ids"][some, -5:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config = processor.tokenizer.generation_config()
    model.save_pretrained(folder / "hf")
    processor.save_pretrained(folder / "hf")
    return folder


def with_path(part: dict, folder: Path) -> dict:
    return part | {"path": str(folder / "digits" / part["path"])} if part["type"] == "image" else part


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--lora"]], ids=["full", "LoRA"])
def test_the_reward_rises(quickstart, options):
    """15 of the 60 steps."""
    done = subprocess.run(
        [sys.executable, SCRIPT, quickstart, "--steps", "15", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rewards = [float(reward) for reward in re.findall(r"'reward': '?([\d.e-]+)", done.stdout)]
    assert len(rewards) == 15
    assert sum(rewards[-5:]) > sum(rewards[:5])
    shares = dict(re.findall(r"(before|after), right_image: ([\d.]+)%", done.stdout))
    assert float(shares["after"]) > float(shares["before"])


def trainer_for(folder: Path, settings: dict | None = None, **options) -> "trl.GRPOTrainer":
    """A trainer of a random model with a random reward, so that every step has a gradient."""
    processor, digits = tiny_processor(), write_digits(folder / "digits")
    torch.manual_seed(0)
    model = GPTOSSVisionForCausalLM(tiny_config())
    model.generation_config = processor.tokenizer.generation_config()
    draw = random.Random(0)

    def reward(completions: list, **_columns: list) -> list[float]:
        return [draw.random() for _ in completions]

    fields = example.OPTIONS | {"per_device_train_batch_size": 16} | (settings or {})
    config = trl.GRPOConfig(folder / "out", max_steps=1, learning_rate=1e-3, **fields)
    rows = example.questions(digits).select(range(16))
    return trl.GRPOTrainer(model, reward, config, rows, processing_class=processor, **options)


def test_a_step_moves_every_parameter_but_the_last_vision_bias(tmp_path):
    trainer = trainer_for(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    still = {name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])}
    idle = {name for name in before if ".vit." in name and name.endswith("k_proj.bias")}
    assert still - idle == {"model.layers.3.mlp.router.vision_bias"}
    assert trainer.args.ddp_find_unused_parameters is False


def sampled(trainer: "trl.GRPOTrainer") -> tuple[dict, torch.Tensor]:
    """The first batch as TRL samples and scores it, and the log-probabilities (b, a) that it then trains on."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ids, masks = (torch.cat((batch[f"prompt_{name}"], batch[f"completion_{name}"]), dim=1) for name in ("ids", "mask"))
    images = {name: batch[name] for name in ("pixel_values", "num_images")}
    answer = batch["completion_ids"].shape[1]
    return batch, trainer._get_per_token_logps_and_entropies(trainer.model, ids, masks, answer, **images)[0]


def test_the_log_probabilities_of_trl_are_those_of_our_own_forward_pass(tmp_path):
    trainer = trainer_for(tmp_path)
    model = GPTOSSVisionForCausalLM(tiny_config())  # TRL replaces the forward pass of its own one
    model.load_state_dict(trainer.model.state_dict())
    batch, found = sampled(trainer)
    assert len(batch["pixel_values"]) == 16
    inputs = {
        "input_ids": torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1),
        "attention_mask": torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1),
        "pixel_values": batch["pixel_values"],
    }
    with torch.no_grad():
        of_next = model(**inputs).logits[:, -1 - found.shape[1] : -1].log_softmax(-1)
    expected = of_next.gather(2, batch["completion_ids"][..., None])[..., 0]
    is_answer = batch["completion_mask"].bool()
    assert is_answer.sum() > 16
    torch.testing.assert_close(found[is_answer], expected[is_answer], rtol=0, atol=1e-5)


def test_the_ratio_of_the_first_step_is_one(tmp_path):
    """To the policy that sampled; TRL records its log-probabilities where answers are used more than once."""
    batch, now = sampled(trainer_for(tmp_path, {"num_iterations": 2}))
    ratio = (now - batch["old_per_token_logps"]).exp()[batch["completion_mask"].bool()]
    assert (ratio - 1).abs().max() <= 1e-6


def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: the word.
    """
    return word


@pytest.mark.parametrize("tools", [None, [look_up]], ids=["no tools", "a tool"])
def test_trl_builds_its_trainer_without_a_warning_of_the_chat_template(tmp_path, recwarn, caplog, tools):
    trainer = trainer_for(tmp_path, tools=tools)
    assert trainer.chat_template is None  # ours is used, no other takes its place
    said = [str(warning.message) for warning in recwarn] + [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "template" in text or "response_schema" in text]


def test_lora_reaches_the_experts_and_merges_exactly(tmp_path):
    trainer = trainer_for(tmp_path, peft_config=example.LORA)
    trainer.train()
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert all(any(f"layers.{layer}.mlp.experts" in name for name in trained) for layer in range(4))
    assert all("lora_" in name for name in trained)
    input_ids = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        model = trainer.model.eval()
        expected = model(input_ids).logits
        merged = model.merge_and_unload()(input_ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_no_load_balancing_loss_is_added_by_default(tmp_path):
    """With a coefficient TRL would add Mixtral's, past our forward pass, and not ours per modality."""
    assert trainer_for(tmp_path).aux_loss_enabled is False


def test_the_reward_reads_what_trl_decodes():
    processor = tiny_processor()
    answer = [{"role": "user", "content": "Which digit?"}, {"role": "assistant", "content": "seven"}]
    whole = processor.apply_chat_template(answer, tokenize=True, return_dict=True)["input_ids"][0]
    prompt = processor.apply_chat_template(answer[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
    decoded = processor.tokenizer.decode(whole[len(prompt["input_ids"][0]) :], skip_special_tokens=True)
    assert decoded == "finalseven"
    assert example.reward([[{"role": "assistant", "content": decoded}]] * 2, ["seven", "one"]) == [1.0, 0.0]


def test_the_chat_template_keeps_earlier_turns_as_they_are():
    """TRL's condition for tools and several turns."""
    from trl.chat_template_utils import is_chat_template_prefix_preserving

    assert is_chat_template_prefix_preserving(tiny_processor())


def test_answers_alone_are_learnt_from_prompt_and_completion_not_by_assistant_only_loss(tmp_path):
    processor, model = tiny_processor(), GPTOSSVisionForCausalLM(tiny_config())
    digits = write_digits(tmp_path / "digits")
    rows = example.questions(digits).select(range(8))
    rows = rows.map(lambda row: {"completion": [{"role": "assistant", "content": row["word"]}]}, remove_columns="word")
    options = {"report_to": "none", "bf16": False, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    with pytest.raises(ValueError, match=r"requires transformers>=5\.18"):
        config = trl.SFTConfig(tmp_path / "out", assistant_only_loss=True, **options)
        trl.SFTTrainer(model, config, train_dataset=rows, processing_class=processor)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(tmp_path / "out", learning_rate=1e-2, **options),
        train_dataset=rows,
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[1]) < float(losses[0])


def test_the_config_has_no_text_config_which_trl_reads_for_tools_with_images():
    assert not hasattr(tiny_config(), "text_config")
