"""What the commands share: option types, reading text, worker processes, and writing output.

A command deletes or overwrites only files that it wrote itself, unless the user gives --overwrite.
"""

import argparse
import ast
import codecs
import contextlib
import errno
import os
import signal
import tempfile
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import IO, Any, Callable, Deque, Iterable, Iterator, List, Optional, Tuple, TypeVar

SNIFF = 8000  # bytes read from a file to tell its encoding
BLOCK = 1000  # items handed to a process at a time
PART = ".evolving-attention-"  # prefix of the temporary folders that hold unfinished output


Item = TypeVar("Item")
Result = TypeVar("Result")


class DataError(Exception):
    """The input cannot be used; the message says where, and what would be right."""


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def name_value(text: str) -> Tuple[str, Any]:
    """An argparse type: NAME=VALUE, where VALUE is a Python literal or else a string."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def text_lines(stream: IO[bytes], name: object) -> Iterator[str]:
    """The lines of UTF-8 text, without their \\n and without a byte-order mark.

    Only \\n ends a line: the other breaks that str.splitlines knows occur inside sentences, and
    splitting there would shift one side of a corpus against the other.

    Raises:
        DataError: the text is not UTF-8; the message begins with `name`.
    """
    head = stream.read(SNIFF)
    stream.seek(0)
    if encoding := wide_encoding(head):
        raise DataError(
            f"{name}: {encoding} text; convert the file to UTF-8 (iconv -f {encoding} -t UTF-8)"
        )
    if b"\0" in head:
        number = head[: head.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{name}: line {number}: a binary file, not UTF-8 text")
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.removesuffix(b"\n").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not "
                "UTF-8; convert the file (iconv -f ISO-8859-1 -t UTF-8) or, if only a few lines "
                "are bad, drop those bytes (iconv -c -f UTF-8 -t UTF-8)"
            ) from None


def wide_encoding(head: bytes) -> Optional[str]:
    """UTF-16 or UTF-32 if the text is in it, told by its byte-order mark or by its zero bytes."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zeros = head[::2].count(0), head[1::2].count(0)
    if len(head) % 2 == 0 and max(zeros) > len(head) // 50 and min(zeros) == 0:
        return "UTF-16BE" if zeros[0] else "UTF-16LE"
    return None


def in_processes(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Applies a function to the items in `workers` processes and yields the results in order.

    Each process calls `make()` once to get the function. Only a few blocks of items are in memory
    at a time. DataError if a process is killed."""
    if workers == 1:
        yield from map(make(), items)
        return
    rest = iter(items)
    pending: Deque[Future[List[Result]]] = deque()
    try:
        with ProcessPoolExecutor(workers, initializer=_begin, initargs=(make,)) as pool:
            for block in iter(lambda: list(islice(rest, BLOCK)), []):
                pending.append(pool.submit(_work, block))
                if len(pending) > 4 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        message = "a worker process was killed, perhaps for lack of memory; try fewer --workers"
        raise DataError(message) from None


_function: Callable[[Any], Any]  # of a worker process


def _begin(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports Ctrl-C
    _function = make()


def _work(block: List[Any]) -> List[Any]:
    return [_function(item) for item in block]


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace output files that already exist"
    )


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raises OSError with the remedy unless `path` can be written without losing a file.

    With `overwrite`, an existing file is fine; devices and pipes always are."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    is_file = path.is_file() or path.is_symlink()
    if is_file and not overwrite:
        raise FileExistsError(f"{path} already exists; choose another name, or add --overwrite")
    if is_file and not path.exists():
        raise FileNotFoundError(f"{path} is a link to nothing; remove it, or choose another name")
    if (is_file or not path.exists()) and not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} cannot be written to")


@contextlib.contextmanager
def whole_or_not_at_all(
    path: Path, overwrite: bool = False, within: Optional[Path] = None
) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, and moves that to `path` if there is no error.

    Args:
        overwrite: whether a file at `path` may be replaced; a folder never is.
        within: folder for the unfinished output, on the same file system; default: that of `path`.

    Raises:
        OSError: `path` exists when the output is finished; or its folder does not exist.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path  # a device or a pipe
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_file() and overwrite:
        path = path.resolve()  # replaces the file that a link points to, not the link
    with tempfile.TemporaryDirectory(prefix=PART, dir=within or path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        if os.path.lexists(path) and not (path.is_file() and overwrite):
            raise FileExistsError(f"{path} already exists; move it, or choose another name")
        os.replace(part, path)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks `folder` by its file .lock, so that two runs do not write to it at once. The system
    releases the lock when the process ends, however it ends. DataError if another run holds it."""
    import fcntl  # not on Windows, where the other functions are needed too

    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise DataError(
                    f"another run is using {folder}; wait until it ends, or give another folder"
                ) from None
            # otherwise the file system has no locks
        yield


def check_data_path(path: Path) -> None:
    """DataError if fairseq would read `path` as several paths."""
    if os.pathsep in str(path):
        raise DataError(f"{path}: fairseq splits paths at {os.pathsep!r}; choose a name without it")
