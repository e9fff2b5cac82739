"""The command line: exit codes, one sentence for a failure, and no damage to the user's files."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt_oss_vision
from gpt_oss_vision.cli import attempt
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes import commands


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process."""
    return process("-m", "gpt_oss_vision.cli", *arguments, **options)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *arguments]
    return subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, **options)


def failing(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def failure(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    """The message on stderr when `error` ends a subcommand; asserts the exit code 1."""
    assert attempt(failing(error), debug=False) == 1
    return capsys.readouterr().err


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder that an earlier run made, with a note of the user in it."""
    out = tmp_path / "out"
    (out / "hf").mkdir(parents=True)
    for name in ("report.json", "note.txt", "hf/config.json"):
        (out / name).write_text("earlier")
    return out


def test_help_names_each_subcommand_and_exits_0():
    done = command("--help")
    assert done.returncode == 0
    assert {"quickstart", "doctor"} <= set(done.stdout.split())


def test_version_is_the_packages():
    assert command("--version").stdout.strip() == gpt_oss_vision.__version__


def test_help_and_wrong_usage_import_nothing_heavy():
    script = """
import json, sys
from gpt_oss_vision.cli import main
try:
    main()
except SystemExit:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    for arguments in (["--help"], ["generate", "--help"], ["quickstart", "--help"], ["quickstart", "--wrong"]):
        line = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        assert not loaded & {
            "torch",
            "transformers",
            "megatron",
            "numpy",
            "matplotlib",
            "PIL",
            "sklearn",
            "rich",
            "pydantic",
        }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["quickstrat"], "quickstrat"),
        (["quickstart", "--step", "3"], "--step"),
        (["quickstart", "--seed", "one"], "--seed"),
        (["quickstart", "--seed", "-1"], "--seed"),
        (["quickstart", "extra"], "extra"),
        (["convert", "export", "--megatron", "a", "--out", "b", "--adapter", "--text-only"], "--text-only"),
        (["convert", "export", "--megatron", "a", "--out", "b", "--adapter", "--dtype", "fp32"], "--dtype"),
    ],
)
def test_wrong_usage_is_named_and_exits_2(arguments: list[str], named: str):
    done = command(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_an_out_that_is_a_file_is_refused_in_one_sentence(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    done = command("quickstart", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "gpt-oss-vision: --out out cannot be written (Not a directory); name another folder\n"
    assert contents(tmp_path) == {"out": "mine"}


def test_an_out_below_a_file_is_refused_in_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    done = command("quickstart", "--out", "file/out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "gpt-oss-vision: --out file/out cannot be written (File exists); name another folder\n"
    assert contents(tmp_path) == {"file": "mine"}


def test_a_full_out_is_left_alone_without_overwrite(earlier: Path):
    before = contents(earlier)
    done = command("quickstart", "--out", str(earlier))
    assert done.returncode == 1
    assert done.stderr.startswith(f"gpt-oss-vision: --out {earlier} is not empty; ")
    assert contents(earlier) == before


def test_overwrite_spares_a_folder_that_no_run_made(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    done = command("quickstart", "--out", str(tmp_path), "--overwrite")
    assert done.returncode == 1
    assert "holds no report.json" in done.stderr
    assert contents(tmp_path) == {"thesis.tex": "mine"}


@pytest.fixture
def run_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs the quickstart in a folder, with `work` in place of the training."""

    def run_in(out: Path, work: Callable[[Path], None] = lambda _: None, *, overwrite: bool = False) -> int:
        def run(folder: Path, _: object) -> dict[str, float]:
            (folder / "log.txt").write_text("chatter")
            work(folder)
            (folder / "report.json").write_text("new")
            return dict.fromkeys(("accuracy_right_image", "accuracy_wrong_image", "accuracy_no_image"), 1.0)

        monkeypatch.setattr(commands, "_run_quickstart", run)
        return attempt(lambda: commands.quickstart(out, overwrite), debug=False)

    return run_in


def test_overwrite_replaces_what_a_run_makes_and_keeps_the_rest(earlier: Path, run_in: Callable[..., int]):
    def work(folder: Path) -> None:
        (folder / "hf").mkdir()
        (folder / "hf" / "new.json").write_text("new")

    (earlier / "mine").mkdir()
    (earlier / "mine" / "note.txt").write_text("mine")
    assert run_in(earlier, work, overwrite=True) == 0
    assert contents(earlier.parent) == {
        "out/hf/new.json": "new",
        "out/report.json": "new",
        "out/log.txt": "chatter",
        "out/note.txt": "earlier",
        "out/mine/note.txt": "mine",
    }


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_failed_run_leaves_its_log_and_what_was_there(
    earlier: Path,
    run_in: Callable[..., int],
    is_relative: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def work(_: Path) -> None:
        raise UserError("stop")

    before = contents(earlier)
    monkeypatch.chdir(earlier.parent)
    out = Path("out") if is_relative else earlier
    assert run_in(out, work, overwrite=True) == 1
    assert contents(earlier) == before
    log = out.with_name("out.failed.log")
    assert capsys.readouterr().err == f"gpt-oss-vision: stop ({log} holds what the libraries printed)\n"
    assert log.read_text() == "chatter"
    assert {entry.name for entry in earlier.parent.iterdir()} == {"out", "out.failed.log"}


def test_an_interrupted_run_leaves_no_new_folder(tmp_path: Path, run_in: Callable[..., int]):
    def work(_: Path) -> None:
        raise KeyboardInterrupt

    assert run_in(tmp_path / "a", work) == 130
    assert list(tmp_path.iterdir()) == []


def test_files_name_the_final_folder(tmp_path: Path, run_in: Callable[..., int]):
    def work(folder: Path) -> None:
        (folder / "megatron").mkdir()
        (folder / "megatron" / "run_config.yaml").write_text(f"save: {folder}/megatron")

    assert run_in(tmp_path / "a", work) == 0
    assert (tmp_path / "a" / "megatron" / "run_config.yaml").read_text() == f"save: {tmp_path}/a/megatron"


def test_the_working_folder_is_refused(tmp_path: Path):
    (tmp_path / "below").mkdir()
    for out in (".", ".."):
        done = command("quickstart", "--out", out, cwd=tmp_path / "below")
        assert done.returncode == 1
        assert done.stderr == (f"gpt-oss-vision: --out {out} is the working folder, or holds it; name another folder\n")


def test_a_layout_that_cannot_work_is_refused_before_anything_is_imported_or_written(tmp_path: Path):
    script = """
import sys
from gpt_oss_vision.cli import main
assert main(["quickstart", "--out", sys.argv[1], "--tensor-parallel", "4"]) == 1
assert not {"torch", "numpy"} & sys.modules.keys()
"""
    line = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stderr == (
        "gpt-oss-vision: tensor_model_parallel_size=4 does not divide the 2 key/value groups of this model.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def without_a_name() -> dict[str, Any]:
    """Options of a process whose user has a number and no name, as in many containers; skips if that is denied."""
    uid = os.getuid()

    def lose_the_name() -> None:
        os.unshare(os.CLONE_NEWUSER)
        Path("/proc/self/uid_map").write_text(f"12345 {uid} 1")

    names = ("USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR")  # the last is set by torch.compile
    options = {
        "preexec_fn": lose_the_name,
        "env": {name: value for name, value in os.environ.items() if name not in names} | {"HOME": "/nonexistent"},
    }
    try:
        process("-c", "", **options)
    except subprocess.SubprocessError:
        pytest.skip("This user may not make a namespace here")
    return options


def test_a_user_without_a_name_can_run_every_command(without_a_name: dict[str, Any], tmp_path: Path):
    done = command("convert", "export", "--megatron", "nothing", "--out", "out", cwd=tmp_path, **without_a_name)
    assert done.stderr == (
        f"gpt-oss-vision: {tmp_path}/nothing is not a folder; name the folder of a Megatron checkpoint\n"
    )


@pytest.mark.upstream
def test_torch_still_fails_for_a_user_without_a_name(without_a_name: dict[str, Any]):
    """When this fails, `cli._name_the_user` can be removed."""
    done = process("-c", "import torch._inductor.config; import transformers.modeling_utils", **without_a_name)
    assert done.returncode == 1 and "uid not found: 12345" in done.stderr


@pytest.mark.parametrize("kind", [UserError, OSError])
def test_a_user_error_prints_its_message_alone(kind: type[Exception], capsys: pytest.CaptureFixture[str]):
    assert failure(kind("2 images need 516 tokens;\n  make room"), capsys) == (
        "gpt-oss-vision: 2 images need 516 tokens; make room\n"
    )


def test_an_error_of_the_system_names_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = tmp_path / "missing.json"
    with pytest.raises(FileNotFoundError) as caught:
        missing.read_text()
    assert failure(caught.value, capsys) == f"gpt-oss-vision: No such file or directory: {missing}\n"
    copied = OSError(errno.ENOSPC, "No space left on device", "source", None, "target")
    assert failure(copied, capsys) == "gpt-oss-vision: No space left on device: source -> target\n"


@pytest.mark.parametrize("kind", [KeyError, ValueError, ImportError])
def test_any_other_exception_is_called_a_bug(kind: type[Exception], capsys: pytest.CaptureFixture[str]):
    bug = f"{kind.__name__}: {kind('sinks')} (a bug in gpt-oss-vision; run again with --debug to see where)"
    assert failure(kind("sinks"), capsys) == f"gpt-oss-vision: {bug}\n"


def test_out_of_memory_is_no_bug_and_comes_with_advice(capsys: pytest.CaptureFixture[str]):
    advice = "use fewer --jobs, a smaller --batch-size, --int8, or a machine with more"
    assert failure(MemoryError(), capsys) == f"gpt-oss-vision: out of host memory: no message; {advice}\n"
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert failure(gpu, capsys).startswith("gpt-oss-vision: out of GPU memory: CUDA out of memory. Tried")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert failure(caught.value, capsys).startswith("gpt-oss-vision: out of host memory: ")


@pytest.mark.parametrize("error", [UserError("yours"), KeyError("ours")])
def test_debug_lets_the_traceback_through(error: Exception):
    with pytest.raises(type(error)):
        attempt(failing(error), debug=True)


def test_an_interrupt_exits_with_130_and_no_explanation(capsys: pytest.CaptureFixture[str]):
    assert attempt(failing(KeyboardInterrupt()), debug=False) == 130
    assert capsys.readouterr().err == "gpt-oss-vision: interrupted\n"


def test_debug_shows_the_traceback(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    done = command("quickstart", "--out", "out", "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "NotADirectoryError" in done.stderr
