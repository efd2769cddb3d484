from PIL import Image

from distill.cache_report import frontier, plot, table

ROWS = [
    {"name": "no cache", "method": "no cache", "speedup": 1.0, "relative_time": 1.0},
    *(
        {"name": name, "method": name[0], "speedup": speedup, "psnr": psnr, "frechet_same_noise": 1 / psnr}
        for name, speedup, psnr in (("a1", 1.5, 40), ("a2", 2.0, 30), ("b1", 1.4, 40), ("b2", 2.0, 30), ("c", 3, 20))
    ),
]


def test_what_is_on_the_frontier():
    assert frontier(ROWS) == [False, True, True, False, True, True]  # of equal ones, both are
    assert frontier(ROWS, "frechet_same_noise", min) == frontier(ROWS)
    assert frontier([]) == []


def test_table_and_plot(tmp_path):
    rows = [{**row, "pareto": on} for row, on in zip(ROWS, frontier(ROWS), strict=True)]
    lines = table(rows).splitlines()
    assert [line[0] for line in lines[1:]] == [" ", "*", "*", " ", "*", "*"]
    assert "PSNR dB" in lines[0] and "LPIPS" not in lines[0]
    assert lines[1].split() == ["no", "cache", "1.000", "1.00", "-", "-"]
    plot(rows, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 1000
