"""The subcommands of recipes: parsers, and one function each. At module level the standard library only."""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from json import dumps
from pathlib import Path
from typing import Any, Literal

from ..arguments import add_command, at_least
from ..errors import UsageError, UserError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `recipes`, `train`, `data`, `quickstart` and `generate` to the command line."""
    add = add_command(commands, list_recipes, "recipes").add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="show this one")
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of it, as for `train`")
    add("--why", action="store_true", help="the source of each number")

    add = add_command(commands, train).add_argument
    add("recipe", metavar="RECIPE[,RECIPE...]", help="a recipe, or stages that run one after the other")
    add("settings", nargs="*", metavar="KEY=VALUE", help="a setting of the run, or @FILE with several")
    add("--dry-run", action="store_true", help="check everything and print the plan, without training")

    text = "Look at data before a run."
    group = commands.add_parser("data", help=text, description=text, allow_abbrev=False)
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    add = _add_data_command(actions, check)
    add("--decode", action="store_true", help="decode all images, and not only read their headers")
    add("--max-skipped", type=at_least(0.0), default=0.01, metavar="F", help="share that may be skipped (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the numbers, and all skipped rows, to this file")
    add("--no-lock", action="store_true", help="do not write FILE.lock, which a run takes in place of checking again")

    add = _add_data_command(actions, show)
    add("-o", "--out", type=Path, metavar="FILE.html", help="the page (name of the first FILE, with .html)")
    add("--overwrite", action="store_true", help="replace an --out that is no such page")
    add("--rows", type=at_least(0), default=20, metavar="N", help="how many of the strangest rows (%(default)s)")
    add("--text", action="store_true", help="print the samples instead, for a terminal")

    add = add_command(actions, convert).add_argument
    add("file", nargs="+", metavar="FILE", help="a file, a folder or a pattern in quotes")
    add("--to", required=True, choices=("jsonl", "webdataset"), help="tar files, or folders with rows and images")
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    add("--rows-per-shard", type=at_least(1), default=1000, metavar="N", help="rows of a shard (%(default)s)")
    _add_image_options(add)
    add("--max-skipped", type=at_least(0.0), default=0.01, metavar="F", help="share that may be left out (%(default)s)")

    add = add_command(commands, quickstart).add_argument
    add("--out", type=Path, default="out", metavar="DIR", help="folder for checkpoints, plots and report (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="same seed, same result (%(default)s)")
    add("--steps", type=at_least(1), metavar="N", help="optimizer steps; with few it learns little")
    for kind in ("tensor", "pipeline", "expert"):
        add(f"--{kind}-parallel", type=at_least(1), metavar="N", help=f"{kind}-parallel size of the training (1)")
    add("--overwrite", action="store_true", help="replace an earlier quickstart in --out")

    command = add_command(commands, generate)
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the question")
    source.add_argument("--batch", type=Path, metavar="FILE", help="a JSONL file of questions")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="an image; may be repeated")
    add("--out", type=Path, metavar="FILE", help="with --batch: the JSONL file for the answers")
    add("--overwrite", action="store_true", help="replace an earlier --out")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="questions answered at once (%(default)s)")
    add("--max-new-tokens", type=at_least(1), default=256, metavar="N", help="longest answer (%(default)s)")
    add("--temperature", type=at_least(0.0), default=0.0, metavar="T", help="0 takes the likeliest token (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="same seed, same answer (%(default)s)")
    add("--int8", action="store_true", help="hold the weights in 8 bits")


def _add_image_options(add: Callable[..., Any]) -> None:
    add("--image-folder", type=Path, metavar="DIR", help="where paths of images start (the folder of each file)")
    add("--allowed-hosts", nargs="+", default=(), metavar="HOST", help="hosts that images may be fetched from (none)")


def _add_data_command(actions: argparse._SubParsersAction, run: Callable[..., int]) -> Callable[..., Any]:
    """Add a command that reads rows; return what adds its own options."""
    add = add_command(actions, run).add_argument
    add("file", nargs="+", metavar="FILE", help="a file, a folder or a pattern in quotes")
    add("--processor", type=Path, metavar="DIR", help="processor of the weights (that of the tiny model)")
    add("--recipe", metavar="RECIPE", help="count the steps that this recipe takes")
    add("--seq-length", type=at_least(1), metavar="N", help="longest row in tokens (that of the recipe, or 8192)")
    _add_image_options(add)
    add(
        "--learned-turns", choices=("all", "last"), default="all", help="as data.learned_turns of the run (%(default)s)"
    )
    channels = ("all", "final", "final_and_thinking")
    add("--learned-channels", choices=channels, default="all", help="as data.learned_channels (%(default)s)")
    return add


def train(recipe: str, settings: Sequence[str], dry_run: bool) -> int:
    """Train by a recipe, or by several, each from the weights of the one before.

    The same command continues a run that has ended. SIGTERM, SIGUSR1, Ctrl-C and a time limit (time=4h) end it after
    the current step; it is saved then, and the exit code is 75.
    """
    from .catalog import find
    from .training import outcome, overrides, ranks
    from .training.stop_signals import EXIT_TO_BE_CONTINUED, Stopped, stopping_at_signals

    if not dry_run:
        ranks.name_ranks()
    with ranks.usage_errors_of_one_rank():
        recipes = [find(name) for name in recipe.split(",")]
        found = overrides.parse(settings)
    options = {override.key: override.value for override in found}
    out = overrides.run_folder(recipe, options)
    if dry_run:
        return _dry_run(recipes, found, options, out)
    with ranks.usage_errors_of_one_rank():
        _refuse_plan_settings(options)
    if ranks.rank() == 0:
        outcome.forget(out)  # now: another rank may fail before this one has imported Megatron
    try:
        with stopping_at_signals(), ranks.log_of_rank(out / "logs"):
            return _train(recipes, found, options, out)
    except Stopped:  # while Megatron was imported
        sentence = f"Stopped before the first step; the same command continues {out}"
        if outcome.write(outcome.file_of(out), outcome.SAVED, sentence):
            print(sentence)
        return EXIT_TO_BE_CONTINUED


def _train(recipes: Sequence[Any], found: Sequence[Any], options: dict[str, Any], out: Path) -> int:
    from .training import outcome
    from .training.run import run

    try:
        stages = _stages(recipes, found, options)
    except UserError as error:
        outcome.write(outcome.file_of(out), outcome.REFUSED, str(error))
        raise
    return run(stages, out, weights=_weights(options), seconds=options.get("time"), hang=options.get("hang"))


def check(
    file: Sequence[str],
    processor: Path | None,
    recipe: str | None,
    seq_length: int | None,
    image_folder: Path | None,
    allowed_hosts: Sequence[str],
    decode: bool,
    learned_turns: Literal["all", "last"],
    learned_channels: Literal["all", "final", "final_and_thinking"],
    max_skipped: float,
    json: Path | None,
    no_lock: bool,
) -> int:
    """Count rows, images and tokens of files, and name the rows that cannot be used.

    What was found is kept beside each file, as FILE.lock; a run takes it in place of checking again. The exit code is 1
    where more than --max-skipped of the rows of a file cannot be used, or none can.
    """
    length, rows_per_step = _lengths_of(recipe, seq_length)
    _check_image_folder(image_folder)
    if json is not None:
        from ..atomic import check_file

        check_file(json, "--json", overwrite=True)
    from .data.check import check_files, together
    from .data.printable import printable
    from .data.tokens import Learned

    found = []
    for each in check_files(
        file,
        _processor_of(processor),
        length,
        rows_per_step=rows_per_step,
        image_folder=image_folder,
        allowed_hosts=frozenset(allowed_hosts),
        decode_images=decode,
        learned_parts=Learned(learned_turns, learned_channels),
        writes_lock=not no_lock,
    ):
        print(_table(printable(each.source.title), each), flush=True)
        found.append(each)
    if json is not None:
        from ..atomic import atomic_file

        with atomic_file(json) as out:
            out.write(dumps(together(found), indent=2) + "\n")
    return 1 if any(each.share_skipped > max_skipped or not len(each.found.usable) for each in found) else 0


def show(
    file: Sequence[str],
    processor: Path | None,
    recipe: str | None,
    seq_length: int | None,
    image_folder: Path | None,
    allowed_hosts: Sequence[str],
    learned_turns: Literal["all", "last"],
    learned_channels: Literal["all", "final", "final_and_thinking"],
    out: Path | None,
    overwrite: bool,
    rows: int,
    text: bool,
) -> int:
    """Show samples as the model receives them: images, tokens, and which tokens are learned.

    They are the longest rows, the shortest, the strangest, and some that are spread evenly. A FILE.lock of `data check`
    is taken in place of checking all rows.
    """
    if text and (out is not None or overwrite):
        raise UsageError("--text prints the samples; --out and --overwrite go with the page")
    length, rows_per_step = _lengths_of(recipe, seq_length)
    _check_image_folder(image_folder)
    if out is None:
        first = Path(file[0])
        out = Path(f"{first.name.translate(dict.fromkeys(map(ord, '*?[]'), '_')) or first.resolve().name}.html")
    if not text:
        from ..atomic import check_file
        from .pages.environment import is_page_of

        check_file(out, "--out", overwrite=overwrite or is_page_of(out, "data show"))
    from .data.printable import printable
    from .data.show import show_files
    from .data.tokens import Learned

    sources = show_files(
        file,
        _processor_of(processor),
        length,
        rows_per_step=rows_per_step,
        image_folder=image_folder,
        allowed_hosts=frozenset(allowed_hosts),
        learned_parts=Learned(learned_turns, learned_channels),
        strangest=rows,
    )
    if text:
        from .data.show_text import print_text

        for source in sources:
            print(_table(printable(source.check.source.title), source.check), flush=True)
            print_text(source)
        return 0
    from ..atomic import atomic_file
    from .data.show_page import page_of

    page = page_of([*sources])
    with atomic_file(out) as written:
        written.write(page)
    print(f"The samples are in {out}; open it in a browser.")
    return 0


def convert(
    file: Sequence[str],
    to: Literal["jsonl", "webdataset"],
    out: Path,
    rows_per_shard: int,
    image_folder: Path | None,
    allowed_hosts: Sequence[str],
    max_skipped: float,
) -> int:
    """Copy rows of any format, with their images, into shards.

    Tar files are for file systems that are slow with many small files. The same command continues a conversion that was
    interrupted.
    """
    from .data import convert as conversion
    from .data.sources.opening import open_source

    _check_image_folder(image_folder)
    hosts = frozenset(allowed_hosts)
    sources = [open_source(each, image_folder=image_folder, allowed_hosts=hosts) for each in file]
    print(conversion.convert(sources, out, to, rows_per_shard=rows_per_shard, max_skipped=max_skipped))
    return 0


def _lengths_of(recipe: str | None, seq_length: int | None) -> tuple[int, int | None]:
    """The longest row in tokens, and the rows of a step, None without a recipe."""
    from .catalog import find

    chosen = None if recipe is None else find(recipe)
    length = seq_length or (chosen.seq_length if chosen else 8192)
    return length, chosen and chosen.tokens_per_step // chosen.seq_length


def _check_image_folder(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise UserError(f"--image-folder {folder} is no folder")


def _processor_of(folder: Path | None) -> Any:
    """The processor of a folder, or that of the tiny model.

    Raises:
        UserError: it is no folder; transformers would look for it on the Hub.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--processor {folder} is no folder; name that of the weights, or of a saved processor")
    from ..bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
    from .data.tiny import tiny_processor

    return tiny_processor() if folder is None else GPTOSSVisionProcessor.from_pretrained(folder)


