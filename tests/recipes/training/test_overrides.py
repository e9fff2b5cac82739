"""Overrides: the grammar, what is refused and how, and the fields that are set."""

import copy
import dataclasses
import enum
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gpt_oss_vision.errors import UsageError
from gpt_oss_vision.recipes.catalog import find, load
from gpt_oss_vision.recipes.training import schema, values
from gpt_oss_vision.recipes.training.overrides import (
    apply,
    for_stage,
    parse,
    refuse_architecture,
    refuse_other_stages,
)

TEXT, COUNT, NUMBER = "logger.wandb_entity", "train.exit_interval", "optimizer.decoupled_lr"
SWITCH, STEPS, CHOICE = "ddp.use_distributed_optimizer", "train.train_iters", "model.moe_token_drop_policy"
LIST, MAPPING = "profiling.profile_ranks", "env_vars"


def value(*arguments: str) -> Any:
    """The value of the only override."""
    (override,) = parse(arguments)
    return override.value


def refusal(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (f"{COUNT}=5", 5),
        (f"{COUNT}=-5", -5),
        (f"{COUNT}=1_000", 1000),
        (f"{COUNT}=1e3", 1000),
        (f"{COUNT}=2.0", 2),
        (f"{COUNT}= 5 ", 5),
        (f"{COUNT}=null", None),
        (f"{COUNT}=int('5')", 5),
        (f"{COUNT}=${{oc.env:STEPS}}", 7),
        (f"{NUMBER}=1e-5", 1e-5),
        (f"{NUMBER}=.5", 0.5),
        (f"{NUMBER}=3", 3.0),
        (f"{NUMBER}=float(3)", 3.0),
        ("optimizer.grad_norm_skip_threshold=inf", float("inf")),
        (f"{SWITCH}=true", True),
        (f"{SWITCH}=False", False),
        (f"{SWITCH}=bool(1)", True),
        (f"{TEXT}=", ""),
        (f"{TEXT}=null", None),
        (f"{TEXT}='null'", "null"),
        (f"{TEXT}=/x y/z", "/x y/z"),
        (f"{TEXT}=5", "5"),
        (f"{TEXT}=007", "007"),
        (f"{TEXT}=1e3", "1e3"),
        (f"{TEXT}=yes", "yes"),
        (f"{TEXT}=true", "true"),
        (f"{TEXT}=x=b", "x=b"),
        (f"{TEXT}=/a=b", "/a=b"),
        (f"{TEXT}=x\\=b", "x=b"),
        (f"{TEXT}='x=b'", "x=b"),
        (f'{TEXT}="x=b"', "x=b"),
        (f"{TEXT}=s3://b/k?x=1", "s3://b/k?x=1"),
        (f"{TEXT}=~/x", "~/x"),
        (f"{TEXT}=a#b", "a#b"),
        (f"{TEXT}=#", "#"),
        (f"{TEXT}=[", "["),
        (f"{TEXT}={{b}}", "{b}"),
        (f"{TEXT}=/a/{{b}}", "/a/{b}"),
        (f"{TEXT}=it's", "it's"),
        (f"{TEXT}=run (1)", "run (1)"),
        (f"{TEXT}=größe", "größe"),
        (f"{TEXT}='a,b'", "a,b"),
        (f"{TEXT}='[1,2]'", "[1,2]"),
        (f"{TEXT}='@file'", "@file"),
        (f"{TEXT}='$HOME'", "$HOME"),
        (f"{TEXT}=layers$", "layers$"),
        (f"{TEXT}=${{oc.env:STEPS}}/x", "7/x"),
        (f"{TEXT}=${{oc.env:NO_SUCH,else}}", "else"),
        (f"+{TEXT}=a", "a"),
        (f"++{TEXT}=a", "a"),
        (f"~{TEXT}", None),
        ("~ft", None),
        ("ft=null", None),
        (f"{LIST}=[1,2]", [1, 2]),
        (f"{LIST}=[]", []),
        ("tokenizer.special_tokens=['a,b',c]", ["a,b", "c"]),
        ("model.window_size=[127,0]", (127, 0)),
        ("model.moe_layer_freq=[0,1]", [0, 1]),
        ("model.moe_layer_freq=2", 2),
        ("model.params_dtype=bf16", "bfloat16"),
        ("model.params_dtype=torch.float32", "float32"),
        ("model.attention_backend=flash", "flash"),
        ("model.recompute_granularity=full", "full"),
        ("logger.timing_log_level=2", 2),
        ("env_vars.NCCL_DEBUG=INFO", "INFO"),
        ("model.vision_config.hidden_size=64", 64),
        ("data.processor_path=a", "a"),
        ("time=4h", 14400.0),
        ("time=90m", 5400.0),
        ("time=1d12h", 129600.0),
        ("time=1.5h", 5400.0),
        ("time=3600s", 3600.0),
        ("train.tokens=2B", 2 * 10**9),
        ("train.tokens=1.5T", 1_500_000_000_000),
        ("train.tokens=500m", 500 * 10**6),
        ("train.tokens=1e9", 10**9),
        ("train.tokens=1_000_000", 10**6),
        ("train.epochs=2", 2.0),
        ("train.epochs=0.5", 0.5),
        ("gpus=8", 8),
        ("gpu=h200", "h200"),
        ("out=runs/a", "runs/a"),
    ],
)
def test_a_value_is_read(argument: str, expected: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEPS", "7")
    found = value(argument)
    assert (found, type(found)) == (expected, type(expected))


TAKES_SIZE = f"it takes a whole number from 1 up, such as {STEPS}=8"
EMPTY = "it takes a path, such as {}=DIR; nothing follows the `=`"
TAKES_COUNT = f"it takes a whole number or null, such as {COUNT}=100"
TAKES_NUMBER = f"it takes a finite number or null, such as {NUMBER}=1e-4"
TAKES_SWITCH = f"it takes true or false, such as {SWITCH}=true"
SWEEP = (
    "it is a sweep over several values, and a run has one; write a list in brackets ([a,b]), and text with a comma in "
    "quotes that the shell leaves in place (\"'a,b'\")"
)
DECIMAL = "write it in decimal digits without leading zeros"
WRITTEN = "a setting is written with `=`, without dashes and spaces"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        *((f"{STEPS}={text}", f"{STEPS}={text}: {TAKES_SIZE}") for text in ("abc", "3.7", "", "null", "0", "-5")),
        *((f"{key}=", f"{key}=: {EMPTY.format(key)}") for key in ("out", "weights")),
        ("optimizer.lr=-1", "optimizer.lr=-1: it takes a number from 0 up, such as optimizer.lr=0.1"),
        ("optimizer.lr=null", "optimizer.lr=null: it takes a number from 0 up, such as optimizer.lr=0.1"),
        ("--dryrun", "--dryrun: the option is --dry-run"),
        (f"{COUNT}=abc", f"{COUNT}=abc: {TAKES_COUNT}"),
        (f"{COUNT}=3.7", f"{COUNT}=3.7: {TAKES_COUNT}"),
        (f"{COUNT}=", f"{COUNT}=: {TAKES_COUNT}"),
        (f"{COUNT}=inf", f"{COUNT}=inf: {TAKES_COUNT}"),
        (f"{COUNT}=true", f"{COUNT}=true: {TAKES_COUNT}"),
        (f"{COUNT}=[1]", f"{COUNT}=[1]: {TAKES_COUNT}"),
        (f"{COUNT}=007", f"{COUNT}=007: {TAKES_COUNT}; {DECIMAL}"),
        (f"{COUNT}=0x10", f"{COUNT}=0x10: {TAKES_COUNT}; {DECIMAL}"),
        (f"{COUNT}='5'", f"{COUNT}='5': {TAKES_COUNT}; write it without quotes"),
        ("rng.seed=null", "rng.seed=null: it takes a whole number, such as rng.seed=100"),
        (f"{NUMBER}=nan", f"{NUMBER}=nan: {TAKES_NUMBER}"),
        (f"{NUMBER}=inf", f"{NUMBER}=inf: {TAKES_NUMBER}"),
        (f"{NUMBER}=1e999", f"{NUMBER}=1e999: {TAKES_NUMBER}"),
        (f"{NUMBER}=fast", f"{NUMBER}=fast: {TAKES_NUMBER}"),
        (f"{SWITCH}=yes", f"{SWITCH}=yes: {TAKES_SWITCH}"),
        (f"{SWITCH}=on", f"{SWITCH}=on: {TAKES_SWITCH}"),
        (f"{SWITCH}=1", f"{SWITCH}=1: {TAKES_SWITCH}"),
        (f"{SWITCH}=null", f"{SWITCH}=null: {TAKES_SWITCH}"),
        (f"{CHOICE}=null", f"{CHOICE}=null: it takes one of probs, position, such as {CHOICE}=probs"),
        (f"{CHOICE}=mpi", f"{CHOICE}=mpi: it takes one of probs, position, such as {CHOICE}=probs"),
        (
            "train.exit_signal=SIGTREM",
            (
                "train.exit_signal=SIGTREM: it takes one of 33 names, such as "
                "train.exit_signal=SIGHUP; the nearest are SIGTERM, SIGVTALRM, SIGTRAP"
            ),
        ),
        (
            "model.params_dtype=int8",
            ("model.params_dtype=int8: it takes bfloat16, float16 or float32, such as model.params_dtype=bfloat16"),
        ),
        (f"{LIST}=3", f"{LIST}=3: it takes a list, each item a whole number, such as {LIST}=[100]"),
        (f"{LIST}=[a]", f"{LIST}=[a]: it takes a list, each item a whole number, such as {LIST}=[100]"),
        (f"{MAPPING}=3", f"{MAPPING}=3: it takes a mapping, such as {MAPPING}={{a: 1}}"),
        (f"{TEXT}=a,b", f"{TEXT}=a,b: {SWEEP}"),
        (f"{COUNT}=1,2", f"{COUNT}=1,2: {SWEEP}"),
        (f"{COUNT}=choice(1,2)", f"{COUNT}=choice(1,2): {SWEEP}"),
        (f"{COUNT}=range(3)", f"{COUNT}=range(3): {SWEEP}"),
        (f"{TEXT}=glob(*)", f"{TEXT}=glob(*): {SWEEP}"),
        (
            f"{TEXT}=[1,2]",
            (
                f"{TEXT}=[1,2]: it takes text or null, such as {TEXT}=text; write text with brackets or "
                "braces in quotes that the shell leaves in place (\"'[a]'\")"
            ),
        ),
        ("out=null", "out=null: it takes a path, such as out=DIR; for the word itself write \"'null'\""),
        (
            f"{TEXT}=$OUT/a",
            (
                f"{TEXT}=$OUT/a: the shell has not replaced $OUT; write it in double quotes, or as "
                "${oc.env:OUT}, or in single quotes within double quotes if it is meant as text"
            ),
        ),
        (
            f"{TEXT}=${{OUT}}/a",
            (
                f"{TEXT}=${{OUT}}/a: the shell has not replaced ${{OUT}}; write it in double quotes, or "
                "as ${oc.env:OUT}, or in single quotes within double quotes if it is meant as text"
            ),
        ),
        (
            f"{TEXT}=${{oc.env:NO_SUCH}}",
            (f"{TEXT}=${{oc.env:NO_SUCH}}: it cannot be resolved: Environment variable 'NO_SUCH' not found"),
        ),
        (f"{TEXT}=@no/such", f"{TEXT}=@no/such: no/such cannot be read (No such file or directory)"),
        (f"~{SWITCH}", f"~{SWITCH}: {SWITCH} cannot be removed; it takes true or false"),
        (f"~{COUNT}=3", f"~{COUNT}=3: `~` takes no value; write {COUNT}=null"),
        ("ft=5", "ft=5: ft is a section; set one of its settings, such as ft.enable_ft_package"),
        ("train=null", "train=null: train is a section; set one of its settings, such as train.tokens"),
        (
            "train.trainiters=5",
            ("train.trainiters is no setting; the nearest are train.train_iters, train.train_sync_interval"),
        ),
        (
            "+train.trainiters=5",
            ("train.trainiters is no setting; the nearest are train.train_iters, train.train_sync_interval"),
        ),
        ("lr=1e-4", "lr is no setting; the nearest is optimizer.lr"),
        ("train.lr=1e-4", "train.lr is no setting; the nearest is optimizer.lr"),
        ("optimzer.lr=1e-4", "optimzer.lr is no setting; the nearest is optimizer.lr"),
        ("train.foo=1", "train.foo is no setting; the section train has none with a similar name"),
        ("=5", "`=` without a name in front of it sets nothing; write KEY=VALUE"),
        (f"{LIST}[0]=1", f"{LIST}[0]: an item of a list cannot be set; set the whole list, as in {LIST}=[1,2]"),
        ("model.normalization=LayerNorm", "model.normalization is fixed by gpt-oss: RMSNorm"),
        ("model.init_method=f", "model.init_method takes a Python function, which only a recipe can give"),
        ("align.out=a", "align.out: out holds for all stages; write out=VALUE"),
        (
            "time=3600",
            ("time=3600: it takes a time with units d, h, m, s, such as time=4h; a number needs its unit, as in 3600s"),
        ),
        ("time=4x", "time=4x: it takes a time with units d, h, m, s, such as time=4h"),
        ("time=0s", "time=0s: it takes a time with units d, h, m, s, such as time=4h"),
        (
            "train.tokens=2G",
            ("train.tokens=2G: it takes a number above 0 with or without K, M, B or T, such as train.tokens=2B"),
        ),
        (
            "train.tokens=0.5",
            ("train.tokens=0.5: it takes a number above 0 with or without K, M, B or T, such as train.tokens=2B"),
        ),
        ("train.epochs=0", "train.epochs=0: it takes a number above 0, such as train.epochs=2"),
        ("gpus=0", "gpus=0: it takes a whole number from 1 up, such as gpus=8"),
        ("gpu=a100", "gpu=a100: it takes one of h100, h200, such as gpu=h100"),
        ("--lr=3", f"--lr 3: {WRITTEN}: optimizer.lr=3"),
        ("lr", f"lr: {WRITTEN}: optimizer.lr=VALUE"),
        ("settings.yaml", "settings.yaml: settings of a file are read by @settings.yaml"),
        (
            "gpt_oss_vision_20b_sft",
            (
                "gpt_oss_vision_20b_sft: several recipes are one argument, with commas between them: "
                "RECIPE,gpt_oss_vision_20b_sft"
            ),
        ),
        ("qqq", "qqq is no setting; write KEY=VALUE"),
        ("@no/such.yaml", "no/such.yaml cannot be read (No such file or directory)"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_right(argument: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert refusal(argument) == message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.path=", "path=: it takes a path or null"),
        ("model.hidden_dropout=2", "model.hidden_dropout=2: it takes a number from 0 to 1"),
        ("checkpoint.save_interval=-3", "checkpoint.save_interval=-3: it takes a whole number from 1 up or null"),
        ("logger.log_interval=0", "logger.log_interval=0: it takes a whole number from 1 up"),
        ("model.tensor_model_parallel_size=0", "it takes a whole number from 1 up"),
        ("optimizer_config_override_provider.vision_model=0", "it takes a number above 0"),
        ("checkpoint.load=/x", "checkpoint.load is in the folder of the run; set out=DIR, and weights=DIR"),
        ("checkpoint.save=/x", "checkpoint.save is in the folder of the run; set out=DIR"),
        ("checkpoint.pretrained_checkpoint=/x", "checkpoint.pretrained_checkpoint is set by weights=DIR"),
        ("checkpoint.finetune=true", "checkpoint.finetune would start at step 0 again"),
        ("logger.tensorboard_dir=/x", "logger.tensorboard_dir is in the folder of the run"),
        ("train.rampup_batch_size=[1,2,3]", "train.rampup_batch_size is not supported"),
        ("train.train_samples=10", "train.train_samples is not counted here; set train.train_iters"),
        ("tokenizer.vocab_size=5", "tokenizer.vocab_size follows from the model"),
        ("dist.distributed_backend=nccl", "dist.distributed_backend follows from the device"),
    ],
)
def test_a_setting_without_effect_or_outside_its_range_is_refused(argument: str, message: str):
    assert message in refusal(argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "3"], f"--lr 3: {WRITTEN}: optimizer.lr=3"),
        (["lr", "1e-5"], f"lr 1e-5: {WRITTEN}: optimizer.lr=1e-5"),
        ([COUNT, "=", "5"], f"{COUNT} 5: {WRITTEN}: {COUNT}=5"),
        (["time", "4h", "gpus=8"], f"time 4h: {WRITTEN}: time=4h"),
        ([f"{COUNT}=1", f"{COUNT}=2"], f"{COUNT}=1 and {COUNT}=2 are two values of one setting; give one"),
        (
            ["train.tokens=2B", "train.epochs=2"],
            ("train.tokens=2B and train.epochs=2 both say how long the run is; give one"),
        ),
        (["train.tokens=2B", f"{STEPS}=2"], f"train.tokens=2B and {STEPS}=2 both say how long the run is; give one"),
        (["peft=null", "peft.dim=8"], "peft=null and peft.dim=8 contradict each other; give one"),
        (
            ["train.trainiters=5", f"{NUMBER}=fast", f"{COUNT}=3"],
            (
                "train.trainiters is no setting; the nearest are "
                f"train.train_iters, train.train_sync_interval; {NUMBER}=fast: {TAKES_NUMBER}"
            ),
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: list[str], message: str):
    assert refusal(*arguments) == message


