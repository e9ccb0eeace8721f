"""Sparse experts that all lie on a GPU: a GPU that is emulated on the CPU, and every refusal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import gangline
from gangline.compress.sparsify import SparsifySettings
from gangline.core.errors import UsageError
from gangline.evaluation.bound import weights_of
from gangline.evaluation.sparsification import SparsifyTexts, sparsify_checkpoint
from gangline.kernels.cuda import choice, gpu
from gangline.kernels.cuda.gpu import Gpu
from gangline.kernels.cuda.launcher import cuda_missing
from gangline.kernels.cuda.measured import Timing
from gangline.runtime import gpu_experts
from kernels.cuda.emulated_rig import EmulatedLauncher
from tiny_models import tiny_model

CODEC = "samoyeds:1:2:32/bf16"
TOKENS = 5
PLENTY = 1 << 40
MEASURED = [Timing("emulated", CODEC, 64, 64, 4, 4, tokens, 1.0, 2.0) for tokens in (1, TOKENS)]


def write_sparse(folder: Path, seed: int, pattern: str = "1:2:32") -> Path:
    """A sparse checkpoint. All four experts serve every token, so that no near tie of the router matters."""
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    MixtralForCausalLM(config).to(torch.bfloat16).eval().save_pretrained(folder / "plain")
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder / "plain")
    sparsify_checkpoint(
        folder / "plain",
        folder / "sparse",
        texts=SparsifyTexts(" ".join(f"w{i % 90}" for i in range(300)), tokens=64, window=32),
        settings=SparsifySettings(pattern=pattern, method="magnitude"),
        measure=False,
    )
    return folder / "sparse"


class CopyingGpu(gpu_experts.GpuExperts):
    """Tells the emulation which copies kernels may read."""

    def bind(self, raws):
        copies = super().bind(raws)
        self.gpu.launcher.readable.extend(copies)
        return copies


@pytest.fixture
def launcher(seed: int, monkeypatch: pytest.MonkeyPatch) -> EmulatedLauncher:
    """Kernels that run on the CPU, behind a GPU with plenty of memory."""
    made = EmulatedLauncher(seed)
    monkeypatch.setattr(gpu_experts, "gpu_missing", lambda: None)
    monkeypatch.setattr(gpu_experts, "open_gpu", lambda _: Gpu(torch.device("cpu"), PLENTY, made))
    monkeypatch.setattr("gangline.runtime.load.GpuExperts", CopyingGpu)
    return made


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in which the sparse kernels won."""
    for module in (choice, gpu):
        monkeypatch.setattr(module, "measured_timings", lambda: tuple(MEASURED))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt and then of one token more."""
    with torch.no_grad():
        first = model(ids[:, :-1], use_cache=True)
        second = model(ids[:, -1:], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1).float()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("asked", [None, "cuda"])
def test_the_model_says_the_same(
    asked: str | None, launcher: EmulatedLauncher, tmp_path: Path, seed: int
) -> None:
    """Prompt and decode go through the sparse kernels; addresses are those of the copies on the device."""
    folder = write_sparse(tmp_path, seed)
    ids = torch.randint(3, 90, (1, TOKENS + 1))
    with gangline.load(folder, device="cpu").gangline as runtime:
        want = logits(runtime._model, ids)
        assert runtime.gpu is None
    ours = gangline.load(folder, device=asked)
    with ours.gangline as runtime:
        got = logits(ours, ids)
        names = [launch.build.name for launch in launcher.started]
        layers, passes = 2, 2
        assert names.count("gangline_combine") == layers * passes
        assert {field.codec for layout in runtime.catalog.layouts for field in layout.fields} == {CODEC}
        assert "all experts on emulated" in runtime.banner()
        assert runtime.stats().host_hits == layers * 2 * 4
        assert weights_of(ours).step_bytes(1, 8) == weights_of(ours).dense > 0
        assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.usefixtures("launcher")
def test_what_was_not_measured_is_computed_densely(tmp_path: Path, seed: int, launcher) -> None:
    """Asked for by name, the GPU decodes the experts; unasked it is left alone."""
    folder = write_sparse(tmp_path, seed)
    ids = torch.randint(3, 90, (1, TOKENS + 1))
    with gangline.load(folder, dtype=torch.float32).gangline as runtime:
        assert runtime.gpu is None
        want = logits(runtime._model, ids)
    ours = gangline.load(folder, device="cuda", dtype=torch.float32)
    with ours.gangline as runtime:
        assert runtime.gpu is not None
        torch.testing.assert_close(logits(ours, ids), want, rtol=1e-4, atol=1e-4)
    assert not launcher.started


@pytest.mark.parametrize(
    ("pattern", "options", "reason"),
    [
        ("3:4:32", {}, "layer 0: .* there are kernels for 1:1"),
        ("1:2:32", {"precision": "int4"}, "--precision int4 has no GPU kernel"),
        ("1:2:32", {"expert_slots": 4}, "slots and evictions are those of the processor"),
        ("1:2:32", {"device": "tpu"}, "'tpu' is no device"),
        ("1:2:32", {"free": 1000}, "the experts take .* emulated has"),
    ],
)
@pytest.mark.usefixtures("launcher", "measured")
def test_refusals_say_why(
    pattern: str, options: dict, reason: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = write_sparse(tmp_path, seed, pattern), {"device": "cuda", **options}
    if "free" in options:
        small = Gpu(torch.device("cpu"), options.pop("free"), EmulatedLauncher())
        monkeypatch.setattr(gpu_experts, "open_gpu", lambda _: small)
    with pytest.raises(UsageError, match=reason):
        gangline.load(folder, **options)
    if options["device"] == "cuda":
        with gangline.load(folder, **{**options, "device": None}).gangline as runtime:
            assert runtime.gpu is None


@pytest.mark.skipif(cuda_missing() is None, reason="there is a GPU here")
def test_without_a_gpu_nothing_changes(tmp_path: Path, seed: int) -> None:
    folder = write_sparse(tmp_path, seed)
    with pytest.raises(UsageError, match=r"torch sees no CUDA device.*use --device cpu"):
        gangline.load(folder, device="cuda")
    found = [gangline.plan(folder, device=device) for device in (None, "cpu")]
    assert (found[0].slots, found[0].codecs) == (found[1].slots, found[1].codecs)


@pytest.mark.parametrize(
    ("option", "says"), [({"device": "cuda"}, "takes a device"), ({"native_only": True}, "takes native_only")]
)
def test_what_only_a_loaded_model_can(seed: int, option: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=rf"only gangline.load {says}"):
        gangline.attach(tiny_model("mixtral", seed=seed), **option)


@pytest.mark.gpu
def test_a_model_on_a_real_gpu(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and decode through the sparse kernels, next to the processor's answer."""
    folder = write_sparse(tmp_path, seed)
    times = [replace(timing, device=torch.cuda.get_device_name(0)) for timing in MEASURED]
    for module in (choice, gpu):
        monkeypatch.setattr(module, "measured_timings", lambda: tuple(times))
    ids = torch.randint(3, 90, (1, TOKENS + 1))
    with gangline.load(folder, device="cpu").gangline as runtime:
        want = logits(runtime._model, ids)
    ours = gangline.load(folder)
    with ours.gangline as runtime:
        assert runtime.gpu is not None
        assert (logits(ours, ids) - want).norm() < 0.03 * want.norm()
