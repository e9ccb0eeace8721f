"""Recording: what a trace holds is what ran, in every family, attached or not, with crashes in between."""

import dataclasses

import numpy as np
import pytest
import torch

from gangline.core.errors import UsageError
from gangline.models import find_moe, select
from gangline.traces import TraceError, TraceWriter, load_counts, open_trace
from gangline.traces.counts import RoutingCounts
from gangline.traces.describe import describe_recording
from gangline.traces.hooks import observe
from gangline.traces.record import record_generation, record_text
from gangline.traces.recorder import Recorder
from gangline.traces.texts import Item
from tiny_models import VOCABULARY, tiny_model

FAMILIES = "mixtral olmoe qwen3_moe gpt_oss deepseek_v3 granitemoe llama4 dbrx jetmoe phimoe"


def items(seed, lengths=(7, 5), labels=None):
    generator = torch.Generator().manual_seed(seed)
    return [
        Item(
            f"item {n}", tuple(torch.randint(3, VOCABULARY, (s,), generator=generator).tolist()), labels or {}
        )
        for n, s in enumerate(lengths)
    ]


def recorded(model, folder, todo, **header):
    with TraceWriter(folder, describe_recording(model, "tiny", **header)) as writer:
        record_text(model, Recorder(writer, special_ids=[1]), todo)
    return open_trace(folder)


@pytest.mark.parametrize("family", FAMILIES.split())
def test_trace_holds_what_the_router_says(family, seed, tmp_path):
    """Routing recorded at the experts equals our rule on the logits recorded at the router."""
    model = tiny_model(family, seed, dtype=torch.float32).eval()
    todo = items(seed)
    trace = recorded(model, tmp_path / "t", todo, extras=("logits",))
    assert trace.header.complete and len(trace) == 12
    assert trace.tokens.input_id.tolist() == [i for item in todo for i in item.ids]
    assert trace.tokens.position.tolist() == [*range(7), *range(5)]
    assert trace.tokens.next_id[6] == -1 and trace.tokens.next_id[0] == todo[0].ids[1]
    checked = 0
    for block in find_moe(model).blocks:
        rows = trace.layer(block.layer)
        assert rows.weights_RK.dtype == np.float16 and rows.ids_RK.max() < block.geometry.experts
        if block.router_spec is None or block.router_spec.logits != "output":
            continue
        expected = select(torch.from_numpy(rows.logits_RN.astype(np.float32)), block.router_spec)
        ours = np.sort(rows.ids_RK, axis=1)
        # fp16 logits may tie where fp32 ones did not.
        assert (ours == np.sort(expected.ids_TK.numpy(), axis=1)).all(axis=1).mean() > 0.8
        checked += 1
    assert checked or family in ("llama4", "dbrx", "jetmoe", "gpt_oss", "granitemoe")


def test_padding_is_left_out_and_rows_find_their_document(seed, tmp_path):
    model = tiny_model("olmoe", seed, dtype=torch.float32).eval()
    one, two = (item.ids for item in items(seed))
    alone = recorded(model, tmp_path / "alone", items(seed))
    ids = torch.tensor([one, (0, 0, *two)])
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    with TraceWriter(tmp_path / "t", describe_recording(model, "tiny")) as writer:
        recorder = Recorder(writer)
        with (
            observe(model, recorder),
            recorder.documents(["a", "b"], {"lang": ["en", "de"]}),
            torch.no_grad(),
        ):
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            model(input_ids=ids, attention_mask=mask, position_ids=position_ids)
    trace = open_trace(tmp_path / "t")
    assert [d.tokens for d in trace.documents] == [7, 5]
    assert [d.sha256 for d in trace.documents] == [d.sha256 for d in alone.documents]
    assert trace.tokens.position.tolist() == [*range(7), *range(5)]
    assert trace.header.labels == {"lang": ("en", "de")}
    assert trace.tokens.labels["lang"].tolist() == [0] * 7 + [1] * 5
    for number in trace.layers:
        # Padding changes the last bits of attention, which may tip a token.
        assert (trace.layer(number).ids_RK == alone.layer(number).ids_RK).all(1).mean() > 0.8
    assert len(trace.passes) == 1 and sum(trace.passes[0].indices(99)[1:2]) == 12


