"""Text encoders and their tokenizers, in Paddle, reading the files of `transformers`."""

from fast_diffusers.text_encoders.clip import CLIPTextModel
from fast_diffusers.text_encoders.t5 import T5EncoderModel
from fast_diffusers.text_encoders.tokenizers import CLIPTokenizer, T5Tokenizer

__all__ = ["CLIPTextModel", "CLIPTokenizer", "T5EncoderModel", "T5Tokenizer"]
