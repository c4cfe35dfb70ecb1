"""A command watched from outside: what it asks of the network, and which files it makes.

`strace` follows the command and all its children. A look-up is any address that is not the
loopback interface, and the reading of the resolver's configuration, with which each begins.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CALLS = (
    "network,open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2,symlink,symlinkat,"
    "link,linkat,mknod,mknodat,truncate"
)
_LONGEST_SECONDS = 600
_ADDRESS = re.compile(r'sin6?_addr=[^"]*"(?P<host>[^"]+)"|inet_pton\(AF_INET6, "(?P<six>[^"]+)"')
_PORT = re.compile(r"sin6?_port=htons\((\d+)\)")
_UNIX = re.compile(r'sun_path=@?"([^"]*)"')
_PATHS = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_RESOLVER = {"/etc/resolv.conf", "/etc/hosts", "/etc/host.conf"}
# glibc asks the name-service cache on this machine for users and for hosts alike
_LOCAL_SOCKETS = ("/var/run/nscd/socket",)
_MAKES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_TMPFILE")


@dataclass(frozen=True)
class Watched:
    """What one command did.

    lookups:  addresses and resolver files it asked for, loopback aside.
    loopback: ports of this machine's own loopback interface that it connected to.
    made:     paths that it opened for writing, made, linked or renamed to.
    """

    returncode: int
    stdout: str
    stderr: str
    lookups: tuple[str, ...]
    loopback: tuple[int, ...]
    made: tuple[Path, ...]

    def made_beyond(self, *folders: Path) -> list[str]:
        """Return what it made outside `folders`, /dev and /proc."""
        inside = [*(folder.resolve() for folder in folders), Path("/dev"), Path("/proc")]
        beyond = {
            str(path)
            for path in self.made
            if not any(path == each or each in path.parents for each in inside)
        }
        return sorted(beyond)


def watched(
    command: Sequence[str | Path], *, cwd: Path, environment: dict[str, str], traces: Path
) -> Watched:
    """Run a command under strace; `traces` is an empty folder for one file per thread."""
    strace = [
        "strace",
        "-ff",
        "-y",
        "-qq",
        "-s",
        "400",
        "-e",
        "signal=none",
        "-e",
        f"trace={_CALLS}",
    ]
    process = subprocess.Popen(
        [*strace, "-o", str(traces / "t"), *(str(part) for part in command)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=_LONGEST_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # what strace followed outlives strace
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for trace in sorted(traces.iterdir()) for line in _lines(trace)]
    asked = [each for line in lines for each in _addresses(line)]
    resolver = {path for line in lines for path in _RESOLVER if f'"{path}"' in line}
    return Watched(
        process.returncode,
        stdout,
        stderr,
        tuple(sorted({*(a for a, port in asked if port is None), *resolver})),
        tuple(sorted({port for _, port in asked if port is not None})),
        tuple(sorted({path for line in lines for path in _made(line, cwd)})),
    )


def _lines(trace: Path) -> list[str]:
    return trace.read_text(encoding="utf-8", errors="replace").splitlines()


def _addresses(line: str) -> Iterator[tuple[str, int | None]]:
    """(address, None) of what lies beyond this machine; (address, port) of its loopback."""
    if not line.startswith(("connect(", "sendto(", "sendmsg(", "sendmmsg(")):
        return
    local = _UNIX.search(line)
    if local and local.group(1) not in _LOCAL_SOCKETS:
        yield local.group(1), None
    found = _ADDRESS.search(line)
    if found:
        host = found.group("host") or found.group("six")
        port = _PORT.search(line)
        on_loopback = host.startswith("127.") or host == "::1"
        yield host, int(port.group(1)) if on_loopback and port else None


def _made(line: str, cwd: Path) -> Iterator[Path]:
    """The paths that a call makes or opens for writing; calls that failed count too."""
    name, _, rest = line.partition("(")
    paths = [(folder, path) for folder, path in _PATHS.findall(rest.rpartition(") = ")[0])]
    if name.startswith("open"):
        paths = paths[:1] if _MAKES.search(rest) else []
    elif name.startswith(("rename", "link", "symlink")):
        paths = paths[-1:]
    elif not name.startswith(("creat", "mkdir", "mknod", "truncate")):
        paths = []
    for folder, path in paths:
        yield Path(os.path.normpath(Path(folder or cwd) / path))
