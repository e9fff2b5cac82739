"""The log and the options of a run, in Megatron-Bridge's own training loop."""

import io
import json
import re
import signal
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import lengths_read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.flops import decoder_flops, image_flops
from gpt_oss_vision.bridge.mcore.param_groups import LearningRateFactors
from gpt_oss_vision.bridge.weight_map import PARAM_GROUPS, group_of
from gpt_oss_vision.recipes.base import ConfigContainer
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import training_config
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training import log
from gpt_oss_vision.recipes.training.log import Callback, CallbackContext
from gpt_oss_vision.recipes.training.metrics import Metrics
from gpt_oss_vision.recipes.training.stopping import stop_requests
from gpt_oss_vision.recipes.training.train import train


@dataclass
class Movement(Callback):
    """How far each parameter of this rank has moved: the sum of its absolute change, by name."""

    before: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    def on_train_start(self, context: CallbackContext) -> None:
        self.before = {name: p.detach().clone() for name, p in context.model[0].named_parameters()}

    def on_train_end(self, context: CallbackContext) -> None:
        after = dict(context.model[0].named_parameters())
        self.moved = {name: float((after[name].detach() - p).abs().sum()) for name, p in self.before.items()}


def lengths_of(out: Path, settings: Settings) -> np.ndarray:
    """The lengths of the samples of a run, `[steps, batch]`, without padding."""
    rows = settings.steps * settings.batch_size
    lengths = lengths_read(out / "digits/train.jsonl", out / "hf_start", rows, settings.seed)
    return lengths.reshape(settings.steps, settings.batch_size)


def run(out: Path, settings: Settings, model: dict[str, Any], factors: dict[str, float]) -> dict[str, float]:
    """Train; return how far each parameter of this rank has moved."""
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    for name, value in model.items():
        setattr(config.model, name, value)
    config.optimizer_config_override_provider = LearningRateFactors(**factors)
    config.checkpoint.save = None
    movement = Movement()
    train(config, callbacks=[movement])
    return movement.moved


def run_with_rows_of(length: int, out: Path, settings: Settings, balance: str) -> dict[str, float]:
    """Train with a large loss for the balance of the experts, on rows padded to a length."""
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.model.seq_length = config.dataset.seq_length = length
    config.model.calculate_per_token_loss = False
    config.model.moe_aux_loss_coeff, config.model.moe_router_load_balancing_type = 1.0, balance
    config.checkpoint.save = None
    movement = Movement()
    train(config, callbacks=[movement])
    return movement.moved


@pytest.mark.parametrize("balance", ["aux_loss", "modality_aux_loss"])
def test_padding_takes_no_part_in_the_balance_of_the_experts(balance: str, out: Path):
    settings = Settings(steps=2, batch_size=8, pipeline_parallel=2)
    short, long = (cpu.run_ranks(2, run_with_rows_of, length, out, settings, balance) for length in (32, 48))
    for moved, moved_on_longer_rows in zip(short, long, strict=True):  # keys of a tower have a bias without effect
        assert moved == pytest.approx(moved_on_longer_rows, rel=1e-3, abs=1e-4)


def by_group(moved: dict[str, float]) -> dict[str, list[float]]:
    return {group: [value for name, value in moved.items() if group_of(name) == group] for group in PARAM_GROUPS}


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {
    "the text model, as for aligning a new projection": (("language_model", "vision_model", "vision_bias"), {}, {}),
    "all but the text model": (("vision_model", "vision_projection", "vision_bias"), {}, {"tensor_parallel": 2}),
    "all but the bias, under recomputation": (("language_model", "vision_model", "vision_projection"), FULL, {}),
    "the bias alone, recomputing the experts": (
        ("language_model", "vision_model", "vision_projection"),
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {},
    ),
    "a whole pipeline stage": (("language_model", "vision_bias"), {}, {"pipeline_parallel": 2}),
}


@pytest.mark.parametrize(("frozen", "extra", "sizes"), CASES.values(), ids=CASES)
def test_frozen_groups_stay_to_the_bit_and_the_rest_learns(frozen: tuple, extra: dict, sizes: dict, out: Path):
    settings = Settings(steps=2, batch_size=8, **sizes)
    model = extra | {f"freeze_{group}": True for group in frozen}
    for moved in cpu.run_ranks(settings.ranks, run, out, settings, model, {}):
        for group, values in by_group(moved).items():
            still = sum(value == 0 for value in values)
            # No loss is computed at visual tokens, so the last layer's bias for them has no effect.
            assert still == len(values) if group in frozen else still <= (group == "vision_bias"), group