def test_generation_has_one_prefill_and_one_pass_per_token(seed, tmp_path):
    model = tiny_model("qwen3_moe", seed, dtype=torch.float32).eval()
    with TraceWriter(tmp_path, describe_recording(model, "tiny", source="generation")) as writer:
        # No token ends an answer: forbidding one until then would have another follow than the likeliest.
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        record_generation(model, Recorder(writer), items(seed), settings=settings)
    trace = open_trace(tmp_path)
    assert trace.tokens.phase.tolist() == [0] * 7 + [1] * 4 + [0] * 5 + [1] * 4
    assert [s.stop - s.start for s in trace.passes] == [7, 1, 1, 1, 1, 5, 1, 1, 1, 1]
    # The model was greedy, so what it thought likeliest is what came next.
    decoded = trace.tokens.phase == 1
    follows = decoded & (trace.tokens.next_id >= 0)
    assert (trace.tokens.pred_id[follows] == trace.tokens.next_id[follows]).all()
    events = list(trace.events())
    assert len(events) == 10 * len(trace.layers)
    assert [e.layer for e in events[: len(trace.layers)]] == list(trace.layers)
    assert events[0].phase == "prefill" and events[-1].phase == "decode"
    for event in events:
        assert sum(event.counts) == event.tokens * trace.header.top_k[event.layer]


def test_recording_does_not_change_the_answer(seed, tmp_path):
    model = tiny_model("switch_transformers", seed, dtype=torch.float32).eval()
    ids = torch.tensor([items(seed)[0].ids])
    before = model.get_encoder()(ids).last_hidden_state
    header = describe_recording(model, "tiny", stack="encoder")
    with TraceWriter(tmp_path, header) as writer:
        recorder = Recorder(writer)
        with observe(model, recorder, "encoder"), recorder.documents(["x"]):
            during = model.get_encoder()(ids).last_hidden_state
    assert torch.equal(before, during)
    assert torch.equal(before, model.get_encoder()(ids).last_hidden_state)
    assert len(open_trace(tmp_path)) == 7
    with pytest.raises(TraceError, match="encoder and a decoder"):
        describe_recording(model, "tiny")


def test_ids_mode_costs_what_the_format_says(seed, tmp_path):
    model = tiny_model("olmoe", seed, dtype=torch.float32).eval()
    trace = recorded(model, tmp_path, items(seed), mode="ids")
    rows = [trace.layer(number) for number in trace.layers]
    assert all(r.weights_RK is None and r.ids_RK.dtype == np.uint8 for r in rows)
    assert sum(r.ids_RK.nbytes for r in rows) == len(trace) * sum(trace.header.top_k)
    with pytest.raises(TraceError, match="--mode full"):
        list(trace.events(needs={"weights"}))


def test_counts_are_the_sums_of_the_full_trace(seed, tmp_path):
    model = tiny_model("deepseek_v3", seed, dtype=torch.float32).eval()
    todo = items(seed, labels={"domain": "code"}) + items(seed + 1, labels={"domain": "prose"})
    full = recorded(model, tmp_path / "full", todo)
    header = describe_recording(model, "tiny", mode="counts")
    with TraceWriter(tmp_path / "counts", header, label_kind="domain", shard_rows=10) as writer:
        record_text(model, Recorder(writer), todo)
    counts = load_counts(tmp_path / "counts", header, "domain")
    expected = RoutingCounts(full.header, "domain")
    expected.add(full.tokens, [full.layer(n) for n in full.layers], len(full.documents))
    assert counts.documents == 4 and np.array_equal(counts.tokens_PB, expected.tokens_PB)
    for number in full.layers:
        assert np.array_equal(counts.load[number], expected.load[number])
        assert np.array_equal(counts.together[number], expected.together[number])
        assert counts.load[number].sum() == len(full) * full.header.top_k[number]
    with pytest.raises(TraceError, match="sums only"):
        open_trace(tmp_path / "counts")


class CrashError(Exception):
    pass