def test_the_same_value_twice_is_one_override():
    assert value(f"{NUMBER}=1", f"{NUMBER}=1.0") == 1.0


def test_a_mapping_is_set_item_by_item():
    found = {
        override.key: override.value for override in parse(["env_vars={A: 1, B: x}", "ft={enable_ft_package: true}"])
    }
    assert found == {"env_vars.A": 1, "env_vars.B": "x", "ft.enable_ft_package": True}


def test_a_stage_is_a_task_or_a_recipe_and_comes_last():
    found = parse(["align.optimizer.lr=1e-3", "gpt_oss_vision_20b_sft_8gpu_h100_bf16_config.train.tokens=2B", "gpus=8"])
    assert [(override.stage, override.key) for override in found] == [
        (None, "gpus"),
        ("align", "optimizer.lr"),
        ("gpt_oss_vision_20b_sft_8gpu_h100_bf16", "train.tokens"),
    ]


def test_what_is_set_for_a_stage_wins_in_that_stage():
    found = parse(["train.tokens=2B", "optimizer.lr=1e-4", "align.train.epochs=1", "align.optimizer.lr=1e-3"])
    of_align = {override.key: override.value for override in for_stage(found, ["align", "gpt_oss_vision_20b_align"])}
    assert of_align == {"train.epochs": 1.0, "optimizer.lr": 1e-3}
    assert {override.key: override.value for override in for_stage(found, ["sft"])} == {
        "train.tokens": 2 * 10**9,
        "optimizer.lr": 1e-4,
    }


