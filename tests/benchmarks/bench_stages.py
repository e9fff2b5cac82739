"""What the tiny recipes learn: digits named by the quickstart's model, after two stages, and with adapters after them.

    uv run python tests/benchmarks/bench_stages.py FOLDER [KEY=VALUE ...]

Each is trained, exported and asked by the commands, as a user would; the settings are for `train`. A share of 0.98 of
the 297 questions has a standard deviation of 0.008.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def command(*arguments: str) -> None:
    """Run `gpt-oss-vision`; its output is that of this process."""
    subprocess.run([sys.executable, "-m", "gpt_oss_vision.cli", *arguments], check=True)


def named_rightly(model: Path, digits: Path) -> str:
    """How many of the held-out digits a model names."""
    rows = [json.loads(line)["messages"] for line in (digits / "test.jsonl").read_text().splitlines()]
    questions, answers = digits / "questions.jsonl", model.with_suffix(".jsonl")
    questions.write_text("".join(json.dumps({"messages": [user]}) + "\n" for user, _ in rows))
    command("generate", "--model", str(model), "--batch", str(questions), "--out", str(answers))
    said = [json.loads(line)["answer"] for line in answers.read_text().splitlines()]
    right = sum(answer == row[1]["content"][0]["text"] for answer, row in zip(said, rows, strict=True))
    return f"{right} of {len(rows)}, {right / len(rows):.1%}"


def main() -> None:
    """Print the three shares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    folder, run = arguments.folder, arguments.folder / "run"
    command("quickstart", "--out", str(folder / "quickstart"))
    found = {"quickstart": named_rightly(folder / "quickstart/hf", folder / "quickstart/digits")}
    recipes = ",".join(f"gpt_oss_vision_tiny_{stage}" for stage in ("align", "sft", "lora"))
    digits = folder / "digits"
    command("train", recipes, f"out={run}", f"data.folder={digits}", *arguments.settings)
    for stage in ("sft", "lora"):
        command("convert", "export", "--megatron", str(run / stage / "checkpoints"), "--out", str(run / stage / "hf"))
        found[stage] = named_rightly(run / stage / "hf", digits)
    print("\n".join(f"{name}: {right}" for name, right in found.items()))


if __name__ == "__main__":
    main()
