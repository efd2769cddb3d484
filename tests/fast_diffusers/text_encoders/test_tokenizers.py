import json
import logging
import re
from pathlib import Path

import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.text_encoders import CLIPTokenizer, T5Tokenizer

ASSETS = Path(__file__).parents[2] / "assets" / "text_encoders"
GOLDEN = json.loads((ASSETS / "ids.json").read_text(encoding="utf-8"))
PROMPTS = GOLDEN["prompts"]
KINDS = {"clip": (CLIPTokenizer, 77), "t5": (T5Tokenizer, 48)}


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_json"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind, folder):
    cls, length = KINDS[kind]
    ids = cls.from_pretrained(ASSETS / kind, folder)(PROMPTS, length)
    assert str(ids.dtype) == "paddle.int64"
    assert ids.tolist() == GOLDEN[kind]


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_json"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_the_same(kind, folder, tmp_path):
    cls, length = KINDS[kind]
    source = ASSETS / kind / folder
    cls.from_pretrained(source).save_pretrained(tmp_path / "saved", layout="diffusers")
    assert {f.name: f.read_bytes() for f in source.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()
    }
    assert cls.from_pretrained(tmp_path, "saved")(PROMPTS, length).tolist() == GOLDEN[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_too_long_prompt_is_cut_with_a_warning(kind, caplog):
    cls, _ = KINDS[kind]
    tokenizer = cls.from_pretrained(ASSETS / kind, "tokenizer")
    with caplog.at_level(logging.WARNING):
        short, long = tokenizer(["a cat", "a cat " * 50], 20).tolist()
    assert len(short) == len(long) == 20
    assert long[-1] == tokenizer.end_id != long[-2]
    [record] = caplog.records
    assert re.search(r"a prompt of \d+ tokens was cut to \d+: a cat a cat", record.getMessage())


def test_default_length_and_padding():
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "clip", "tokenizer")
    assert tokenizer(["a cat"]).shape == [1, 77]
    assert T5Tokenizer.from_pretrained(ASSETS / "t5", "tokenizer").model_max_length == 512


@pytest.mark.parametrize("pad", ["!", {"content": "!", "special": True}])
def test_pad_token_of_the_files_counts(pad, tmp_path):
    CLIPTokenizer.from_pretrained(ASSETS / "clip", "tokenizer").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, "model_max_length": 10**30}))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    ids = tokenizer([""])[0].tolist()
    assert ids == [vocab["<|startoftext|>"], vocab["<|endoftext|>"], *[vocab["!"]] * 75]


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json or vocab.json \+ merges.txt"):
        CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"spiece\.model cannot be read as a T5Tokenizer"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a T5Tokenizer"):
        T5Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no '<\|startoftext\|>', which CLIPTokenizer needs"):
        CLIPTokenizer.from_pretrained(ASSETS / "t5", "tokenizer_json")
    with pytest.raises(UserError, match="max_length 1 leaves no room"):
        CLIPTokenizer.from_pretrained(ASSETS / "clip", "tokenizer")(["a"], 1)
