"""The largest outputs of experts, against the experts' own arithmetic."""

import numpy as np
import pytest
import torch

import gangline
from gangline.models import find_moe
from gangline.traces import TraceError
from gangline.traces.expert_outputs import load_expert_outputs, measure_expert_outputs
from gangline.traces.statistics.super_experts import super_experts
from tiny_models import VOCABULARY, tiny_model


def documents(seed, lengths=(30, 20)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_measures_what_each_expert_puts_out(family, seed, tmp_path):
    model = tiny_model(family, seed, dtype=torch.float32).eval()
    texts = documents(seed)
    found = measure_expert_outputs(model, texts)
    blocks = find_moe(model).blocks
    assert found.tokens == 50 and [len(layer) for layer in found.peaks] == [
        b.geometry.experts for b in blocks
    ]
    assert np.isfinite(np.concatenate(found.peaks)).any()
    assert np.isfinite(found.shared).tolist() == [bool(b.shared) for b in blocks]
    found.save(tmp_path)
    again = load_expert_outputs(tmp_path)
    np.testing.assert_equal(again.peaks, found.peaks)
    assert (again.depth, again.decoder_layers, again.tokens) == (found.depth, found.decoder_layers, 50)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_expert_is_found_alone(seed, sign):
    model = tiny_model("mixtral", seed, dtype=torch.float32).eval()
    blocks = find_moe(model).blocks
    texts = documents(seed)
    used = measure_expert_outputs(model, texts).peaks[0]
    expert = int(np.nanargmax(used))
    with torch.no_grad():
        blocks[0].experts.down_proj[expert] *= 1000 * sign
    found = measure_expert_outputs(model, texts)
    assert found.peaks[0][expert] == pytest.approx(1000 * used[expert], rel=1e-3)
    rule = super_experts([np.array(p) for p in found.peaks], found.shared, found.depth, found.decoder_layers)
    assert [(one.layer, one.expert) for one in rule.found] == [(0, expert)]


def test_refuses_what_it_cannot_measure(seed, tmp_path):
    model = tiny_model("mixtral", seed, dtype=torch.float32).eval()
    with pytest.raises(TraceError, match="no document"):
        measure_expert_outputs(model, [])
    gangline.attach(model)
    with pytest.raises(TraceError, match="gangline's store"):
        measure_expert_outputs(model, documents(seed))
    assert load_expert_outputs(tmp_path) is None
    (tmp_path / "expert_outputs.json").write_text("{}")
    with pytest.raises(TraceError, match="damaged"):
        load_expert_outputs(tmp_path)
