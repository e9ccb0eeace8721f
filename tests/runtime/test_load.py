"""Loading and generating within a budget, and every refusal that a user can meet."""

import json
import os
import subprocess
import sys

import pytest
import torch

import gangline
from gangline.core.errors import BudgetError, CheckpointError, ContextError, StoreError, UsageError
from gangline.formats import get_codec
from gangline.kernels.cpu import native
from gangline.models import find_moe
from gangline.runtime.dense_packing import linear_codec, packable_linears
from gangline.runtime.opened import codec_of
from near_ties import agree_unless_tied, is_tied, share_off
from tiny_models import tiny_inputs, tiny_model


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))


@pytest.fixture
def saved(tmp_path, seed):
    model = tiny_model("olmoe", seed=seed, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def greedy(model, ids, tokens=12):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("io", ["direct", "cached"])
@pytest.mark.parametrize("cache_seed", [None, 7])
def test_generates_the_plain_tokens(saved, io, cache_seed):
    model, folder = saved

    def attempt(draw):
        ids = torch.randint(3, 90, (2, 8))
        loaded = gangline.load(folder, expert_slots=4, io=io, cache_seed=cache_seed, batch_tokens=4)
        with loaded.gangline:
            found = greedy(loaded, ids)
            stats = loaded.gangline.stats()
        assert stats.host_misses > 0
        assert stats.prefill_tokens == 16
        assert stats.decode_tokens == 22
        if torch.equal(found, greedy(model, ids)):
            return None
        return lambda: is_tied(model, lambda: greedy(model, ids), lambda a, b: not torch.equal(a, b))

    agree_unless_tied(attempt)


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setenv("GANGLINE_CPU", "torch")
    native.cache_clear()
    yield
    native.cache_clear()


def round_weights(model, precision):
    """Make a plain model compute with the weights that ``precision`` leaves: experts and linear layers."""
    codec = get_codec(codec_of(precision))

    def round_matrix(weight, codec=codec):
        weight.copy_(codec.decode(codec.encode(weight), tuple(weight.shape), torch.float32))

    view = find_moe(model)
    with torch.no_grad():
        for block in view.blocks:
            for name in ("gate_up_proj", "down_proj"):
                for weight in getattr(block.experts, name).data:
                    round_matrix(weight)
        names = [name for name, _ in packable_linears(model, view)]
        assert {name.rsplit(".", 1)[-1] for name in names} >= {"q_proj", "o_proj", "lm_head"}
        for name in names:
            is_head = model.get_submodule(name) is model.get_output_embeddings()
            own = get_codec(linear_codec(codec.name, is_head=is_head))
            round_matrix(model.get_submodule(name).weight, own)


def same_logits(loaded, plain):
    """Ours and a plain model's, of draws of inputs, until no choice is tied."""

    @torch.no_grad()
    def attempt(draw):
        inputs = tiny_inputs(plain, seed=draw)

        def again():
            return plain(**inputs).logits

        if share_off(loaded(**inputs).logits, again()) < 5e-5:
            return None
        return torch.no_grad()(lambda: is_tied(plain, again, lambda a, b: not share_off(a, b) < 2e-4))

    agree_unless_tied(attempt)


@pytest.mark.parametrize("precision", ["int8", "int4", "int4g64"])
def test_lower_precision_equals_rounded_weights(saved, precision, seed, without_native):
    """Through torch, ``int4`` must compute exactly what a plain model with the rounded weights computes."""
    model, folder = saved
    loaded = gangline.load(folder, precision=precision)
    round_weights(model, precision)
    with loaded.gangline:
        same_logits(loaded, model)
        assert "approximate" in loaded.gangline.banner()


@pytest.mark.skipif(native() is None, reason="the native core was not built")
@pytest.mark.parametrize("precision", ["int8", "int4", "int4g64"])
def test_rounded_activations_change_little(saved, precision, seed):
    """The native core also rounds activations to int8, which costs far less than rounding weights to int4."""
    model, folder = saved
    loaded = gangline.load(folder, precision=precision)
    round_weights(model, precision)
    # Where rounding tips a router, this row and those after it differ much: of short sequences only few.
    inputs = tiny_inputs(model, batch=40, tokens=2, seed=seed)
    with loaded.gangline, torch.no_grad():
        expected = model(**inputs).logits
        apart = (loaded(**inputs).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert apart.flatten().quantile(0.25) < 0.06


def test_pack_is_made_once(saved, tmp_path):
    _, folder = saved
    for _ in range(2):
        gangline.load(folder, precision="int4").gangline.close()
        packs = list((tmp_path / "home" / "packs").iterdir())
        assert len([p for p in packs if not p.name.startswith(".")]) == 1


def test_bf16_checkpoint_in_fp32(tmp_path, seed):
    model = tiny_model("mixtral", seed=seed, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "model")
    plain = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = gangline.load(tmp_path / "model", dtype=torch.float32, expert_slots=3)
    with loaded.gangline:
        same_logits(loaded, plain.eval())


def test_budget_too_small_names_the_smallest(saved):
    _, folder = saved
    with pytest.raises(BudgetError, match=r"smallest budget that works is [0-9]+MiB") as caught:
        gangline.load(folder, memory="10MiB")
    smallest = caught.value.smallest
    plan = gangline.plan(folder, memory=smallest + (64 << 20))
    assert plan.peak <= smallest + (64 << 20)


def test_longer_than_the_context_is_refused(saved):
    _, folder = saved
    loaded = gangline.load(folder, memory="4GiB", ctx_size=16)
    with loaded.gangline:
        with pytest.raises(ContextError, match="ctx_size"):
            greedy(loaded, torch.randint(3, 90, (1, 20)))
        assert greedy(loaded, torch.randint(3, 90, (1, 6)), 4).shape == (1, 10)


def test_training_is_refused(saved):
    _, folder = saved
    loaded = gangline.load(folder)
    with loaded.gangline, pytest.raises(StoreError, match="cannot be trained"):
        loaded(input_ids=torch.randint(3, 90, (1, 5)))


def test_missing_shard_and_truncation(saved):
    _, folder = saved
    shard = next(folder.glob("*.safetensors"))
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    with pytest.raises(CheckpointError, match=shard.name):
        gangline.load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError):
        gangline.load(folder)


def test_attach_twice_and_detach_of_loaded(saved):
    model, folder = saved
    runtime = gangline.attach(model)
    with pytest.raises(UsageError, match="attached already"):
        gangline.attach(model)
    runtime.close()
    loaded = gangline.load(folder)
    with pytest.raises(UsageError, match="not attached"):
        gangline.detach(loaded)
    loaded.gangline.close()


def test_peak_memory_stays_within_the_plan(saved):
    """In a process of its own, measured from outside by its high-water mark."""
    _, folder = saved
    code = (
        "import sys, json, torch, gangline\n"
        "from gangline.runtime.runtime import peak_resident\n"
        "model = gangline.load(sys.argv[1], memory=sys.argv[2], ctx_size=60)\n"
        "ids = torch.randint(3, 90, (1, 20))\n"
        "model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)\n"
        "print(json.dumps({'peak': peak_resident(), 'plan': model.gangline.plan.peak}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "1GiB"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= 1 << 30
    assert found["peak"] <= found["plan"]
