"""Where experts lie never changes the answer: `gangline check` on demo and on tiny models of many families.

    python benchmarks/exactness.py --out benchmarks/results/exactness.json

For each model: 100, 50 and 25 % of the experts in memory and the smallest number that works, two cache
orders, two batch sizes. "ours" counts the cases that are bit-equal to the run with everything in memory, the
peer is the number of cases. Beside it the largest difference of a logit from plain transformers.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from gangline.benchmarks.result import Row, write_result
from gangline.evaluation.check import CheckSettings, check_model
from gangline.evaluation.check_report import CheckReport

FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "llama4",
    "dbrx",
    "phimoe",
    "jamba",
    "nemotron_h",
    "ernie4_5_moe",
    "minimax_m2",
    "hunyuan_v1_moe",
    "switch_transformers",
    "nllb_moe",
)


def rows(name: str, report: CheckReport) -> list[Row]:
    """The report of one model."""
    cases = report.cases
    exact = sum(case.identical for case in cases)
    difference = max((case.reference_max_abs_logit_diff or 0.0 for case in cases), default=0.0)
    misses = sum(case.misses for case in cases)
    same = sum(bool(case.reference_tokens_equal) for case in cases)
    work = f"{name}, {report.dtype}, {misses:,} experts read"
    return [
        Row(work, "cases bit-equal to all in memory", exact, "cases", len(cases), exact / len(cases)),
        Row(work, "cases with plain transformers' tokens", same, "cases", len(cases), same / len(cases)),
        Row(work, "largest logit difference from plain transformers", difference),
    ]


def main() -> None:
    """Check and write the result."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from tiny_models import tiny_model

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=None, help="of the tiny models; fresh if left out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else torch.seed() % 2**31
    found = rows("demo", check_model("demo", CheckSettings(new_tokens=12)))
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(family, seed=seed, dtype=torch.float32).save_pretrained(folder)
            settings = CheckSettings(prompt_tokens=12, new_tokens=8)
            found += rows(f"tiny {family}", check_model(folder, settings, dtype=torch.float32))
        print(found[-3], found[-2], found[-1], sep="\n", flush=True)
    if arguments.out is not None:
        write_result(arguments.out.stem, found, folder=arguments.out.parent)


if __name__ == "__main__":
    main()
