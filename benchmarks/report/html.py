"""A report's Markdown as one HTML file that needs nothing beside it: figures and their data lie inside.

The Markdown is the only source: tables, words and figures of the page are those of the file, rendered.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.token import Token

from benchmarks.files import atomic_write_text

_TYPES = {".svg": "image/svg+xml", ".png": "image/png", ".csv": "text/csv", ".json": "application/json"}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1d2125; --dim: #59636e; --page: #ffffff; --line: #d5dae0; --band: #f4f6f8; --link: #0060a8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6ea; --dim: #9aa4af; --page: #16191d; --line: #383f47; --band: #1f2429; --link: #7db8ee; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
p, ul { max-width: 48rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: var(--link); }
code { font: .875em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; max-width: none; }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0 1.25rem; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
td.words { white-space: normal; min-width: 12rem; text-align: left !important; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
tbody tr:hover td { background: var(--band); }
figure { margin: 1.25rem 0 2rem; }
figure .scroll { margin: 0; background: #ffffff; border: 1px solid var(--line); border-radius: 4px; padding: .5rem; }
figure img { display: block; min-width: 36rem; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--dim); font-size: .875rem; max-width: 48rem; margin-top: .5rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 3rem; }
  th:first-child, td:first-child { min-width: 8rem; max-width: 9rem; white-space: normal;
    overflow-wrap: anywhere; }
}
@media print { body { max-width: none; } .scroll { overflow: visible; } nav { display: none; } }
</style>
</head>
<body>
$nav
<main>
$body
</main>
</body>
</html>
""")

_LONG = 36  # characters from which a cell is text to be wrapped, not a number


def write_html(markdown: Path) -> Path:
    """Write the page of a Markdown file beside it, ``report.html`` of ``report.md``.

    Raises:
        OSError: a figure or a file of data that it names is not there.
    """
    page = render(markdown.read_text(encoding="utf-8"), markdown.parent)
    return atomic_write_text(markdown.with_suffix(".html"), page)


def render(text: str, folder: Path) -> str:
    """The page of a text; its figures and data are read from ``folder``.

    Raises:
        OSError: a figure or a file of data that it names is not there.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    for rule in (
        _image,
        _hardbreak,
        _link_open,
        _table_open,
        _table_close,
        _td_open,
        _paragraph_open,
        _paragraph_close,
    ):
        parser.add_render_rule(rule.__name__.lstrip("_"), rule)
    env = {"folder": folder}
    tokens = parser.parse(text, env)
    title, sections = "report", []
    for opened, inline in zip(tokens, tokens[1:], strict=False):
        if opened.type == "heading_open":
            if opened.tag == "h1":
                title = inline.content
            elif opened.tag == "h2":
                name = _unused(re.sub(r"\W+", "-", inline.content.lower()).strip("-"), [s for s, _ in sections])
                opened.attrSet("id", name)
                sections.append((name, inline.content))
    items = "".join(f'<li><a href="#{name}">{html.escape(words)}</a></li>' for name, words in sections)
    nav = f'<nav aria-label="sections"><ul>{items}</ul></nav>' if items else ""
    body = parser.renderer.render(tokens, parser.options, env)
    return _PAGE.substitute(title=html.escape(title), nav=nav, body=body)


def _unused(name: str, taken: Sequence[str]) -> str:
    return name if name not in taken else f"{name}-{sum(t.startswith(name) for t in taken) + 1}"


def _data(path: Path) -> str:
    return f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


Env = MutableMapping[str, Any]


def _image(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    path = env["folder"] / unquote(str(tokens[i].attrGet("src")))
    vector = path.with_suffix(".svg")
    source = _data(vector if vector.exists() else path)
    alt = html.escape(tokens[i].content)
    # The rest of the paragraph is the caption; the rules for paragraphs put the figure around both.
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{alt}"><img alt="{alt}" src="{source}"></div><figcaption>'


def _hardbreak(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    return "" if tokens[0].type == "image" else "<br>\n"


def _link_open(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    target = str(tokens[i].attrGet("href"))
    if re.match(r"(https?:|mailto:|#)", target):
        return f'<a href="{html.escape(target)}">'
    path = env["folder"] / unquote(target)
    return f'<a download="{html.escape(path.name)}" href="{_data(path)}">'


def _table_open(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    return '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>\n'


def _table_close(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    return "</table></div>\n"


def _td_open(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    style = tokens[i].attrGet("style")
    kind = ' class="words"' if len(tokens[i + 1].content) > _LONG else ""
    return f"<td{kind}" + (f' style="{style}">' if style else ">")


def _is_figure(tokens: Sequence[Token], inline: int) -> bool:
    children = tokens[inline].children if 0 <= inline < len(tokens) else None
    return bool(children) and children[0].type == "image"  # type: ignore[index]


def _paragraph_open(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    if _is_figure(tokens, i + 1):
        return "<figure>"
    return "" if tokens[i].hidden else "<p>"


def _paragraph_close(self: RendererProtocol, tokens: Sequence[Token], i: int, options: Any, env: Env) -> str:
    if _is_figure(tokens, i - 1):
        return "</figcaption></figure>\n"
    return "\n" if tokens[i].hidden else "</p>\n"
