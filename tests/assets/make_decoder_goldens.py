"""Write the goldens of the decoder-only text encoders: tiny random Gemma-2, Qwen3 and Qwen2.5-VL models, tokenizers.

They come from PyTorch `transformers`, which is no dependency of the project. To repeat:

    python -m venv /tmp/goldens
    /tmp/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 sentencepiece protobuf
    /tmp/goldens/bin/python tests/assets/make_decoder_goldens.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from make_text_encoder_goldens import CORPUS, OUT, PROMPTS, save
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

LENGTH = 20
LIMIT = {"gemma2": 50, "qwen3": 120}
TEMPLATE = "<|im_start|>system\nDescribe the image:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
COMMON = {"intermediate_size": 24, "vocab_size": 40, "initializer_range": 0.3, "attn_implementation": "eager"}


def gemma2() -> transformers.PreTrainedModel:
    """Head size apart from hidden size / heads, windows of 5 tokens, logits large enough for their cap to show."""
    config = transformers.Gemma2Config(
        **COMMON,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        sliding_window=5,
    )
    return transformers.Gemma2Model(config)


def qwen3() -> transformers.PreTrainedModel:
    """The last of three layers looks back 6 tokens only."""
    config = transformers.Qwen3Config(
        **COMMON,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return transformers.Qwen3Model(config)


def qwen2_5_vl() -> transformers.PreTrainedModel:
    """With its visual part, as Qwen-Image stores it."""
    text = COMMON | {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"type": "mrope", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, attn_implementation="eager")
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def outputs(name: str, model: transformers.PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """Save a model and return its hidden states, [layers + 1, B, T, D], of which the last is after the final norm."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        result = model.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    save(model, OUT / name, **({"max_shard_size": "10KB"} if name == "qwen3" else {}))
    return {f"{name}.hidden_states": torch.stack(result.hidden_states).numpy()}


def gemma_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """BPE over text whose spaces are ▁, with a byte for whatever it does not know; <bos> in front."""
    learner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"] + [f"<0x{i:02X}>" for i in range(256)]
    words = [f" {word}" for line in CORPUS for word in line.split()]
    learner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=450, special_tokens=special))
    content = json.loads(learner.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    content["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<bos>:0 $A:0", special_tokens=[("<bos>", 2)]).__getstate__()
    )
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    settings |= {"unk_token": "<unk>", "model_max_length": int(1e30), "tokenizer_class": "GemmaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def qwen_tokenizer(folder: Path) -> transformers.Qwen2Tokenizer:
    """Byte-level BPE, special tokens after the vocabulary; nothing in front of a text or behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = transformers.Qwen2Tokenizer(vocab={token: i for i, token in enumerate(alphabet)}).backend_tokenizer
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet))
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=1024)
    tokenizer.add_tokens([tokenizers.AddedToken(f"<|im_{end}|>", special=True) for end in ("start", "end")])
    tokenizer.save_pretrained(folder / "tokenizer_json")
    classic = folder / "tokenizer"  # as Qwen-Image stores it
    classic.mkdir()
    (classic / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (classic / "merges.txt").write_text("\n".join(["#version: 0.2"] + [" ".join(pair) for pair in merges]) + "\n")
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    (classic / "added_tokens.json").write_text(json.dumps(added))
    decoder = {index: {"content": token, "special": True} for token, index in added.items()}
    settings = {"added_tokens_decoder": decoder, "add_bos_token": False, "bos_token": None, "model_max_length": 1024}
    settings |= {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}
    (classic / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def encoded(tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str], **options) -> dict[str, list]:
    return dict(tokenizer(texts, truncation=True, return_token_type_ids=False, **options))


def main() -> None:
    for name in ("gemma2", "qwen3", "qwen2_5_vl"):
        shutil.rmtree(OUT / name, ignore_errors=True)
        (OUT / name).mkdir(parents=True)
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (3, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    mask[2, :7] = 0
    arrays = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    for make in (gemma2, qwen3, qwen2_5_vl):
        arrays |= outputs(make.__name__, make(), ids, mask)
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, OUT / "decoders.safetensors")
    gemma = gemma_tokenizer(OUT / "gemma2" / "tokenizer")
    qwen = qwen_tokenizer(OUT / "qwen3")
    templated = [TEMPLATE.format(prompt) for prompt in PROMPTS]
    golden = {"prompts": PROMPTS, "template": TEMPLATE, "limit": LIMIT}
    for name, tokenizer, texts in (("gemma2", gemma, PROMPTS), ("qwen3", qwen, templated)):
        for side in ("left", "right"):
            tokenizer.padding_side = side
            for padding, some in (("longest", texts[:4]), ("max_length", texts)):
                golden[f"{name}.{side}.{padding}"] = encoded(tokenizer, some, padding=padding, max_length=LIMIT[name])
    (OUT / "decoder_ids.json").write_text(json.dumps(golden, ensure_ascii=False))


if __name__ == "__main__":
    main()
