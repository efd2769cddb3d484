import pytest
from omegaconf import OmegaConf

from distill.data.sources import open_source
from fast_diffusers.errors import UserError


def test_opens_by_kind(tmp_path, png, pictures):
    assert len(open_source({"kind": "digits", "split": "test"})) == 355
    (tmp_path / "a.png").write_bytes(png(pictures[0]))
    config = OmegaConf.create({"kind": "image_folder", "dir": str(tmp_path), "captions": "folder"})
    assert open_source(config)[0].prompt == tmp_path.name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "data needs a kind: one of digits, mnist, image_folder, laion_list, parquet"),
        ({"kind": "digit"}, "unknown data kind 'digit': did you mean 'digits'"),
        ({"kind": ["digits"]}, "unknown data kind"),
        ({"kind": "mnist", "foldr": "x"}, "unknown mnist setting 'foldr': did you mean 'folder'"),
        ({"kind": "digits", "zzz": 1}, "unknown digits setting 'zzz': choose from split"),
        ({"kind": "image_folder"}, "data kind 'image_folder' needs dir"),
    ],
)
def test_mistakes(config, message):
    with pytest.raises(UserError, match=message):
        open_source(config)
