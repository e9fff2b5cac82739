"""Run scripts in fresh processes: forks of a new interpreter that has imported torch and transformers alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

LAUNCHER = """
import json, os, sys, traceback
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.gpt_oss import modeling_gpt_oss

def run(script, arguments, name):
    for number, stream in enumerate(("out", "err"), 1):
        os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = arguments
    try:
        exec(script, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0

assert "gpt_oss_vision" not in sys.modules
codes = {}
for name, (script, *arguments) in json.load(sys.stdin).items():
    child = os.fork()
    if not child:
        os._exit(run(script, arguments, name))
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""

type Finished = subprocess.CompletedProcess[str]


def run_fresh(folder: Path, scripts: dict[str, list[str]]) -> dict[str, Finished]:
    """Run each script, given by its name with its arguments, one after the other, in a process of its own.

    Args:
        folder: their working directory, and the cache of modules that come with a checkpoint.
    """
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        input=json.dumps(scripts),
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
        check=True,
    )
    return {
        name: subprocess.CompletedProcess(
            name, code, *((folder / f"{name}.{stream}").read_text() for stream in ("out", "err"))
        )
        for name, code in json.loads(done.stdout).items()
    }
