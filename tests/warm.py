"""A `python` for our command line that starts at once: each process is a fork of one that has imported Megatron.

Launchers start ranks by an interpreter. `python` here is a small program that takes its place: it hands its arguments,
variables and output to a server, which forks; it passes signals on to the fork, and ends with its exit code. When it is
killed, the fork and all its descendants are killed.
"""

import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from array import array
from collections.abc import Iterator
from pathlib import Path

import gpt_oss_vision
from gpt_oss_vision.recipes.launch.stand_in import signal_tree

CLIENT = """#!{python} -SEI
import array, json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
server.sendmsg([len(request).to_bytes(4)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(request)
child = int.from_bytes(server.recv(4))
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGCONT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(child, number))
code = int.from_bytes(server.recv(4), signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class WarmPython:
    """The server, a fork of this process until the context ends.

    Attributes:
        python: the program that takes the place of an interpreter.
    """

    def __init__(self, folder: Path) -> None:
        self.python, self.address = folder / "python", folder / "server"

    def __enter__(self) -> "WarmPython":
        self.python.write_text(CLIENT.format(python=sys.executable, address=str(self.address)))
        self.python.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.address))
        listener.listen(64)
        self.process = os.fork()
        if not self.process:
            try:
                _serve(listener, str(self.python))
            finally:
                os._exit(70)
        listener.close()
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.process, signal.SIGTERM)
        os.waitpid(self.process, 0)


@contextlib.contextmanager
def warm_python_with(path: Path, folder: Path) -> Iterator[Path]:
    """A program as `WarmPython.python`, whose server is an interpreter that finds the packages of a folder too."""
    paths = [path, *filter(None, [os.environ.get("PYTHONPATH")]), Path(__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    with subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, env=environment) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == READY, "the server has not started"
            yield folder / "python"
        finally:
            server.terminate()


READY = b"ready\n"


def import_all() -> None:
    """Import what a rank imports, so that forks need not."""
    gpt_oss_vision.register()
    from gpt_oss_vision.recipes import tiny  # noqa: F401
    from gpt_oss_vision.recipes.training import run  # noqa: F401


def main(folder: Path) -> None:
    """Serve until SIGTERM."""
    import_all()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with WarmPython(folder):
        os.write(1, READY)
        signal.pause()


def _serve(listener: socket.socket, python: str) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    gc.freeze()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for key, _ in selector.select():
            if selector.get_map().get(key.fd) != key:  # unregistered since the selection
                continue
            if key.fileobj is listener:
                client, _ = listener.accept()
                child = _fork(client, python)
                if child is None:
                    client.close()
                    continue
                watch = os.pidfd_open(child)
                children[watch] = child, client
                with contextlib.suppress(OSError):
                    client.sendall(child.to_bytes(4))
                selector.register(watch, selectors.EVENT_READ)
                selector.register(client, selectors.EVENT_READ, child)
            elif key.data is not None:  # the client was killed
                selector.unregister(key.fileobj)
                signal_tree(key.data, signal.SIGKILL)
            else:
                child, client = children.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                with contextlib.suppress(KeyError):  # the client was killed
                    selector.unregister(client)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                with contextlib.suppress(OSError):
                    client.sendall(code.to_bytes(4, signed=True))
                client.close()


def _fork(client: socket.socket, python: str) -> int | None:
    """A fork that runs what a client asks for; None where the client was killed before it had asked."""
    length, ancillary, _, _ = client.recvmsg(4, socket.CMSG_SPACE(12))
    if not ancillary:
        return None
    files = array("i", ancillary[0][2])
    request = client.recv(int.from_bytes(length), socket.MSG_WAITALL)
    if len(request) < int.from_bytes(length):
        for file in files:
            os.close(file)
        return None
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the server's handler is not the fork's
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    if not child:
        _run(*json.loads(request), files, python)
    for file in files:
        os.close(file)
    return child


def _run(arguments: list[str], environment: dict[str, str], folder: str, files: array, python: str) -> None:
    """Run `-m MODULE ARGUMENTS` as an interpreter does, and end."""
    code = 70
    try:
        import torch

        warnings.resetwarnings()
        os.setpgrp()
        torch.set_num_threads(1)
        os.environ.clear()
        os.environ.update(environment | {"PYTHON_EXEC": python})  # by which torchrun starts its workers
        os.chdir(folder)
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        position = arguments.index("-m")
        sys.executable = python
        sys.argv = [arguments[position + 1], *arguments[position + 2 :]]
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        runpy.run_module(arguments[position + 1], run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the server's loop must not go on in the fork
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
