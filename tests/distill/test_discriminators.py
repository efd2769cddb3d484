import paddle
import pytest

from distill.discriminators import PatchDiscriminator, PatchHead


def parameter_count(layer):
    return sum(p.size for p in layer.parameters())


def test_head_of_flux_has_the_published_size():
    """57 heads of 3072 channels are 1.077 B parameters; the count is quadratic in the channels."""

    def count(channels):
        return 2 * (channels**2 + 3 * channels) + channels + 1

    assert parameter_count(PatchHead(64)) == count(64)
    assert 57 * count(3072) == pytest.approx(1.077e9, rel=1e-3)


def test_heads_map_features_to_patch_logits():
    heads = PatchDiscriminator(48, 3)
    features = [paddle.randn([2, 48, 3, 5], dtype="float32") for _ in range(3)]
    assert [list(logits.shape) for logits in heads(features)] == [[2, 1, 3, 5]] * 3
    assert heads.heads[0].entry[1]._num_groups == 16
    with pytest.raises(ValueError, match="3 discriminator heads got 2 feature maps"):
        heads(features[:2])
