"""What a report is made of, and its two forms: Markdown and one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape as escape_html
from importlib.resources import files
from string import Template


@dataclass(frozen=True)
class Text:
    """A paragraph, or a heading within a section."""

    text: str
    heading: bool = False


@dataclass(frozen=True)
class Note:
    """A remark in small print."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text; the first `text_columns` are set to the left, the others, numbers, to the right.

    `strong` is the row that stands out, `folded` the line to click on where the table starts hidden.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None
    folded: str | None = None
    text_columns: int = 1


@dataclass(frozen=True)
class Figure:
    """Inline SVG; Markdown has the caption and says where the figure is."""

    svg: str
    caption: str


Block = Text | Note | Table | Figure


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """`tiles` are (name, value, remark)."""

    title: str
    kicker: str
    headline: str
    tiles: Sequence[tuple[str, str, str]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""


def to_html(page: Page) -> str:
    """One HTML file: style sheet and figures inside, no script."""
    template = Template(files("asr_kd").joinpath("report_template.html").read_text(encoding="utf-8"))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>" for name, value, remark in page.tiles)
    sections = "\n".join(f"<section>\n<h2>{escape(section.title)}</h2>\n{''.join(map(_block_html, section.blocks))}</section>" for section in page.sections)
    return template.substitute(title=escape(page.title), kicker=escape(page.kicker), headline=escape(page.headline),
                               tiles=f'<dl class="tiles">{tiles}</dl>' if tiles else "", sections=sections, footer=escape(page.footer))


def _block_html(block: Block) -> str:
    if isinstance(block, Figure):
        return f"<figure>{block.svg}<figcaption>{escape(block.caption)}</figcaption></figure>\n"
    if isinstance(block, Note):
        return f'<p class="note">{escape(block.text)}</p>\n'
    if isinstance(block, Text):
        return f"<h3>{escape(block.text)}</h3>\n" if block.heading else f"<p>{escape(block.text)}</p>\n"
    return _table_html(block)


def _table_html(table: Table) -> str:
    head = "".join(f"<th{_side(c, table)}>{escape(name)}</th>" for c, name in enumerate(table.header))
    rows = "".join(_row_html(row, table, strong=r == table.strong) for r, row in enumerate(table.rows))
    kind = ' class="text"' if table.text_columns == len(table.header) else ""
    html = f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
    return f"<details><summary>{escape(table.folded)}</summary>\n{html}</details>\n" if table.folded else html


def _row_html(row: Sequence[str], table: Table, strong: bool) -> str:
    kind = ' class="strong"' if strong else ""
    return f"<tr{kind}>{''.join(f'<td{_side(c, table)}>{escape(cell)}</td>' for c, cell in enumerate(row))}</tr>\n"


def _side(column: int, table: Table) -> str:
    return ' class="l"' if column < table.text_columns else ""


def to_markdown(page: Page) -> str:
    """The words and tables of the page."""
    parts = [f"# {page.title}", page.kicker, f"**{page.headline}**"]
    for section in page.sections:
        parts += [f"## {section.title}", *map(_block_markdown, section.blocks)]
    return "\n\n".join(part for part in [*parts, page.footer] if part) + "\n"


def _block_markdown(block: Block) -> str:
    if isinstance(block, Figure):
        return f"*Figure in report.html: {block.caption}*"
    if isinstance(block, Table):
        rule = ["---" if c < block.text_columns else "---:" for c in range(len(block.header))]
        lines = [block.header, rule, *block.rows]
        table = "\n".join("| " + " | ".join(map(_cell_markdown, line)) + " |" for line in lines)
        return f"**{block.folded}**\n\n{table}" if block.folded else table
    return f"### {block.text}" if isinstance(block, Text) and block.heading else block.text


def _cell_markdown(text: str) -> str:
    r"""What others named (words, speakers, paths) must not be read as tags or emphasis.

    >>> print(_cell_markdown("<noise> | a*b_c"))
    \<noise> \| a\*b_c
    """
    return re.sub(r"([\\`*<|])", r"\\\1", text)


def escape(text: str) -> str:
    """For text between tags; quotes stay as they are."""
    return escape_html(text, quote=False)
