"""A real SLURM of two nodes on this machine: Debian's munged, slurmctld and two slurmd, with ports of their own."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from gpt_oss_vision.recipes.launch.stand_in import tree_of

ACCOUNTING = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db")
DAEMONS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SECONDS = 120.0

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=20
MpiDefault=none
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=normal Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 MaxTime=2:00:00 State=UP
"""


ACCOUNTING_CONFIGURATION = """
AuthType=auth/munge
AuthInfo={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[0]}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[1]}
StorageUser=slurm
StoragePass=slurm
"""


def missing(*, accounting: bool = False) -> list[str]:
    """The programs that this machine lacks."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in DAEMONS + ACCOUNTING * accounting if shutil.which(name, path=path) is None]


class Cluster:
    """The running daemons, until the context ends.

    Args:
        accounting: keep accounts of jobs, which `sacct` reads: slurmdbd, with a MariaDB of its own.

    Attributes:
        configuration: for the variable SLURM_CONF, by which SLURM's commands find this cluster.
    """

    def __init__(self, folder: Path, *, accounting: bool = False) -> None:
        self.accounting = accounting
        self.folder, self.configuration = folder, folder / "slurm.conf"

    def __enter__(self) -> "Cluster":
        self.environment = {name: os.environ.get(name) for name in ("PATH", "SLURM_CONF")}
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        os.environ["SLURM_CONF"] = str(self.configuration)
        for name in ("munge", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(parents=True)
        self.configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname(), ports=_free_ports(3), folder=self.folder, user=_output("id", "-un").strip()
            )
        )
        self._start_munge()
        if self.accounting:
            self._start_accounting()
        subprocess.run(["slurmctld", "-f", self.configuration], check=True)
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_until(lambda: _output("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"])
        return self

    def __exit__(self, *_: object) -> None:
        user = _output("id", "-un").strip()
        for options in ((), ("--signal=KILL",)):
            subprocess.run(["scancel", *options, "--user", user], stderr=subprocess.DEVNULL)
        for file in (*self.folder.glob("*.pid"), self.folder / "munge/pid"):
            with suppress(ProcessLookupError, FileNotFoundError, ValueError):
                process = int(file.read_text())
                os.kill(process, signal.SIGTERM)
                end = time.monotonic() + 5
                while Path(f"/proc/{process}").exists() and time.monotonic() < end:
                    time.sleep(0.01)
                os.kill(process, signal.SIGKILL)
        if self.accounting:
            self.database.wait()
        for name, value in self.environment.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        subprocess.run(["mungekey", "--create", f"--keyfile={folder / 'key'}"], check=True)
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        subprocess.run(["munged", "--force", *options], check=True, stderr=subprocess.DEVNULL)

    def _start_accounting(self) -> None:
        user, ports, data = _output("id", "-un").strip(), _free_ports(2), self.folder / "database"
        database = ["--no-defaults", f"--user={user}", f"--datadir={data}"]
        subprocess.run(
            ["mariadb-install-db", *database], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        statements = self.folder / "statements.sql"
        statements.write_text(
            "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\nGRANT ALL ON *.* TO slurm@'127.0.0.1';\n"
        )
        files = {
            "socket": "mysql.sock",
            "pid-file": "mariadbd.pid",
            "log-error": "mariadbd.log",
            "init-file": statements.name,
        }
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        network = (f"--port={ports[1]}", "--bind-address=127.0.0.1", "--skip-name-resolve")
        self.database = subprocess.Popen(["mariadbd", *database, *options, *network], stderr=subprocess.DEVNULL)
        configuration = self.folder / "slurmdbd.conf"
        configuration.write_text(ACCOUNTING_CONFIGURATION.format(folder=self.folder, user=user, ports=ports))
        configuration.chmod(0o600)
        with self.configuration.open("a") as file:
            file.write(
                "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
                f"AccountingStoragePort={ports[0]}\nAccountingStoragePass={self.folder}/munge/socket\nJobAcctGatherType=jobacct_gather/none\n"
            )
        self.wait_until(lambda: (self.folder / "mariadbd.pid").exists())
        environment = os.environ | {"SLURM_CONF": str(self.configuration)}
        subprocess.run(["slurmdbd"], env=environment, check=True)
        self.wait_until(
            lambda: subprocess.run(["sacctmgr", "-n", "list", "cluster"], capture_output=True).returncode == 0
        )
        for words in ("cluster test", "account team", f"user {user} account=team"):
            subprocess.run(["sacctmgr", "-i", "add", *words.split()], check=True, stdout=subprocess.DEVNULL)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        subprocess.run(["slurmd", "-f", self.configuration, "-N", node], check=True)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and all that runs there."""
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        for process in _steps_of(node):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` prints."""
        return dict(re.findall(r"(\w+)=(\S*)", _output("scontrol", "show", "job", "--oneliner", str(number))))

    def wait_for(self, number: int, *states: str) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        self.wait_until(lambda: self.job(number)["JobState"] in states)
        return self.job(number)

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait for an event."""
        end = time.monotonic() + SECONDS
        while not is_reached():
            assert time.monotonic() < end, _output("scontrol", "show", "job") + _output("sinfo", "-R")
            time.sleep(0.1)


def _steps_of(node: str) -> set[int]:
    """The slurmstepd of a node, and their descendants."""
    roots = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"slurmstepd" in (folder / "cmdline").read_bytes() and _is_on(folder, node):
                roots.add(int(folder.name))
    return tree_of(roots)


def _is_on(folder: Path, node: str) -> bool:
    return f"SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