@pytest.mark.parametrize("mode", ["full", "counts"])
def test_a_crash_loses_no_whole_shard_and_can_be_resumed(mode, seed, tmp_path):
    model = tiny_model("mixtral", seed, dtype=torch.float32).eval()
    todo = items(seed, (6, 6, 6, 6, 6))
    header = describe_recording(model, "tiny", mode=mode)
    done = []

    def crash(item):
        done.append(item)
        if len(done) == 3:
            raise CrashError

    writer = TraceWriter(tmp_path / "t", header, shard_rows=10)
    with pytest.raises(CrashError):
        record_text(model, Recorder(writer), todo, on_item=crash)
    (tmp_path / "t" / ".shard-000001.safetensors.77.partial").write_bytes(b"half a shard")
    again = TraceWriter(tmp_path / "t", header, shard_rows=10, resume=True)
    assert (again.documents, again.tokens) == (2, 12)
    with again:
        record_text(model, Recorder(again), todo[again.documents :])
    with TraceWriter(tmp_path / "whole", header) as writer:
        record_text(model, Recorder(writer), todo)
    if mode == "counts":
        a, b = (load_counts(tmp_path / name, header) for name in ("t", "whole"))
        assert a.documents == b.documents == 5
        assert all(np.array_equal(x, y) for x, y in zip(a.together, b.together, strict=True))
        return
    resumed, whole = open_trace(tmp_path / "t"), open_trace(tmp_path / "whole")
    assert resumed.header.complete and [d.number for d in resumed.documents] == [0, 1, 2, 3, 4]
    for name in ("input_id", "doc", "step", "position"):
        assert np.array_equal(getattr(resumed.tokens, name), getattr(whole.tokens, name))
    for number in whole.layers:
        assert np.array_equal(resumed.layer(number).ids_RK, whole.layer(number).ids_RK)


def test_a_failed_document_leaves_nothing(seed, tmp_path):
    model = tiny_model("olmoe", seed, dtype=torch.float32).eval()
    with TraceWriter(tmp_path, describe_recording(model, "tiny")) as writer:
        recorder = Recorder(writer)
        with pytest.raises(CrashError), observe(model, recorder), recorder.documents(["x"]):
            model(input_ids=torch.tensor([[3, 4, 5]]))
            raise CrashError
        record_text(model, recorder, items(seed)[:1])
    assert len(open_trace(tmp_path)) == 7


def test_another_recording_is_refused(seed, tmp_path):
    model = tiny_model("olmoe", seed, dtype=torch.float32).eval()
    header = describe_recording(model, "tiny")
    TraceWriter(tmp_path / "t", header).close()
    with pytest.raises(TraceError, match="resume"):
        TraceWriter(tmp_path / "t", header)
    with pytest.raises(TraceError, match="another model"):
        TraceWriter(tmp_path / "t", dataclasses.replace(header, model="other"), resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(TraceError, match="not empty"):
        TraceWriter(tmp_path / "full", header)


@pytest.mark.parametrize("damage", ["meta", "truncated", "version", "missing"])
def test_damage_is_named(damage, seed, tmp_path):
    model = tiny_model("olmoe", seed, dtype=torch.float32).eval()
    recorded(model, tmp_path, items(seed))
    shard, meta = tmp_path / "shard-000000.safetensors", tmp_path / "meta.json"
    if damage == "meta":
        meta.write_text("{")
    elif damage == "version":
        meta.write_text(meta.read_text().replace('"version": 1', '"version": 9', 1))
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    with pytest.raises(TraceError, match=r"record|resume|update"):
        open_trace(tmp_path).layer(0)


def test_texts_and_prompts(tmp_path):
    from evaluation.tiny_text import tiny_tokenizer
    from gangline.traces.texts import prompt_items, text_items

    tokenizer = tiny_tokenizer()
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n\na dog")
    (tmp_path / "b.jsonl").write_text('{"text": "one", "lang": "en"}\n{"prompt": "zwei", "lang": "de"}\n')
    found = text_items([tmp_path / "a.txt"], tokenizer, window=11)
    assert [len(item.ids) for item in found] == [11, 11, 10]
    assert "".join(tokenizer.decode(item.ids[1:]) for item in found) == "the cat sat on the mat\n\na dog"
    assert len(prompt_items([tmp_path / "a.txt"], tokenizer)) == 2
    labelled = prompt_items([tmp_path / "b.jsonl"], tokenizer, raw=True)
    assert [item.labels for item in labelled] == [{"lang": "en"}, {"lang": "de"}]
    with pytest.raises(UsageError, match="same kinds"):
        text_items([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer, window=9)
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(UsageError, match=r"c\.jsonl:1"):
        text_items([tmp_path / "c.jsonl"], tokenizer, window=9)
