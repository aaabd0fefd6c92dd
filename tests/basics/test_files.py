import json
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from diffusion_policy.basics.files import (
    MAX_BRACKETS,
    FileError,
    format_json,
    once_each,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    remove,
    write_whole,
)


def test_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": [1, 2.5, null, "é"]}')
    (tmp_path / "link").symlink_to("a.json")
    for name in ("a.json", "link"):
        assert read_json(tmp_path / name) == {"x": [1, 2.5, None, "é"]}
        assert len(read_bytes(tmp_path / name, 100)) == 27


def test_whatever_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("pipe", "folder", "device", "to_pipe", "socket"):
            with pytest.raises(FileError, match=f"{name} is no regular file"):
                read_bytes(tmp_path / name, 100)
    with pytest.raises(FileError, match="dangling is missing"):
        read_bytes(tmp_path / "dangling", 100)
    for name in ("loop", "a\0b"):
        with pytest.raises(FileError, match="cannot read"), open_regular(tmp_path / name):
            pass


def test_a_file_larger_than_allowed_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(FileError, match="has 5368709120 bytes; at most 1000 are read"):
        read_bytes(tmp_path / "sparse", 1000)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100 + "]" * 100, "nested more than 32 levels"),
        ("[" * (MAX_BRACKETS + 1), "lists and objects; at most"),
        ("[" + "0," * 2**20 + "0]", "more than 524288 items"),
        ('{"a": 1', "Expecting"),
        ('"\\ud800"', "half a surrogate pair"),
        ("1" * 5000, "4300"),
    ],
)
def test_json_is_bounded_before_anything_is_built_of_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=f"a.json is not JSON that can be read: .*{message}"):
        read_json(tmp_path / "a.json")


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(FileError, match="is not JSON") as info:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(info.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results [1].json"
    (tmp_path / f".writing-{path.name}").write_text("half of what a killed process wr")
    write_whole(path, "first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*json: No space left on device"):
        write_whole(path, "second")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "first"


def test_json_of_results_has_only_what_json_knows() -> None:
    tree = {"a": np.float32(0.5), 1: (np.int64(3), math.nan), "b": [np.array([1.0, np.inf]), np.bool_(True), Path("x")]}
    assert json.loads(format_json(tree)) == {"a": 0.5, "1": [3, None], "b": [[1.0, None], True, "x"]}


def test_a_key_that_stands_twice_is_said_where_that_matters() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="the key 'a' stands there twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', pairs=once_each)


def test_a_pipe_is_deleted_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "inner")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "link", "loop"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    remove(tmp_path / "folder")
    remove(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())
