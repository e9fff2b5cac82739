"""A forward pass of a checkpoint that is larger than memory: one layer at a time, from its files.

    uv run python examples/plain/offload.py CHECKPOINT [TOKEN_ID ...]

The model is that of model.py, with hooks that fill a layer before its call and empty it afterwards. What is stored in
bf16 is mapped from its file, without memory of its own; experts in MXFP4 are unpacked, into the memory of one layer.
"""

import re
import sys
import time
from pathlib import Path
from threading import Event, Thread

import torch
from torch import nn

from checkpoint import read_config, read_weights
from model import GPTOSSVision

FILLED_AT_ONCE = re.compile(r"model\.(embed_tokens|vision_adapter|layers\.\d+|norm)|lm_head")


def load(folder: str | Path) -> GPTOSSVision:
    """The model of a checkpoint, called like any other; its parameters are in memory while they are used."""

    def fill(module: nn.Module, name: str) -> None:
        weights = read_weights(folder, prefix=f"{name}.")
        module.load_state_dict({key.removeprefix(f"{name}."): weights[key] for key in weights}, assign=True)

    def empty(module: nn.Module, _inputs: tuple, _output: torch.Tensor) -> None:
        module.to("meta")

    with torch.device("meta"):
        model = GPTOSSVision(read_config(folder))
    for name, module in model.named_modules():
        if FILLED_AT_ONCE.fullmatch(name):
            module.register_forward_pre_hook(lambda module, _inputs, name=name: fill(module, name))
            module.register_forward_hook(empty)
    return model


def watch(peak: list[int], end: Event) -> None:
    """Keep the largest anonymous memory of this process in bytes: what is neither a page of a file nor shared."""
    while not end.wait(0.01):
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1]))


if __name__ == "__main__":
    peak, end, started = [0], Event(), time.perf_counter()
    Thread(target=watch, args=(peak, end)).start()
    with torch.no_grad():
        logits = load(sys.argv[1])(torch.tensor([[int(token) for token in sys.argv[2:] or ["1"]]]))
    end.set()
    for probability, token in zip(*logits[0, -1].float().softmax(-1).topk(5), strict=True):
        print(f"token {token}: {probability:.1%}")
    print(f"{time.perf_counter() - started:.1f} s, at most {peak[0] / 2**30:.2f} GiB of anonymous memory")
