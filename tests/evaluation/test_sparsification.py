"""From a checkpoint to sparse ones: both kinds load and say the same; an interrupted run leaves nothing."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import gangline
from gangline.checkpoint.locate import LocalCheckpoint
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.compress.sparsify import LayerWalk, SparsifySettings, distill, sparsify_layers
from gangline.core.errors import CheckpointError, UnsupportedModelError, UsageError
from gangline.evaluation.check import CheckSettings, check_model
from gangline.evaluation.sparsification import (
    SparsifyReport,
    SparsifyTexts,
    choose_pieces,
    sparsify_checkpoint,
)
from gangline.formats import get_codec
from gangline.runtime.opened import open_model
from near_ties import agree_unless_tied, is_tied, share_off
from tiny_models import tiny_model

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe")
WORDS = " ".join(f"w{(7 * i * i + i) % 90}" for i in range(2000))
TEXTS = SparsifyTexts(WORDS, tokens=256, held_out_tokens=64, window=32)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(93)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def tiny(tmp_path, tokenizer, seed):
    """Write a tiny model of a family with a tokenizer; returns its folder."""

    def make(family: str, dtype: torch.dtype = torch.bfloat16, model_seed: int = seed) -> Path:
        folder = tmp_path / family
        tiny_model(family, seed=model_seed).to(dtype).eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def assert_same_experts(packed: Path, dense: Path) -> None:
    """Both checkpoints hold the same weights, bit for bit, the packed one under its pattern."""
    ours, twin = (
        open_model(LocalCheckpoint(str(folder), folder, None), None).source for folder in (packed, dense)
    )
    for layer, (our_layout, twin_layout) in enumerate(zip(ours.layouts, twin.layouts, strict=True)):
        for (_, our_raws), (_, twin_raws) in zip(ours.read_layer(layer), twin.read_layer(layer), strict=True):
            for our_spec, twin_spec, our_raw, twin_raw in zip(
                our_layout.fields, twin_layout.fields, our_raws, twin_raws, strict=True
            ):
                assert our_spec.codec.startswith("samoyeds:")
                one = get_codec(our_spec.codec).decode(our_raw, our_spec.shape, torch.float32)
                other = get_codec(twin_spec.codec).decode(twin_raw, twin_spec.shape, torch.float32)
                assert torch.equal(one, other.t() if twin_spec.transposed else other)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_dense_say_the_same(family: str, tiny, tmp_path: Path) -> None:
    """The packed checkpoint in our runtime, and its dense-stored twin in plain transformers."""
    source = tiny(family)
    settings = SparsifySettings(pattern="1:2:16", method="sparsegpt", min_tokens=8)
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    report = sparsify_checkpoint(source, packed, texts=TEXTS, settings=settings, dense=dense)
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    twin = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    ours = gangline.load(packed, dtype=torch.float32)

    @torch.no_grad()
    def attempt(draw: int) -> Callable[[], bool] | None:
        ids = torch.arange(3 + draw, 27 + draw)[None]
        if share_off(ours(ids).logits, twin(ids).logits) < 5e-5:
            return None
        return torch.no_grad()(
            lambda: is_tied(twin, lambda: twin(ids).logits, lambda a, b: not share_off(a, b) < 2e-4)
        )

    agree_unless_tied(attempt)
    codecs = {spec.codec for spec in ours.gangline.catalog.layouts[0].fields}
    assert codecs <= {"samoyeds:1:2:16/bf16", "samoyeds16:1:2:16/bf16"}
    stored = open_model(LocalCheckpoint(str(packed), packed, None), None).source
    assert {spec.codec for spec in stored.layouts[0].fields} == {"samoyeds:1:2:16/bf16"}
    old, new = SafetensorsIndex.from_folder(source), SafetensorsIndex.from_folder(dense)
    changed = {name for name in old.tensors if not torch.equal(old.read(name), new.read(name))}
    assert changed
    assert all("expert" in name or "_linear" in name for name in changed)
    zeros = [float((new.read(name) == 0).float().mean()) for name in changed]
    assert min(zeros) > 0.6


def test_check_compares_with_the_dense_twin(tiny, tmp_path: Path) -> None:
    """Of one model: in fp32 a check has no excuse for a near-tie, which a fresh one may have."""
    sparsify_checkpoint(
        tiny("mixtral", model_seed=5),
        tmp_path / "out",
        texts=TEXTS,
        settings=SparsifySettings(method="wanda"),
        measure=False,
    )
    settings = CheckSettings(
        shares=(0.5,), batch_sizes=(1,), cache_seeds=(None,), prompt_tokens=8, new_tokens=4
    )
    report = check_model(tmp_path / "out", settings, dtype=torch.float32)
    assert report.reference_passed
    assert report.passed


@pytest.mark.parametrize("values", ["int8", "int4g32"])
def test_integer_values_on_top(values: str, tiny, tmp_path: Path) -> None:
    settings = SparsifySettings(precision=values, method="magnitude")
    report = sparsify_checkpoint(
        tiny("mixtral"),
        tmp_path / "out",
        texts=TEXTS,
        settings=settings,
        dense=tmp_path / "dense",
        measure=False,
    )
    ours = gangline.load(tmp_path / "out")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 91).view(44, 2)
    with torch.no_grad():
        found, expected = ours(ids).logits.float(), twin(ids).logits.float()
    # The native core rounds the activations of integer weights to int8, which tips a router of some rows.
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.1
    assert report.bits_per_weight < report.stored_bits_per_weight
    catalog = open_model(LocalCheckpoint("out", tmp_path / "out", None), None).source.catalog
    assert catalog is not None
    weights = sum(
        experts * spec.shape[0] * spec.shape[1]
        for layout, experts in zip(catalog.layouts, [8] * len(catalog.layouts), strict=True)
        for spec in layout.fields
    )
    assert report.bits_per_weight == pytest.approx(8 * report.expert_bytes / weights)
    assert report.expert_bytes == catalog.nbytes


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_walk_is_the_model(family: str, tiny) -> None:
    """Layer by layer, with the experts' own outputs played back, the hidden states are those of the model.

    Mixtral's layers do nothing but add them; Qwen2's put those of shared experts to them first.
    """
    folder = tiny(family, torch.float32)
    opened = open_model(LocalCheckpoint(str(folder), folder, None), torch.float32)
    ids_SC = torch.randint(3, 90, (6, 10))
    model, view = opened.load_dense(None)
    walk = LayerWalk(model.eval(), view, ids_SC)
    dense = SparsifySettings(pattern="4:4:16", method="magnitude")
    assert dense.codec.pattern.sparsity == 0.5
    seen = []
    for report in sparsify_layers(walk, opened.source, dense, lambda key, _: seen.append(key)):
        assert [expert.expert for expert in report.experts] == list(range(len(report.experts)))
    assert len(seen) == sum(opened.source.experts)
    # Now all at once: the same weights in the plain model.
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    state = plain.state_dict()
    from gangline.formats.samoyeds_pattern import keep_mask

    for name, weight in state.items():
        if ".experts." in name and weight.dim() == 3:
            for expert_OI in weight:
                halves = expert_OI.chunk(2) if "gate_up" in name else (expert_OI,)
                for half_OI in halves:
                    stored = half_OI.masked_fill(~keep_mask(half_OI.abs(), dense.codec.pattern), 0)
                    half_OI.copy_(stored.bfloat16().float())
    with torch.no_grad():
        hidden = plain(ids_SC, output_hidden_states=True).hidden_states
        last = plain.model.norm(torch.cat(walk.hidden))
    # One sequence may hold a near-tie of a router, which sums in another order tip.
    off = [share_off(one, other) for one, other in zip(last, hidden[-1], strict=True)]
    assert sorted(off)[-2] < 5e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_walk_lets_go_of_outputs(family: str, tiny) -> None:
    """They are as large as the hidden states of all texts, and there are as many as layers."""
    folder = tiny(family, torch.float32)
    model, view = open_model(LocalCheckpoint(str(folder), folder, None), torch.float32).load_dense(None)
    given, still_there = [], []
    for _, step in LayerWalk(model.eval(), view, torch.randint(3, 90, (3, 10))):
        out_TD = torch.rand_like(step.routing.x_TD)
        given.append(weakref.ref(out_TD))
        step.give(out_TD)
        del out_TD, step
        still_there.append(sum(ref() is not None for ref in given))
    gc.collect()
    assert len(given) > 1
    assert max(still_there) == 1  # the one just given
    assert all(ref() is None for ref in given)


def test_experts_with_few_tokens_are_named(tiny, tmp_path: Path) -> None:
    settings = SparsifySettings(method="wanda", min_tokens=10_000)
    report = sparsify_checkpoint(
        tiny("mixtral"), tmp_path / "out", texts=TEXTS, settings=settings, measure=False
    )
    assert set(report.poor) == {layer.name for layer in report.layers}
    stored = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert stored["poor"] == {name: list(experts) for name, experts in report.poor.items()}
    assert stored["layers"][0]["experts"][0]["calibration"] == "layer"
    assert 0.5 < stored["kept"] < 1
    assert stored["perplexity_after"] is None
    assert stored["sparsity"] == 0.5


def test_permuting_changes_no_answer_but_the_zeros(tiny, tmp_path: Path) -> None:
    kept = {}
    for permute in (False, True):
        settings = SparsifySettings(pattern="1:2:16", method="magnitude", permute=permute)
        report = sparsify_checkpoint(
            tiny("mixtral"), tmp_path / str(permute), texts=TEXTS, settings=settings, measure=False
        )
        kept[permute] = report.kept
    assert kept[True] >= kept[False] - 1e-6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "qwen2_moe"])
def test_reconstruction_brings_every_layer_nearer(family: str, tiny, tmp_path: Path) -> None:
    """Each layer's error falls, the pattern stays, and packed and dense are the same model still."""
    settings = SparsifySettings(pattern="1:2:16", min_tokens=8, reconstruct=2)
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    report = sparsify_checkpoint(
        tiny(family), packed, texts=TEXTS, settings=settings, dense=dense, measure=False
    )
    for layer in report.layers:
        assert layer.reconstructed is not None
        before, after = layer.reconstructed
        assert 0 < after < before
    assert_same_experts(packed, dense)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_distilling_leaves_zeros_embeddings_and_routers(family: str, tiny, tmp_path: Path) -> None:
    source, changed = tiny(family), []
    steps: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("distilling"):
            steps.append((done, total))

    for tokens in (0, 192):
        settings = SparsifySettings(pattern="1:2:16", method="magnitude", distill_tokens=tokens)
        packed, dense = tmp_path / f"packed{tokens}", tmp_path / f"dense{tokens}"
        report = sparsify_checkpoint(
            source, packed, texts=TEXTS, settings=settings, dense=dense, measure=False, progress=progress
        )
        assert_same_experts(packed, dense)
    assert report.distilled is not None
    assert report.distilled.tokens == 192
    assert steps == [(step, 6) for step in range(1, 7)]
    pruned, learned = (SafetensorsIndex.from_folder(tmp_path / f"dense{tokens}") for tokens in (0, 192))
    ours = SafetensorsIndex.from_folder(tmp_path / "packed192")
    for name in pruned.tensors:
        before, after = pruned.read(name), learned.read(name)
        if name in ours.tensors:
            assert torch.equal(after, ours.read(name))
        if not torch.equal(before, after):
            changed.append(name)
            assert "experts." not in name or not ((before == 0) & (after != 0)).any()
    assert any("experts." in name for name in changed)
    assert any("self_attn" in name for name in changed)
    assert not any(word in name for name in changed for word in ("embed", "lm_head", "router", ".gate."))
    document = json.loads((tmp_path / "packed192" / "sparsify.json").read_text())
    assert len(document["distilled"]["losses"]) == 6


