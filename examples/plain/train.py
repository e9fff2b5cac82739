"""Teach the small model to read the handwritten digits of scikit-learn: SFT on a CPU, in a minute or two.

uv run python examples/plain/train.py [--steps 300] [--router sigmoid] [--out digits]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, linear

from model import GPT_OSS_SMALL, GPTOSSVision, TopKRouter

# The id of a word is its index. A question has 5 words, then 6 image tokens.
WORDS = "zero one two three four five six seven eight nine . which digit is this ?".split()  # noqa: SIM905
QUESTION = torch.tensor([*range(11, 16), *[GPT_OSS_SMALL.image_token_id] * 6])
scans, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
IMAGES, DIGITS = torch.tensor(scans.images[order, None] / 8 - 1).float(), torch.tensor(scans.target[order])
HELD_OUT = slice(1500, None)


class SigmoidRouter(TopKRouter):
    """Another router: each expert is scored on its own, then the scores of the chosen are scaled to a sum of 1."""

    def forward(self, x: torch.Tensor, is_visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = linear(x, self.weight, self.bias) + is_visual[:, None] * self.vision_bias
        scores, chosen = logits.sigmoid().topk(self.k)
        return scores / scores.sum(-1, keepdim=True), chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--router", choices=["top-k", "sigmoid"])
    parser.add_argument("--out", type=Path, default=Path("digits"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = GPTOSSVision(GPT_OSS_SMALL, SigmoidRouter if arguments.router == "sigmoid" else TopKRouter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, arguments.steps + 1):
        rows = torch.randint(HELD_OUT.start, (64,))
        answer = torch.stack((DIGITS[rows], torch.full((64,), WORDS.index("."))), dim=1)
        logits = model(torch.cat((QUESTION.expand(64, -1), answer), dim=1), IMAGES[rows])
        # The logits at a position are about the next token, so those about the answer begin one before it.
        loss = cross_entropy(logits[:, -3:-1].flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == arguments.steps:
            said = model(QUESTION.expand(297, -1), IMAGES[HELD_OUT])[:, -1].argmax(-1)
            print(f"step {step}: loss {loss:.3f}, {(said == DIGITS[HELD_OUT]).float().mean():.1%} of held-out digits")
    arguments.out.mkdir(exist_ok=True)
    save_file(model.state_dict(), arguments.out / "model.safetensors")
    for axes, image, word in zip(plt.subplots(4, 8)[1].flat, IMAGES[HELD_OUT], said, strict=False):
        axes.imshow(-image[0], cmap="gray")
        axes.set(title=WORDS[word], xticks=[], yticks=[])
    plt.savefig(arguments.out / "answers.png")
