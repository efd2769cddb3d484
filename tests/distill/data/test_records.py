import pytest

from distill.data.records import files_identity, one_of, user_path
from fast_diffusers.errors import UserError


def test_user_path(tmp_path):
    assert user_path(str(tmp_path), "x", folder=True) == tmp_path
    with pytest.raises(UserError, match=r"^x must be a file: .* is not a file$"):
        user_path(tmp_path, "x", folder=False)


def test_one_of():
    assert one_of("a", ["a", "b"], "letter") == "a"
    with pytest.raises(UserError, match=r"^unknown letter 'q': choose from a, b$"):
        one_of("q", ["a", "b"], "letter")


def test_files_identity_is_relative_and_survives_missing_files(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    names = ["gone"]
    assert files_identity("k", tmp_path / "one", names) == files_identity("k", tmp_path / "two", names)
    assert files_identity("k", tmp_path, names) != files_identity("k", tmp_path, names, "setting")