def test_interrupted_learning_goes_on(tiny, tmp_path: Path, monkeypatch) -> None:
    """After the fourth step of six; the result is that of a run that nobody interrupted."""
    monkeypatch.setattr(distill, "KEEP_SECONDS", -1)
    source, halfway = tiny("mixtral"), tmp_path / "halfway"
    settings = SparsifySettings(
        method="magnitude", reconstruct=1, min_tokens=8, distill_tokens=192, distill_text=0.25
    )
    stages: list[str] = []

    def run(
        folder: Path, resume: Path | None, stop: int = 0, settings: SparsifySettings = settings
    ) -> SparsifyReport:
        def progress(what: str, done: int, total: int) -> None:
            stages.append(what)
            if what.startswith("distilling") and done == stop:
                raise KeyboardInterrupt

        return sparsify_checkpoint(
            source,
            None,
            dense=folder,
            texts=TEXTS,
            settings=settings,
            measure=False,
            progress=progress,
            resume=resume,
        )

    expected = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", halfway, stop=4)
    stages.clear()
    found = run(tmp_path / "parts", halfway)
    assert "pruning experts" not in stages
    assert sum(stage.startswith("distilling") for stage in stages) == 2
    assert found.layers == expected.layers
    assert found.distilled == expected.distilled
    one, other = (SafetensorsIndex.from_folder(tmp_path / name) for name in ("whole", "parts"))
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name
    with pytest.raises(UsageError, match=r"learning\.safetensors is of another model"):
        run(tmp_path / "other", halfway, settings=replace(settings, distill_text=0.5))
    with pytest.raises(UsageError, match="of another model, other settings or other text"):
        sparsify_checkpoint(
            source,
            None,
            dense=tmp_path / "other",
            texts=TEXTS,
            settings=SparsifySettings(method="magnitude", distill_tokens=192),
            resume=halfway,
        )
    (halfway / "pruned.safetensors").write_bytes(b"what is this")
    with pytest.raises(CheckpointError, match="remove it"):
        run(tmp_path / "broken", halfway)


