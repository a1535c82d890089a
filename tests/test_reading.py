"""The door for files from elsewhere: what is no plain file of a plausible size, or no plain data, is one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest

from lipexp.reading import (
    DEPTH,
    Missing,
    Unreadable,
    is_whole_json,
    parse,
    printable,
    read_bytes,
    read_json,
    read_yaml,
    refuse_links_out,
)


def refusal(call, *arguments) -> str:
    with pytest.raises(Unreadable) as refused:
        call(*arguments)
    assert str(refused.value).isprintable()
    return str(refused.value)


def test_only_plain_files_in_the_folder_are_opened(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside.json"
    (folder / "directory").mkdir(parents=True)
    outside.write_text("{}")
    (folder / "link").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    for name in ("link", "linked/outside.json", "device"):
        assert refusal(read_json, folder, name) == f"{name} cannot be read: it is a link"
    for name in ("directory", "pipe", "loop"):
        assert refusal(read_json, folder, name) == f"{name} cannot be read: it is no file"
    (folder / "large").touch()
    os.truncate(folder / "large", 2**40)  # without a block on the disk
    assert refusal(read_json, folder, "large") == "large cannot be read: it is larger than 16 MiB"
    for nothing in ("none", "none/none", "large/none"):
        with pytest.raises(Missing, match=f"^there is no {nothing}$"):
            read_bytes(folder, nothing, 1)
    (tmp_path / "named").symlink_to(folder)  # a folder itself may be named by a link
    (folder / "own.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "named", "own.json") == {"a": 1}


NESTED = "[" * (DEPTH + 1) + "]" * (DEPTH + 1)
JSON = {
    "": "Expecting value",
    "[1, 2]": "it is no JSON object",
    f'{{"a": {NESTED}}}': "it is nested too deeply",
    '{"a": ' * 10**5: "it is nested too deeply",
    r'{"a": "\ud800"}': "surrogates not allowed",
    r'{"\udfff": 1}': "surrogates not allowed",
    "\xff": "can't decode",
    f'{{"a": {"9" * 5000}}}': "Exceeds the limit",
}
YAML = {
    "": "it is no mapping",
    "[1, 2]": "it is no mapping",
    "a: 1\na: [": "did not find expected node content",
    "a: &a [1]\nb: *a": "it has aliases or tags",
    "a: &a [*a]": "it has aliases or tags",
    f"a: {NESTED}": "it is nested too deeply",
    "a: " + "[" * 10**5: "cannot be read",
    "a: !!python/object/apply:os.getpid []": "it has aliases or tags",
    "? [1, 2]\n: 3": "unhashable key",
    "2026-01-31: 3": "it has the key 2026-01-31",
    "a: 1\n--- 2": "but found another document",
    'a: "\\ud800"': "cannot be read",
    "\xff": "cannot be read",
}


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [*((read_json, *case) for case in JSON.items()), *((read_yaml, *case) for case in YAML.items())],
    ids=lambda value: f"{value:.20}" if isinstance(value, str) else None,
)
def test_content_that_is_no_plain_data_is_refused(tmp_path, read, text, reason):
    (tmp_path / "file").write_bytes(text.encode("latin-1"))
    refused = refusal(read, tmp_path, "file")
    assert refused.startswith("file cannot be read: ")
    assert reason in refused


def test_plain_data_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: {b: [1, 2.5, null, true], c: .inf}\nd: 'ü'\n1: &unused x\n")
    expected = {"a": {"b": [1, 2.5, None, True], "c": float("inf")}, "d": "ü", 1: "x"}
    assert read_yaml(tmp_path, "a.yaml") == expected
    (tmp_path / "long.yaml").write_text("a:\n  - odd: *\n  b:\n    c: 1\n    d:\n    - 2\n  e: !odd 1\n")
    assert read_yaml(tmp_path, "long.yaml", inside="  b:") == {"c": 1, "d": [2]}
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, true], "b": "\\ud83d\\ude00"}')
    assert read_json(tmp_path, "a.json") == {"a": [1, 2.5, None, True], "b": "😀"}


@pytest.mark.parametrize(
    ("content", "whole"),
    {
        b'{"a": 1}\n': True,
        b'{"a": 1}': True,
        b"": False,
        b'{"a": ': False,
        b"{" + 20 * b"\0": False,
        b"[1]": False,
    }.items(),
)
def test_a_torn_object_has_no_end(tmp_path, content, whole):
    (tmp_path / "a.json").write_bytes(content)
    assert is_whole_json(tmp_path / "a.json") == whole


def test_what_is_no_file_is_no_whole_object(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").write_text("{}")
    (tmp_path / "link").symlink_to("target")
    assert not any(is_whole_json(tmp_path / name) for name in ("pipe", "link", "none", "."))


def test_links_out_of_a_folder_are_found_at_any_depth(tmp_path):
    folder = tmp_path / "sweep"
    (folder / "0" / "deep").mkdir(parents=True)
    (folder / "0" / "deep" / "inside").symlink_to(folder / "0")
    refuse_links_out(folder)
    (folder / "0" / "deep" / "out").symlink_to(tmp_path / "not there")
    assert refusal(refuse_links_out, folder).startswith("0/deep/out cannot be read: it is a link out of")


def test_what_a_terminal_would_carry_out_is_spelled_out():
    text = "plain ‖∇f‖₂ \x1b]0;title\x07 \ud800 \u202e"
    assert printable(text) == r"plain ‖∇f‖₂ \x1b]0;title\x07 \ud800 \u202e"


class Shape(NamedTuple):
    size: float
    tags: tuple[str, ...] = ()
    where: Path | None = None
    by: dict[int, Shape] = {}
    kind: Annotated[str, ("a", "b")] = "a"


def test_types_are_those_of_the_fields():
    content = {"size": 1, "tags": ["x"], "where": "here", "by": {"3": {"size": 2.5}}, "kind": "b"}
    assert parse(Shape, content) == Shape(1.0, ("x",), Path("here"), {3: Shape(2.5)}, "b")
    wrong = {
        "size": (None, True, "1", float("nan"), 10**400),
        "tags": ("x", [1], None),
        "where": (1,),
        "by": ([], {"x": {"size": 1}}, {"3": {}}),
        "kind": ("c", 1),
        "other": (1,),
    }
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=r"^(Shape|invalid literal)"):
                parse(Shape, {"size": 1, key: value})