def test_two_names_of_one_stage_cannot_differ():
    found = parse(["sft.optimizer.lr=1", "gpt_oss_vision_20b_sft.optimizer.lr=2"])
    with pytest.raises(UsageError, match=r"optimizer.lr=1 and optimizer.lr=2 are two values of one setting"):
        for_stage(found, ["sft", "gpt_oss_vision_20b_sft"])


def test_a_stage_that_the_run_does_not_have_is_refused():
    found = parse(["align.optimizer.lr=1", "sft.optimizer.lr=2", "train.tokens=2B"])
    refuse_other_stages(found, ["align", "sft"])
    with pytest.raises(UsageError) as caught:
        refuse_other_stages(found, ["align", "gpt_oss_vision_20b_align"])
    assert str(caught.value) == (
        "sft.optimizer.lr=2: this run has no stage sft; it has align, gpt_oss_vision_20b_align"
    )


def test_the_architecture_is_that_of_the_weights():
    refuse_architecture(parse(["model.seq_length=4096", "model.freeze_vision_model=true"]))
    with pytest.raises(UsageError) as caught:
        refuse_architecture(parse(["model.num_layers=2", "model.vision_config.hidden_size=8", f"{COUNT}=3"]))
    assert str(caught.value) == (
        "model.num_layers and model.vision_config.hidden_size cannot be set, as the architecture comes from the "
        "weights; leave it out, or train without weights"
    )


