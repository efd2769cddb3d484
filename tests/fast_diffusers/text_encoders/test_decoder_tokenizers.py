"""Tokenizers of the decoder-only text encoders against transformers (tests/assets/make_decoder_goldens.py)."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.text_encoders import GemmaTokenizer, Qwen2Tokenizer

ASSETS = Path(__file__).parents[2] / "assets" / "text_encoders"
GOLDEN = json.loads((ASSETS / "decoder_ids.json").read_text(encoding="utf-8"))
PROMPTS = GOLDEN["prompts"]
FOLDERS = {
    "gemma": (GemmaTokenizer, "gemma2", "tokenizer", "{}"),
    "qwen": (Qwen2Tokenizer, "qwen3", "tokenizer_json", GOLDEN["template"]),
    "qwen_classic": (Qwen2Tokenizer, "qwen3", "tokenizer", GOLDEN["template"]),
}


def load(kind: str) -> GemmaTokenizer | Qwen2Tokenizer:
    cls, model, folder, _ = FOLDERS[kind]
    return cls.from_pretrained(ASSETS / model, folder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("padding", "count"), [("longest", 4), ("max_length", len(PROMPTS))])
@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_and_masks_are_those_of_transformers(kind, padding, count, side):
    _, model, _, template = FOLDERS[kind]
    tokens = load(kind)(PROMPTS[:count], GOLDEN["limit"][model], template=template, padding=padding, padding_side=side)
    golden = GOLDEN[f"{model}.{side}.{padding}"]
    for name, value in tokens._asdict().items():
        assert str(value.dtype) == "paddle.int64"
        assert value.tolist() == golden[name], name


@pytest.mark.parametrize("kind", FOLDERS)
def test_saved_tokenizer_is_the_same(kind, tmp_path):
    cls, model, folder, _ = FOLDERS[kind]
    source = ASSETS / model / folder
    load(kind).save_pretrained(tmp_path / "saved", layout="diffusers")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert saved == {file.name: file.read_bytes() for file in source.iterdir()}
    assert cls.from_pretrained(tmp_path, "saved")(PROMPTS).input_ids.tolist() == load(kind)(PROMPTS).input_ids.tolist()


def test_companion_files_travel_along(tmp_path):
    load("gemma").save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "tokenizer.model").write_bytes(b"sentencepiece")
    (tmp_path / "one" / "chat_template.jinja").write_text("template")
    GemmaTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert {file.name for file in (tmp_path / "two").iterdir()} == {file.name for file in (tmp_path / "one").iterdir()}


def with_settings(kind: str, folder: Path, **changes) -> GemmaTokenizer | Qwen2Tokenizer:
    """The tokenizer with other entries in tokenizer_config.json; None removes one."""
    load(kind).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps(settings))
    return FOLDERS[kind][0].from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "surroundings"),
    [
        ({"add_bos_token": None}, ([2], [])),  # what tokenizer.json says
        ({"add_bos_token": True}, ([2], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_bos_token": True, "bos_token": None}, ([], [])),
        ({"add_eos_token": True, "eos_token": {"content": "<eos>"}}, ([2], [1])),
    ],
)
def test_special_tokens_around_a_text(settings, surroundings, tmp_path):
    tokenizer = with_settings("gemma", tmp_path, **settings)
    start, end = surroundings
    body = load("gemma")(["a cat"]).input_ids[0].tolist()[1:]
    assert tokenizer(["a cat"]).input_ids[0].tolist() == [*start, *body, *end]
    assert tokenizer.count("a cat") == len(body) + len(start) + len(end)
    cut = tokenizer(["a cat"], len(start) + len(end) + 2).input_ids[0].tolist()
    assert cut == [*start, *body[:2], *end]


def test_settings_of_the_files_count(tmp_path):
    tokenizer = with_settings("qwen", tmp_path, padding_side="left", pad_token={"content": "<|im_end|>"})
    tokens = tokenizer(["a", "a cat"])
    pad = tokenizer.pad_id
    assert pad != load("qwen").pad_id
    assert (tokens.input_ids == pad).numpy().tolist() == (tokens.attention_mask == 0).numpy().tolist()
    assert tokens.attention_mask[0, 0] == 0 and tokens.attention_mask[0, -1] == 1
    assert tokenizer.model_max_length == 1024 and load("gemma").model_max_length == 8192


def test_defaults():
    assert load("gemma").padding_side == "left" and load("qwen").padding_side == "right"
    nothing = load("qwen")(["", ""])
    assert nothing.input_ids.shape == [2, 1] and not nothing.attention_mask.any()


def test_braces_of_a_prompt_are_text():
    tokenizer = load("qwen")
    ids = tokenizer(["{x} {}"], template="<{}>").input_ids
    assert ids.tolist() == tokenizer(["<{x} {}>"]).input_ids.tolist()


def test_too_long_prompt_is_cut_with_a_warning(caplog):
    tokenizer = load("qwen")
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer(["a cat", "a cat " * 50], 40, template=GOLDEN["template"])
    assert tokens.attention_mask.sum(-1).tolist()[1] == tokens.input_ids.shape[1] == 40
    messages = [record.getMessage() for record in caplog.records]
    assert any(re.search(r"a prompt of \d+ tokens was cut to 40: a cat a cat", message) for message in messages)


def test_older_files_list_added_tokens_apart(tmp_path):
    tokenizer = with_settings("qwen_classic", tmp_path, added_tokens_decoder=None)
    text = GOLDEN["template"].format("a cat")
    assert np.array_equal(tokenizer([text]).input_ids, load("qwen")([text]).input_ids)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no GemmaTokenizer vocabulary in .*expected tokenizer\.json"):
        GemmaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a GemmaTokenizer"):
        GemmaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="max_length 1 leaves no room for a text in GemmaTokenizer"):
        load("gemma")(["a"], 1)
    with pytest.raises(UserError, match="no '<nowhere>', which GemmaTokenizer needs"):
        with_settings("gemma", tmp_path, pad_token="<nowhere>")
    with pytest.raises(ValueError, match="padding 'none' on side 'right'"):
        load("qwen")(["a"], padding="none")
    with pytest.raises(ValueError, match="on side 'top'"):
        load("qwen")(["a"], padding_side="top")
    classic = tmp_path / "classic"
    with pytest.raises(UserError, match=r"added token '<gap>' has id 999, which does not follow the vocabulary"):
        with_settings("qwen_classic", classic, added_tokens_decoder={"999": {"content": "<gap>", "special": True}})
