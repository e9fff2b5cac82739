"""Grouped experts against the formula, one token at a time."""

import torch

from gpt_oss_vision.bridge.ops.experts import clamped_gate, grouped_experts


def test_each_token_goes_through_its_own_expert_and_is_weighted_with_its_bias():
    torch.manual_seed(0)
    counts, hidden, ffn = [3, 0, 2], 6, 5
    tokens, probs = 4 * torch.randn(5, hidden), torch.rand(5)
    fc1 = [(torch.randn(2 * ffn, hidden), torch.randn(2 * ffn)) for _ in counts]
    fc2 = [(torch.randn(hidden, ffn), torch.randn(hidden)) for _ in counts]
    found = grouped_experts(tokens, counts, probs, fc1, fc2, limit=7.0, offset=1.0)
    for token, expert in enumerate([0, 0, 0, 2, 2]):
        gate_up = (fc1[expert][0] @ tokens[token] + fc1[expert][1]).double()
        gate, up = gate_up[:ffn].clamp(max=7.0), gate_up[ffn:].clamp(-7.0, 7.0)
        inner = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        expected = probs[token] * (fc2[expert][0].double() @ inner + fc2[expert][1])
        torch.testing.assert_close(found[token].double(), expected, rtol=1e-5, atol=1e-4)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    fc1 = [(torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)) for _ in range(2)]
    fc2 = [(torch.randn(3, 2, requires_grad=True), torch.randn(3, requires_grad=True)) for _ in range(2)]
    output = grouped_experts(torch.randn(2, 3), [2, 0], torch.ones(2), fc1, fc2, limit=7.0, offset=1.0)
    output.square().sum().backward()
    for used, unused in ((fc1[0], fc1[1]), (fc2[0], fc2[1])):
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
