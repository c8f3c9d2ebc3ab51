"""A folder on a file system of a process (FUSE) whose reads are slow: so long before the first byte, so many bytes a
second. It needs no library: this module speaks the kernel's protocol. Root may mount it where /dev/fuse exists.

    python -m tests.support.slow_folder SOURCE MOUNT LATENCY_MS MB_S [shared]

Serves the files of SOURCE (one level) until the folder is unmounted. Each read takes its latency and its bytes by
itself, as on a network; with "shared" all reads share the bytes a second, as on a disk.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "fuse.slowtest"
BUFFER_BYTES = 2**17 + 4096
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, BATCH_FORGET = 25, 26, 27, 28, 29, 34, 42
HEADER = struct.Struct("<IIQQIIII")  # length, opcode, request, node, user, group, process, padding
READERS = 12  # threads, as many as the kernel has pending requests
VALID_S = 3600
ROOT_NODE = 1


class NoSlowFolder(Exception):
    """The folder cannot be mounted here; the text says why."""


class Server:
    """Answers the kernel's requests for the files of a folder."""

    def __init__(self, source: Path, device: int, latency_s: float, bytes_s: float, shared: bool) -> None:
        self.device, self.latency_s, self.bytes_s, self.shared = device, latency_s, bytes_s, shared
        self.names = sorted(path.name for path in source.iterdir() if path.is_file())
        self.files = [os.open(source / name, os.O_RDONLY) for name in self.names]
        self.stats = [os.stat(source), *(os.fstat(file) for file in self.files)]
        self.free_s, self.lock = 0.0, threading.Lock()

    def serve(self) -> None:
        """Answers requests until the folder is unmounted, in several threads."""
        threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(READERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _loop(self) -> None:
        while True:
            try:
                request = os.read(self.device, BUFFER_BYTES)
            except OSError as error:
                if error.errno == 19:  # ENODEV: unmounted
                    return
                continue
            length, opcode, unique, node, *_ = HEADER.unpack_from(request)
            body = request[HEADER.size : length]
            if opcode in (FORGET, BATCH_FORGET):
                continue
            code, answer = self._answer(opcode, node, body)
            with suppress(OSError):
                os.write(self.device, struct.pack("<IiQ", 16 + len(answer), -code, unique) + answer)

    def _answer(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        match opcode:
            case 26:  # INIT: version 7.31, reads of 128 KiB, asynchronous
                _, minor, readahead, flags = struct.unpack_from("<IIII", body)
                return 0, struct.pack("<IIIIHHIIHH32x", 7, min(minor, 31), readahead, flags & 1, 12, 9, 4096, 1, 32, 0)
            case 1:  # LOOKUP
                name = body.rstrip(b"\0").decode()
                if name not in self.names:
                    return 2, b""
                found = self.names.index(name) + 2
                return 0, struct.pack("<QQQQII", found, 0, VALID_S, VALID_S, 0, 0) + self._attributes(found)
            case 3:  # GETATTR
                return 0, struct.pack("<QII", VALID_S, 0, 0) + self._attributes(node)
            case 14 | 27:  # OPEN, OPENDIR; 2: keep the page cache
                return 0, struct.pack("<QII", 0, 2 if opcode == OPEN else 0, 0)
            case 15:  # READ
                _, offset, size = struct.unpack_from("<QQI", body)
                data = os.pread(self.files[node - 2], size, offset)
                self._wait(len(data))
                return 0, data
            case 28:  # READDIR
                _, offset, size = struct.unpack_from("<QQI", body)
                return 0, self._entries(offset, size)
            case 17:  # STATFS
                return 0, struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
            case 18 | 25 | 29 | 34:
                return 0, b""
        return 38, b""  # ENOSYS

    def _wait(self, size: int) -> None:
        """The time that a read of so many bytes takes."""
        if not self.shared:
            time.sleep(self.latency_s + size / self.bytes_s)
            return
        with self.lock:
            now_s = time.monotonic()
            self.free_s = max(now_s, self.free_s) + size / self.bytes_s
            until_s = self.free_s
        time.sleep(max(0.0, until_s - now_s) + self.latency_s)

    def _attributes(self, node: int) -> bytes:
        of = self.stats[node - 1]
        seconds, rest_ns = divmod(of.st_mtime_ns, 10**9)
        sizes = (node, of.st_size, -(-of.st_size // 512), seconds, seconds, seconds)
        return struct.pack("<QQQQQQIIIIIIIIII", *sizes, 0, rest_ns, 0, of.st_mode, 1, of.st_uid, of.st_gid, 0, 4096, 0)

    def _entries(self, offset: int, size: int) -> bytes:
        listed, answer = [(1, "."), (1, ".."), *((n + 2, name) for n, name in enumerate(self.names))], b""
        for place, (node, name) in enumerate(listed):
            raw = name.encode()
            entry = struct.pack("<QQII", node, place + 1, len(raw), stat.S_IFREG >> 12) + raw
            entry += bytes(-len(entry) % 8)
            if place >= offset and len(answer) + len(entry) <= size:
                answer += entry
        return answer


def main() -> None:
    """Mounts and serves."""
    source, mount, latency_ms, mb_s, *shared = sys.argv[1:]
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40755,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"slow", mount.encode(), NAME.encode(), 0, options.encode()):
        sys.exit(os.strerror(ctypes.get_errno()))
    print("mounted", flush=True)
    Server(Path(source), device, float(latency_ms) / 1000, 1e6 * float(mb_s), bool(shared)).serve()


@contextmanager
def slow_folder(source: Path, mount: Path, latency_ms: float, mb_s: float, shared: bool = False) -> Iterator[Path]:
    """Mounts `source` as a slow folder at `mount`, served by a process of its own.

    Raises:
        NoSlowFolder: the machine does not allow it.
    """
    if not Path("/dev/fuse").exists() or os.geteuid():
        raise NoSlowFolder("mounting a FUSE folder requires /dev/fuse and root")
    mount.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.support.slow_folder", source, mount, latency_ms, mb_s, *["shared"] * shared]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        if not server.stdout.readline():
            raise NoSlowFolder(f"the FUSE folder could not be mounted: {server.stderr.read().strip()}")
        try:
            yield mount
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=False)
            server.kill()


if __name__ == "__main__":
    main()
