"""What all models share: gradient checkpointing, loading and saving."""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from ppdiffusers.configuration_utils import ConfigMixin
from ppdiffusers.models.modeling_utils import ModelMixin

from fast_diffusers.errors import UserError
from fast_diffusers.models.checkpoint_io import Checkpoint, find_checkpoint, load_into, read_json, save_from, write_text


class PretrainedModel(ModelMixin, ConfigMixin):
    """A ppdiffusers model whose weights stream from and to safetensors in HF diffusers' or Paddle's layout.

    `weight_stems` names the weight files of each layout, without their ending. A model that runs its blocks by
    `_run_block` supports gradient checkpointing and says so in `_supports_gradient_checkpointing`.
    """

    weight_stems = MappingProxyType({"paddle": "diffusion_paddle_model", "diffusers": "diffusion_pytorch_model"})

    gradient_checkpointing = False

    def _set_gradient_checkpointing(self, module: nn.Layer, value: bool = False) -> None:
        """What ppdiffusers' enable_ and disable_gradient_checkpointing call for every sublayer."""
        if module is self:
            self.gradient_checkpointing = value

    def _run_block(self, block: nn.Layer, *inputs: Any) -> Any:
        """block(*inputs), checkpointed where that is switched on and a gradient will be asked for."""
        if not (self.gradient_checkpointing and paddle.in_dynamic_mode() and paddle.is_grad_enabled()):
            return block(*inputs)
        weights = tuple(weight for weight in block.parameters() if not weight.stop_gradient)
        tensors = [x for x in inputs if isinstance(x, paddle.Tensor)]
        if not weights and all(x.stop_gradient for x in tensors):
            return block(*inputs)
        # Adapters are switched by context variables: the recomputation must see them as the forward did, although the
        # backward runs outside of the `with` statement. Weights are passed for Paddle to see what needs a gradient.
        context = contextvars.copy_context()

        def run(inputs: tuple, _weights: tuple) -> Any:
            return context.run(block, *inputs)

        return recompute(run, inputs, weights, use_reentrant=False, preserve_rng_state=False)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike,
        subfolder: str | None = None,
        paddle_dtype: str | paddle.dtype | None = None,
    ) -> Self:
        """Load a model from a local directory, in evaluation mode on the current device.

        Args:
            directory: where config.json and the weights lie, in diffusers' or Paddle's layout, sharded or not.
            subfolder: a folder inside it.
            paddle_dtype: dtype of the model, whatever the file's; None is Paddle's default dtype, float32.

        Raises:
            UserError: a missing or broken file, another class of model, or weights that do not fit; each is named.
        """
        folder = Path(directory, subfolder or "")
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder: give a local directory with config.json and safetensors weights"
            )
        config = read_json(folder / cls.config_name)
        stored_class = config.get("_class_name", cls.__name__)
        if stored_class != cls.__name__:
            raise UserError(f"{folder} holds a {stored_class}, not a {cls.__name__}")
        checkpoint = cls._adapt_checkpoint(find_checkpoint(folder, cls.weight_stems))
        with paddle.LazyGuard(), _default_dtype(paddle_dtype):  # no memory and no random numbers until values come
            model = cls.from_config(config)
        load_into(model, checkpoint, ignore=cls._keys_to_ignore_on_load_unexpected or ())
        model.eval()
        return model

    @classmethod
    def _adapt_checkpoint(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Put the model's own names in place of those that other versions of its files use; here there are none."""
        return checkpoint

    def save_pretrained(
        self, directory: str | PathLike, layout: str = "paddle", max_shard_size: int | str = "10GB"
    ) -> None:
        """Write config.json and the weights, without adapters, in the model's dtype.

        Args:
            directory: made if it does not exist; files there are replaced only by complete ones.
            layout: "paddle", or "diffusers" for files that HF diffusers and PyTorch read.
            max_shard_size: bytes, or a text such as "10GB"; larger models are split and get an index.
        """
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: give a directory to save the model in")
        if layout not in self.weight_stems:
            raise UserError(f"unknown layout {layout!r}: choose one of {', '.join(self.weight_stems)}")
        save_from(self, folder, self.weight_stems[layout], layout, max_shard_size)
        write_text(folder / self.config_name, self.to_json_string(to_diffusers=layout == "diffusers"))


@contextmanager
def _default_dtype(dtype: str | paddle.dtype | None) -> Iterator[None]:
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)
