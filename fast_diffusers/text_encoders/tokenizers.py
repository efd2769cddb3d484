"""Prompts to token ids for CLIP and T5, from tokenizer.json, vocab.json + merges.txt, or spiece.model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import paddle
import tokenizers
from paddle import Tensor

from fast_diffusers.errors import UserError
from fast_diffusers.text_encoders.tokenizer_files import StoredTokenizer, read_merges, read_tokenizer_json

logger = logging.getLogger(__name__)

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer(StoredTokenizer):
    """Fixed-length token ids of prompts: start token (if any), text, end token, padding.

    Subclasses say which special tokens surround the text.
    """

    start_token: ClassVar[str | None] = None
    end_token: ClassVar[str]
    pad_token: ClassVar[str]

    def __init__(self, files: Mapping[str, bytes]):
        super().__init__(files)
        self._encode, token_id = self._build(self._files)
        self.pad_id = self._require(self._special("pad_token", self.pad_token), token_id)
        self.start_ids = [] if self.start_token is None else [self._require(self.start_token, token_id)]
        self.end_id = self._require(self.end_token, token_id)

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
        model = read_tokenizer_json(files)
        return lambda text: model.encode(text, add_special_tokens=False).ids, model.token_to_id


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
        model = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab=json.loads(files["vocab.json"]),
                merges=read_merges(files),
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