def test_an_interrupted_run_leaves_nothing(tiny, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    source = tiny("mixtral")
    with pytest.raises(KeyboardInterrupt):
        sparsify_checkpoint(
            source, tmp_path / "out", dense=tmp_path / "dense", texts=TEXTS, measure=False, progress=stop
        )
    assert [path.name for path in tmp_path.iterdir()] == ["mixtral"]


def test_what_cannot_be_done_is_refused(tiny, tmp_path: Path) -> None:
    source = tiny("mixtral")
    with pytest.raises(UsageError, match="nothing to write"):
        sparsify_checkpoint(source, None, texts=TEXTS)
    with pytest.raises(UsageError, match="fewer than two tokens"):
        sparsify_checkpoint(source, tmp_path / "x", texts=SparsifyTexts("w1"))
    with pytest.raises(UsageError, match="give distill_tokens too"):
        SparsifySettings(distill_text=0.5)
    with pytest.raises(UsageError, match="from 0 to 1"):
        SparsifySettings(distill_tokens=64, distill_text=1.5)
    out = tmp_path / "out"
    sparsify_checkpoint(
        source, out, texts=TEXTS, settings=SparsifySettings(method="magnitude"), measure=False
    )
    with pytest.raises(UnsupportedModelError, match="plain bf16, fp16 or fp32"):
        sparsify_checkpoint(out, tmp_path / "twice", texts=TEXTS)


def test_damaged_packed_checkpoints_are_named(tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sparsify_checkpoint(
        tiny("mixtral"), out, texts=TEXTS, settings=SparsifySettings(method="magnitude"), measure=False
    )
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gangline", "version": 1}
    index_file = out / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    lost = next(name for name in index["weight_map"] if ".5.down." in name)
    del index["weight_map"][lost]
    index_file.write_text(json.dumps(index))
    from safetensors.torch import load_file, save_file

    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop(lost, None) is not None:
            save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"5\.down.*is missing"):
        gangline.load(out)
    config["quantization_config"]["version"] = 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="version 2"):
        gangline.load(out)


