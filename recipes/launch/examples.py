"""The batch scripts in `examples/slurm`, made of plans. `python -m gpt_oss_vision.recipes.launch.examples FOLDER`"""

import sys
from collections.abc import Iterator
from pathlib import Path

from .plan import Plan, batch_script

RUNS, DATA, CHECKPOINTS, PYTHON = "/shared/runs", "/shared/data", "/shared/checkpoints", "/shared/venv/bin/python"
TASK = "SLURM_TASK"
"""Stands for the number of a job in an array."""


def examples() -> Iterator[tuple[str, str]]:
    """Name and text of each script."""
    start = f"weights={CHECKPOINTS}/20b"
    yield _training("pretrain", "gpt_oss_vision_20b_pretrain", f"data.path={DATA}/pretrain.jsonl", start, nodes=2)
    yield _training("sft", "gpt_oss_vision_20b_sft", f"data.path={DATA}/chats.jsonl", start, nodes=1)
    yield _training("lora", "gpt_oss_vision_20b_lora", f"data.path={DATA}/chats.jsonl", start, nodes=1, gpus=1)
    convert = ("convert", "import", "--hf", f"{CHECKPOINTS}/gpt-oss-20b-vision", "--out", f"{CHECKPOINTS}/20b")
    yield _script("convert", *convert, time="02:00:00", more=("--cpus-per-task=32", "--mem=128G"))
    files = (f"{DATA}/questions-{TASK}.jsonl", "--out", f"{DATA}/answers-{TASK}.jsonl")
    answer = ("generate", "--model", f"{RUNS}/sft/hf", "--batch", *files)
    name, text = _script("answer", *answer, time="01:00:00", more=("--array=0-7", "--gpus=1"))
    yield name, text.replace(TASK, '"$SLURM_ARRAY_TASK_ID"')


def _training(name: str, recipe: str, *settings: str, nodes: int, gpus: int = 8) -> tuple[str, str]:
    run = Path(RUNS, name)
    export = ("convert", "export", "--megatron", f"{run}/checkpoints", "--out", f"{run}/hf", "--overwrite")
    plan = Plan(
        name=name,
        run=run,
        train=("train", recipe, *settings, "hang=1h", f"out={run}"),
        export=export if name == "sft" else (),
        nodes=nodes,
        ranks_per_node=gpus,
        gpus=True,
        python=PYTHON,
        account="ACCOUNT",
        partition="PARTITION",
        time="1-00:00:00",
        file=f"{name}.sbatch",
        output=f"{name}-%j.txt",
    )
    return plan.file, batch_script(plan)


def _script(name: str, *command: str, time: str, more: tuple[str, ...]) -> tuple[str, str]:
    plan = Plan(
        name=name,
        run=Path(RUNS, name),
        train=command,
        nodes=1,
        ranks_per_node=1,
        gpus=False,
        starter="srun",
        python=PYTHON,
        account="ACCOUNT",
        partition="PARTITION",
        time=time,
        more=more,
        file=f"{name}.sbatch",
        output=f"{name}-%j.txt",
        seconds_to_save=0,
        retries=0,
    )
    return plan.file, batch_script(plan)


def main(folder: Path) -> None:
    """Write the scripts."""
    for name, text in examples():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
