"""Whether this package can be installed beside frameworks for RL: one run of uv's resolver each, nothing is installed.

    uv run python tests/resolves.py

Only the ranges of `[project.dependencies]` count, as for anybody who installs the wheel. What Megatron-Bridge asks for
and no machine without CUDA can build is left out by the same overrides as in `[tool.uv]`.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
HOSTS = {
    "trl 1.16.0": ["trl==1.16.0"],
    "verl 0.9.1": ["verl==0.9.1"],
    "NeMo-RL's bounds": ["transformers>=5.5,<5.9", "torch==2.11.0"],  # 7ea279a; it is not on the index
    "the lowest transformers": ["transformers==5.8.0"],
}


def resolve(requirements: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the resolver on this package's dependencies and those of a host; nothing is installed."""
    uv = PROJECT["tool"]["uv"]
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder, "overrides.txt")
        overrides.write_text("\n".join(uv["override-dependencies"]))
        command = ["uv", "pip", "compile", "--no-config", "--quiet", "--python-version", "3.12", "-"]
        return subprocess.run(
            [*command, "--overrides", str(overrides), "--exclude-newer", uv["exclude-newer"]],
            input="\n".join(PROJECT["project"]["dependencies"] + requirements),
            capture_output=True,
            text=True,
        )


if __name__ == "__main__":
    failed = False
    for name, requirements in HOSTS.items():
        done = resolve(requirements)
        failed = failed or bool(done.returncode)
        chosen = [
            line for line in done.stdout.splitlines() if line.startswith(("torch==", "transformers==", "numpy=="))
        ]
        print(f"{name}: {', '.join(chosen) if not done.returncode else done.stderr}")
    sys.exit(failed)