def _dry_run(recipes: Sequence[Any], found: Sequence[Any], options: dict[str, Any], out: Path) -> int:
    from ..terminal import quiet, say

    plans = []
    with quiet(Path(os.devnull)):
        from .training.plan import disk_problems
        from .training.run import dry_run

        for name, plan in dry_run(_stages(recipes, found, options), out, weights=_weights(options)):
            say(_table(name, plan))
            plans.append(plan)
    if problems := [sentence for plan in plans for sentence in plan.problems()] + disk_problems(plans):
        raise UserError("; ".join(problems))
    return 0


def _refuse_plan_settings(options: dict[str, Any]) -> None:
    if planned := [f"{name}={options[name]}" for name in ("gpus", "gpu") if options.get(name)]:
        raise UsageError(f"{' and '.join(planned)} is for --dry-run; a run has the ranks that start it")


def _table(title: str, plan: Any) -> str:
    return "\n".join([title, *(f"  {name:<12}  {value}" for name, value in plan.lines())])


def list_recipes(recipe: str | None, settings: Sequence[str], why: bool) -> int:
    """List the recipes; or show one with its settings as a file that `train` reads, and what it costs.

    Without a name: purpose, GPUs, memory of the rank that needs most, and tokens per step of each.
    """
    from .catalog import RECIPES, find

    if recipe is None and why:
        raise UsageError("--why goes with the name of a recipe")
    if recipe is None:
        width = max(len(each.name) for each in RECIPES)
        print(f"{'recipe':<{width}}  {'GPUs':>8}  {'GiB':>6}  {'tokens/step':>11}  trains")
        for each in RECIPES:
            gpus = f"{each.gpus} {each.gpu or 'cpu'}"
            print(
                f"{each.name:<{width}}  {gpus:>8}  {each.memory_gib:>6.2f}  {each.tokens_per_step:>11,}  {each.purpose}"
            )
        return 0
    from .training import overrides

    if why:
        if settings:
            raise UsageError("--why explains the numbers of a recipe; it takes no settings")
        print(_sources(find(recipe)))
        return 0
    chosen, found = find(recipe), overrides.parse(settings)
    options = {override.key: override.value for override in found}
    if "train.epochs" in options:
        raise UsageError(
            f"train.epochs={options['train.epochs']:g} is a number of steps only with the data: "
            f"`train {chosen.name} --dry-run` counts them"
        )
    from ..terminal import quiet, say

    with quiet(Path(os.devnull)):
        from .training.plan import cost_without_data
        from .training.run import derived
        from .training.settings import settings_of, text_of

        (stage,) = _stages([chosen], found, options)
        config = derived(stage)
        say(_commented(f"train {chosen.name} @FILE reads this file"))
        say(_commented(_table("It costs:", cost_without_data(config, stage.hardware, stage.given))))
        own = {override.key: _own_value(override) for override in found if override.key in overrides.FOR_ALL_STAGES}
        say(text_of(own | settings_of(config, stage.stated), stage.recipe_settings).rstrip())
    return 0


