"""Operations against published counts, parameters against the built model, activations against autograd's tensors."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from allocated import Allocated

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.activations import chunks_in_flight, microbatches_in_first_chunk, tower_activations
from gpt_oss_vision.bridge.mcore.flops import decoder_flops, image_flops
from gpt_oss_vision.bridge.mcore.memory import (
    adapters_of_stage,
    bytes_of_states,
    memory_of_stage,
    memory_per_rank,
    parameters_of_stage,
)
from gpt_oss_vision.bridge.mcore.provider import GPTOSSVisionProvider, provider_from_config
from gpt_oss_vision.recipes.training.peft import GPTOSSVisionLoRA
from layouts import Layout
from tiny import tiny_config, tiny_vision_config

SIZES = {"20B": {"num_hidden_layers": 24, "num_local_experts": 32}, "120B": {}}


def provider_of(size: str, **overrides: object) -> GPTOSSVisionProvider:
    return provider_from_config(GPTOSSVisionConfig(**SIZES[size], dtype="bfloat16"), **overrides)


@pytest.mark.parametrize(
    ("size", "length", "forward", "training", "lora"),
    # Counted by hand from the model card, causal and window aware, in GFLOP per token.
    [
        ("20B", 2048, 7.44, 22.3, 15.1),
        ("20B", 4096, 7.64, 22.9, 15.7),
        ("20B", 8192, 8.04, 24.1, 16.9),
        ("120B", 4096, 10.9, 32.7, 22.5),
    ],
)
def test_operations_per_token_are_those_of_gpt_oss(size, length, forward, training, lora):
    operations = decoder_flops(provider_of(size, seq_length=length), tokens=1)
    assert operations.forward / 1e9 == pytest.approx(forward, rel=0.005)
    assert operations.training() / 1e9 == pytest.approx(training, rel=0.005)
    assert operations.training(weight_gradients=False) / 1e9 == pytest.approx(lora, rel=0.005)


def test_operations_per_image_are_those_of_a_vit_l():
    operations = image_flops(provider_of("20B"))
    projection = 2 * 258 * 1024 * 2880
    assert (operations.forward - projection) / 1e9 == pytest.approx(162, rel=0.002)
    assert (operations.training() - 3 * projection) / 1e9 == pytest.approx(485, rel=0.003)


def test_packed_samples_cost_less_attention_than_one_long_one():
    provider = provider_of("20B", seq_length=4096)
    packed = decoder_flops(provider, tokens=4096, squared=4 * 1024**2)
    apart = decoder_flops(provider_of("20B", seq_length=1024), tokens=4096)
    assert packed == apart
    assert packed.attention < decoder_flops(provider, tokens=4096).attention / 3


def numbers(config: dict, layout: Layout) -> tuple[int, int]:
    """The parameters of this rank: their estimated number, and that of the built model."""
    torch.distributed.init_process_group("gloo")
    provider = provider_from_config(tiny_config(**config))
    layout.apply(provider)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    built = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
    return sum(part.count for part in parameters_of_stage(provider, stage)), built


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, Layout()),
        ({"vision_config": tiny_vision_config("siglip_vision_model"), "vision_pool_token": False}, Layout()),
        ({"use_vision": False}, Layout(tp=2)),
        ({}, Layout(tp=2, pp=2, ep=2)),
        ({}, Layout(pp=2, vpp=2, ep=2)),
        ({}, Layout(etp=2, pp=2, extra={"num_layers_in_first_pipeline_stage": 1})),
    ],
    ids=str,
)
def test_the_count_of_parameters_is_exact_on_every_rank(config: dict, layout: Layout):
    for estimated, built in cpu.run_ranks(layout.world_size, numbers, config, layout):
        assert estimated == built


def finalized(**overrides: object) -> GPTOSSVisionProvider:
    provider = provider_of("20B", seq_length=4096, **overrides)
    with cpu.runtime():
        provider.finalize()
    return provider


def test_memory_of_the_20b_model_on_eight_ranks():
    # 21.2e9 parameters: 2.1e9 are dense, and on every rank; the experts' are distributed over the ranks.
    provider = finalized(expert_model_parallel_size=8)
    memory = memory_per_rank(provider, world_size=8, micro_batch_size=1, microbatches=4)
    dense, experts = 2.1e9, 19.1e9 / 8
    assert memory.parameters == pytest.approx(2 * (dense + experts), rel=0.03)
    assert memory.gradients == 2 * memory.parameters
    assert memory.optimizer == pytest.approx(12 * (dense / 8 + experts), rel=0.03)


def test_frozen_parameters_have_neither_gradients_nor_optimizer_states():
    sizes = {"world_size": 8, "micro_batch_size": 1, "microbatches": 4}
    memory = memory_per_rank(finalized(expert_model_parallel_size=8, freeze_language_model=True), **sizes)
    whole = memory_per_rank(finalized(expert_model_parallel_size=8), **sizes)
    assert memory.parameters == whole.parameters
    assert memory.gradients == pytest.approx(4 * 0.307e9, rel=0.02)


def test_adapted_weights_have_neither_gradients_nor_optimizer_states():
    peft = GPTOSSVisionLoRA(dim=16, full_weights=[])
    memory = memory_per_rank(finalized(), world_size=1, micro_batch_size=1, microbatches=1, peft=peft)
    adapters = sum(part.count for part in adapters_of_stage(finalized(), 0, peft))
    weights = sum(part.count for part in parameters_of_stage(finalized(), 0))
    assert memory.parameters == 2 * (weights + adapters)
    assert (memory.gradients, memory.optimizer) == (4 * adapters, 12 * adapters)


def adapted_parameters(layout: Layout, per_expert: bool) -> tuple[int, int]:
    """Parameters of adapters on a rank: estimated, and in the model."""
    torch.distributed.init_process_group("gloo")
    provider = provider_from_config(tiny_config())
    layout.apply(provider)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    peft = GPTOSSVisionLoRA(dim=4, share_expert_adapters=not per_expert)
    model = peft(provider.provide_distributed_model(wrap_with_ddp=False), training=True)
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    adapters = [p.numel() for chunk in model for name, p in chunk.named_parameters() if ".adapter." in name]
    return sum(part.count for part in adapters_of_stage(provider, stage, peft)), sum(adapters)


@pytest.mark.parametrize("per_expert", [False, True], ids=["shared", "per expert"])
@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2), Layout(tp=2), Layout(pp=2)], ids=str)
def test_the_adapters_of_a_rank_are_counted(layout: Layout, per_expert: bool):
    for estimated, counted in cpu.run_ranks(layout.world_size, adapted_parameters, layout, per_expert):
        assert estimated == counted > 0


def test_a_stage_without_layers_keeps_no_activations():
    layout = "E|" + "t" * 24 + "L"
    settings = {"use_vision": False}
    provider = finalized(pipeline_model_parallel_size=2, pipeline_model_parallel_layout=layout, **settings)
    sizes = {"world_size": 2, "micro_batch_size": 1, "microbatches": 1}
    assert memory_of_stage(provider, 0, **sizes).activations == 0
    one = memory_per_rank(finalized(**settings), **sizes | {"world_size": 1}).activations
    assert memory_of_stage(provider, 1, **sizes).activations == one


def test_the_first_stage_holds_a_microbatch_for_every_later_stage():
    provider = finalized(pipeline_model_parallel_size=4, use_vision=False)
    held = [
        memory_of_stage(provider, stage, world_size=4, micro_batch_size=1, microbatches=8).activations
        for stage in range(3)
    ]
    assert held == pytest.approx([held[2] * 2, held[2] * 1.5, held[2]])


@pytest.mark.parametrize("microbatches", [1, 4, 8])
@pytest.mark.parametrize("vpp", [None, 2, 3])
def test_the_microbatches_in_flight_are_those_of_megatrons_schedule(vpp: int | None, microbatches: int):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    provider = finalized(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=vpp)
    for stage in range(4):
        group = SimpleNamespace(size=lambda: 4, rank=lambda stage=stage: stage)
        schedule = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp)
        _, _, warm_up, left = get_pp_rank_microbatches(microbatches, vpp or 1, 4, p2p_communicator=schedule)
        assert chunks_in_flight(provider, stage, microbatches) == warm_up + (1 if left else 0)


def test_interleaving_holds_more_activations():
    held = {
        vpp: memory_per_rank(
            finalized(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=vpp, use_vision=False),
            world_size=4,
            micro_batch_size=1,
            microbatches=8,
        ).activations
        for vpp in (None, 2, 3)
    }
    # The activations of (2 (pp - 1) + (vpp - 1) pp + 1) / vpp stages, and without interleaving those of pp.
    assert held[2] == pytest.approx(held[None] * 11 / 8)
    assert held[3] == pytest.approx(held[None] * 15 / 12)


DECODER = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 8}
LENGTH = 64


def is_softmax(tensor: torch.Tensor) -> bool:
    """Whether it holds products of queries and keys, with or without the sink; kernels for CUDA keep none."""
    return tensor.ndim > 1 and tensor.shape[-1] in (LENGTH, LENGTH + 1) and tensor.shape[-2] % LENGTH == 0


def step_of(config: dict, settings: dict) -> tuple[torch.nn.Module, Callable[[], None], float]:
    """A model, a function that takes a step of one microbatch, an image in each of 4 rows, and its estimated bytes."""
    torch.distributed.init_process_group("gloo")
    model_config = tiny_config(**DECODER | config)
    provider = provider_from_config(model_config, seq_length=LENGTH, **settings)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    ids = torch.randint(0, 200, (4, LENGTH))
    ids[:, : model_config.num_image_tokens] = model_config.image_token_id
    images = torch.randn(4, *model_config.image_shape, dtype=provider.params_dtype)
    memory = memory_per_rank(provider, world_size=1, micro_batch_size=4, microbatches=1, images=4)
    return model, lambda: model(ids, labels=ids, pixel_values=images).sum().backward(), memory.activations


def kept_bytes(config: dict, settings: dict) -> tuple[float, float]:
    """Bytes of activations: estimated, and kept by autograd after the forward pass."""
    model, step, estimated = step_of(config, settings)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not is_softmax(tensor):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return estimated, sum(kept.values())


def allocated_bytes(config: dict, settings: dict) -> tuple[float, float]:
    """Bytes of activations: estimated, and at most allocated in a step beside weights and their gradients."""
    model, step, estimated = step_of(config, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Allocated(leaves_out=is_softmax) as allocated:
        for parameter in model.parameters():  # a detached tensor has the same storage
            allocated.add(parameter.detach())
            if parameter.grad is not None:
                allocated.add(parameter.grad)
        before = allocated.bytes
        step()
    return estimated, allocated.most - before


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_estimated_activations_are_those_that_autograd_keeps(dtype: torch.dtype, is_frozen: bool):
    frozen = {"freeze_language_model": is_frozen, "freeze_vision_model": True}
    ((estimated, measured),) = cpu.run_ranks(1, kept_bytes, {"dtype": dtype}, frozen)
    assert estimated == pytest.approx(measured, rel=0.1)


def full(method: str, layers: int) -> dict:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def selective(*modules: str) -> dict:
    return {"recompute_granularity": "selective", "recompute_modules": [*modules]}


RECOMPUTED = [
    *(full("block", layers) for layers in (1, 12, 24)),
    *(full("uniform", layers) for layers in (1, 5, 24)),
    *(selective(module) for module in ("core_attn", "moe")),
]


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("recompute", RECOMPUTED, ids=lambda each: "-".join(map(str, each.values())))
def test_with_recomputation_they_are_those_that_are_allocated_at_most(recompute: dict, is_frozen: bool):
    settings = recompute | {"freeze_language_model": is_frozen, "freeze_vision_model": True}
    ((estimated, measured),) = cpu.run_ranks(1, allocated_bytes, {"num_hidden_layers": 24}, settings)
    # The gradients of the layer that is in its backward pass are not estimated.
    assert estimated == pytest.approx(measured, rel=0.13)


def large_tower(kind: str, image_size: int = 28) -> dict:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "image_size": image_size}
    return {"num_hidden_layers": 2, "vision_config": tiny_vision_config(kind, **sizes)}


TOWERS = {
    "learns": ("vit", {}),
    "frozen": ("vit", {"freeze_vision_model": True}),
    "frozen, and the projection": ("vit", {"freeze_vision_model": True, "freeze_vision_projection": True}),
    "recomputed": ("vit", {"vision_recompute": True}),
    "frozen and recomputed": ("vit", {"vision_recompute": True, "freeze_vision_model": True}),
    "clip": ("clip_vision_model", {}),
    "siglip": ("siglip_vision_model", {}),
}


@pytest.mark.parametrize(("kind", "settings"), TOWERS.values(), ids=TOWERS)
def test_the_activations_of_the_tower_are_those_that_autograd_keeps(kind: str, settings: dict):
    measure = allocated_bytes if "vision_recompute" in settings else kept_bytes
    ((estimated, measured),) = cpu.run_ranks(1, measure, large_tower(kind), settings)
    assert estimated == pytest.approx(measured, rel=0.1)


def test_images_take_memory_for_every_microbatch_in_flight():
    provider = finalized(pipeline_model_parallel_size=4, tensor_model_parallel_size=2)
    sizes = {"world_size": 8, "micro_batch_size": 1, "microbatches": 8}
    few, many = (memory_of_stage(provider, 0, **sizes, images=images).activations for images in (2, 15))
    each = tower_activations(provider, {"vision_model", "vision_projection"}).between * 2
    assert many - few == pytest.approx(4 * (8 - 1) * each)  # of 15 images a tensor-parallel rank has 8
    assert memory_of_stage(provider, 0, **sizes).activations == many  # as many as a row of 4,096 tokens can have
    assert memory_of_stage(provider, 1, **sizes, images=2) == memory_of_stage(provider, 1, **sizes, images=15)


@pytest.mark.parametrize(("vpp", "microbatches", "held"), [(None, 8, 4), (2, 8, 8), (2, 4, 4), (3, 16, 8)])
def test_the_microbatches_in_the_first_chunk_are_those_of_megatrons_schedule(vpp, microbatches, held):
    provider = finalized(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=vpp)
    assert microbatches_in_first_chunk(provider, microbatches) == held


def test_a_shared_vocabulary_is_counted_once_where_both_ends_are_on_a_stage():
    both, shared = (
        sum(part.count for part in parameters_of_stage(finalized(share_embeddings_and_output_weights=is_shared), 0))
        for is_shared in (False, True)
    )
    assert both - shared == 201_088 * 2880


BYTES = {
    "Adam": ({}, 12),
    "SGD": ({"optimizer": "sgd"}, 8),
    "SGD without momentum": ({"optimizer": "sgd", "sgd_momentum": 0.0}, 4),
    "Lion": ({"optimizer": "lion"}, 8),
    "half on the CPU": ({"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}, 8),
    "nothing on the CPU": ({"optimizer_cpu_offload": True}, 12),
}


@pytest.mark.parametrize(("settings", "expected"), BYTES.values(), ids=BYTES)
def test_the_states_of_an_optimizer_are_counted(settings: dict, expected: int):
    from megatron.core.optimizer import OptimizerConfig

    assert bytes_of_states(OptimizerConfig(**settings), width=2) == expected


def test_gradients_in_half_precision_are_counted():
    from megatron.core.distributed import DistributedDataParallelConfig

    sizes = {"world_size": 1, "micro_batch_size": 1, "microbatches": 1}
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=False)
    wide, narrow = (memory_per_rank(finalized(), **sizes, ddp=each).gradients for each in (None, ddp))
    assert wide == 2 * narrow


def test_an_image_takes_what_was_measured_of_the_default_tower():
    tower = tower_activations(provider_of("20B"), {"vision_model", "vision_projection"})
    assert tower.between * 2 / 2**20 == pytest.approx(194, rel=0.01)
    assert tower.within == 0


@pytest.mark.parametrize(
    ("backend", "layers", "peak"),
    # GiB at most allocated on an H200 in a forward and a backward pass (`just bench-gpu`, docs/gpu.md).
    [("transformer_engine", 4, 33.68), ("transformer_engine", 8, 41.80), ("torch", 4, 30.95), ("torch", 8, 42.72)],
)
def test_the_estimate_is_near_the_peak_on_a_gpu(backend: str, layers: int, peak: float):
    config = GPTOSSVisionConfig(num_hidden_layers=layers, num_local_experts=4, dtype="bfloat16")
    provider = provider_from_config(config, seq_length=4096)
    with cpu.runtime():
        provider.finalize()
    if backend == "transformer_engine":
        provider.transformer_impl, provider.cross_entropy_loss_fusion = backend, True
    memory = memory_per_rank(provider, world_size=1, micro_batch_size=2, microbatches=1, images=8)
    assert (memory.total - memory.optimizer) / 2**30 == pytest.approx(peak, rel=0.015)


def test_the_estimate_reads_as_a_sentence():
    memory = memory_per_rank(finalized(), world_size=1, micro_batch_size=1, microbatches=1)
    assert str(memory).startswith(f"{memory.total / 2**30:.2f} GiB (parameters ")
