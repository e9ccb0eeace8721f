"""Section: do reading and writing use the same experts?"""

from dataclasses import asdict

import numpy as np

from gangline.reports.figure import Line, chart
from gangline.reports.section import Picture, Section
from gangline.reports.study import Study
from gangline.traces.statistics.phases import phases

TITLE = "Do reading a prompt and writing use the same experts?"


def phases_section(study: Study) -> Section:
    """Report how the loads of prefill and decoding agree, over answers that the model wrote."""
    decode_R = study.rows.tokens.phase == 1
    answers_R = np.isin(study.doc_R, np.unique(study.doc_R[decode_R]))
    if not decode_R.any() or (answers_R & ~decode_R).sum() < 2:
        lack = "The traces hold no answers of the model: record with --prompts."
        return Section("phases", TITLE, lacks=[lack])
    mine = decode_R[answers_R]
    found = [phases(study.used(n)[answers_R], mine, study.rng(9, n)) for n in study.layers]
    both = [(f.correlation, f.ceiling) for f in found if f.correlation is not None and f.ceiling is not None]
    mean, ceiling = (float(np.mean([pair[n] for pair in both])) if both else 0.0 for n in (0, 1))
    says = (
        f"Over {int((~mine).sum()):,} tokens read and {int(mine.sum()):,} written the loads of the experts "
        f"correlate by {mean:.2f}; two halves of what was written correlate by {ceiling:.2f}, which is the "
        "most to expect. "
        + (
            "A prompt says little about what its answer needs: do not choose a cache's content by prompts "
            "alone."
            if mean < ceiling - 0.2
            else "So a prompt warms the cache for its answer."
        )
    )
    lines = [
        Line("prompt / answer", list(study.layers), [f.correlation for f in found]),
        Line("halves of the answers", list(study.layers), [f.ceiling for f in found], chance=True),
    ]
    draw = chart(
        "Do prompts and answers load the same experts?",
        "MoE layer",
        "correlation",
        lines,
        bottom=None,
        top=1.0,
    )
    return Section(
        "phases",
        TITLE,
        says,
        "Two random halves of the decoded tokens: what sampling leaves of a perfect agreement.",
        {"read": int((~mine).sum()), "written": int(mine.sum()), "layers": [asdict(f) for f in found]},
        [Picture("phases", "Correlation of the loads of prefill and decoding by layer", draw)],
    )