def _own_value(override: Any) -> Any:
    """The value of a setting of the command itself, as a file has it."""
    return override.text if override.key in ("time", "hang") else override.value


def _sources(recipe: Any) -> str:
    """The hyper-parameters of a recipe, each with its source, the range of the sources, and the reason."""
    from .sources import why

    lines = [recipe.name]
    for row in why(recipe):
        lines.append(f"  {row.field}={row.value}")
        lines.append(f"    {row.source}" + (f"; elsewhere {row.range}" if row.range else "") + f"; {row.reason}")
    return "\n".join(lines)


def _commented(text: str) -> str:
    return "\n".join(f"# {line}" for line in text.splitlines())


def _weights(options: dict[str, Any]) -> Path | None:
    return Path(options["weights"]).absolute() if options.get("weights") else None


def _stages(recipes: Sequence[Any], found: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """The stages of a run: each a recipe with the settings that are for it."""
    from .catalog import ASSUMED_TFLOPS, GPUS, load, stage_names
    from .training import overrides
    from .training.run import Hardware, Stage
    from .training.settings import settings_of

    overrides.refuse_other_stages(found, [name for recipe in recipes for name in recipe.names])
    stages = []
    for number, (recipe, name) in enumerate(zip(recipes, stage_names(recipes), strict=True), start=1):
        config, mine = load(recipe), overrides.for_stage(found, recipe.names)
        recipe_settings = settings_of(config)
        overrides.apply(config, mine)
        own = {override.key: override.value for override in mine}
        if options.get("weights") or number > 1:
            overrides.refuse_architecture(mine)
        gpu = GPUS.get(options.get("gpu") or recipe.gpu or "")
        hardware = Hardware(
            ranks=options.get("gpus") or recipe.gpus,
            gpu=gpu and gpu.name,
            memory=gpu and gpu.usable_gib,
            tflops=gpu and ASSUMED_TFLOPS,
        )
        stages.append(
            Stage(
                name=name,
                config=config,
                given=frozenset(own),
                needs_weights=recipe.size != "tiny" and recipe.task != "pretrain",
                tokens=own.get("train.tokens"),
                epochs=own.get("train.epochs"),
                hardware=hardware,
                recipe=recipe.name,
                recipe_settings=recipe_settings,
            )
        )
    return stages


def quickstart(out: Path, overwrite: bool, **options: int | None) -> int:
    """Train, convert and answer on a CPU, in minutes.

    A tiny model with everything on learns to read real handwritten digits: written in Hugging Face format, trained by
    Megatron, exported, and evaluated on digits that were held out.
    """
    from .quickstart.settings import Settings

    settings = Settings(**{name: value for name, value in options.items() if value is not None})
    settings.check_layout()
    _check_folder(out, overwrite)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run on every machine
    from ..atomic import atomic_folder

    with atomic_folder(out, overwrite=out.exists()) as folder:
        try:
            report = _run_quickstart(folder, settings)
        except Exception as error:
            with suppress(OSError):  # there is no log yet, or the disk is full
                log = shutil.copy(folder / "log.txt", out.with_name(f"{out.name}.failed.log"))
                error.add_note(f"{log} holds what the libraries printed")
            raise
        _name_final_folder(folder, out)
        _keep_other_files(out, folder)
    right, wrong, without = (report[f"accuracy_{image}_image"] for image in ("right", "wrong", "no"))
    print(f"Digits named rightly: {right:.1%} with their image, {wrong:.1%} with another, {without:.1%} with none.")
    print(f"Checkpoints, pictures and report.json are in {out}.")
    return 0


def _run_quickstart(folder: Path, settings: Any) -> dict[str, Any]:
    from ..terminal import quiet

    with quiet(folder / "log.txt") as console:
        console.print("Loading torch, transformers and Megatron-Bridge")
        from .quickstart import run
    return run.run(folder, settings=settings)


def _check_files(batch: Path, out: Path, overwrite: bool) -> None:
    """Refuse files of questions and answers that cannot be read and written, before a model is loaded."""
    if not batch.is_file():
        raise FileNotFoundError(f"--batch {batch} is no file")
    if out.exists() and out.samefile(batch):
        raise FileExistsError(f"--out {out} is the file of questions; name another file")
    from ..atomic import check_file

    check_file(out, "--out", overwrite=overwrite)


def _check_folder(out: Path, overwrite: bool) -> None:
    """Refuse an `--out` that cannot be made, or that may not be replaced. Its parents are made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        held = {entry.name for entry in out.iterdir()} if os.path.lexists(out) else set()
        if not os.access(out.resolve().parent, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise type(error)(f"--out {out} cannot be written ({error.strerror}); name another folder") from error
    if Path.cwd().is_relative_to(out.resolve()):  # it would be a removed folder after the renaming
        raise FileExistsError(f"--out {out} is the working folder, or holds it; name another folder")
    if held and not overwrite:
        raise FileExistsError(
            f"--out {out} is not empty; name another folder, or replace an earlier run with --overwrite"
        )
    if held and "report.json" not in held:
        raise FileExistsError(f"--out {out} holds no report.json, so this command did not make it; name another folder")


def _name_final_folder(folder: Path, out: Path) -> None:
    """Replace the temporary name of the folder by the final one in the files that name its checkpoints."""
    for name in ("run_config.yaml", "conversion.json"):
        for file in folder.rglob(name):
            file.write_text(file.read_text().replace(str(folder), str(out.absolute())))


def _keep_other_files(out: Path, folder: Path) -> None:
    """Copy files and folders that no quickstart makes from `out` to the folder that replaces it."""
    for entry in out.iterdir() if out.is_dir() else ():
        if entry.is_dir() and not (folder / entry.name).exists():
            shutil.copytree(entry, folder / entry.name, symlinks=True)
        elif not (folder / entry.name).exists():
            shutil.copy2(entry, folder / entry.name, follow_symlinks=False)


def generate(
    model: Path,
    prompt: str | None,
    image: list[Path],
    batch: Path | None,
    out: Path | None,
    overwrite: bool,
    batch_size: int,
    int8: bool,
    **sampling: Any,
) -> int:
    """Answer a question with images, or a file of questions, by a checkpoint in Hugging Face format.

    The answer is written while it is generated. Of a model that thinks, the final channel is shown.
    """
    if batch is None and out is not None:
        raise UsageError("--out goes with --batch")
    if batch is not None and (out is None or image):
        raise UsageError("--batch needs --out for its answers, and names its images in its lines, not by --image")
    if batch is not None and out is not None:
        _check_files(batch, out, overwrite)
    from ..conversion.formats.hf_config import check_checkpoint

    check_checkpoint(model)
    from .inference import generate as recipe

    choice = recipe.Sampling(**sampling)
    loaded = recipe.load(model, int8=int8)
    if int8:
        from ..bridge.hf_int8 import describe_weights

        print(describe_weights(loaded[0]), file=sys.stderr)
    if batch is not None and out is not None:
        from .inference.batch import answer_file

        print(answer_file(*loaded, batch, out, choice, batch_size))
    elif not recipe.answer(*loaded, prompt or "", image, choice, sys.stdout):
        raise UserError(f"no answer in {choice.max_new_tokens} tokens; allow more with --max-new-tokens")
    return 0
