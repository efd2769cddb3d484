"""Write the metric goldens next to this file: a tiny random CLIP with its outputs, and features of an Inception v3.

They come from PyTorch, torchvision and transformers, which are no dependencies of the project. To repeat:

    python -m venv /tmp/goldens
    /tmp/goldens/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.23.0 pillow
    /tmp/goldens/bin/python tests/assets/make_metric_goldens.py
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.numpy import save_file
from torchvision.models import inception

OUT = Path(__file__).parent / "metrics"
TOKENIZER = Path(__file__).parent / "text_encoders" / "clip" / "tokenizer"
PROMPTS = ["a photo of a small red cat", "an astronaut riding a horse", ""]


def clip_goldens() -> None:
    """A CLIPModel folder, and scores and embeddings of three images with three prompts."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    text |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "hidden_act": "gelu"}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the tiny initial values, where every image looks alike
            if parameter.ndim:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(OUT / "clip")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((70, 50), Image.BICUBIC)) for image in images])
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
    scores = (output.image_embeds * output.text_embeds).sum(-1)
    save_file(
        {
            "images": images,
            "pixels": pixels.numpy(),
            "image_embeds": output.image_embeds.numpy(),
            "text_embeds": output.text_embeds.numpy(),
            "scores": scores.numpy(),
        },
        OUT / "clip_outputs.safetensors",
        metadata={"prompts": json.dumps(PROMPTS)},
    )


def inception_weight(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The value that the test gives the tensor `name`; None for those that do not matter."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("conv.weight"):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name.endswith(("running_var", "bn.weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(("bn.bias", "running_mean")):
        return rng.normal(0, 0.1, shape).astype(np.float32)
    return None


class FidPooling:
    """torch.nn.functional with the pooling of the FID network, for torchvision's inception module."""

    def __init__(self) -> None:
        self.by_maximum = False

    def __getattr__(self, name):
        return getattr(F, name)

    def avg_pool2d(self, x, kernel_size, stride, padding):
        if self.by_maximum:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)


def inception_goldens() -> None:
    """Features of one image under weights that the test can make again."""
    network = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    values = {name: inception_weight(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    network.load_state_dict({name: torch.tensor(a) for name, a in values.items() if a is not None}, strict=False)
    pooling = inception.F = FidPooling()
    network.Mixed_7c.register_forward_pre_hook(lambda *_: setattr(pooling, "by_maximum", True))
    features = []
    network.avgpool.register_forward_hook(lambda _, __, output: features.append(output.flatten(1).numpy()))
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 40, 32)).astype(np.float32)
    with torch.no_grad():
        network(F.interpolate(torch.tensor(image), size=(299, 299), mode="bilinear", align_corners=False))
    save_file({"image": image, "features": features[0]}, OUT / "inception_outputs.safetensors")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    clip_goldens()
    inception_goldens()
