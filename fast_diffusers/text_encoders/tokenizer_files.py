"""The files of a tokenizer folder of `transformers`: read as they are, written back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import tokenizers

from fast_diffusers.errors import UserError

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class StoredTokenizer:
    """A tokenizer made of files; subclasses say which of them can define the vocabulary.

    Build one with `from_pretrained`; `save_pretrained` writes the very files it was read from.
    """

    default_max_length: ClassVar[int]
    vocabularies: ClassVar[tuple[tuple[str, ...], ...]]
    """Alternative sets of files that define the vocabulary, in order of preference."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Other files that belong to the tokenizer, to be kept although they are not read."""

    def __init__(self, files: Mapping[str, bytes]):
        self._files = dict(files)
        settings: dict[str, Any] = json.loads(self._files.get("special_tokens_map.json", b"{}"))
        self.settings = settings | json.loads(self._files.get("tokenizer_config.json", b"{}"))
        longest = self.settings.get("model_max_length", self.default_max_length)
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
        known = {name for names in cls.vocabularies for name in names} | set(CONFIG_FILES) | set(cls.companions)
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

    def _special(self, name: str, default: str | None = None) -> str | None:
        """The text of a special token such as "pad_token", which is stated as itself or as a description of it."""
        token = self.settings.get(name) or default
        return token["content"] if isinstance(token, dict) else token

    def _require(self, token: str, token_id: Callable[[str], int | None]) -> int:
        index = token_id(token)
        if index is None:
            raise UserError(f"the vocabulary has no {token!r}, which {type(self).__name__} needs")
        return index


def read_tokenizer_json(files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    """The tokenizer that tokenizer.json describes, without the truncation and the padding it may ask for."""
    model = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    model.no_truncation()
    model.no_padding()
    return model


def read_merges(files: Mapping[str, bytes]) -> list[tuple[str, ...]]:
    """The pairs of merges.txt, in order."""
    lines = files["merges.txt"].decode("utf-8").split("\n")
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
