"""Text encoders and their tokenizers, in Paddle, reading the files of `transformers`."""

from fast_diffusers.text_encoders.clip import CLIPTextModel
from fast_diffusers.text_encoders.clip_projection import CLIPTextModelWithProjection
from fast_diffusers.text_encoders.decoder_tokenizers import GemmaTokenizer, Qwen2Tokenizer
from fast_diffusers.text_encoders.gemma2 import Gemma2Model
from fast_diffusers.text_encoders.qwen import Qwen2_5_VLTextModel, Qwen3Model
from fast_diffusers.text_encoders.t5 import T5EncoderModel
from fast_diffusers.text_encoders.tokenizers import CLIPTokenizer, T5Tokenizer

__all__ = [
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "Gemma2Model",
    "GemmaTokenizer",
    "Qwen2Tokenizer",
    "Qwen2_5_VLTextModel",
    "Qwen3Model",
    "T5EncoderModel",
    "T5Tokenizer",
]
