"""Collect all sections of a report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gangline.reports.section import Section
from gangline.reports.sections.caching import caching_section
from gangline.reports.sections.certainty import certainty_section
from gangline.reports.sections.control import control_section
from gangline.reports.sections.groups import groups_section
from gangline.reports.sections.languages import languages_section
from gangline.reports.sections.load import load_section
from gangline.reports.sections.locality import locality_section
from gangline.reports.sections.outputs import outputs_section
from gangline.reports.sections.phases import phases_section
from gangline.reports.sections.positions import positions_section
from gangline.reports.sections.together import together_section
from gangline.reports.sections.tokens import tokens_section
from gangline.reports.sections.training import training_section
from gangline.reports.study import Study

Make = Callable[[Study], Section]

# What works on sums alone.
_ALWAYS: tuple[Make, ...] = (caching_section, load_section, outputs_section)
SECTIONS: tuple[Make, ...] = (
    caching_section,
    locality_section,
    load_section,
    certainty_section,
    together_section,
    groups_section,
    tokens_section,
    positions_section,
    languages_section,
    phases_section,
    training_section,
    outputs_section,
    control_section,
)


@dataclass(frozen=True)
class Report:
    """All sections, and the study that they are about."""

    study: Study
    sections: tuple[Section, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain data."""
        study, header = self.study, self.study.header
        return {
            "kind": "report",
            "model": header.model,
            "revision": header.revision,
            "family": header.family,
            "layers": len(header.layers),
            "experts": list(header.experts),
            "top_k": list(header.top_k),
            "shared_experts": any(layer.shared for layer in header.layers),
            "recorded_tokens": study.recorded,
            "tokens": 0 if study.trace is None else len(study.trace),
            "documents": 0 if study.trace is None else len(study.trace.documents),
            "groups": {"kind": study.group_kind, "names": list(study.groups)},
            "seed": study.seed,
            "versions": header.versions,
            "notes": study.notes,
            "sections": {section.name: _section(section) for section in self.sections},
        }


def build_report(study: Study, progress: Callable[[int, int], None] | None = None) -> Report:
    """Compute every section.

    Args:
        study: see :func:`gangline.reports.study.open_study`.
        progress: called with sections done and sections in all.

    Raises:
        TraceError: a shard is damaged.
    """
    makers = SECTIONS if study.trace is not None else _ALWAYS
    sections = []
    for number, make in enumerate(makers):
        sections.append(make(study))
        if progress is not None:
            progress(number + 1, len(makers))
    if study.trace is None:
        missing = (
            "These traces hold sums only (mode counts); the rest needs single tokens: --mode ids or full."
        )
        sections.append(Section("not_in_sums", "What else there could be", lacks=[missing]))
    return Report(study, tuple(sections))


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "says": section.says,
        "null": section.null,
        "source": section.source,
        "lacks": list(section.lacks),
        "numbers": section.numbers,
    }
