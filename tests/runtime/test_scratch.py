"""What the planner reserves for the kernels of the experts."""

from pathlib import Path

import pytest

from checkpoint.gguf_models import tiny_model
from gangline.kernels.cpu import native
from gangline.runtime.load import plan_model

if native() is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral"])
def test_packed_experts_need_rows_and_plain_ones_a_copy(tmp_path: Path, family: str, seed: int) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    packed = {
        rows: plan_model(tmp_path, precision="int4", batch_tokens=rows, ctx_size=128).kernel
        for rows in (8, 64, 128)
    }
    assert packed[8] < packed[64] < packed[128]
    plain = {rows: plan_model(tmp_path, batch_tokens=rows, ctx_size=128) for rows in (8, 128)}
    assert plain[8].kernel == plain[128].kernel > 0


def test_packed_experts_of_a_wide_model_need_less_than_a_copy(tmp_path: Path, seed: int) -> None:
    tiny_model("mixtral", intermediate_size=4096, num_hidden_layers=1).save_pretrained(tmp_path)
    packed = plan_model(tmp_path, precision="int4", batch_tokens=8, ctx_size=128)
    plain = plan_model(tmp_path, batch_tokens=8, ctx_size=128)
    assert packed.kernel < plain.kernel
