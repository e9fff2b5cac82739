"""Reinforcement learning with a reward that is computed, not learnt: does the answer name the digit of the image?

    uv run python examples/plain/train.py --out digits
    uv run python examples/plain/rl.py digits [--algorithm grpo|ppo] [--steps 60]

It starts from train.py's model with noise on its weights, which is right now and then: where no answer is ever right,
no reward tells what to change. Each step samples answers, and makes those that were better than expected likelier. GRPO
(arXiv 2402.03300) expects the mean of the answers to the same question, PPO (arXiv 1707.06347) what a value head
predicts before each token. Nothing holds the model near its start, since this reward can't be tricked.

Shapes: b answers (those to one question are neighbours), a tokens of an answer, h hidden size.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model import GPT_OSS_SMALL, GPTOSSVision
from train import DIGITS, HELD_OUT, IMAGES, QUESTION, WORDS

NOISE = 1.3
QUESTIONS, GROUP, LENGTH = 24, 8, 3  # questions of a step, answers to each, tokens of an answer at most
UPDATES, CLIP = 2, 0.2  # updates from the same answers, and how far they may move the probability of a token
DISCOUNT, LAMBDA = 1.0, 0.95
STOP = WORDS.index(".")


def log_probs(model: GPTOSSVision, states: Tensor) -> Tensor:
    """Log-probabilities (…, vocab_size) of the next token after hidden states (…, h); an image token is no answer."""
    logits = model.lm_head(states)
    logits[..., GPT_OSS_SMALL.image_token_id] = -torch.inf
    return logits.log_softmax(-1)


@torch.no_grad()
def sample(model: GPTOSSVision, images: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """An answer to the question about each image: tokens (b, a), and the log-probability (b, a) of each."""
    answers, chosen, cache = [], [], {}
    states = model.model(QUESTION.expand(len(images), -1), images, cache=cache)
    for _ in range(LENGTH):
        of_next = log_probs(model, states[:, -1])
        answers.append(of_next.argmax(-1, keepdim=True) if greedy else of_next.exp().multinomial(1))
        chosen.append(of_next.gather(1, answers[-1]))
        states = model.model(answers[-1], cache=cache)
    return torch.cat(answers, dim=1), torch.cat(chosen, dim=1)


def until_stop(answers: Tensor) -> Tensor:
    """Whether a token (b, a) belongs to the answer: up to the first full stop, which is part of it."""
    stops = answers == STOP
    return stops.cumsum(1) - stops.int() == 0


def reward(answers: Tensor, digits: Tensor) -> Tensor:
    """1 for the digit of the image and a full stop, else 0."""
    return ((answers[:, 0] == digits) & (answers[:, 1] == STOP)).float()


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO: how much better (b, 1) an answer is than the others to its question, in standard deviations."""
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def generalized_advantages(rewards: Tensor, values: Tensor, is_answer: Tensor) -> Tensor:
    """PPO: how much better (b, a) it went after a token than the value head expected before it (arXiv 1506.02438).

    The reward comes with the last token of an answer; after it nothing is expected.
    """
    advantages, later, value_later = torch.zeros_like(values), 0.0, 0.0
    is_last = is_answer & (is_answer.cumsum(1) == is_answer.sum(1, keepdim=True))
    for t in reversed(range(LENGTH)):
        surprise = rewards * is_last[:, t] + DISCOUNT * value_later - values[:, t]
        later = advantages[:, t] = (surprise + DISCOUNT * LAMBDA * later) * is_answer[:, t]
        value_later = values[:, t] * is_answer[:, t]
    return advantages


def states_before(model: GPTOSSVision, images: Tensor, answers: Tensor) -> Tensor:
    """Hidden states (b, a, h) from which each token of an answer was predicted."""
    ids = torch.cat((QUESTION.expand(len(answers), -1), answers), dim=1)
    return model.model(ids, images)[:, -LENGTH - 1 : -1]


@torch.no_grad()
def accuracy(model: GPTOSSVision) -> tuple[float, float]:
    """Share of held-out digits that are named with their own image, and with the image of another digit."""
    images, digits = IMAGES[HELD_OUT], DIGITS[HELD_OUT]
    other = images.roll(1, 0)[digits != digits.roll(1)]
    right = reward(sample(model, images, greedy=True)[0], digits)
    wrong = reward(sample(model, other, greedy=True)[0], digits[digits != digits.roll(1)])
    return right.mean().item(), wrong.mean().item()


def damaged(folder: Path) -> GPTOSSVision:
    """The model of train.py with noise on every matrix, in proportion to its standard deviation."""
    model = GPTOSSVision(GPT_OSS_SMALL)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for matrix in [parameter.data for parameter in model.parameters() if parameter.ndim > 1]:
        matrix += NOISE * matrix.std() * torch.randn_like(matrix)
    return model


def main(folder: Path, algorithm: str, steps: int) -> None:
    """Train, and print the reward of each step and the accuracy before and after."""
    torch.manual_seed(0)
    model, value_head, history = damaged(folder), nn.Linear(GPT_OSS_SMALL.hidden_size, 1), []
    optimizer = torch.optim.AdamW([*model.parameters(), *value_head.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    print("before: {:.1%} of held-out digits, {:.1%} with the image of another".format(*accuracy(model)))
    for step in range(1, steps + 1):
        rows = torch.randint(HELD_OUT.start, (QUESTIONS,)).repeat_interleave(GROUP)
        images, digits = IMAGES[rows], DIGITS[rows]
        answers, chosen_then = sample(model, images)
        rewards, is_answer = reward(answers, digits), until_stop(answers)
        history.append(rewards.mean())
        for update in range(UPDATES):
            states = states_before(model, images, answers)
            chosen = log_probs(model, states).gather(2, answers[..., None])[..., 0]
            values = value_head(states)[..., 0]
            if update == 0 and algorithm == "grpo":
                advantages = group_advantages(rewards)
            elif update == 0:
                advantages = generalized_advantages(rewards, values.detach(), is_answer)
                returns = advantages + values.detach()
                advantages = (advantages - advantages[is_answer].mean()) / (advantages[is_answer].std() + 1e-4)
            ratio = (chosen - chosen_then).exp()
            gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            loss = -gain[is_answer].mean()
            if algorithm == "ppo":
                loss = loss + 0.5 * (values - returns)[is_answer].square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
        print(f"step {step}: reward {history[-1]:.2f}")
    print(f"reward of the last 10 steps: {sum(history[-10:]) / len(history[-10:]):.2f}")
    print("after: {:.1%} of held-out digits, {:.1%} with the image of another".format(*accuracy(model)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--algorithm", choices=["grpo", "ppo"], default="grpo")
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
