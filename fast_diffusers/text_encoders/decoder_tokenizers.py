"""Prompts to token ids and masks for the decoder-only text encoders, from tokenizer.json or vocab.json + merges.txt."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import paddle
import tokenizers
from paddle import Tensor

from fast_diffusers.errors import UserError
from fast_diffusers.text_encoders.tokenizer_files import StoredTokenizer, read_merges, read_tokenizer_json

logger = logging.getLogger(__name__)

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenBatch(NamedTuple):
    """`input_ids` and `attention_mask`, int64 [B, T]; the mask is 1 for tokens and 0 for padding."""

    input_ids: Tensor
    attention_mask: Tensor


class DecoderTokenizer(StoredTokenizer):
    """Token ids of prompts of different lengths, with a mask.

    Special tokens around a text are those of tokenizer.json's post-processor, unless tokenizer_config.json says by
    `add_bos_token` or `add_eos_token` which ones to add; it then says it all, as in `transformers`.
    """

    pad_token: ClassVar[str]
    default_padding_side: ClassVar[str]

    def __init__(self, files: Mapping[str, bytes]):
        super().__init__(files)
        self._model = self._build(self._files)
        if self.settings.keys() & {"add_bos_token", "add_eos_token"}:
            self._model.post_processor = self._surroundings()
        self.pad_id = self._require(self._special("pad_token", self.pad_token), self._model.token_to_id)
        self.padding_side: str = self.settings.get("padding_side", self.default_padding_side)

    def __call__(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        *,
        template: str = "{}",
        padding: str = "longest",
        padding_side: str | None = None,
    ) -> TokenBatch:
        """Token ids and mask of every text.

        A text that does not fit is cut at its end (special tokens around it stay) and a warning names it. Special
        tokens written inside a text count as themselves.

        Args:
            max_length: by default `model_max_length`.
            template: a format string, such as that of a chat, in which "{}" stands for the text.
            padding: up to the "longest" text of the batch, or to "max_length".
            padding_side: "left" or "right"; by default `padding_side`, the tokenizer's own.

        Raises:
            UserError: max_length leaves no room for a text.
        """
        max_length = self.model_max_length if max_length is None else max_length
        side = padding_side or self.padding_side
        if padding not in ("longest", "max_length") or side not in ("left", "right"):
            raise ValueError(f"padding {padding!r} on side {side!r}: longest or max_length, left or right")
        room = max_length - self._model.num_special_tokens_to_add(False)
        if room < 1:
            raise UserError(f"max_length {max_length} leaves no room for a text in {type(self).__name__}")
        rows = [self._encode(text, template, room) for text in texts]
        longest = max(map(len, rows), default=0)
        length = max_length if padding == "max_length" else max(longest, 1)  # a model needs some token to work on
        ids = np.full([len(rows), length], self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            place = slice(length - len(tokens), length) if side == "left" else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        return TokenBatch(paddle.to_tensor(ids), paddle.to_tensor(mask))

    def count(self, text: str) -> int:
        """How many tokens a text has, special ones around it included."""
        return len(self._model.encode(text).ids)

    def _encode(self, text: str, template: str, room: int) -> list[int]:
        encoding = self._model.encode(template.format(text), add_special_tokens=False)
        if len(encoding.ids) > room:
            logger.warning(
                "%s: a prompt of %d tokens was cut to %d: %.60s…", type(self).__name__, len(encoding.ids), room, text
            )
            encoding.truncate(room)
        return self._model.post_process(encoding).ids

    def _surroundings(self) -> tokenizers.processors.PostProcessor:
        """The post-processor that puts the start and the end token where tokenizer_config.json wants them."""

        def wanted(name: str) -> list[str]:
            token = self._special(f"{name}_token")
            return [token] if token and self.settings.get(f"add_{name}_token") else []

        start, end = wanted("bos"), wanted("eos")
        tokens = [(token, self._require(token, self._model.token_to_id)) for token in {*start, *end}]
        return tokenizers.processors.TemplateProcessing(single=[*start, "$A", *end], special_tokens=tokens)

    @classmethod
    def _build(cls, files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
        return read_tokenizer_json(files)


class GemmaTokenizer(DecoderTokenizer):
    """BPE with byte fallback of Gemma; `<bos>` text."""

    pad_token = "<pad>"
    default_padding_side = "left"
    default_max_length = 8192
    vocabularies = (("tokenizer.json",),)
    companions = ("tokenizer.model",)


class Qwen2Tokenizer(DecoderTokenizer):
    """Byte-level BPE of Qwen 2 to 3 and of Qwen2.5-VL; nothing around the text."""

    pad_token = "<|endoftext|>"
    default_padding_side = "right"
    default_max_length = 32768
    vocabularies = (("tokenizer.json",), ("vocab.json", "merges.txt"))

    @classmethod
    def _build(cls, files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
        if "tokenizer.json" in files:
            return read_tokenizer_json(files)
        pre = tokenizers.pre_tokenizers
        model = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(files["vocab.json"]), read_merges(files)))
        model.normalizer = tokenizers.normalizers.NFC()
        words = pre.Split(tokenizers.Regex(QWEN_WORDS), behavior="isolated")
        model.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        for index, token in sorted(_added_tokens(files).items()):
            model.add_tokens([token])
            if model.token_to_id(token.content) != index:
                raise UserError(f"added token {token.content!r} has id {index}, which does not follow the vocabulary")
        return model


def _added_tokens(files: Mapping[str, bytes]) -> dict[int, tokenizers.AddedToken]:
    """Tokens beyond the vocabulary by id, from tokenizer_config.json or, in older files, from added_tokens.json."""
    described = json.loads(files.get("tokenizer_config.json", b"{}")).get("added_tokens_decoder")
    if described:
        return {int(index): tokenizers.AddedToken(**token) for index, token in described.items()}
    plain = json.loads(files.get("added_tokens.json", b"{}"))
    return {index: tokenizers.AddedToken(token, special=True, normalized=False) for token, index in plain.items()}
