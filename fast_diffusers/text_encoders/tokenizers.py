"""Prompts to token ids, from the files of `transformers`: tokenizer.json, vocab.json + merges.txt, or spiece.model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import paddle
import tokenizers
from paddle import Tensor

from fast_diffusers.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Fixed-length token ids of prompts: start token (if any), text, end token, padding.

    Subclasses say which special tokens surround the text and which files can define the vocabulary. Build one with
    `from_pretrained`; `save_pretrained` writes the very files it was read from.
    """

    start_token: ClassVar[str | None] = None
    end_token: ClassVar[str]
    pad_token: ClassVar[str]
    default_max_length: ClassVar[int]
    vocabularies: ClassVar[tuple[tuple[str, ...], ...]]
    """Alternative sets of files that define the vocabulary, in order of preference."""

    def __init__(self, files: Mapping[str, bytes]):
        self._files = dict(files)
        self._encode, self._token_id = self._build(self._files)
        settings = json.loads(self._files.get("special_tokens_map.json", b"{}"))
        settings |= json.loads(self._files.get("tokenizer_config.json", b"{}"))
        pad = settings.get("pad_token") or self.pad_token
        self.pad_id = self._require(pad["content"] if isinstance(pad, dict) else pad)
        self.start_ids = [] if self.start_token is None else [self._require(self.start_token)]
        self.end_id = self._require(self.end_token)
        longest = settings.get("model_max_length", self.default_max_length)
        self.model_max_length: int = int(longest) if longest < 1e9 else self.default_max_length

    @classmethod
    def from_pretrained(cls, directory: str | Path, subfolder: str | None = None) -> Self:
        """Read a tokenizer folder.

        Raises:
            FileNotFoundError: the folder holds none of the vocabularies this class reads.
            UserError: a file cannot be parsed, or lacks a special token.
        """
        folder = Path(directory, subfolder or "")
        for names in cls.vocabularies:
            if all((folder / name).is_file() for name in names):
                break
        else:
            wanted = " or ".join(" + ".join(names) for names in cls.vocabularies)
            raise FileNotFoundError(f"no {cls.__name__} vocabulary in {folder}: expected {wanted}")
        # The other vocabularies travel along, so that what is saved is what was loaded.
        known = {name for names in cls.vocabularies for name in names} | set(CONFIG_FILES)
        files = {name: (folder / name).read_bytes() for name in sorted(known) if (folder / name).is_file()}
        try:
            return cls(files)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except Exception as error:  # the tokenizers library raises bare Exception, sentencepiece RuntimeError
            raise UserError(f"{folder}: {' + '.join(names)} cannot be read as a {cls.__name__}: {error}") from error

    def save_pretrained(self, directory: str | Path, layout: str = "paddle") -> None:
        """Write the tokenizer's files (the same in every layout)."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Token ids, int64 [len(texts), max_length], padded on the right.

        A text that does not fit is cut (the end token stays) and a warning names it. `max_length` defaults to
        `model_max_length`. Special tokens written inside a prompt count as themselves with tokenizer.json and the CLIP
        files, and as plain text with spiece.model.
        """
        max_length = self.model_max_length if max_length is None else max_length
        room = max_length - len(self.start_ids) - 1
        if room < 0:
            raise UserError(f"max_length {max_length} leaves no room for the special tokens of {type(self).__name__}")
        ids = np.full([len(texts), max_length], self.pad_id, dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            body = self._encode(text)
            if len(body) > room:
                logger.warning(
                    "%s: a prompt of %d tokens was cut to %d: %.60s…", type(self).__name__, len(body), room, text
                )
            tokens = [*self.start_ids, *body[:room], self.end_id]
            row[: len(tokens)] = tokens
        return paddle.to_tensor(ids)

    @classmethod
    def _build(cls, files: Mapping[str, bytes]) -> tuple[Callable[[str], list[int]], Callable[[str], int | None]]:
        """The text -> ids function (without special tokens) and the token -> id function."""
        model = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        model.no_truncation()
        model.no_padding()
        return lambda text: model.encode(text, add_special_tokens=False).ids, model.token_to_id

    def _require(self, token: str) -> int:
        index = self._token_id(token)
        if index is None:
            raise UserError(f"the vocabulary has no {token!r}, which {type(self).__name__} needs")
        return index


class CLIPTokenizer(Tokenizer):
    """Lower-cased byte-level BPE of CLIP; `<|startoftext|>` text `<|endoftext|>`, 77 tokens."""

    start_token = "<|startoftext|>"
    end_token = "<|endoftext|>"
    pad_token = "<|endoftext|>"
    default_max_length = 77
    vocabularies = (("tokenizer.json",), ("vocab.json", "merges.txt"))

    @classmethod
    def _build(cls, files: Mapping[str, bytes]) -> tuple[Callable[[str], list[int]], Callable[[str], int | None]]:
        if "tokenizer.json" in files:
            return super()._build(files)
        lines = files["merges.txt"].decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        model = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab=json.loads(files["vocab.json"]),
                merges=merges,
                end_of_word_suffix="</w>",
                unk_token=cls.end_token,
            )
        )
        normalizers, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
        model.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        model.pre_tokenizer = pre.Sequence(
            [
                pre.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True),
                pre.ByteLevel(add_prefix_space=False),
            ]
        )
        model.add_special_tokens([cls.start_token, cls.end_token])
        return lambda text: model.encode(text, add_special_tokens=False).ids, model.token_to_id


class T5Tokenizer(Tokenizer):
    """SentencePiece unigram of T5; text `</s>`, padded with `<pad>`, 512 tokens."""

    end_token = "</s>"
    pad_token = "<pad>"
    default_max_length = 512
    vocabularies = (("tokenizer.json",), ("spiece.model",))

    @classmethod
    def _build(cls, files: Mapping[str, bytes]) -> tuple[Callable[[str], list[int]], Callable[[str], int | None]]:
        if "tokenizer.json" in files:
            return super()._build(files)
        from sentencepiece import SentencePieceProcessor  # only older checkpoints need it

        model = SentencePieceProcessor(model_proto=files["spiece.model"])

        def token_id(token: str) -> int | None:
            index = model.piece_to_id(token)
            return index if model.id_to_piece(index) == token else None

        return model.encode, token_id
