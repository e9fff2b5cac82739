"""examples/plain/train.py and rl.py as a user runs them, shorter, and the formulas of rl.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import model as plain
import rl
import train

EXAMPLES = Path(__file__).parents[2] / "examples/plain"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "digits"
    lines = run("train.py", "--steps", "150", "--out", str(folder)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 50", "step 100", "step 150"]
    assert float(re.search(r"([\d.]+)% of held-out digits$", lines[-1])[1]) >= 85  # 95 with the default of 300
    return folder


@pytest.mark.slow
def test_training_leaves_weights_and_a_picture(digits):
    assert (digits / "model.safetensors").stat().st_size > 1e6
    with Image.open(digits / "answers.png") as picture:
        assert picture.size == (640, 480)


@pytest.mark.slow
def test_another_router_trains(tmp_path):
    lines = run("train.py", "--steps", "50", "--router", "sigmoid", "--out", str(tmp_path / "out")).splitlines()
    assert float(re.search(r"([\d.]+)% of held-out digits$", lines[-1])[1]) >= 40


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "steps"), [("grpo", 30), ("ppo", 45)])
def test_reinforcement_learning_raises_the_reward_by_looking(digits, algorithm: str, steps: int):
    """Part of the 60 steps."""
    out = run("rl.py", str(digits), "--algorithm", algorithm, "--steps", str(steps))
    before, after = (
        [float(share) for share in re.search(rf"{when}: ([\d.]+)%.* ([\d.]+)% with", out).groups()]
        for when in ("before", "after")
    )
    rewards = [float(reward) for reward in re.findall(r"step \d+: reward ([\d.]+)", out)]
    assert sum(rewards[:2]) / 2 <= 0.5
    assert float(re.search(r"reward of the last 10 steps: ([\d.]+)", out)[1]) >= 0.65
    assert after[0] > before[0] + 10
    assert after[1] <= 8


@pytest.fixture
def policy() -> plain.GPTOSSVision:
    torch.manual_seed(0)
    model = plain.GPTOSSVision(plain.GPT_OSS_SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_sampled_tokens_have_the_probabilities_that_training_computes(policy):
    """The cache of the sampler against a whole forward pass: the first ratio of an update is 1."""
    policy, images = policy.double(), train.IMAGES[:16]
    answers, sampled = rl.sample(policy, images)
    assert not (answers == plain.GPT_OSS_SMALL.image_token_id).any()
    with torch.no_grad():
        computed = rl.log_probs(policy, rl.states_before(policy, images, answers))
    ratio = (computed.gather(2, answers[..., None])[..., 0] - sampled).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-9)


def test_an_answer_ends_with_its_first_full_stop_and_is_rewarded_whole():
    answers = torch.tensor([[3, rl.STOP, 5], [rl.STOP, 3, rl.STOP], [3, 4, 5], [4, rl.STOP, rl.STOP]])
    assert rl.until_stop(answers).tolist() == [
        [True, True, False],
        [True, False, False],
        [True] * 3,
        [True, True, False],
    ]
    assert rl.reward(answers, torch.tensor([3, 3, 3, 3])).tolist() == [1, 0, 0, 0]


def test_advantages_of_a_group_have_mean_0_and_deviation_1():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1] + [1.0] * 8)
    first, second = rl.group_advantages(rewards).view(2, rl.GROUP)
    assert first.mean().item() == pytest.approx(0, abs=1e-6)
    assert first.std().item() == pytest.approx(1, abs=1e-3)
    assert second.tolist() == [0] * 8


def test_generalized_advantages_are_the_sum_of_discounted_surprises():
    values = torch.tensor([[0.2, 0.5, 0.7], [0.1, 0.4, 0.9]])
    is_answer = torch.tensor([[True, True, True], [True, True, False]])
    found = rl.generalized_advantages(torch.tensor([1.0, 0.0]), values, is_answer)
    for row, surprises in enumerate([[0.5 - 0.2, 0.7 - 0.5, 1 - 0.7], [0.4 - 0.1, 0 - 0.4]]):
        expected = [
            sum(surprise * (rl.DISCOUNT * rl.LAMBDA) ** later for later, surprise in enumerate(surprises[t:]))
            for t in range(len(surprises))
        ]
        assert found[row, : len(expected)].tolist() == pytest.approx(expected)
    assert found[1, 2] == 0
