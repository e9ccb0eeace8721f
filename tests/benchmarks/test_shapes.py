import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gangline.benchmarks import random_checkpoint
from gangline.benchmarks.random_checkpoint import MARKER, meta_model, plan_tensors
from gangline.benchmarks.shapes import SHAPES, make_shape, parse_shape, shape_config
from gangline.core.errors import UsageError

TINY = [name for name in SHAPES if name.startswith("tiny-")]
# Parameters in billions, as the models' own cards state them.
CARDS = {
    "olmoe-1b-7b": 6.92,
    "qwen3-30b-a3b": 30.5,
    "mixtral-8x7b": 46.7,
    "deepseek-v2-lite": 15.7,
    "switch-base-128": 7.4,
}
TOKENS = 256


def load(folder, spec):
    auto = AutoModelForSeq2SeqLM if "switch" in spec else AutoModelForCausalLM
    return auto.from_pretrained(folder, output_loading_info=True)


def all_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                found[name] = file.get_tensor(name)
    return found


def shares_of_experts_used(model, ids):
    """Return, for each router, the share of its experts that at least one token chose."""
    shares = []

    def watch(module, args, output):
        if hasattr(module, "classifier"):
            chosen = output[0].sum(dim=(0, 1)).count_nonzero().item()
            shares.append(chosen / module.num_experts)
        else:
            shares.append(output[2].unique().numel() / module.num_experts)

    hooks = [m.register_forward_hook(watch) for m in model.modules() if type(m).__name__.endswith("Router")]
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    for hook in hooks:
        hook.remove()
    return shares


@pytest.mark.parametrize("spec", TINY)
def test_plain_transformers_loads_it_and_routing_is_balanced(spec, tmp_path):
    folder = make_shape(spec, tmp_path / spec)
    model, info = load(folder, spec)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    prompt = torch.randint(model.config.vocab_size, (1, 5))
    out = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == (4 if model.config.is_encoder_decoder else 8)
    ids = torch.stack([torch.randperm(model.config.vocab_size)[:TOKENS] for _ in range(4)])
    shares = shares_of_experts_used(model, ids)
    assert len(shares) >= 3
    # One expert a token draws less often from more experts; collapsed routing would use about a fifth.
    assert min(shares) > (0.8 if spec == "tiny-switch" else 0.9), shares


@pytest.mark.parametrize(("spec", "billions"), CARDS.items())
def test_sizes_are_those_of_the_model_card(spec, billions):
    plans = plan_tensors(meta_model(shape_config(spec)))
    params = sum(torch.Size(plan.shape).numel() for plan in plans)
    assert params / 1e9 == pytest.approx(billions, rel=0.01)


def test_names_are_those_of_the_hub():
    def names(spec):
        return {plan.name: plan.shape for plan in plan_tensors(meta_model(shape_config(spec)))}

    assert names("mixtral-8x7b:1")["model.layers.0.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    assert names("mixtral-8x7b:1")["model.layers.0.block_sparse_moe.gate.weight"] == (8, 4096)
    assert names("olmoe-1b-7b:2")["model.layers.1.mlp.experts.63.gate_proj.weight"] == (1024, 2048)
    deepseek = names("deepseek-v2-lite:2")
    assert deepseek["model.layers.0.mlp.down_proj.weight"] == (2048, 10944)
    assert deepseek["model.layers.1.mlp.experts.0.down_proj.weight"] == (2048, 1408)
    switch = names("switch-base-128:2")
    assert switch["decoder.block.1.layer.2.mlp.experts.expert_127.wi.weight"] == (3072, 768)
    assert "lm_head.weight" not in switch


def test_no_two_matrices_are_alike(tmp_path):
    tensors = all_tensors(make_shape("tiny-olmoe:1", tmp_path / "x"))
    matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    assert len({tuple(tensor.flatten()[:64].tolist()) for tensor in matrices}) == len(matrices)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 2**19)


def test_resumes_and_ends_with_the_same_bytes(tmp_path, small_shards, monkeypatch):
    whole = make_shape("tiny-olmoe", tmp_path / "whole", seed=3)
    shards = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(shards) > 2
    part = tmp_path / "part"
    save_file, calls = random_checkpoint.save_file, []

    def stop_at_the_third(tensors, path, metadata):
        calls.append(path)
        save_file(tensors, path, metadata=metadata)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(random_checkpoint, "save_file", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_shape("tiny-olmoe", part, seed=3)
    assert sorted(path.name for path in part.iterdir()) == [MARKER, *shards[:2]]
    kept = (part / shards[0]).stat().st_mtime_ns
    seen = []
    monkeypatch.setattr(random_checkpoint, "save_file", save_file)
    make_shape("tiny-olmoe", part, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert (part / shards[0]).stat().st_mtime_ns == kept
    for path in whole.iterdir():
        assert (part / path.name).read_bytes() == path.read_bytes()
    total = json.loads((whole / random_checkpoint.INDEX).read_text())["metadata"]["total_size"]
    assert 0 < seen[0][0] < total
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_another_seed_or_dtype_is_another_checkpoint(tmp_path):
    a = all_tensors(make_shape("tiny-mixtral:1", tmp_path / "a", seed=0))
    b = all_tensors(make_shape("tiny-mixtral:1", tmp_path / "b", seed=1, dtype=torch.float32))
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert b[router].dtype == torch.float32
    assert not torch.equal(a[router].float(), b[router])
    with pytest.raises(UsageError, match="another folder"):
        make_shape("tiny-mixtral:1", tmp_path / "a", seed=1)


def test_refuses_foreign_folders_and_full_disks(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        make_shape("tiny-olmoe", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    usage = random_checkpoint.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="1000 B free"):
        make_shape("tiny-olmoe", tmp_path / "new")


def test_default_folder_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path))
    assert make_shape("tiny-mixtral:2") == tmp_path / "shapes" / "tiny-mixtral-2"


@pytest.mark.parametrize(
    "spec", ["olmo", "olmoe-1b-7b:", "olmoe-1b-7b:0", "olmoe-1b-7b:17", "tiny-olmoe:two"]
)
def test_bad_specs_are_named(spec):
    with pytest.raises(UsageError, match=spec.partition(":")[0]):
        parse_shape(spec)


def test_odd_layers_of_switch_are_refused():
    with pytest.raises(UsageError, match="even"):
        shape_config("switch-base-128:3")
