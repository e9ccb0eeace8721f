"""Records in the cache folder are whole or not there."""

import json

import pytest

from gangline.core.home import write_record


def test_a_record_replaces_another_at_once_or_leaves_it(tmp_path):
    file = tmp_path / "record.json"
    write_record(file, {"a": [1, 2]})
    write_record(file, {"a": [3]})
    with pytest.raises(TypeError):
        write_record(file, {"a": [4], "b": object()})
    assert json.loads(file.read_text()) == {"a": [3]}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
