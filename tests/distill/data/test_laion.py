import base64
import json

import numpy as np
import pytest

from distill.data.laion import laion_list
from distill.data.records import BadRecord
from fast_diffusers.errors import UserError


def line(caption: str, image: bytes) -> bytes:
    return b"\t".join([b"id", b"url", caption.encode(), b"1", b"x", base64.b64encode(image)])


@pytest.fixture
def write(tmp_path):
    def write(*records: bytes) -> str:
        names = []
        for number, record in enumerate(records):
            names.append(f"part-{number}")
            (tmp_path / names[-1]).write_bytes(record)
        (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
        return tmp_path / "list.txt"

    return write


@pytest.mark.parametrize("dump", [json.dumps, repr], ids=["json", "python literal"])
def test_records(write, png, pictures, dump):
    caption = 'it\'s a "cat", très\tbeau'.replace("\t", " ")
    record = line(dump({"blip_caption_en": caption, "other": None}), png(pictures[0]))
    source = laion_list(write(record, record + b"\nanother line\twith\tfields"))
    assert len(source) == 2
    for index in range(2):
        assert source[index].prompt == caption and source[index].name == f"part-{index}"
        np.testing.assert_array_equal(source[index].image, pictures[0])


def test_other_folder_and_key(write, png, pictures, tmp_path):
    write(line('{"caption_en": "dog"}', png(pictures[0])))
    elsewhere = tmp_path / "lists" / "list.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text("part-0")
    assert laion_list(elsewhere, folder=tmp_path, caption_key="caption_en")[0].prompt == "dog"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"only\ttwo", "2 tab-separated fields in the first line, needs 6"),
        (b"", "1 tab-separated fields"),
        (line("{'blip_caption_en': 3}", b""), "no caption 'blip_caption_en'"),
        (line("{'caption': 'x'}", b""), "no caption 'blip_caption_en'"),
        (line("[1, 2]", b""), "is a list, not a dict"),
        (line("{oops", b""), "neither JSON nor a Python dict"),
        (line("(" * 5000, b""), "neither JSON nor a Python dict"),
        (line("__import__('os').mkdir('/tmp/executed')", b""), "neither JSON nor a Python dict"),
        (line("{'blip_caption_en': 'x'}", b"hello"), "not an image"),
        (line("{'blip_caption_en': 'x'}", b"") + b"%%%", "not base64"),
        (line("{'blip_caption_en': 'x'}", b"").replace(b"'x'", b"'\xff'"), "neither JSON nor"),
    ],
)
def test_bad_records(write, record, message):
    with pytest.raises(BadRecord, match=f"part-0: .*{message}"):
        laion_list(write(record))[0]


def test_missing_record_file(write, tmp_path):
    path = write(b"x")
    (tmp_path / "part-0").unlink()
    with pytest.raises(BadRecord, match="part-0: the file does not exist"):
        laion_list(path)[0]


def test_bad_lists(tmp_path):
    with pytest.raises(UserError, match=r"list.txt does not exist"):
        laion_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"list.txt is empty"):
        laion_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not a text file"):
        laion_list(tmp_path / "list.txt")


def test_identity_follows_the_record_files(write):
    first = laion_list(write(b"x")).identity
    assert laion_list(write(b"xy")).identity != first
