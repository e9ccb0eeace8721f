"""From traces to a page: what is computed, what is said to be missing, and that the page stands by itself."""

import json
import re
import sys

import numpy as np
import pytest

from gangline.core.errors import UsageError
from gangline.reports.build import build_report
from gangline.reports.figure import Line, chart, figure, png
from gangline.reports.page import page
from gangline.reports.section import Picture
from gangline.reports.sections.caching import BOUND, recommendation
from gangline.reports.sections.together import clustered
from gangline.reports.sections.training import common_rows
from gangline.reports.study import open_study, sample
from gangline.reports.write import plain, write_report
from gangline.traces import TraceError, open_trace
from gangline.traces.expert_outputs import ExpertOutputs
from reports.written import K, N, by_token, write_trace


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def sections(study):
    return {section.name: section for section in build_report(study).sections}


def test_random_routing_is_chance_everywhere(rng, tmp_path):
    labels = [{"domain": "ab"[n % 2]} for n in range(16)]
    study = open_study([write_trace(tmp_path / "t", rng, docs=16, labels=labels)])
    found = sections(study)
    assert study.group_kind == "domain" and study.groups == ("a", "b")
    assert max(one["divergence"] for one in found["groups"].numbers["layers"]) < 0.03
    explained = [one["explained"] for one in found["tokens"].numbers["context_independence"]]
    assert np.abs(explained).max() < 0.03
    srp = found["locality"].numbers["srp"][1]
    assert srp["window"] == 16 and srp["srp"] == pytest.approx(srp["chance"]["srp"], abs=0.05)
    assert found["together"].numbers["coactivation"][0]["excess"] < 0.2
    repeats = found["together"].numbers["repetition"][0]
    assert repeats["overlap"] == pytest.approx(K / N, abs=0.1)


def test_planted_structure_is_reported(rng, tmp_path):
    labels = [{"domain": "ab"[n % 2]} for n in range(12)]

    def route(table, layer):
        low = 4 * table.labels["domain"].astype(int)
        return np.stack([low + table.input_id % 4, low + (table.input_id + 1) % 4], axis=1)

    found = sections(open_study([write_trace(tmp_path / "t", rng, docs=12, labels=labels, route=route)]))
    groups = found["groups"].numbers
    assert all(one["divergence"] == pytest.approx(1) for one in groups["layers"])
    assert groups["discovered_layers"] == [0, 1, 2]
    assert all(one["divergence"] == pytest.approx(1) for one in groups["matched"][0]["layers"])
    assert found["together"].numbers["transition"][0]["share"] > 0.4


def test_a_router_of_tokens_is_seen_as_one(rng, tmp_path):
    found = sections(open_study([write_trace(tmp_path / "t", rng, route=by_token)]))
    tokens = found["tokens"].numbers
    assert [one["explained"] for one in tokens["context_independence"]] == pytest.approx([1, 1, 1])
    assert tokens["vocabulary"]["input_id"][0]["specialisation"] == 1
    assert {t["token"] % N for t in tokens["top_tokens"][0][3]} == {2, 3}
    assert "predict" in " ".join(found["tokens"].lacks)


def test_what_a_trace_lacks_is_said(rng, tmp_path):
    made = build_report(open_study([write_trace(tmp_path / "t", rng)]))
    lacking = {section.name for section in made.sections if section.says is None}
    needs_more = {"languages", "phases", "training", "super_experts", "hidden_control"}
    assert lacking == {"caching", "router_entropy", "groups"} | needs_more
    assert all(section.lacks for section in made.sections if section.says is None)
    text = page(made, {p.name: b"" for s in made.sections for p in s.pictures})
    for word in ("--logits", "--inputs", "--prompts", "--outputs", "lang", "--sim-tokens"):
        assert word in text


