"""Sink attention against the formula in plain loops of fp64."""

import pytest
import torch

from gpt_oss_vision.bridge.ops.attention import sink_attention


def attention_by_hand(query, key, value, sinks, scale, window):
    """One query at a time: ``exp(s_ij) / (exp(sink) + sum_j exp(s_ij))`` over the keys that it may see."""
    output = torch.zeros_like(query)
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for q in range(queries):
                place = q + keys - queries
                first = 0 if window is None else max(0, place - window + 1)
                seen = slice(first, place + 1)
                weights = torch.exp((key[b, g, seen] @ query[b, h, q]) * scale)
                output[b, h, q] = (weights[:, None] * value[b, g, seen]).sum(0) / (weights.sum() + sinks[h].exp())
    return output


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("queries", [10, 1])
def test_output_and_gradients_are_those_of_the_formula(window: int | None, queries: int):
    torch.manual_seed(0)
    shapes = {"query": (2, 4, queries, 8), "key": (2, 2, 10, 8), "value": (2, 2, 10, 8)}
    wide = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    wide["sinks"] = torch.tensor([-5.0, 0.0, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    narrow = {name: tensor.detach().float().requires_grad_() for name, tensor in wide.items()}
    expected = attention_by_hand(*wide.values(), scale=8**-0.5, window=window)
    found = sink_attention(*narrow.values(), scale=8**-0.5, window=window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights.float()).sum().backward()
    for name, tensor in wide.items():
        torch.testing.assert_close(narrow[name].grad.double(), tensor.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_large_sink_takes_nearly_everything():
    ones = torch.ones(1, 1, 3, 4)
    found = sink_attention(ones, ones, ones, torch.tensor([20.0]), scale=0.5)
    assert found.max() < 1e-6
