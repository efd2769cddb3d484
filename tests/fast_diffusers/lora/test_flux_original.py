from pathlib import Path

import pytest

from fast_diffusers.lora.flux_original import split, translate
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.models.checkpoint_io import StoredTensor

BLOCKS = {
    "double_blocks_0": [
        *(f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2")),
        "img_mod_lin",
        "txt_mod_lin",
    ],
    "single_blocks_0": ["linear1", "linear2", "modulation_lin"],
}
OUTSIDE = ["img_in", "txt_in", "final_layer_linear"] + [
    f"{name}_in_{layer}" for name in ("time", "vector", "guidance") for layer in ("in_layer", "out_layer")
]
ORIGINAL = OUTSIDE + [f"{block}_{layer}" for block, layers in BLOCKS.items() for layer in layers]


def test_every_linear_layer_but_the_last_modulation_has_one_original():
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    linear = [name for name, layer in model.named_sublayers() if type(layer).__name__ == "Linear"]
    translated = [path for layer in ORIGINAL for path in translate(layer)]
    assert sorted(translated) == sorted(set(linear) - {"norm_out.linear"})


def test_dots_may_stay_and_numbers_of_blocks_do():
    assert translate("double_blocks.13.txt_attn.proj") == ("transformer_blocks.13.attn.to_add_out",)
    assert translate("single_blocks_7_modulation_lin") == ("single_transformer_blocks.7.norm.linear",)


@pytest.mark.parametrize("name", ["", "proj_out", "transformer_blocks_0_attn_to_q", "double_blocks_0_other", "x"])
def test_other_names_mean_nothing(name):
    assert translate(name) == ()


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        ("double_blocks_0_txt_attn_qkv", [(0, 4), (4, 8), (8, 12)]),
        ("single_blocks_0_linear1", [(0, 4), (4, 8), (8, 12), (12, 28)]),
    ],
)
def test_parts_share_a_and_divide_the_rows_of_b(layer, rows):
    a = StoredTensor(Path("x"), (2, 4), "F32", 0)
    b = StoredTensor(Path("x"), (rows[-1][1], 2), "F32", 32)
    parts = split(translate(layer), {"A": a, "B": b})
    assert [(part["A"], part["B"]) for part in parts.values()] == [(a, b.rows(*each)) for each in rows]
    assert [path.rsplit(".", 1)[-1] for path in parts][:3] in (
        ["to_q", "to_k", "to_v"],
        ["add_q_proj", "add_k_proj", "add_v_proj"],
    )