def test_the_command(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from gangline.cli.main import app

    source, text = tiny("mixtral"), tmp_path / "text.txt"
    text.write_text(WORDS)
    runner = CliRunner()
    arguments = [
        "sparsify",
        str(source),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "magnitude",
        "--window",
        "32",
    ]
    failed = runner.invoke(app, arguments)
    assert failed.exit_code == 2
    assert "--data" in failed.stderr
    done = runner.invoke(app, [*arguments, "--data", str(text), "--json"])
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["settings"]["pattern"] == "2:4"
    assert document["perplexity_before"] > 1
    again = runner.invoke(app, [*arguments, "--data", str(text)])
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    arguments[3] = str(tmp_path / "other")
    more = ["--reconstruct", "1", "--distill-tokens", "64", "--distill-text", "0.5", "--damping", "0.1"]
    shown = runner.invoke(app, [*arguments, "--data", str(text), *more])
    assert "bits a weight" in shown.stdout
    assert " -> " in shown.stdout
    assert "distilled on 64 tokens" in shown.stdout
    assert "kept energy" in shown.stdout


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_learning_takes_first_what_pruning_has_not_seen(there: int, calibrating: int, learning: int) -> None:
    seen, learned_from = choose_pieces(there, calibrating, learning)
    assert len(seen) == min(there, calibrating)
    assert len(learned_from) == min(there, learning)
    assert len(set(learned_from)) == len(learned_from)
    again = set(seen) & set(learned_from)
    assert not again or len(learned_from) > there - len(seen)
    assert set(seen) | set(learned_from) <= set(range(there))
