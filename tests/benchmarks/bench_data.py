"""Check a million rows of LLaVA's JSON, and load images for the tower, beside what PIL alone takes.

    uv run python tests/benchmarks/bench_data.py FOLDER [--rows N]

The rows have a question and an answer or two of made-up words and one of 1,000 JPEG files of 500 x 375 pixels; the
tokenizer is trained on such texts, as gpt-oss's own is not at hand.
"""

import argparse
import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.recipes.data.check import check_source
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.sources.opening import open_source
from gpt_oss_vision.recipes.data.tokenizer import train_tokenizer

IMAGES, SIZE, SIDE = 1000, (500, 375), 224
TOKENS_PER_IMAGE = 258


def words(random_: random.Random) -> list[str]:
    """A vocabulary of 5,000 words of two to four syllables."""
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "ou")]
    return ["".join(random_.choices(syllables, k=random_.randint(2, 4))) for _ in range(5000)]


def records(count: int, seed: int = 0) -> Iterator[dict]:
    """Rows of LLaVA: about 1 kB each."""
    random_ = random.Random(seed)
    vocabulary = words(random_)

    def text(low: int, high: int) -> str:
        return " ".join(random_.choices(vocabulary, k=random_.randint(low, high)))

    for number in range(count):
        turns = [("human", "<image>\n" + text(5, 15)), ("gpt", text(20, 60))]
        turns += [("human", text(5, 15)), ("gpt", text(10, 50))] * random_.randint(0, 1)
        chat = [{"from": role, "value": value} for role, value in turns]
        yield {"id": f"{number:09}", "image": f"images/{random_.randrange(IMAGES):04}.jpg", "conversations": chat}


def write(folder: Path, count: int) -> Path:
    """The images, the processor, and the rows as one array."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(IMAGES):
        small = Image.fromarray(noise.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"images/{number:04}.jpg", quality=90)
    texts = [turn["value"] for record in records(3000, seed=1) for turn in record["conversations"]]
    tokenizer = train_tokenizer(texts, vocab_size=16_000)
    image_processor = GPTOSSVisionImageProcessor(size={"height": SIDE, "width": SIDE})
    GPTOSSVisionProcessor(image_processor, tokenizer, num_image_tokens=TOKENS_PER_IMAGE).save_pretrained(
        folder / "processor"
    )
    with (folder / "rows.json").open("w") as file:
        file.write("[\n")
        for number, record in enumerate(records(count)):
            file.write(("," if number else "") + json.dumps(record) + "\n")
        file.write("]\n")
    return folder / "rows.json"


class Memory(threading.Thread):
    """The most memory that this process and its children hold together: pages that they share count once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()

    def run(self) -> None:
        """Look every five seconds; a look takes several milliseconds of each process."""
        while not self.done.wait(5):
            self.peak = max(self.peak, sum(map(proportional_gib, [os.getpid(), *children()])))


def children() -> list[int]:
    """Processes that this one has started."""
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def proportional_gib(pid: int) -> float:
    """Memory of a process, in which a page that n processes share is an n-th."""
    with suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 2**20
    return 0.0


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def rate(function: Callable[[int], object], count: int) -> float:
    """Calls per second of CPU."""
    function(0)
    started = time.process_time()
    for number in range(count):
        function(number)
    return count / (time.process_time() - started)


def by_pil(path: Path) -> np.ndarray:
    """What no loader can do without: decode, resize, and normalise to float32."""
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / 255 - 0.5) / 0.5


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    folder = arguments.folder
    # A process that has trained a tokenizer should not be forked into others that use one.
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(folder, arguments.rows))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    memory = Memory()
    memory.start()
    started, cpu_before = time.perf_counter(), cpu_seconds()
    source = open_source(folder / "rows.json")
    indexed = time.perf_counter() - started
    found = check_source(source, GPTOSSVisionProcessor.from_pretrained(folder / "processor"))
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
    memory.done.set()
    size = (folder / "rows.json").stat().st_size
    print(
        f"check: {len(found):,} rows, {size / 1e9:.2f} GB, {seconds:.0f} s on {len(os.sched_getaffinity(0))} cores "
        f"({indexed:.0f} s to find the rows), {cpu:.0f} s of CPU, {1e6 * cpu / len(found):.0f} us a row, "
        f"{int(found.lengths.sum()):,} tokens, {len(found.skipped)} skipped, "
        f"at most {memory.peak:.2f} GiB in all processes"
    )
    torch.set_num_threads(1)  # as in a loader's worker
    lines = (folder / "rows.json").read_bytes()[2:500_000].split(b"\n,")[:400]
    (folder / "few.jsonl").write_bytes(b"\n".join(lines))
    dataset = ChatDataset(folder / "few.jsonl", GPTOSSVisionProcessor.from_pretrained(folder / "processor"), 8192)
    alone = rate(lambda number: dataset[number % len(dataset)], 400)
    together = 16 * rate(lambda number: dataset.__getitems__([(16 * number + n) % len(dataset) for n in range(16)]), 25)
    pil = rate(lambda number: by_pil(folder / f"images/{number % IMAGES:04}.jpg"), 400)
    decode = rate(lambda number: Image.open(folder / f"images/{number % IMAGES:04}.jpg").load(), 400)
    print(
        f"load: {together:.0f} samples/s of one image each on one core, 16 at once as in a pack or a microbatch "
        f"({1000 / together:.2f} ms of CPU), one at once {alone:.0f} ({1000 / alone:.2f} ms); "
        f"PIL alone {pil:.0f} ({1000 / pil:.2f} ms, of which decoding {1000 / decode:.2f})"
    )


if __name__ == "__main__":
    main()
