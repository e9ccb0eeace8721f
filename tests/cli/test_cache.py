import json

import pytest


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache with one entry of each kind."""
    root = tmp_path / "home"
    monkeypatch.setenv("GANGLINE_HOME", str(root))
    (root / "packs" / "abc").mkdir(parents=True)
    (root / "packs" / "abc" / "experts.bin").write_bytes(bytes(1000))
    (root / "packs" / "abc" / "index.json").write_bytes(bytes(24))
    (root / "machine").mkdir()
    (root / "machine" / "m.json").write_bytes(bytes(10))
    return root


def test_list_adds_up(gangline, home):
    result = gangline("cache", "ls", "--json")
    found = json.loads(result.stdout)
    sizes = {entry["name"]: entry["bytes"] for entry in found["entries"]}
    assert sizes == {"machine/m.json": 10, "packs/abc": 1024}
    assert found["bytes"] == 1034
    assert found["folder"] == str(home)


def test_list_as_a_table(gangline, home):
    lines = gangline("cache", "ls").stdout.splitlines()
    assert any("packs/abc" in line and "1.00 KiB" in line for line in lines)


def test_remove_one(gangline, home):
    result = gangline("cache", "rm", "packs/abc", "--yes")
    assert result.exit_code == 0, result.stderr
    assert not (home / "packs" / "abc").exists()
    assert (home / "machine" / "m.json").exists()


def test_remove_asks(gangline, home):
    result = gangline("cache", "rm", "--all", input="n\n")
    assert result.exit_code == 130
    assert (home / "packs" / "abc").exists()
    result = gangline("cache", "rm", "--all", input="y\n")
    assert result.exit_code == 0, result.stderr
    assert json.loads(gangline("cache", "ls", "--json").stdout)["entries"] == []


@pytest.mark.parametrize("name", ["packs", "packs/../machine", "../x", "/etc", "packs/abc/experts.bin", ""])
def test_only_listed_names_are_removed(gangline, only_error, home, name):
    result = gangline("cache", "rm", name, "--yes")
    assert result.exit_code == 2
    only_error(result)
    assert (home / "packs" / "abc" / "experts.bin").exists()
    assert (home / "machine" / "m.json").exists()


def test_a_link_is_removed_and_not_followed(gangline, home, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (home / "packs" / "link").symlink_to(outside)
    result = gangline("cache", "rm", "packs/link", "--yes")
    assert result.exit_code == 0, result.stderr
    assert not (home / "packs" / "link").is_symlink()
    assert (outside / "kept").exists()


def test_damaged_pack_fails_verification(gangline, home):
    result = gangline("cache", "verify", "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["ok"] is False
    (entry,) = found["entries"]
    assert entry["name"] == "packs/abc"
    assert entry["detail"]


def test_only_packs_can_be_verified(gangline, only_error, home):
    result = gangline("cache", "verify", "machine/m.json")
    assert result.exit_code == 2
    assert "machine/m.json" in only_error(result)


def test_nothing_to_verify_is_fine(gangline, tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path))
    assert gangline("cache", "verify").exit_code == 0
