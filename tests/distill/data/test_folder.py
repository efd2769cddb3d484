import json
import os

import numpy as np
import pytest

from distill.data.folder import image_folder
from distill.data.records import BadRecord
from fast_diffusers.errors import UserError


@pytest.fixture
def folder(tmp_path, png, pictures):
    for index, name in enumerate(["b/2.png", "a/1.PNG", "a/deep/3.png", "top.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pictures[index]))
        path.with_suffix(".txt").write_text(f" caption of {name}\n", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.md").write_text("x")
    return tmp_path


def test_text_captions(folder, pictures):
    source = image_folder(folder)
    records = [source[index] for index in range(len(source))]
    assert [record.name for record in records] == ["a/1.PNG", "a/deep/3.png", "b/2.png", "top.png"]
    assert [record.prompt for record in records] == [f"caption of {record.name}" for record in records]
    np.testing.assert_array_equal(records[2].image, pictures[0])


def test_folder_captions(folder):
    source = image_folder(str(folder), captions="folder")
    assert [source[index].prompt for index in range(4)] == ["a", "deep", "b", folder.name]


def test_jsonl_captions(folder):
    lines = [{"file_name": "top.png", "text": "tôp"}, {"file_name": "a/1.PNG", "text": "one", "more": 1}]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = image_folder(folder, captions="jsonl")
    assert [(source[i].name, source[i].prompt) for i in range(len(source))] == [("top.png", "tôp"), ("a/1.PNG", "one")]


def test_bad_records_say_why(folder):
    (folder / "b/2.png").write_bytes(b"not a picture")
    (folder / "top.txt").unlink()
    (folder / "a/1.txt").write_bytes(b"\xff\xfe\xff")
    source = image_folder(folder)
    for index, message in [(0, "1.txt is not UTF-8"), (2, "b/2.png: not an image"), (3, "no caption file top.txt")]:
        with pytest.raises(BadRecord, match=message):
            source[index]


def test_identity_follows_files_and_captions(folder):
    first = image_folder(folder).identity
    assert image_folder(folder).identity == first
    os.utime(folder / "b/2.txt", ns=(1, 1))
    second = image_folder(folder).identity
    (folder / "top.png").unlink()
    third = image_folder(folder).identity
    assert len({first, second, third, image_folder(folder, captions="folder").identity}) == 4


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"no images in .* \(it is empty\)"):
        image_folder(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"no images in .*1 other files, such as notes.md.*\.png"):
        image_folder(tmp_path)
    with pytest.raises(UserError, match="gone does not exist"):
        image_folder(tmp_path / "gone")
    with pytest.raises(UserError, match=r"notes.md is not a folder"):
        image_folder(tmp_path / "notes.md")
    with pytest.raises(UserError, match="must be a path, not 3"):
        image_folder(3)
    with pytest.raises(UserError, match="captions 'jsnl': did you mean 'jsonl'"):
        image_folder(tmp_path, captions="jsnl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{oops', "line 2: expected an object"),
        ('{"file_name": "a.png"}', "line 1: expected an object"),
        ("[1]", "line 1: expected an object"),
        ('{"file_name": "a.png", "text": 3}', "line 1: .* must be strings"),
        ("\n", "lists no images"),
    ],
)
def test_bad_metadata_is_located(folder, text, message):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"metadata.jsonl.*{message}"):
        image_folder(folder, captions="jsonl")


def test_missing_metadata(folder):
    with pytest.raises(UserError, match=r"needs .*metadata.jsonl"):
        image_folder(folder, captions="jsonl")
