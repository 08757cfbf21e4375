"""Shared parts of the commands: option types, and outputs that leave the user's files alone."""

import argparse
import io
import os
import re
import subprocess
from pathlib import Path

import pytest

from evolving_attention.commands import (
    DataError,
    check_output,
    name_value,
    positive,
    text_lines,
    whole_or_not_at_all,
)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1e3", "²"])
def test_what_counts_is_positive(text):
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="whole number of at least 1, got"):
        positive(text)


def test_options_with_values():
    assert name_value("a=0.5") == ("a", 0.5)
    assert name_value("size=(1, 2)") == ("size", (1, 2))
    assert name_value("name=x=y") == ("name", "x=y")
    with pytest.raises(argparse.ArgumentTypeError, match="must be NAME=VALUE, got 'alpha'"):
        name_value("alpha")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["Ein Mann.\nZwei Männer.\n", "Я 你\n" * 99])
def test_wide_text_is_named_and_iconv_reads_it_so(encoding, text):
    data = text.encode(encoding)
    with pytest.raises(DataError, match=r"x.txt: UTF-.* text; convert .*\(iconv -f ") as error:
        list(text_lines(io.BytesIO(data), "x.txt"))
    command = re.search(r"\((.*)\)", str(error.value))[1].split()
    assert subprocess.run(command, input=data, capture_output=True).stdout.decode() == text


def test_text():
    data = b"\xef\xbb\xbfa\r\n\nb\xe2\x80\xa8c\x0cd"
    assert list(text_lines(io.BytesIO(data), "x")) == ["a\r", "", "b\u2028c\x0cd"]
    assert list(text_lines(io.BytesIO(b""), "x")) == []
    late = io.BytesIO(b"a\n" * 9999 + b"b\0c\n")  # too far from the beginning to look binary
    assert list(text_lines(late, "x"))[-1] == "b\0c"
    for data, message in (
        (b"a\nb\0\n", "x: line 2: a binary file, not UTF-8 text"),
        (b"\0\0\1\0", "x: line 1: a binary file"),
        (b"a\nb\xe4\n", r"x: line 2: byte 2 \(0xe4\) is not UTF-8; convert the file"),
    ):
        with pytest.raises(DataError, match=message):
            list(text_lines(io.BytesIO(data), "x"))


def test_a_new_file_is_fine_and_an_old_one_by_overwrite(tmp_path):
    path = tmp_path / "x"
    check_output(path)
    path.write_text("theirs")
    with pytest.raises(
        FileExistsError, match="x already exists; choose another name, or add --over"
    ):
        check_output(path)
    check_output(path, overwrite=True)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link already exists"):
        check_output(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match="link is a link to nothing; remove it"):
        check_output(tmp_path / "link", overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
            check_output(tmp_path, overwrite)
        with pytest.raises(FileNotFoundError, match="there is no folder .*none to write y to"):
            check_output(tmp_path / "none" / "y", overwrite)
    check_output(Path(os.devnull))  # holds nothing


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_output(tmp_path / "x")


def test_a_file_and_a_folder_come_whole(tmp_path):
    umask = os.umask(0o022)
    try:
        with whole_or_not_at_all(tmp_path / "file") as part:
            part.write_text("ours")
            assert not (tmp_path / "file").exists()
        with whole_or_not_at_all(tmp_path / "folder") as part:
            part.mkdir()
            (part / "a").write_text("ours")
    finally:
        os.umask(umask)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "ours"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_after_an_error_all_is_as_before(tmp_path, error, overwrite):
    path = tmp_path / "x"
    if overwrite:
        path.write_text("theirs")
    with pytest.raises(error), whole_or_not_at_all(path, overwrite) as part:
        part.write_text("half")
        raise error
    assert [found.read_text() for found in tmp_path.iterdir()] == ["theirs"] * overwrite


def test_what_appears_during_the_work_stays(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(FileExistsError), whole_or_not_at_all(path) as part:
        part.write_text("ours")
        path.write_text("theirs")
    path.unlink()
    with pytest.raises(FileExistsError), whole_or_not_at_all(path, overwrite=True) as part:
        part.mkdir()
        path.mkdir()
        (path / "theirs").touch()
    assert [str(found.relative_to(path)) for found in path.rglob("*")] == ["theirs"]


def test_overwriting_goes_through_links_and_into_devices(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with whole_or_not_at_all(tmp_path / "link", overwrite=True) as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with whole_or_not_at_all(tmp_path / "pipe") as part:
        assert part == tmp_path / "pipe"
