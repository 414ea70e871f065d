"""The Markdown of an answer: what becomes an element and what stays text, while it grows and when
it is hostile.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Page

WHOLE = """async (text) => {
  const { MarkdownView } = await import("/assets/chat/markdown.js");
  const box = document.createElement("div");
  new MarkdownView(box).update(text);
  return box.innerHTML;
}"""
PIECEWISE = """async ([text, step]) => {
  const { MarkdownView } = await import("/assets/chat/markdown.js");
  const box = document.createElement("div");
  const view = new MarkdownView(box);
  for (let end = step; end < text.length; end += step) view.update(text.slice(0, end));
  view.update(text);
  return box.innerHTML;
}"""


def code(text: str, language: str = "") -> str:
    """A block of code."""
    return (
        f'<div class="code"><pre data-language="{language}" tabindex="0"><code>{text}</code></pre>'
        '<button type="button" aria-label="Copy this code"></button></div>'
    )


LINK = ' target="_blank" rel="noopener noreferrer"'
BARE = f'<a href="http://b.org/"{LINK}>http://b.org/</a>'


TASK = '<input type="checkbox" disabled="" aria-label="Done"'
RENDERED = {
    "formulas in a line": (
        r"\(a_1 * b_2\) \[c\\d\] $$e^*$$ \\(f\\) $5 *g* $6 \(h",
        (
            r"<p><code>\(a_1 * b_2\)</code> <code>\[c\\d\]</code> <code>$$e^*$$</code> "
            r"\(f\) $5 <em>g</em> $6 (h</p>"
        ),
    ),
    "a formula of several lines": (
        "a\n\\[\n- b\n= c \\\\\n\\]\nd\n\n$$\n# e\n$$\n\n- f\n  $$\n  g\n\n  h",
        (
            "<p>a</p>"
            + code("\\[\n- b\n= c \\\\\n\\]")
            + "<p>d</p>"
            + code("$$\n# e\n$$")
            + "<ul><li><p>f</p>"
            + code("$$\ng")
            + "<p>h</p></li></ul>"
        ),
    ),
    "a formula behind a paragraph": (
        "a\n$$\nb\n$$\nc",
        "<p>a<br><code>$$\nb\n$$</code><br>c</p>",
    ),
    "tasks": (
        "- [ ] a\n- [x] *b*\n- [y] c\n- [ ]d\n\n[ ] e",
        (
            f'<ul><li>{TASK}> a</li><li>{TASK} checked=""> <em>b</em></li>'
            "<li>[y] c</li><li>[ ]d</li></ul><p>[ ] e</p>"
        ),
    ),
    "headings": (
        "# One\n## Two ##\n#### C#\n#none",
        "<h3>One</h3><h4>Two</h4><h6>C#</h6><p>#none</p>",
    ),
    "no heading by the line below": ("a\n---\nb\n=", "<p>a</p><hr><p>b<br>=</p>"),
    "emphasis": (
        "*a* **b** ***c*** _d_ ~~e~~",
        "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <del>e</del></p>",
    ),
    "no emphasis": ("snake_case_name 2 * 3 * 4 \\*a\\* **b", None),
    "code in a line": (
        "`a` ``b ` c`` `*d*` `e",
        "<p><code>a</code> <code>b ` c</code> <code>*d*</code> `e</p>",
    ),
    "lists": (
        "- a\n- b\n  - c\n\n3. d\n4. e",
        (
            "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"
            '<ol start="3"><li>d</li><li>e</li></ol>'
        ),
    ),
    "code in a list": (
        "1. a\n\n   ```sh\n   b\n   ```\n2. c",
        f"<ol><li><p>a</p>{code('b', 'sh')}</li><li><p>c</p></li></ol>",
    ),
    "a fence": (
        "~~~py\n\tif a:\n\n```\n~~~\nb",
        code("\tif a:\n\n```", "py") + "<p>b</p>",
    ),
    "a fence without end": (
        "a\n```\nb *c*",
        "<p>a</p>" + code("b *c*"),
    ),
    "lines that are indented": ("a\n\n    b", "<p>a</p><p>    b</p>"),
    "a quote": (
        "> *a*\nb\n\n---",
        "<blockquote><p><em>a</em><br>b</p></blockquote><hr>",
    ),
    "a table": (
        "| a | b \\| c |\n|---|--:|\n| `d` | e |\n\nf",
        (
            '<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
            '<th>a</th><th align="right">b | c</th></tr></thead><tbody><tr><td><code>d</code></td>'
            '<td align="right">e</td></tr></tbody></table></div><p>f</p>'
        ),
    ),
    "no table": ("| a | b |\n|---|", "<p>| a | b |<br>|---|</p>"),
    "links": (
        '[a *b*](https://x.org/c_d "title") <http://y.org> (https://z.org/e_f).',
        (
            f'<p><a href="https://x.org/c_d"{LINK}>a <em>b</em></a> <a href="http://y.org/"{LINK}>'
            f'http://y.org</a> (<a href="https://z.org/e_f"{LINK}>https://z.org/e_f</a>).</p>'
        ),
    ),
    "no links": (
        (
            "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](//x.org) [d](/dashboard) "
            "[e](data:text/html,f) <javascript:alert(1)> [g](https://[) "
            "![j](javascript:k) <l@m.org> [n]"
        ),
        None,
    ),
    "no link of entities": ("[a](&#106;avascript:b)", "<p>[a](javascript:b)</p>"),
    "no links by name": ("[a]\n\n[a]: http://b.org/", f"<p>[a]</p><p>[a]: {BARE}</p>"),
    "an image is a link": (
        "![a](https://x.org/b.png)",
        f'<p><a href="https://x.org/b.png"{LINK}>a</a></p>',
    ),
    "no link in a link": (
        "[a ![b](http://x.org/) *c*](http://z.org/)",
        f'<p><a href="http://z.org/"{LINK}>a b <em>c</em></a></p>',
    ),
    "no attribute of an address or a language": (
        '[a](http://b.org/"onclick="c)\n\n```x"onclick="y\nd\n```',
        (
            f'<p><a href="http://b.org/%22onclick=%22c"{LINK}>a</a></p>'
            + code("d", "x&quot;onclick=&quot;y")
        ),
    ),
    "markup": (
        "<img src=x onerror=alert(1)> <b>a</b> &lt;i> <script>b</script>\n\n<div>\n\n<style>*{}",
        (
            "<p>&lt;img src=x onerror=alert(1)&gt; &lt;b&gt;a&lt;/b&gt; &lt;i&gt; "
            "&lt;script&gt;b&lt;/script&gt;</p><p>&lt;div&gt;</p><p>&lt;style&gt;*{}</p>"
        ),
    ),
}


async def test_markdown_becomes_elements(blank: Page) -> None:
    for name, (text, html) in RENDERED.items():
        shown = text.replace("\\*", "*").replace("<", "&lt;").replace(">", "&gt;")
        whole = await blank.evaluate(WHOLE, text)

        elements = re.sub(r"(?<=>)\n(?=<)", "", whole)  # those of marked stand in lines
        assert elements == (f"<p>{shown}</p>" if html is None else html), name
        assert await blank.evaluate(PIECEWISE, [text, 1]) == whole, name


PARTS = (
    *("a", "b c", " ", "  ", "\n", "\n\n", "\n\n\n", "# ", "- ", "- item\n", "  - sub\n", "1. "),
    *("2. x\n", "> ", "> q\n", "| a | b |\n", "|---|:-:|\n", "| 1 | 2 |\n", "```", "```py\n"),
    *(
        "~~~\n",
        "`",
        "``",
        "*",
        "**",
        "_",
        "__",
        "~~",
        "[",
        "](https://a.b/c)",
        "](x:y)",
        "![",
        "|",
    ),
    *("\\(", "\\)", "\\[", "\\]", "\\[\n", "$$", "$$\n", "- [ ] ", "- [x] y\n", "$"),
    *("https://x.y/z.", "\\", "---\n", "***\n", "\t", "<b>", "\U0001f600", "    code\n", "x" * 50),
)


@pytest.mark.parametrize("repeats", [1, 300])
async def test_texts_of_chance_grow_into_the_whole(blank: Page, repeats: int) -> None:
    """With repeats the blocks are longer than what is parsed at once."""
    chance = random.Random(repeats)
    texts = [
        "".join(chance.choice(PARTS) * chance.choice((1, 1, repeats)) for _ in range(40))
        for _ in range(10 if repeats == 1 else 2)
    ]

    for text in texts:
        step = 1 if repeats == 1 else 97
        grown = await blank.evaluate(PIECEWISE, [text, step])
        # Text nodes may be divided differently; the elements and their texts are the same.
        assert grown == await blank.evaluate(WHOLE, text), text


async def test_what_does_not_change_stays_while_the_text_grows(blank: Page) -> None:
    kept = await blank.evaluate(
        """async () => {
          const { MarkdownView } = await import("/assets/chat/markdown.js");
          const box = document.createElement("div");
          const view = new MarkdownView(box);
          let text = "# a\\n\\n- b\\n- *c* d";
          view.update(text);
          const nodes = () => {
            const em = box.querySelector("em");
            return [box.querySelector("h3"), box.querySelector("li"), em, em.nextSibling];
          };
          const before = nodes();
          for (const more of [" e", " f", "\\n- g", "\\n\\nh", " **i**"]) view.update((text += more));
          const after = nodes();
          return before.map((node, index) => node === after[index]);
        }"""
    )

    assert kept == [True] * 4


LONG = {
    "code": ("```py\n" + "x = 1\n\n" * 1500 + "```", "pre", "x = 1\n\n" * 1499 + "x = 1\n"),
    "a table": ("|a|b|\n|-|-|\n" + "|c|d|\n" * 2000, "table", None),
    "a list": ("- a\n" * 3000 + "  - b\n- c", ".whole > ul", None),
    "a paragraph, which is divided": ("a" * 20_000, "p", "a" * 20_000),
    "a quote": ("> a\n>\n" * 2000 + "> b", "blockquote", None),
    "an item with code": (
        "1. a\n   ```\n" + "   b\n" * 2000 + "   ```\n2. c",
        "pre",
        "b\n" * 1999 + "b",
    ),
}


async def test_what_is_longer_than_a_piece_is_one_element(blank: Page) -> None:
    for name, (text, selector, inside) in LONG.items():
        found = await blank.evaluate(
            """async ([text, selector]) => {
              const { MarkdownView } = await import("/assets/chat/markdown.js");
              const box = document.createElement("div");
              box.className = "whole";
              document.createElement("ol").append(box); // as on the page
              const view = new MarkdownView(box);
              for (let end = 5000; end < text.length; end += 5000) view.update(text.slice(0, end));
              view.update(text);
              return Array.from(box.querySelectorAll(selector), ({ textContent }) => textContent);
            }""",
            [text, selector],
        )

        assert len(found) == (3 if name == "a paragraph, which is divided" else 1), name
        assert inside is None or "".join(found) == inside, name


async def test_another_text_replaces_the_first(blank: Page) -> None:
    shown = await blank.evaluate(
        """async () => {
          const { MarkdownView } = await import("/assets/chat/markdown.js");
          const box = document.createElement("div");
          const view = new MarkdownView(box);
          const shown = [];
          for (const text of ["# a\\n\\nb", "", "c", "d\\n***", "d\\n***e***"]) {
            view.update(text);
            shown.push(box.innerHTML);
          }
          return shown;
        }"""
    )

    assert shown == [
        "<h3>a</h3><p>b</p>",
        "",
        "<p>c</p>",
        "<p>d</p><hr>",
        "<p>d<br><em><strong>e</strong></em></p>",
    ]


async def test_what_the_parser_might_let_through_is_sanitized(blank: Page) -> None:
    """The parser makes no such elements of any text that is known."""
    shown = await blank.evaluate(
        """async (html) => {
          const { Marked } = await import("/assets/vendor/marked.js");
          const { MarkdownView } = await import("/assets/chat/markdown.js");
          Marked.prototype.parser = () => html;
          const box = document.createElement("div");
          new MarkdownView(box).update("a");
          return box.innerHTML;
        }""",
        '<p onclick="a()" style="color: red" id="b">c<script>d()</script><img src="https://x.org/">'
        '<a href="javascript:e()">f</a><a href="/g">h</a><style>*{}</style></p><iframe src="i">'
        '</iframe><svg><a href="https://y.org/">j</a></svg><form action="https://z.org/"><input>'
        '</form><p><a href="https://x.org/" target="_blank" rel="noopener noreferrer">k</a></p>',
    )

    assert shown == (f'<p>c<a>f</a><a>h</a></p><input><p><a href="https://x.org/"{LINK}>k</a></p>')


HOSTILE = ("*[", "[](http://", "`a", "> ", "1. a\n   ")
FURTHER = (
    *(
        "- a\n",
        "\n",
        "|a|b|\n|-|-|\n",
        "http://a.b/((((",
        "**a",
        "_a ",
        "` `` ``` ",
        "<http://a",
        "![a](",
        "http://.",
        ">>>>> a\n",
        "- ",
        "# ",
        "~~a",
    ),
    *("- a\n\n\n\n", "|", "```\n", "*a _b ", "x*_", " ", "\\"),
)


PIECE, ITEM = 8_192, 32_768  # characters: MAX_PIECE and MAX_ITEM of the page


@pytest.mark.parametrize(
    ("units", "size"),
    [(HOSTILE, 2 * ITEM), pytest.param(HOSTILE + FURTHER, 4 * ITEM, marks=pytest.mark.stress)],
    ids=["some", "all"],
)
@pytest.mark.timeout(240)
async def test_hostile_text_is_parsed_in_bounded_pieces(
    blank: Page, units: tuple[str, ...], size: int
) -> None:
    """So the time is linear, however long the text: no piece takes more than its bound squared."""
    for unit in units:
        longest, parsed, further, whole, grown = await blank.evaluate(
            """async ([unit, size, piece]) => {
              const { Marked } = await import("/assets/vendor/marked.js");
              const { MarkdownView } = await import("/assets/chat/markdown.js");
              const lexer = Marked.prototype.lexer;
              let longest = 0;
              let parsed = 0;
              Marked.prototype.lexer = function (text, ...more) {
                longest = Math.max(longest, text.length);
                parsed += text.length;
                return lexer.call(this, text, ...more);
              };
              const text = unit.repeat(Math.ceil(size / unit.length));
              const box = document.createElement("div");
              const view = new MarkdownView(box);
              view.update(text);
              const first = parsed;
              view.update(text + unit);
              const further = parsed - first;
              Marked.prototype.lexer = lexer;
              const shown = (step, text) => {
                const box = document.createElement("div");
                const view = new MarkdownView(box);
                for (let end = step; end < text.length; end += step) view.update(text.slice(0, end));
                view.update(text);
                return box.textContent.length;
              };
              const part = text.slice(0, 2 * piece);
              return [longest, first, further, shown(part.length, part), shown(piece / 3, part)];
            }""",
            [unit, size, PIECE],
        )

        assert longest < ITEM + 64, unit  # with the head of a table that goes on
        assert parsed < 2.5 * size, unit
        assert further < 3 * PIECE, unit
        assert whole == grown, unit


async def test_deep_nesting_has_a_bound(blank: Page) -> None:
    depth = await blank.evaluate(
        """async () => {
          const { MarkdownView } = await import("/assets/chat/markdown.js");
          const box = document.createElement("div");
          const depth = (element) => 1 + Math.max(0, ...Array.from(element.children, depth));
          return ["*".repeat(4000) + "a" + "*".repeat(4000), "> ".repeat(4000), "- ".repeat(2000) + "a"]
            .map((text) => {
              new MarkdownView(box).update(text);
              const found = depth(box);
              box.replaceChildren();
              return found;
            });
        }"""
    )

    assert max(depth) <= 24


# By the bound: a text at the bound, a text one past it, and what is counted in both.
BOUNDED = {
    "6 quotes in each other": ("> " * 6 + "a", "> " * 7 + "a", "blockquote", 6, 6),
    "6 lists in each other": ("- " * 6 + "a", "- " * 7 + "a", "ul", 6, 6),
    "255 marks that nothing closes": (
        "*a " * 255 + "*b*",
        "*a " * 256 + "*b*",
        "em",
        1,
        0,
    ),
    "tables of 64 columns": (
        "|a" * 64 + "|\n" + "|-" * 64 + "|",
        "|a" * 65 + "|\n" + "|-" * 65 + "|",
        "th",
        64,
        0,
    ),
    "16 inline elements in each other": (
        "*a " * 16 + "b" + "* c" * 16,
        "*a " * 17 + "b" + "* c" * 17,
        "em",
        16,
        16,
    ),
}


async def test_what_a_model_can_nest_or_widen_has_a_bound(blank: Page) -> None:
    count = """async ([text, selector]) => {
      const { MarkdownView } = await import("/assets/chat/markdown.js");
      const box = document.createElement("div");
      new MarkdownView(box).update(text);
      return box.querySelectorAll(selector).length;
    }"""

    for name, (at, past, selector, within, beyond) in BOUNDED.items():
        assert await blank.evaluate(count, [at, selector]) == within, name
        assert await blank.evaluate(count, [past, selector]) == beyond, name
