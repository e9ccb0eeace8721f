"""What transformers finds in its model files is remembered exactly, and only while they stay as they are."""

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.runtime import model_files

HOME = """
import os
from functools import lru_cache
calls = []
@lru_cache
def create_import_structure_from_path(path):
    calls.append(os.fspath(path))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    found = {frozenset({"torch"}): {"a": {"A", "B"}}}
    for name in sorted(os.listdir(folder)):
        inside = os.path.join(folder, name)
        if os.path.isdir(inside):
            found[name] = create_import_structure_from_path(inside)
        elif name != "__init__.py":
            found.setdefault(frozenset(), {})[name] = set(open(inside).read().split())
    return found
"""


@pytest.fixture
def transformers(tmp_path, monkeypatch):
    """A package that looks through its model files as transformers does; the folder of these files."""
    models = tmp_path / "site" / "looks" / "models"
    (models / "olmoe").mkdir(parents=True)
    (models.parent / "utils.py").write_text(HOME)
    (models.parent / "__init__.py").write_text("")
    (models / "__init__.py").write_text("")
    (models / "olmoe" / "modeling.py").write_text("Model Head")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(model_files, "_HOME", "looks.inside.utils")
    (models.parent / "inside").mkdir()
    (models.parent / "inside" / "__init__.py").write_text("")
    (models.parent / "utils.py").rename(models.parent / "inside" / "utils.py")
    yield models
    forget()


def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "looks"]:
        del sys.modules[name]


def look(models):
    """What a new process finds, and the folders that it read for that."""
    forget()
    with model_files.one_look_at_models():
        from looks.inside import utils

        found = utils.create_import_structure_from_path(models)
        assert utils.create_import_structure_from_path(os.fspath(models / "__init__.py")) is found
    assert hasattr(utils.create_import_structure_from_path, "cache_info")
    return found, [os.path.relpath(call, models) for call in utils.calls]


def test_looks_once_and_then_not_at_all(transformers):
    found, calls = look(transformers)
    assert calls == [".", "olmoe"]
    assert found[frozenset({"torch"})] == {"a": {"A", "B"}}
    assert found["olmoe"][frozenset()] == {"modeling.py": {"Model", "Head"}}
    again, calls = look(transformers)
    assert again == found and list(again) == list(found) and calls == []


@pytest.mark.parametrize("change", ["edited", "touched", "added", "removed", "folder", "reader"])
def test_looks_again_after_any_change(transformers, change):
    before, _ = look(transformers)
    file = transformers / "olmoe" / "modeling.py"
    if change == "edited":
        file.write_text("Model Foot")
        os.utime(file, ns=(1, 1))
    elif change == "touched":
        os.utime(file, ns=(2, 2))
    elif change == "added":
        (transformers / "olmoe" / "more.py").write_text("More")
    elif change == "removed":
        file.unlink()
    elif change == "folder":
        (transformers / "mixtral").mkdir()
        (transformers / "mixtral" / "modeling.py").write_text("Mixtral")
    else:
        reader = transformers.parent / "inside" / "utils.py"
        reader.write_text(reader.read_text() + "# another\n")
    after, calls = look(transformers)
    assert calls and (after == before) is (change in ("touched", "reader"))
    assert look(transformers) == (after, [])


@pytest.mark.parametrize("broken", ["no JSON", "[]", '{"state": 1}', "null"])
def test_a_record_that_cannot_be_used_is_written_anew(transformers, broken):
    found, _ = look(transformers)
    (record,) = (transformers.parents[2] / "home" / "starts").iterdir()
    record.write_text(broken)
    assert look(transformers) == (found, [".", "olmoe"])
    assert look(transformers) == (found, [])


@pytest.mark.parametrize("odd", ["a value", "no folder", "no function", "no cache"])
def test_what_looks_otherwise_is_read_every_time(transformers, tmp_path, monkeypatch, odd):
    reader = transformers.parent / "inside" / "utils.py"
    text = reader.read_text()
    if odd == "a value":
        reader.write_text(text.replace('{"A", "B"}', "3"))
    elif odd == "no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "file" / "home"))
    elif odd == "no cache":
        reader.write_text(text.replace("@lru_cache\n", ""))
    else:
        reader.write_text("")
    for _ in range(2):
        forget()
        with model_files.one_look_at_models():
            from looks.inside import utils
        if odd == "no function":
            assert not hasattr(utils, "create_import_structure_from_path")
            continue
        with model_files.one_look_at_models():
            found = utils.create_import_structure_from_path(transformers)
        assert found["olmoe"] and utils.calls


names = st.text(max_size=5)
needs = st.dictionaries(
    st.frozensets(names, max_size=3),
    st.dictionaries(names, st.sets(names, max_size=3), max_size=3),
    max_size=3,
)
found = st.recursive(
    needs, lambda inner: st.builds(lambda a, b: a | b, needs, st.dictionaries(names, inner, max_size=3))
)


@given(found)
def test_a_record_holds_all_in_order(found):
    decoded = model_files._decode(model_files._encode(found))
    assert decoded == found and list(decoded) == list(found)
