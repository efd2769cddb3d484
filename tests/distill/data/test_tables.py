import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.data.records import BadRecord
from distill.data.tables import parquet
from fast_diffusers.errors import UserError


@pytest.fixture
def rows(png, pictures):
    return {"text": [f"picture {i}" for i in range(6)], "image_bytes": [png(picture) for picture in pictures]}


def test_rows_over_files_and_groups(tmp_path, rows, pictures):
    table = pa.table({**rows, "other": list(range(6))})
    pq.write_table(table.slice(0, 4), tmp_path / "a.parquet", row_group_size=3)
    (tmp_path / "sub").mkdir()
    pq.write_table(table.slice(4), tmp_path / "sub" / "b.parquet", row_group_size=1)
    source = parquet(tmp_path)
    assert len(source) == 6
    for index in (5, 0, 3, 2, 4, 1):
        assert source[index].prompt == f"picture {index}"
        np.testing.assert_array_equal(source[index].image, pictures[index])
    assert source[3].name == "a.parquet[group 1, row 0]"
    files = [tmp_path / "a.parquet", str(tmp_path / "sub")]
    assert [parquet(files)[i].prompt for i in range(6)] == rows["text"]


def test_a_sequential_pass_reads_each_group_once(tmp_path, rows, monkeypatch):
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=2)
    source = parquet(tmp_path / "a.parquet")
    opened = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: opened.append(i) or original(self, i, **kw)
    )
    for index in range(6):
        source[index]
    assert opened == [0, 1, 2]


def test_columns_can_be_named_and_images_can_be_structs(tmp_path, rows, pictures):
    images = [{"bytes": data, "path": None} for data in rows["image_bytes"]]
    pq.write_table(pa.table({"caption": rows["text"], "image": images}), tmp_path / "a.parquet")
    source = parquet(tmp_path / "a.parquet", text="caption", image="image")
    np.testing.assert_array_equal(source[1].image, pictures[1])


def test_bad_rows(tmp_path, rows):
    rows["text"][0] = None
    rows["image_bytes"][1] = None
    rows["image_bytes"][2] = b"hello"
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = parquet(tmp_path / "a.parquet")
    for index, message in enumerate(["'text' is empty", "'image_bytes' is empty", "not an image"]):
        with pytest.raises(BadRecord, match=rf"a.parquet\[group 0, row {index}\]: .*{message}"):
            source[index]


def test_damaged_group_is_bad_rows(tmp_path, rows):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(rows), path, row_group_size=3, compression="gzip")
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    source = parquet(path)
    with pytest.raises(BadRecord, match=r"group 0, row 1\]: the row group cannot be read"):
        source[1]
    assert source[4].prompt == "picture 4"


def test_unusable_files(tmp_path, rows):
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column of .*a.parquet 'txt': did you mean 'text'"):
        parquet(tmp_path / "a.parquet", text="txt")
    with pytest.raises(UserError, match=r"gone.parquet does not exist"):
        parquet(tmp_path / "gone.parquet")
    with pytest.raises(UserError, match="empty list"):
        parquet([])
    with pytest.raises(UserError, match="must be a path, not 3"):
        parquet(3)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a.parquet is not a whole parquet file"):
        parquet(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no .parquet files in"):
        parquet(tmp_path / "none")
    pq.write_table(pa.table(rows).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no rows in"):
        parquet(tmp_path / "empty.parquet")