def test_a_factor_scales_the_step_of_its_group_alone(out: Path):
    factors = {"vision_model": 0.5, "vision_projection": 3.0, "vision_bias": 10.0}
    settings = Settings(steps=1, batch_size=8)
    (plain,) = cpu.run_ranks(1, run, out, settings, {}, {})
    (scaled,) = cpu.run_ranks(1, run, out, settings, {}, factors)
    for name, value in plain.items():
        assert scaled[name] == pytest.approx(value * factors.get(group_of(name), 1.0), rel=1e-3), name


def test_a_factor_of_zero_is_refused(out: Path):
    with pytest.raises(ValueError, match="above 0, vision_bias has 0"):
        cpu.run_ranks(1, run, out, Settings(steps=1, batch_size=8), {}, {"vision_bias": 0.0})


class Total(Callback):
    """Megatron-Bridge's running total of operations after the last step."""

    operations: float = 0.0

    def on_train_end(self, context: CallbackContext) -> None:
        self.operations = context.state.train_state.floating_point_operations_so_far


def counted_run(out: Path, settings: Settings) -> tuple[float, float, float]:
    """Numbers of operations: counted by the loop, of all tokens, and of one image."""
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.checkpoint.save = None
    total = Total()
    train(config, callbacks=[total])
    tokens = settings.steps * settings.batch_size * settings.seq_length
    return total.operations, decoder_flops(config.model, tokens).training(), image_flops(config.model).training()


@pytest.mark.parametrize("sizes", [{}, {"pipeline_parallel": 2}], ids=str)
def test_the_log_shows_memory_speed_and_operations_with_the_tower(sizes: dict, out: Path, capfd):
    settings = Settings(steps=10, batch_size=8, **sizes)
    for operations, text, image in cpu.run_ranks(settings.ranks, counted_run, out, settings):
        images = (operations - text) / image
        assert images == pytest.approx(round(images), abs=1e-3)
        assert 0 < images <= 80, "at most one in a row"
    said = capfd.readouterr().out
    assert "Estimated memory of the rank that needs most" in said
    assert "tokens per second per GPU: " in said
    logged = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("tokens", "images", "model_TFLOP"):
        assert all(event.value > 0 for event in logged.Scalars(f"throughput/{name}_per_second_per_GPU"))