def test_everything_recorded_lacks_only_checkpoints(rng, tmp_path):
    labels = [{"lang": "de" if n % 2 else "en", "pair": str(n // 2)} for n in range(8)]
    folder = write_trace(
        tmp_path / "t", rng, labels=labels, logits=True, inputs=True, decode_from=20, route=by_token
    )
    peaks = tuple(tuple(row) for row in np.abs(rng.normal(1, 0.1, size=(3, N))).tolist())
    ExpertOutputs(peaks, (float("nan"),) * 3, (0, 1, 2), 3, 99).save(folder)
    made = build_report(open_study([folder]))
    assert {s.name for s in made.sections if s.says is None} == {"caching", "training"}
    found = {section.name: section.numbers for section in made.sections}
    assert found["languages"]["from_logits"] and found["languages"]["layers"]["de"][0]["sentences"] == 4
    assert found["phases"]["read"] == found["phases"]["written"] == 160
    assert 0 < found["router_entropy"]["layers"][0]["kept"] <= 1
    assert found["super_experts"]["layers"] == 2
    json.dumps(plain(made.to_dict()), allow_nan=False)


def test_several_traces_are_groups(rng, tmp_path):
    folders = [write_trace(tmp_path / name, rng, docs=4) for name in ("english", "french")]
    study = open_study(folders)
    assert study.group_kind == "trace" and study.groups == ("english", "french")
    assert len(study.rows) == 320 and len(np.unique(study.doc_R)) == 8
    assert study.group_D.tolist() == [0] * 4 + [1] * 4
    both = [open_trace(folder).layer(1).ids_RK for folder in folders]
    assert (study.rows.layer(1).ids_RK == np.concatenate(both)).all()
    assert "groups" not in [s.name for s in build_report(study).sections if s.says is None]


def test_labels_of_several_traces_meet_by_name(rng, tmp_path):
    one = write_trace(tmp_path / "one", rng, docs=2, labels=[{"domain": "a"}, {"domain": "b"}])
    other = write_trace(tmp_path / "other", rng, docs=2, labels=[{"domain": "b"}, {"domain": "c"}])
    study = open_study([one, other])
    assert study.groups == ("a", "b", "c") and study.group_D.tolist() == [0, 1, 1, 2]
    assert open_study([one, other], group="trace").groups == ("one", "other")
    with pytest.raises(UsageError, match=r"'lang'.*domain"):
        open_study([one, other], group="lang")


def test_sampling_takes_whole_documents_from_all_groups(rng, tmp_path):
    labels = [{"domain": "a"}] * 6 + [{"domain": "b"}] * 2
    study = open_study([write_trace(tmp_path / "t", rng, labels=labels)], tokens=170)
    assert len(study.rows) == 160 and study.recorded == 320
    assert sorted(study.group_D.tolist()) == [0, 0, 1, 1] and "160 of 320" in study.notes[0]
    whole = open_trace(tmp_path / "t")
    assert len(sample(whole, None, 1)) == 40


def test_other_models_and_broken_folders_are_refused(rng, tmp_path):
    one = write_trace(tmp_path / "one", rng)
    with pytest.raises(TraceError, match="nothing"):
        open_study([tmp_path / "nothing", one])
    meta = json.loads((one / "meta.json").read_text())
    meta["layers"] = meta["layers"][:2]
    other = tmp_path / "other"
    other.mkdir()
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UsageError, match="different models"):
        open_study([other, one])


def test_checkpoints_are_compared_on_common_texts(rng, tmp_path, seed):
    folders = []
    for name, route in (("first", None), ("middle", by_token), ("last", by_token)):
        same = np.random.default_rng(seed)
        folders.append(write_trace(tmp_path / name, same, model=f"made {name}", route=route))
    study = open_study(folders)
    assert list(study.earlier) == ["first", "middle"] and len(study.rows) == 320
    training = sections(study)["training"]
    assert [one["saturation"] for one in training.numbers["middle"]] == [1, 1, 1]
    assert training.numbers["first"][0]["saturation"] == pytest.approx(K / N, abs=0.1)
    other = write_trace(tmp_path / "other", np.random.default_rng(seed + 1), model="made other")
    assert common_rows(open_trace(other), study.rows) is None


def test_sums_alone_report_the_load(rng, tmp_path):
    labels = [{"domain": "ab"[n % 2]} for n in range(8)]
    study = open_study([write_trace(tmp_path / "t", rng, mode="counts", labels=labels)])
    made = build_report(study)
    load = made.sections[1]
    assert load.name == "load" and sum(load.numbers["layers"][0]["counts"]) == 8 * 40 * K
    assert {s.name for s in made.sections if s.says is None} == {"caching", "super_experts", "not_in_sums"}
    assert "within documents" in " ".join(load.lacks)


def test_numbers_repeat_with_the_seed(rng, tmp_path):
    folder = write_trace(tmp_path / "t", rng, docs=4)
    first, second, other = (
        plain(build_report(open_study([folder], seed=seed)).to_dict()) for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.fixture
def made(rng, tmp_path):
    return build_report(open_study([write_trace(tmp_path / "t", rng, model="<b>&made", docs=4)]))


def test_the_folder_holds_page_pictures_and_numbers(made, tmp_path):
    files = write_report(made, tmp_path / "out")
    names = {path.name for path in files}
    assert {"index.html", "report.json", "load_map.png", "srp.png"} <= names
    assert all(path.is_file() for path in files)
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["sections"]["load"]["numbers"]["layers"][0]["counts"]
    for picture in (tmp_path / "out").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_page_stands_by_itself(made, tmp_path):
    (only,) = write_report(made, tmp_path / "deep" / "page.html")
    text = only.read_text()
    assert [path.name for path in only.parent.iterdir()] == ["page.html"]
    assert not re.search(r"<script|<link|https?://|url\(", text)
    assert text.count("<img") == text.count('src="data:image/png;base64,') > 5
    assert all(re.search(r'alt="[^"]{5,}"', tag) for tag in re.findall(r"<img[^>]*>", text))
    assert "&lt;b&gt;&amp;made" in text and "<b>" not in text
    assert 'name="viewport"' in text
    anchors = re.findall(r'href="#(\w+)"', text)
    assert anchors and all(f'id="{anchor}"' in text for anchor in anchors)


def test_places_that_do_not_fit_are_refused(made, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    for place in ("file", "folder.html"):
        with pytest.raises(UsageError, match=place):
            write_report(made, tmp_path / place)


def test_a_missing_matplotlib_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = Picture("p", "a line", chart("t", "x", "y", [Line("a", [0, 1], [1, 2])]))
    with pytest.raises(UsageError, match=r"gangline\[plot\]"):
        png(picture)


def test_a_chart_has_title_axes_and_legend():
    lines = [
        Line("a", [1, 2, 3], [1, None, 3]),
        Line("c", [1, 2, 3], [0, 0, 0], [0] * 3, [1] * 3, chance=True),
    ]
    made = figure(Picture("p", "lines", chart("title", "tokens", "share", lines, shares=True)))
    axes = made.axes[0]
    assert axes.get_title(loc="left") == "title" and axes.get_ylabel() == "share"
    assert [t.get_text() for t in made.legends[0].get_texts()] == ["a", "c"]


def row(policy, slots, rate):
    return {"policy": policy, "slots": slots, "hit_rate": rate}


def test_the_recommendation():
    rows = [
        row("lru", 25, 0.4),
        row("lru", 50, 0.8),
        row("lfu", 50, 0.7),
        row("lru", 75, 0.9),
        row(BOUND, 50, 0.9),
    ]
    found = recommendation(rows, 100, 10)
    assert found["worth"] and (found["slots"], found["policy"], found["slots_per_layer"]) == (50, "lru", 5)
    assert found["gain"] == pytest.approx(0.3) and found["of_bound"] == pytest.approx(8 / 9)
    assert not recommendation([row("lru", 50, 0.52), row(BOUND, 50, 0.6)], 100, 10)["worth"]
    assert recommendation([row(BOUND, 50, 0.6)], 100, 10) == {"worth": False}


def test_clustering_puts_pairs_side_by_side(rng):
    order = rng.permutation(8)
    similar = np.zeros((8, 8))
    for a, b in order.reshape(4, 2):
        similar[a, b] = similar[b, a] = 1
    found = clustered(similar)
    assert sorted(found) == list(range(8))
    assert all(similar[found[n], found[n + 1]] == 1 for n in range(0, 8, 2))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("docs", "tokens"), [(1, 1), (5, 1), (2, 2), (3, 6)])
def test_small_traces_make_a_page_without_warnings(rng, tmp_path, docs, tokens):
    labels = [{"domain": "ab"[n % 2]} for n in range(docs)]
    folder = write_trace(tmp_path / "t", rng, docs=docs, tokens=tokens, labels=labels, logits=True)
    made = build_report(open_study([folder]))
    json.dumps(plain(made.to_dict()), allow_nan=False)
    assert all(section.says or section.lacks for section in made.sections)
