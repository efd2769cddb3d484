"""Tiny models and pipelines of every family; those of the pipelines' tests serve here too."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import paddle
import pytest
from ppdiffusers import FlowMatchEulerDiscreteScheduler as PPDiffusersScheduler
from ppdiffusers import StableDiffusion3Pipeline as PPDiffusersPipeline
from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel as PPDiffusersSD3

import cinn_infer
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.models import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.models import SD3Transformer2DModel as OurSD3
from fast_diffusers.pipelines import SanaLabelPipeline, SanaPipeline, SanaSprintPipeline, StableDiffusion3Pipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from fast_diffusers.text_encoders import Gemma2Model, GemmaTokenizer


def _module(*parts):
    path = Path(__file__).parents[1].joinpath(*parts)
    spec = importlib.util.spec_from_file_location("cinn_infer_tests_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _module("fast_diffusers", "pipelines", "conftest.py")
caching = _module("fast_diffusers", "caching", "conftest.py")
text_assets, sd3, theirs = tiny.text_assets, tiny.sd3, tiny.theirs
qwen, z, qwen_tokenizer = tiny.qwen, tiny.z, tiny.qwen_tokenizer

SANA = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=1,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=24,
    sample_size=4,
)


def sana_transformer(**config):
    return tiny.moved(SanaTransformer2DModel(**SANA | config), 1)


def sana_pipeline(text_assets, kind=SanaPipeline, scheduler=None, **config):
    paddle.seed(2)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        decoder_norm_types=("rms_norm",) * 2,
        decoder_act_fns=("silu",) * 2,
    )
    sizes = dict(hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = GemmaTokenizer.from_pretrained(text_assets / "gemma2" / "tokenizer")
    encoder = Gemma2Model(vocab_size=450, num_key_value_heads=1, head_dim=8, sliding_window=8, **sizes)
    parts = dict(tokenizer=tokenizer, text_encoder=tiny.moved(encoder, 3, 0.3), vae=tiny.moved(vae, 4))
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    return tiny.quiet(kind(transformer=sana_transformer(**config), scheduler=scheduler, **parts))


def sana_label_pipeline():
    model = sana_transformer(in_channels=1, out_channels=1, caption_channels=10, sample_size=8)
    return tiny.quiet(SanaLabelPipeline(FlowMatchEulerDiscreteScheduler(), model))


@dataclass
class Family:
    """A model and what a denoiser of it is called with."""

    model: paddle.nn.Layer
    channels: int
    widths: dict
    guidance: float | None = None

    def predict(self, batch=2, height=8, width=4, text=3):
        """The velocity, from inputs that are functions of the sizes."""
        paddle.seed(7)
        x = paddle.randn([batch, self.channels, height, width])
        cond = {
            name: paddle.randn([batch, size]) if name.startswith("pooled") else paddle.randn([batch, text, size])
            for name, size in self.widths.items()
        }
        t = paddle.linspace(0.3, 0.9, batch)
        with paddle.no_grad():
            return denoiser_for(self.model)(x, t, Cond(cond), guidance=self.guidance)


def flux_family():
    widths = dict(prompt_embeds=8, pooled_prompt_embeds=8)
    sizes = dict(in_channels=16, joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True)
    return Family(tiny.tiny_transformer(**sizes), 4, widths, 3.5)


FAMILIES = {
    "flux": flux_family,
    "sd3": lambda: Family(tiny.moved(OurSD3(**tiny.SD3), 1), 4, dict(prompt_embeds=32, pooled_prompt_embeds=24)),
    "ppdiffusers_sd3": lambda: Family(
        tiny.moved(PPDiffusersSD3(**tiny.SD3), 1), 4, dict(prompt_embeds=32, pooled_prompt_embeds=24)
    ),
    "sana": lambda: Family(sana_transformer(), 4, dict(prompt_embeds=24)),
    "qwen_image": lambda: Family(tiny.moved(tiny.qwen_transformer(), 3), 4, dict(prompt_embeds=24)),
    "z_image": lambda: Family(tiny.moved(tiny.z_transformer(), 3), 4, dict(prompt_embeds=24)),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


@pytest.fixture
def make_pipeline(request, text_assets):
    """The tiny pipeline of a family, from text to image, by its name."""

    def with_ppdiffusers():
        parts = {
            name: getattr(request.getfixturevalue("sd3"), name) for name in StableDiffusion3Pipeline.component_types
        }
        return tiny.quiet(StableDiffusion3Pipeline(**parts | {"transformer": FAMILIES["ppdiffusers_sd3"]().model}))

    makers = {
        "flux": tiny.flux_pipeline,
        "sd3": lambda: request.getfixturevalue("sd3"),
        "ppdiffusers_sd3": with_ppdiffusers,
        "sana": lambda: sana_pipeline(text_assets),
        "qwen_image": lambda: request.getfixturevalue("qwen"),
        "z_image": lambda: request.getfixturevalue("z"),
    }
    return lambda family: makers[family]()


@pytest.fixture
def sprint(text_assets):
    """With a ControlNet."""
    options = dict(guidance_embeds=True, qk_norm="rms_norm_across_heads", num_layers=2)
    pipe = sana_pipeline(text_assets, SanaSprintPipeline, SCMScheduler(), **options)
    controlnet = tiny.moved(SanaControlNetModel.from_transformer(pipe.transformer, num_layers=1), 5)
    return tiny.quiet(SanaSprintPipeline(**pipe.components | {"controlnet": controlnet}))


@pytest.fixture
def ppdiffusers_sd3_pipeline():
    """(a function that makes latents, ppdiffusers' own StableDiffusion3Pipeline)."""
    paddle.seed(0)
    model = tiny.moved(PPDiffusersSD3(**tiny.SD3), 1)
    names = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae"]
    pipe = tiny.quiet(PPDiffusersPipeline(model, PPDiffusersScheduler(), **dict.fromkeys(names)))
    text, pooled = paddle.randn([1, 5, 32]), paddle.randn([1, 24])
    embeds = dict(
        prompt_embeds=text,
        negative_prompt_embeds=-text,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=-pooled,
        latents=paddle.randn([1, 4, 4, 4]),
    )

    def generate(**options):
        return pipe(height=32, width=32, guidance_scale=3.0, output_type="latent", **embeds, **options).images

    return generate, pipe


@pytest.fixture
def cached():
    """Families, settings of every caching method, and the loop over steps that the tests of caches have."""
    return caching


@pytest.fixture
def flux():
    return flux_family()


@pytest.fixture
def sana():
    return FAMILIES["sana"]()


@pytest.fixture
def sana_label():
    return sana_label_pipeline()


@pytest.fixture(scope="session")
def make_sana_label():
    return sana_label_pipeline


@pytest.fixture(scope="session")
def onnx_export(tmp_path_factory):
    """Folder of an exported label pipeline, with ONNX files; not to be changed."""
    pytest.importorskip("paddle2onnx", reason="the extra [export] is not installed")
    folder = tmp_path_factory.mktemp("onnx_export") / "pipeline"
    cinn_infer.export(sana_label_pipeline(), folder, "onnx")
    return folder
