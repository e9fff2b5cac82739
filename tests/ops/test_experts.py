"""Grouped experts against the formula, one token at a time."""

import torch

from gpt_oss_vision.bridge.ops.experts import clamped_gate, grouped_linear


def test_each_token_goes_through_its_own_expert_with_its_bias():
    torch.manual_seed(0)
    counts, tokens = [3, 0, 2], torch.randn(5, 6)
    experts = [(torch.randn(4, 6), torch.randn(4)) for _ in counts]
    found = grouped_linear(tokens, counts, experts)
    for token, expert in enumerate([0, 0, 0, 2, 2]):
        weight, bias = experts[expert]
        torch.testing.assert_close(found[token], weight @ tokens[token] + bias, rtol=1e-5, atol=1e-5)


def test_the_gate_and_the_linear_half_are_clamped_and_multiplied_as_in_the_formula():
    gate_up = 9 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    gate, up = gate_up[:, :4].double().clamp(max=7.0), gate_up[:, 4:].double().clamp(-7.0, 7.0)
    expected = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    torch.testing.assert_close(clamped_gate(gate_up, limit=7.0, offset=1.0).double(), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    used, unused = [(torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)) for _ in range(2)]
    grouped_linear(torch.randn(2, 3), [2, 0], [used, unused]).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in used)
    assert all(parameter.grad.abs().sum() == 0 for parameter in unused)


def test_the_gate_is_clamped_from_above_only():
    gate_up = torch.tensor([[-9.0, 9.0, -9.0, 9.0]])
    low, high = clamped_gate(gate_up, limit=7.0, offset=1.0)[0].double()
    slope = 1.702
    assert torch.isclose(
        low, torch.tensor(-6.0 * -9.0).double() / (1 + torch.exp(torch.tensor(slope * 9.0))), rtol=1e-4
    )
    assert torch.isclose(
        high, torch.tensor(8.0 * 7.0).double() / (1 + torch.exp(torch.tensor(-slope * 7.0))), rtol=1e-4
    )