# Files


def test_a_value_may_be_in_a_file(tmp_path: Path):
    (tmp_path / "text").write_text("  $HOME is [where] I live, '#1'\n")
    (tmp_path / "number").write_text("1e3\n")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "mapping.yaml").write_text("A: 1\nB: '2'\n")
    assert value(f"{TEXT}=@{tmp_path}/text") == "$HOME is [where] I live, '#1'"
    assert value(f"{COUNT}=@{tmp_path}/number") == 1000
    assert value(f"{LIST}=@{tmp_path}/list.json") == [1, 2]
    mapping = parse([f"env_vars=@{tmp_path}/mapping.yaml"])
    assert {override.key: override.value for override in mapping} == {"env_vars.A": 1, "env_vars.B": "2"}


SETTINGS = """
data: {path: a.jsonl}
train:
  train_iters: 10
  exit_interval: null
optimizer:
  lr: 1e-4
peft: {dim: 8}
env_vars: {A: "1", B: 2}
profiling:
  profile_ranks: [1, 2]
model: {params_dtype: torch.bfloat16, window_size: [127, 0]}
ft: {}
align:
  optimizer: {lr: 1e-3}
"""


def test_settings_may_be_in_a_yaml_file(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text(SETTINGS)
    assert {(override.stage, override.key): override.value for override in parse([f"@{file}"])} == {
        (None, "dataset.path"): "a.jsonl",
        (None, "train.train_iters"): 10,
        (None, "train.exit_interval"): None,
        (None, "optimizer.lr"): 1e-4,
        (None, "peft.dim"): 8,
        (None, "env_vars.A"): "1",
        (None, "env_vars.B"): 2,
        (None, "profiling.profile_ranks"): [1, 2],
        (None, "model.params_dtype"): "bfloat16",
        (None, "model.window_size"): (127, 0),
        ("align", "optimizer.lr"): 1e-3,
    }


def test_arguments_win_over_files(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text(SETTINGS)
    found = {
        override.key: override.value for override in parse([f"@{file}", "train.epochs=2", "peft=null", "env_vars.A=3"])
    }
    assert "train.train_iters" not in found and "peft.dim" not in found
    assert (found["train.epochs"], found["peft"], found["env_vars.A"], found["env_vars.B"]) == (2.0, None, 3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  train_itres: 3\n",
            ("line 2: train.train_itres is no setting; the nearest is train.train_iters"),
        ),
        ("optimizer:\n  decoupled_lr: fast\n", f"line 2: {NUMBER}=fast: {TAKES_NUMBER}"),
        ("ddp:\n  use_distributed_optimizer: yes\n", f"line 2: {SWITCH}=yes: {TAKES_SWITCH}"),
        (
            "checkpoint: 3\n",
            "line 1: checkpoint=3: checkpoint is a section; set one of its settings, such as checkpoint.save_interval",
        ),
        ("model:\n  params_dtype: !torch bfloat16\n", "line 2: the tag !torch is not read; write a plain value"),
        ("- a\n", "line 1: a mapping of settings is expected here, such as `lr: 1e-4`"),
        ("a: [1\n", "line 2: not valid YAML (did not find expected ',' or ']')"),
        ("? [a]\n: 1\n", "line 1: a name is expected in place of a list or a mapping"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(text: str, message: str, tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert refusal(f"@{file}") == f"{file}, {message}"


def test_a_file_that_holds_itself_is_refused(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("env_vars: &a {A: *a}")
    assert refusal(f"@{file}") == f"{file}: an alias in it stands for what it is in"
    assert f"{file}: an alias" in refusal(f"env_vars=@{file}")
    file.write_text("profiling: {profile_ranks: &a [1]}\ntrain: {iterations_to_skip: *a}")
    assert [override.value for override in parse([f"@{file}"])] == [[1], [1]]


# Spelling

MISSPELT = []
for seed in range(30):
    dice = random.Random(seed)
    fields = [field for field in schema.load().fields.values() if not field.refused and "group" not in field.types]
    key = dice.choice(sorted(field.key for field in fields if len(field.key.rpartition(".")[2]) > 4))
    place = dice.randrange(key.rfind(".") + 2, len(key) - 1)
    pieces = key[:place], key[place], key[place + 1], key[place + 2 :]
    misspelt = [
        pieces[0] + "".join(pieces[2:]),
        f"{pieces[0]}{pieces[2]}{pieces[1]}{pieces[3]}",
        key[: place + 1] + key[place:],
    ]
    MISSPELT.append((misspelt[seed % 3], key))


@pytest.mark.parametrize(("misspelt", "key"), MISSPELT)
def test_a_misspelt_name_is_answered_with_the_right_one(misspelt: str, key: str):
    assert schema.find(misspelt) is None
    assert key in schema.nearest(misspelt)
    assert key in refusal(f"{misspelt}=1")


PARSE = """
import json, resource, sys
from gpt_oss_vision.errors import UsageError
from gpt_oss_vision.recipes.training.overrides import parse
try:
    parse(sys.argv[1:])
except UsageError as error:
    used = resource.getrusage(resource.RUSAGE_SELF)
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps([str(error), used.ru_utime + used.ru_stime, loaded]))
"""


@pytest.mark.parametrize("argument", ["train.trainiters=5", f"{COUNT}=abc", "checkpoint.svae=/a=b", f"{SWITCH}=yes"])
def test_a_wrong_override_is_answered_within_half_a_second_without_a_framework(argument: str):
    done = subprocess.run([sys.executable, "-c", PARSE, argument], capture_output=True, text=True, check=True)
    message, seconds, loaded = json.loads(done.stdout)
    assert message.startswith(argument.partition("=")[0])
    assert not {"torch", "megatron", "transformers", "numpy", "hydra", "omegaconf", "antlr4"} & set(loaded)
    assert seconds < 0.5


# Properties


@given(st.integers())
def test_any_whole_number_is_read_as_written(number: int):
    assert value(f"{COUNT}={number}") == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_number_is_read_as_written(number: float):
    assert value(f"{NUMBER}={number!r}") == number


QUOTE = "'"


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\\$")))
@example("x=b")
@example("'")
@example("[a, {b: c}]")
def test_any_text_in_quotes_is_read_as_written(text: str):
    assert value(f"{TEXT}='{text.replace(QUOTE, chr(92) + QUOTE)}'") == text


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="".join(values.SYNTAX))))
def test_any_text_without_special_characters_is_read_as_written(text: str):
    assume(text.strip().lower() != "null" and not text.startswith("@"))
    assert value(f"{TEXT}={text}") == text.strip()


WORDS = [
    "1",
    "0",
    "07",
    "_",
    ".",
    "e",
    "E",
    "+",
    "-",
    "nan",
    "inf",
    "null",
    "True",
    "false",
    "a",
    " ",
    "/",
    ":",
    "%",
    "*",
    "?",
]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join))
def test_a_value_without_special_characters_is_read_as_hydra_reads_it(text: str):
    """Hydra is not imported for these."""
    try:
        theirs = OverridesParser.create().parse_override(f"value={text}").value()
    except HydraException:
        assume(False)
    ours = values.scalar(text).value
    assert (repr(ours), type(ours)) == (repr(theirs), type(theirs))