@dataclass
class FakeClock(Callback):
    """A clock on which a training step takes one second, and an evaluation step one hour."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_train_step_end(self, context: CallbackContext) -> None:
        self.now += 1

    def on_eval_step_end(self, context: CallbackContext) -> None:
        self.now += 3600


def evaluated_run(out: Path, settings: Settings) -> float:
    """Train with an evaluation between the steps; return the time of the clock at the end."""
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.checkpoint.save = None
    config.logger.log_interval = 2
    config.dataset.valid_path = config.dataset.path
    config.validation.eval_interval, config.validation.eval_iters = 3, 1
    log.time = clock = FakeClock()
    train(config, callbacks=[clock])
    return clock.now


def test_every_line_of_the_log_has_its_speed_without_evaluations(out: Path, capfd):
    settings = Settings(steps=4, batch_size=8)
    (seconds,) = cpu.run_ranks(1, evaluated_run, out, settings)
    assert seconds > 3600
    speeds = re.findall(r"tokens per second per GPU: ([\d.]+)", capfd.readouterr().out)
    tokens = lengths_of(out, settings).sum(1)
    assert [float(speed) for speed in speeds] == pytest.approx([tokens[:2].mean(), tokens[2:].mean()], rel=1e-3)


def run_with_held_out_data(out: Path, settings: Settings, folder: Path) -> None:
    """Two steps with an evaluation after the second, which Megatron-Bridge repeats at the end, and a test."""
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.checkpoint.save = None
    config.dataset.valid_path = config.dataset.test_path = config.dataset.path
    config.validation.eval_interval, config.validation.eval_iters = 2, 1
    train(config, log=folder)


def test_the_losses_of_validation_and_test_data_are_written_once(out: Path, tmp_path: Path, capfd):
    (tmp_path / "log").mkdir()
    cpu.run_ranks(1, run_with_held_out_data, out, Settings(steps=2, batch_size=8), tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "loss" not in line]
    assert [[*line] for line in held_out] == [["step", "validation_loss"], ["step", "test_loss"]]
    assert [line["step"] for line in held_out] == [2, 2]
    said = re.findall(r"^step 2: loss of the (\w+) data ([\d.]+)$", capfd.readouterr().out, re.MULTILINE)
    assert said == [
        (name, f"{line[f'{name}_loss']:.4f}") for name, line in zip(("validation", "test"), held_out, strict=True)
    ]
    metrics = Metrics(tmp_path / "log")
    metrics.update()
    assert metrics.steps.keys() == {1, 2}
    assert (metrics.validation, metrics.test) == ({2: held_out[0]["validation_loss"]}, {2: held_out[1]["test_loss"]})


def stopped_while_printing() -> list[bool]:
    """Whether Megatron-Bridge has seen a signal that came in the middle of a print."""
    from megatron.bridge.training.utils.sig_utils import DistributedSignalHandler

    class Raw(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, content: Any, /) -> int:
            signal.raise_signal(signal.SIGTERM)
            return len(content)

    printed = io.TextIOWrapper(io.BufferedWriter(Raw()))
    with stop_requests() as requests, DistributedSignalHandler() as handler:
        requests.save = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, requests.handle)
        with redirect_stdout(printed):
            print("step 1", flush=True)
        return handler.signals_received()


def test_a_signal_that_comes_while_the_run_prints_is_seen():
    assert cpu.run_ranks(1, stopped_while_printing) == [[True]]


def printed_by_the_handler() -> str:
    from megatron.bridge.training.utils.sig_utils import DistributedSignalHandler

    with redirect_stdout(io.StringIO()) as printed, DistributedSignalHandler():
        signal.raise_signal(signal.SIGTERM)
    return printed.getvalue()


@pytest.mark.upstream
def test_megatron_bridge_still_prints_in_its_signal_handler():
    assert "Received signal" in cpu.run_ranks(1, printed_by_the_handler)[0]


def layerless_run(out: Path, settings: Settings) -> None:
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.checkpoint.save = None
    config.model.pipeline_model_parallel_layout = "E|ttttL"
    config.logger.log_interval = settings.steps
    train(config)


def test_a_pipeline_stage_may_have_no_layers(out: Path):
    settings = Settings(steps=1, batch_size=8, pipeline_parallel=2)
    cpu.run_ranks(2, layerless_run, out, settings)
    logged = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    counts = make_ndarray(logged.Tensors("router/tokens_per_expert")[0].tensor_proto)
    assert (counts.sum((1, 2)) == lengths_of(out, settings).sum() * 2).all()


def short_run(out: Path, settings: Settings) -> None:
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.checkpoint.save = None
    config.logger.log_interval = 2
    train(config)


@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 2}], ids=str)
def test_tensorboard_shows_the_experts_of_each_modality(sizes: dict, out: Path):
    settings = Settings(steps=4, batch_size=8, **sizes)
    cpu.run_ranks(settings.ranks, short_run, out, settings)
    logged = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    events = logged.Tensors("router/tokens_per_expert")
    assert [event.step for event in events] == [2, 4]
    lengths = lengths_of(out, settings)
    for event in events:
        counts = make_ndarray(event.tensor_proto)
        assert counts.shape == (4, 2, 8)
        # Since the last event: the tokens of 2 steps x 2 experts; an image has 6 tokens.
        per_modality = counts.sum(-1)
        assert (per_modality.sum(-1) == lengths[event.step - 2 : event.step].sum() * 2).all()
        assert (per_modality[:, 1] == per_modality[0, 1]).all()
        assert per_modality[0, 1] > 0
        assert per_modality[0, 1] % (6 * 2) == 0
    scalars = logged.Tags()["scalars"]
    for layer in range(4):
        assert 0 <= logged.Scalars(f"router/overlap/layer_{layer}")[-1].value <= 1
        assert {f"router/{modality}_entropy/layer_{layer}" for modality in ("text", "visual")} <= set(scalars)
    assert set(logged.Tags()["images"]) == {"router/text", "router/visual"}


def test_factors_and_frozen_groups_survive_the_configuration_file(out: Path):
    config = training_config(out, write_digits(out / "digits", 0), Settings())
    config.optimizer_config_override_provider = LearningRateFactors(vision_model=0.1)
    config.model.freeze_vision_bias = True
    config.to_yaml(str(out / "run_config.yaml"))
    again = ConfigContainer.from_yaml(str(out / "run_config.yaml"))
    assert again.optimizer_config_override_provider == LearningRateFactors(vision_model=0.1)
    assert again.model.frozen_groups == ["vision_bias"]
