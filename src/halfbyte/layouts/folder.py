"""The output folder: `NAME.unfinished` with a journal while the run lasts, `NAME` from the moment it is complete.

Every file is written beside its place, flushed to the disk and renamed; the journal names what is finished, with its
hash. So a run that is killed at any moment leaves a folder from which it can go on, and never one that looks complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from halfbyte.errors import OutputError

JOURNAL = "journal.json"
LOCK = "run.lock"
SLACK = 64 * 2**20  # room for tokenizer, report and journal


class OutputFolder:
    """One run's output. Use as a context manager; leave it with `complete()` or the run stays resumable."""

    def __init__(
        self, output: Path, fingerprint: Mapping[str, Any], *, size: int, resume: bool, overwrite: bool
    ) -> None:
        """Open a new run, or an unfinished one to `resume`.

        `fingerprint`: what decides the result; a run only goes on where it is the same. `size`: bytes still to come.
        OutputError where the folder is in the way, belongs to another run, cannot be written or does not fit the disk.
        """
        self.output, self.overwrite = output, overwrite
        self.folder = output.with_name(output.name + ".unfinished")
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.finished: dict[str, dict[str, Any]] = {}
        if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output} exists already: choose another --output, or give --overwrite to replace it")
        if overwrite and output.exists() and not _replaceable(output):
            raise OutputError(
                f"{output} is not a checkpoint (it has no config.json), so it is not deleted: move it away"
            )
        if self.folder.exists() and not (resume or overwrite):
            raise OutputError(
                f"{self.folder} holds an unfinished run: go on with --resume, or give --overwrite to start anew"
            )
        try:
            if self.folder.exists() and not resume:
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as cause:
            raise OutputError(
                f"another run is writing to {self.folder}: wait for it, or choose another --output"
            ) from cause
        except OSError as cause:
            raise OutputError(f"{self.folder} cannot be written ({cause.strerror}): choose another --output") from cause
        self._read_journal()
        self._check_room(size)
        self._writer = ThreadPoolExecutor(max_workers=1)  # one: the journal must name files in order
        self._pending: list[Future[None]] = []

    def _read_journal(self) -> None:
        path = self.folder / JOURNAL
        if not path.is_file():
            return
        journal = json.loads(path.read_text())
        if journal["fingerprint"] != self.fingerprint:
            different = [key for key in self.fingerprint if journal["fingerprint"].get(key) != self.fingerprint[key]]
            raise OutputError(
                f"{self.folder} was begun with another {', '.join(different)}: go on with the same as then, or give "
                "--overwrite to start anew"
            )
        for name, entry in journal["finished"].items():
            file = self.folder / name
            if not file.is_file() or sha256(file) != entry["sha256"]:
                break  # what comes after depends on it
            self.finished[name] = entry

    def _check_room(self, size: int) -> None:
        done = sum((self.folder / name).stat().st_size for name in self.finished)
        free, needed = shutil.disk_usage(self.folder).free, size - done + SLACK
        if free < needed:
            raise OutputError(
                f"the checkpoint needs {needed / 1e9:.1f} GB and {self.folder.parent} has {free / 1e9:.1f} GB free: make "
                "room, or choose an --output on another disk"
            )

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Queue a safetensors file and its record for the journal; an earlier failure to write is raised here."""
        self._raise_failures()
        data = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._pending.append(self._writer.submit(self._write, name, data, record))

    def _write(self, name: str, tensors: dict[str, Tensor], record: Any) -> None:
        content = save(tensors, metadata={"format": "pt"})
        digest = hashlib.sha256(content).hexdigest()
        self._replace(name, content)
        self.finished[name] = {"sha256": digest, "size": len(content), "tensors": list(tensors), "record": record}
        self._replace(JOURNAL, json.dumps({"fingerprint": self.fingerprint, "finished": self.finished}).encode())

    def _replace(self, name: str, content: bytes) -> None:
        place, beside = self.folder / name, self.folder / (name + ".part")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(place)
        except (OSError, SafetensorError) as cause:
            beside.unlink(missing_ok=True)
            raise OutputError(
                f"{place} could not be written ({cause}): make room or mend the disk, then go on with --resume; "
                f"{len(self.finished)} finished files are kept"
            ) from cause

    def write_text(self, name: str, text: str) -> None:
        """Write a small file now."""
        self._replace(name, text.encode())

    def copy(self, source: Path) -> None:
        """Take over a file of the source model as it is."""
        self._replace(source.name, source.read_bytes())

    def _raise_failures(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def flush(self) -> None:
        """Wait until everything queued is on the disk."""
        while self._pending:
            self._pending.pop(0).result()

    def complete(self) -> Path:
        """Make the folder appear under its name, in place of an old one with `overwrite`."""
        self.flush()
        old = self.output.with_name(self.output.name + ".replaced")
        if self.output.exists():
            self.output.rename(old)
        self.folder.rename(self.output)
        self._lock.release()
        for name in (JOURNAL, LOCK):
            (self.output / name).unlink(missing_ok=True)
        if old.exists():
            shutil.rmtree(old)
        return self.output

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown(wait=True)
        self._lock.release()


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / "config.json").is_file() or not any(path.iterdir()))


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
