"""Where checkpoints lie: a directory of a file system, or a prefix of an object store behind fsspec.

Object stores cannot rename. So a checkpoint is written in its final place, and it exists from the moment
its marker is written, last and in one piece.
"""

import hashlib
import io
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.files import write_whole

_READ_BYTES = 16 << 20


class Store:
    """One directory, local or remote; names are relative to it."""

    def __init__(self, location: str) -> None:
        """Opens a location, which need not exist.

        Args:
            location: a path, or a URL such as `s3://bucket/run-7`.

        Raises:
            ConfigError: a URL of a kind that is not known, or whose package is not installed.
        """
        self.location = location.rstrip("/")
        try:
            self._fs, self._root = url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{location}: {error}; name a path, or a URL that fsspec can open here"
            ) from error
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The whole path or URL of a name."""
        return f"{self.location}/{name}"

    def directories(self) -> list[str]:
        """Names of the directories here; none where nothing was written yet."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return [_last(entry["name"]) for entry in entries if entry["type"] == "directory"]

    def exists(self, name: str) -> bool:
        """Whether there is a file or directory of that name."""
        self._fs.invalidate_cache()
        try:
            self._fs.info(self._inner(name))  # `exists` says no as well where it could not look
        except FileNotFoundError:
            return False
        return True

    def read_text(self, name: str) -> str:
        """Content of a text file."""
        content: bytes = self._fs.cat_file(self._inner(name))
        return content.decode("utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file in one piece: a reader sees the old content or the new one."""
        if self._is_local:
            write_whole(Path(self._inner(name)), text)
        else:
            self._fs.pipe_file(self._inner(name), text.encode("utf-8"))

    def make(self, name: str) -> None:
        """Makes a directory, where the file system has any."""
        self._fs.makedirs(self._inner(name), exist_ok=True)

    def remove_file(self, name: str) -> None:
        """Removes a file, if it is there."""
        if self.exists(name):
            self._fs.rm_file(self._inner(name))

    def remove_directory(self, name: str) -> None:
        """Removes a directory and what is in it, if it is there."""
        if self.exists(name):
            self._fs.rm(self._inner(name), recursive=True)

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        self._fs.invalidate_cache()
        return int(self._fs.size(self._inner(name)))

    def sha256(self, name: str) -> str:
        """Digest of a file's content, read in pieces."""
        digest = hashlib.sha256()
        with self._fs.open(self._inner(name), "rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def writer(self, name: str) -> "DigestingWriter":
        """What DCP writes the shards of a checkpoint to a directory here with."""
        return DigestingWriter(self.path(name), sync=self._is_local)

    def reader(self) -> FsspecReader:
        """What DCP reads the shards of the checkpoint here with."""
        return FsspecReader(self.location)

    def _inner(self, name: str) -> str:
        return f"{self._root}/{name}"


class DigestingWriter(FsspecWriter):
    """Writes a rank's shards and notes size and SHA-256 of every file as it is written."""

    def __init__(self, location: str, *, sync: bool) -> None:
        # Copying ahead is for tensors of a device, and would use the first one of the host from every rank.
        super().__init__(location, sync_files=sync, per_thread_copy_ahead=0)
        self.files: dict[str, dict[str, Any]] = {}
        """By name: `bytes` and `sha256` of what this rank wrote."""
        self.fs = _DigestingFileSystem(self.files)  # type: ignore[assignment]  # as in the base class
        self.path = self.fs.init_path(location)


class _DigestingFileSystem(FileSystem):
    def __init__(self, files: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self._files = files

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            digesting = _DigestingStream(stream)
            try:
                yield digesting
            except RuntimeError as error:
                # torch.save ends its archive on the way out; that this fails too would hide why.
                raise (digesting.failure or error) from None
            self._files[_last(os.fspath(path))] = digesting.description()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self._files[_last(os.fspath(new_path))] = self._files.pop(_last(os.fspath(path)))


class _DigestingStream(io.RawIOBase):
    """Passes what is written on, and digests it on the way."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.failure: OSError | None = None

    def write(self, block: Any) -> int:
        try:
            self._stream.write(block)
        except OSError as error:
            self.failure = error
            raise
        self._digest.update(block)
        self._bytes += memoryview(block).nbytes
        return memoryview(block).nbytes

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        self.flush()  # who asks is about to sync it to the disk
        number: int = self._stream.fileno()
        return number

    def close(self) -> None:
        self._stream.close()

    def description(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def damaged_files(store: Store, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with the files of a directory, one line each.

    Args:
        store: the directory.
        files: `bytes` and `sha256` of those to check.
    """
    for file, expected in files.items():
        try:
            found = store.size(file)
            if found != expected["bytes"]:
                yield f"{file} has {found:,} of {expected['bytes']:,} bytes"
            elif store.sha256(file) != expected["sha256"]:
                yield f"{file} was changed: its checksum does not fit"
        except Exception as error:  # stores have errors of their own
            yield f"{file} cannot be read: {error}"
