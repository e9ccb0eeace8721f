"""One self-contained HTML page: no script, nothing fetched, readable on a phone."""

import base64
import html
import re
from collections.abc import Mapping
from typing import Any

from gangline.reports.build import Report
from gangline.reports.section import Picture, Section, Table

_CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1b1b1b;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:68rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.55rem;line-height:1.25;margin:.6rem 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;margin:0 0 .4rem}
section{border-top:1px solid #d9d9d9;padding:1.4rem 0 .6rem;margin-top:1.4rem}
p{margin:.4rem 0;max-width:46rem}
.facts{color:#444}
.says{font-size:1.06rem}
.advice{background:#eef4fa;border-left:4px solid #0072B2;padding:.7rem .9rem;margin:.9rem 0}
.lacks{background:#fbf5e6;border-left:4px solid #E69F00;padding:.5rem .9rem;margin:.7rem 0;max-width:46rem}
.lacks p{margin:.2rem 0}
code{white-space:nowrap;font-size:.92em}
.small{color:#555;font-size:.9rem}
.pictures{display:grid;grid-template-columns:1fr;gap:1.1rem;margin:1rem 0;align-items:start}
@media(min-width:56rem){.pictures{grid-template-columns:1fr 1fr}}
figure{margin:0;min-width:0}
figure img{display:block;width:100%;height:auto;max-width:36rem}
details{margin:.6rem 0}
summary{cursor:pointer;padding:.35rem 0;font-weight:600}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #e6e6e6;
text-align:right;vertical-align:top;white-space:nowrap}
th{border-bottom:2px solid #b5b5b5;white-space:normal;min-width:3.6rem}
td.text,th.text{text-align:left}
td.long{white-space:normal;min-width:14rem}
nav ul{list-style:none;padding:0;margin:.6rem 0;columns:1}
@media(min-width:40rem){nav ul{columns:2}}
nav li{padding:.16rem 0;break-inside:avoid}
a{color:#00548a}
"""
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)")
_LONG = 40
_NUMBER = re.compile(r"[-+]?[\d.,]+\s?(%|[kMGT]?i?B)?|-")


def page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Return the page.

    Args:
        report: what it shows.
        pictures: for the name of each picture its PNG file, which is put into the page.
    """
    header = report.study.header
    title = f"Routing of {header.model}"
    answered = [section for section in report.sections if section.says is not None]
    rest = [section for section in report.sections if section.says is None]
    links = "".join(f'<li><a href="#{s.name}">{_text(s.title)}</a></li>' for s in answered)
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="facts">{_text(_facts(report))}</p>',
        *(f'<p class="small">{_text(note)}</p>' for note in report.study.notes),
        _advice(report),
        f"<nav><ul>{links}</ul></nav>",
        *(_section(section, pictures) for section in answered),
        _not_said(rest),
        _about(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _facts(report: Report) -> str:
    study, header = report.study, report.study.header
    experts, slots = sorted(set(header.experts)), sorted(set(header.top_k))
    facts = [
        f"{len(header.layers)} MoE layers of {'/'.join(map(str, experts))} experts, "
        f"{'/'.join(map(str, slots))} per token."
    ]
    if study.trace is not None:
        documents = len(study.trace.documents)
        facts.append(f"{len(study.trace):,} tokens in {documents} documents.")
        if len(study.groups) > 1:
            facts.append(f"Groups: {', '.join(study.groups)}.")
    if any(layer.shared for layer in header.layers):
        facts.append("Shared experts see every token and are in no trace.")
    return " ".join(facts)


def _advice(report: Report) -> str:
    said = [section.headline for section in report.sections if section.headline]
    if not said:
        return ""
    return f'<div class="advice"><strong>Worth caching?</strong> {_text(" ".join(said))}</div>'


def _section(section: Section, pictures: Mapping[str, bytes]) -> str:
    shown = "".join(_picture(one, pictures) for one in section.pictures)
    parts = [
        f'<section id="{section.name}"><h2>{_text(section.title)}</h2>',
        f'<p class="says">{_text(section.says or "")}</p>',
        f'<p class="small"><strong>Compared with:</strong> {_text(section.null)}</p>' if section.null else "",
        f'<div class="pictures">{shown}</div>' if shown else "",
        _lacks(section),
        *(_table(table) for table in section.tables if table.rows),
        f'<p class="small">{_text(section.source)}</p>' if section.source else "",
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _picture(picture: Picture, pictures: Mapping[str, bytes]) -> str:
    data = base64.b64encode(pictures[picture.name]).decode()
    return f'<figure><img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{data}"></figure>'


def _lacks(section: Section) -> str:
    if not section.lacks:
        return ""
    return '<div class="lacks">' + "".join(f"<p>{_text(lack)}</p>" for lack in section.lacks) + "</div>"


def _table(table: Table) -> str:
    texts = [_is_text(row[n] for row in table.rows) for n in range(len(table.head))]
    head = "".join(
        f'<th{_class(text)} scope="col">{_text(h)}</th>' for h, text in zip(table.head, texts, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(value, text) for value, text in zip(row, texts, strict=True)) + "</tr>"
        for row in table.rows
    )
    inside = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{_text(table.caption)}</summary>{inside}</details>"


def _is_text(values: Any) -> bool:
    return not all(_NUMBER.fullmatch(str(value)) for value in values)


def _cell(value: Any, text: bool) -> str:
    names = ["text"] if text else []
    names += ["long"] if len(str(value)) > _LONG else []
    return f"<td{_class(*names)}>{_text(str(value))}</td>"


def _class(*names: Any) -> str:
    chosen = ["text" if name is True else name for name in names if name]
    return f' class="{" ".join(chosen)}"' if chosen else ""


def _not_said(sections: list[Section]) -> str:
    if not sections:
        return ""
    items = "".join(
        f"<h3>{_text(section.title)}</h3>{_lacks(section)}" + "".join(_table(t) for t in section.tables)
        for section in sections
    )
    return f'<section id="missing"><h2>What these traces cannot say</h2>{items}</section>'


def _about(report: Report) -> str:
    header = report.study.header
    software = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    facts = [
        f"Recorded with {software}." if software else "",
        f"Computed in {header.dtype}." if header.dtype else "",
        f"Seed {report.study.seed}. Intervals and chance are 95% ranges; every choice of draws follows from "
        "the seed.",
        "Simulated numbers come from replaying the trace, not from a run.",
    ]
    return f'<section><p class="small">{_text(" ".join(f for f in facts if f))}</p></section>'


def _text(text: str) -> str:
    """Escape, and keep the names of options in one piece."""
    return _OPTION.sub(r"<code>\1</code>", html.escape(text, quote=True))
