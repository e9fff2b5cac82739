"""The vision stage alone: the ranks share the images, and activations may be recomputed instead of kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionAdapter
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.provider import provider_from_config
from gpt_oss_vision.bridge.mcore.vision import VisionStage
from tiny import tiny_config, tiny_model

CONFIG = tiny_config()


def adapter() -> GPTOSSVisionAdapter:
    return tiny_model(CONFIG).model.vision_adapter


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def stage(tensor_parallel: int = 1, context_parallel: int = 1, **overrides: object) -> VisionStage:
    """The vision stage on this rank, with the weights of `adapter()`."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, context_parallel_size=context_parallel
    )
    provider = provider_from_config(CONFIG, tensor_model_parallel_size=tensor_parallel, **overrides)
    provider.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    provider.perform_initialization = False
    module = VisionStage(provider, groups)
    module.load_state_dict(adapter().state_dict())
    return module


def loss_of(features: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    return (features * weights).sum()


def share(counts: list[int], tensor_parallel: int, context_parallel: int) -> list[tuple]:
    """Per count of images: the number in this rank's tower, the features, and the gradients summed over the ranks."""
    module, results = stage(tensor_parallel, context_parallel), []
    seen: list[int] = []
    module.vit.register_forward_pre_hook(lambda vit, args: seen.append(len(args[0])))
    for count in counts:
        module.zero_grad()
        features = module(images(count))
        # Each context-parallel rank has a part of the loss; all tensor-parallel ranks have the whole of that part.
        (loss_of(features) / context_parallel).backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
        results.append((sum(seen), features.detach(), gradients))
        seen.clear()
    return results


@pytest.mark.parametrize(("tensor_parallel", "context_parallel"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_share_the_images_and_all_get_the_features(tensor_parallel: int, context_parallel: int, monkeypatch):
    monkeypatch.setattr(CONFIG, "num_key_value_heads", 4)
    ranks, counts = tensor_parallel * context_parallel, [5, 4, 1, 0]
    by_rank = cpu.run_ranks(ranks, share, counts, tensor_parallel, context_parallel)
    for count, results in zip(counts, zip(*by_rank, strict=True), strict=True):
        seen = [result[0] for result in results]
        most = -(-count // ranks)
        # A rank without images runs its tower on a blank one, so that its parameters get gradients.
        assert seen == [min(max(count - rank * most, 0), most) or 1 for rank in range(ranks)]
        module = adapter()
        expected = module(images(count)).pooler_output if count else torch.zeros(0, 6, 32)
        if count:
            loss_of(expected).backward()
        for _, features, gradients in results:
            torch.testing.assert_close(features, expected.detach(), rtol=1e-5, atol=1e-5)
            for name, parameter in module.named_parameters():
                wanted = parameter.grad if count else torch.zeros_like(parameter)
                torch.testing.assert_close(gradients[name], wanted, rtol=1e-4, atol=1e-4)


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """The sizes in bytes of all tensors that autograd keeps inside the context, except for weights."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def step(recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
    module = stage(vision_recompute=recompute)
    with kept_bytes() as sizes:
        features = module(images(4))
    loss_of(features).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}, sum(sizes)


def test_recomputation_keeps_less_and_gives_the_same_gradients():
    ((gradients, kept),) = cpu.run_ranks(1, step, False)
    ((again, kept_again),) = cpu.run_ranks(1, step, True)
    assert kept_again < kept / 20
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name
