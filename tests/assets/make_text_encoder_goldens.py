"""Write the text-encoder goldens next to this file: tiny random CLIP and T5 models, tokenizers and their outputs.

They come from PyTorch `transformers`, which is no dependency of the project. To repeat:

    python -m venv /tmp/goldens
    /tmp/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 sentencepiece protobuf
    /tmp/goldens/bin/python tests/assets/make_text_encoder_goldens.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.numpy import save_file

OUT = Path(__file__).parent / "text_encoders"
CORPUS = """a photo of a small red cat sitting on the wooden table, looking at the camera
an oil painting of three horses running along the beach at sunset; highly detailed
it's the year 2049, and we're watching the city lights from above
an astronaut riding a horse, digital art, 8k resolution
the quick brown fox jumps over the lazy dog! isn't that what they'd say?
a café in Paris, rain, people with umbrellas, soft light, film grain
black and white portrait of an old fisherman, deep wrinkles, 50mm f/1.8
""".splitlines()
PROMPTS = [
    "",
    "a photo of a small red cat",
    "It's the YEAR 2049 — and we're watching; isn't that what they'd say?!",
    "  extra   spaces\tand\nnewlines  ",
    "a café in Zürich, ﬁlm grain， 日本語 😀",
    "cafe\u0301 x² <|endoftext|> tail",
    "an oil painting of three horses " * 20,
]


def clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """A byte-level BPE vocabulary with the special tokens last, as CLIP's."""
    from tokenizers import models, pre_tokenizers, trainers

    learner = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        (line.lower() for line in CORPUS),
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>"),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = alphabet + [token + "</w>" for token in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder / "tokenizer_json")
    classic = folder / "tokenizer"
    classic.mkdir()
    (classic / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (classic / "merges.txt").write_text("\n".join(["#version: 0.2"] + [" ".join(pair) for pair in merges]) + "\n")
    shutil.copy(folder / "tokenizer_json" / "tokenizer_config.json", classic)
    return tokenizer


def t5_tokenizer(folder: Path) -> transformers.T5Tokenizer:
    """A unigram SentencePiece model with T5's special ids; a few rules stand for the large nmt_nfkc table."""
    classic = folder / "tokenizer"
    classic.mkdir()
    rules = classic / "rules.tsv"
    pairs = [("\t", " "), ("\n", " "), ("\u00a0", " "), ("ﬁ", "fi"), ("，", ","), ("²", "2"), ("e\u0301", "é")]
    rules.write_text(
        "".join(f"{' '.join(f'{ord(c):X}' for c in a)}\t{' '.join(f'{ord(c):X}' for c in b)}\n" for a, b in pairs)
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(classic / "spiece"),
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_tsv=str(rules),
    )
    rules.unlink()
    (classic / "spiece.vocab").unlink()
    (classic / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    tokenizer = transformers.T5Tokenizer.from_pretrained(classic)
    tokenizer.save_pretrained(folder / "tokenizer_json")
    return tokenizer


def clip_model(folder: Path, tokenizer: transformers.CLIPTokenizer) -> dict[str, np.ndarray]:
    """One set of weights, two configurations: the legacy one (eos 2, quick_gelu) and the present one."""
    arrays = {}
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    for name, eos, activation in [("clip", tokenizer.eos_token_id, "gelu"), ("clip_legacy", 2, "quick_gelu")]:
        torch.manual_seed(0)
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act=activation,
            eos_token_id=eos,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=1,
            initializer_factor=4.0,
        )
        model = transformers.CLIPTextModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            output = model(ids)
        save(model, folder if name == "clip" else folder / "legacy")
        arrays |= {
            f"{name}.last_hidden_state": output.last_hidden_state.numpy(),
            f"{name}.pooler_output": output.pooler_output.numpy(),
        }
    (folder / "legacy" / "model.safetensors").unlink()  # the very same weights as in `folder`
    return arrays


def t5_model(folder: Path, tokenizer: transformers.T5Tokenizer) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=8,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        initializer_factor=1.0,
    )
    model = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=48, return_tensors="pt").input_ids
        output = model(ids).last_hidden_state
    save(model, folder, max_shard_size="10KB")
    return {"t5.last_hidden_state": output.numpy()}


def save(model: transformers.PreTrainedModel, folder: Path, **options) -> None:
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    clip, t5 = OUT / "clip", OUT / "t5"
    for folder in (clip, t5):  # the other goldens are make_decoder_goldens.py's
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    tokenizer, tokenizer_2 = clip_tokenizer(clip), t5_tokenizer(t5)
    arrays = clip_model(clip, tokenizer) | t5_model(t5, tokenizer_2)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, OUT / "outputs.safetensors")
    ids = {
        "prompts": PROMPTS,
        "clip": tokenizer(PROMPTS, padding="max_length", truncation=True).input_ids,
        "t5": tokenizer_2(PROMPTS, padding="max_length", truncation=True, max_length=48).input_ids,
    }
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    ids["t5_buckets"] = bucket(torch.arange(-199, 200), num_buckets=32, max_distance=128).tolist()
    (OUT / "ids.json").write_text(json.dumps(ids, ensure_ascii=False))


if __name__ == "__main__":
    main()
