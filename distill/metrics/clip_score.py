"""CLIP score: how well images match their prompts (Radford et al. 2021; Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from PIL import Image
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.text_encoders import CLIPTextModel, CLIPTokenizer
from fast_diffusers.text_encoders.clip import CLIPEncoder

PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

# What transformers leaves out of a config.json because it is the default.
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_KEYS = (
    *TEXT_DEFAULTS,
    *("vocab_size", "num_hidden_layers", "max_position_embeddings", "hidden_act", "layer_norm_eps", "eos_token_id"),
)


class VisionEmbeddings(nn.Layer):
    """Patch embeddings after a class token, plus positions."""

    def __init__(self, channels: int, image_size: int, patch_size: int):
        super().__init__()
        self.class_embedding = self.create_parameter([channels])
        self.patch_embedding = nn.Conv2D(3, channels, patch_size, stride=patch_size, bias_attr=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, channels)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose([0, 2, 1])
        first = self.class_embedding.expand([pixels.shape[0], 1, patches.shape[-1]])
        return paddle.concat([first, patches], axis=1) + self.position_embedding.weight


class VisionTransformer(nn.Layer):
    """The image tower; the output is the class token's state [B, D]."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        channels, epsilon = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = VisionEmbeddings(channels, config["image_size"], config["patch_size"])
        self.pre_layrnorm = nn.LayerNorm(channels, epsilon=epsilon)  # the checkpoints' spelling
        self.encoder = CLIPEncoder(
            config["num_hidden_layers"],
            channels,
            config["intermediate_size"],
            config["num_attention_heads"],
            config["hidden_act"],
            epsilon,
        )
        self.post_layernorm = nn.LayerNorm(channels, epsilon=epsilon)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(pixels))
        x = self.encoder(x, paddle.zeros([x.shape[1], x.shape[1]]))
        return self.post_layernorm(x[:, 0])


class CLIPModel(CLIPTextModel):
    """Both towers and their projections, read by `from_pretrained` from the folder of a `transformers` CLIPModel."""

    model_type = "clip"
    _keys_to_ignore_on_load_unexpected = (r"\.position_ids$", r"^logit_scale$")

    @register_to_config
    def __init__(self, text_config: Mapping[str, Any], vision_config: Mapping[str, Any], projection_dim: int = 512):
        text = TEXT_DEFAULTS | text_config
        super().__init__(**{key: text[key] for key in TEXT_KEYS if key in text})
        vision = VISION_DEFAULTS | vision_config
        self.image_size: int = vision["image_size"]
        self.vision_model = VisionTransformer(vision)
        self.visual_projection = nn.Linear(vision["hidden_size"], projection_dim, bias_attr=False)
        self.text_projection = nn.Linear(text["hidden_size"], projection_dim, bias_attr=False)

    def embed_texts(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, L] -> unit vectors [B, P]."""
        return F.normalize(self.text_projection(self(input_ids).pooler_output), axis=-1)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S], S the model's image size -> unit vectors [B, P]."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), axis=-1)


class ClipScorer:
    """Cosine similarity of images and prompts under a CLIP checkpoint.

    Args:
        directory: a folder that holds a `transformers` CLIPModel (config.json, model.safetensors) and its tokenizer,
            such as a copy of openai/clip-vit-base-patch32 or laion/CLIP-ViT-g-14.
    """

    def __init__(self, directory: str | Path):
        self.model = CLIPModel.from_pretrained(directory)
        self.tokenizer = CLIPTokenizer.from_pretrained(directory)
        self.identity = str(Path(directory).resolve())

    @paddle.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each image uint8 [B, H, W, C] with its prompt, float64 [B], not scaled by 100."""
        pixels = np.stack([preprocess(image, self.model.image_size) for image in images])
        image_vectors = self.model.embed_images(paddle.to_tensor(pixels))
        text_vectors = self.model.embed_texts(self.tokenizer(list(prompts)))
        return (image_vectors * text_vectors).sum(-1).numpy().astype(np.float64)


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 1 or 3] -> float32 [3, size, size], as CLIP wants it.

    The shorter side is resized (bicubic) to `size`, the longer one rounded down, then the centre is cropped, as
    transformers' CLIPImageProcessor does with Pillow.
    """
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return ((pixels - PIXEL_MEAN) / PIXEL_STD).transpose(2, 0, 1)
