import json
import logging
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from distill.data.bad_records import GoodRecords, jsonl_log
from distill.data.records import BadRecord, Record
from fast_diffusers.errors import UserError


class Holes:
    """A source of n records of which some are bad."""

    identity = "holes"

    def __init__(self, n, bad):
        self.n, self.bad, self.reads = n, set(bad), []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise BadRecord(f"record {index}", "hole")
        return Record(np.zeros((1, 1, 1), np.uint8), str(index), f"record {index}")


def test_the_next_good_record_replaces_a_bad_one_in_any_order():
    expected = {0: 0, 1: 3, 2: 3, 3: 3, 4: 4, 5: 0}
    for seed in range(5):
        records = GoodRecords(Holes(6, {1, 2, 5}), max_bad_fraction=0.5)
        order = random.Random(seed).sample(range(6), 6)
        assert {index: records.get(index)[0] for index in order} == expected
        assert records.get(1)[1].prompt == "3"
        assert set(records.bad) == {1, 2, 5}


def test_a_bad_record_is_read_counted_and_reported_once(tmp_path, caplog):
    source = Holes(200, {7})
    records = GoodRecords(source, on_bad=jsonl_log(tmp_path / "bad.jsonl"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert records.get(7)[0] == 8
    assert source.reads.count(7) == 1
    assert caplog.messages == ["bad record 1 of 1 seen: record 7: hole"]
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"index": 7, "name": "record 7", "why": "hole"}]


def test_too_many_bad_records_stop():
    records = GoodRecords(Holes(1000, range(0, 1000, 4)), max_bad_fraction=0.2)
    message = r"of the \d+ records seen are bad, more than the allowed fraction 0.2: record 0: hole; .* and \d+ more"
    with pytest.raises(UserError, match=message):
        for index in range(1000):
            records.get(index)
    assert len(records.bad) == 201


def test_a_tolerable_fraction_goes_on():
    records = GoodRecords(Holes(1000, range(0, 1000, 10)), max_bad_fraction=0.11)
    assert sum(records.get(index)[0] != index for index in range(1000)) == 100


def test_all_bad_stops_even_when_any_fraction_is_allowed():
    with pytest.raises(UserError, match=r"all 5 records are bad, among them record 2: hole; .* and 2 more"):
        GoodRecords(Holes(5, range(5)), max_bad_fraction=1.0).get(2)


def test_threads_count_each_record_once():
    records = GoodRecords(Holes(500, range(0, 500, 20)))
    with ThreadPoolExecutor(8) as pool:
        read = [index for index, _ in pool.map(records.get, list(range(500)) * 3)]
    assert len(records.bad) == 25 and read == [i + (i % 20 == 0) for i in range(500)] * 3


@pytest.mark.parametrize("fraction", [-0.1, 1.1, "x"])
def test_bad_fraction_setting(fraction):
    with pytest.raises(UserError, match="max_bad_fraction must be between 0 and 1"):
        GoodRecords(Holes(5, ()), max_bad_fraction=fraction)