# Applying


@pytest.fixture
def config() -> Any:
    """The configuration of a recipe."""
    return load(find("gpt_oss_vision_tiny_sft"))


def test_fields_are_set_with_their_types(config: Any):
    import torch
    from megatron.core.transformer.enums import AttnBackend

    apply(
        config,
        parse(
            [
                *("train.train_iters=5", "optimizer.lr=1e-5", "data.path=/a=b", "model.params_dtype=bf16"),
                *("model.attention_backend=flash", "model.window_size=[3,0]", "profiling.profile_ranks=[0,1]"),
                *("env_vars.A=1", "model.vision_config.x.y=2", "optimizer_config_override_provider.vision_model=0.1"),
                *("gpus=8", "time=4h", "mixed_precision=bf16_mixed"),
            ]
        ),
    )
    assert (config.train.train_iters, config.optimizer.lr, config.dataset.path) == (5, 1e-5, "/a=b")
    assert config.model.params_dtype is torch.bfloat16 and config.model.attention_backend is AttnBackend.flash
    assert config.model.window_size == (3, 0) and config.profiling.profile_ranks == [0, 1]
    assert config.env_vars["A"] == 1 and config.model.vision_config["x"] == {"y": 2}
    assert config.model.vision_config["model_type"] == "vit"
    assert config.optimizer_config_override_provider.vision_model == 0.1
    assert config.mixed_precision == "bf16_mixed"


def plain(value: Any) -> Any:
    """A value as YAML holds it."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def test_all_settings_of_a_configuration_in_a_file_give_the_same_configuration(config: Any, tmp_path: Path):
    written: dict[str, Any] = {}
    for key, field in schema.load().fields.items():
        section, _, name = key.partition(".")
        if name and not field.refused and key not in schema.OWN and hasattr(getattr(config, section), name):
            written.setdefault(section, {})[name] = plain(getattr(getattr(config, section), name))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(written))
    again = copy.deepcopy(config)
    apply(again, parse([f"@{tmp_path}/all.yaml"]))
    for section, names in written.items():
        for name in names:
            before, after = getattr(getattr(config, section), name), getattr(getattr(again, section), name)
            assert before == after and type(before) in (type(after), int), f"{section}.{name}: {before!r}, {after!r}"
    assert sum(map(len, written.values())) > 500


def test_a_section_that_is_none_is_made_by_its_first_setting(config: Any):
    assert config.ft is None and config.peft is None and config.comm_overlap is None
    apply(config, parse(["ft.enable_ft_package=true", "ft.calc_ft_timeouts=true", "peft.dim=8", "peft.alpha=4"]))
    assert config.ft.enable_ft_package and config.ft.calc_ft_timeouts
    assert (config.peft.dim, config.peft.alpha) == (8, 4)
    with pytest.raises(UsageError) as caught:
        apply(config, parse(["comm_overlap.overlap_grad_reduce=true"]))
    assert str(caught.value) == (
        "comm_overlap.overlap_grad_reduce=true: the section comm_overlap also needs comm_overlap.tp_comm_overlap"
    )
    apply(config, parse(["comm_overlap.overlap_grad_reduce=true", "comm_overlap.tp_comm_overlap=false"]))
    assert config.comm_overlap.overlap_grad_reduce is True
    apply(config, parse(["~ft", "peft=null"]))
    assert config.ft is None and config.peft is None


def test_a_named_section_keeps_what_its_name_says(config: Any):
    import torch

    apply(config, parse(["mixed_precision.grad_reduce_in_fp32=false", "mixed_precision=bf16_mixed"]))
    assert config.mixed_precision.params_dtype is torch.bfloat16
    assert config.mixed_precision.grad_reduce_in_fp32 is False


def test_a_section_of_another_class_without_the_field_is_refused(config: Any):
    from megatron.bridge.peft.dora import DoRA

    config.peft = DoRA()
    with pytest.raises(UsageError) as caught:
        apply(config, parse(["peft.a2a_experimental=true"]))
    assert str(caught.value) == ("peft.a2a_experimental=true: this recipe has a DoRA here, without a2a_experimental")


def test_a_frozen_section_is_replaced(config: Any):
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        seed: int = 1

    config.rng = before = Frozen()
    apply(config, parse(["rng.seed=2"]))
    assert config.rng == Frozen(2) and before.seed == 1
