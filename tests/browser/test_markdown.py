"""The Markdown of an answer: what becomes an element and what stays text, while it grows and when
it is hostile.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.support.dashboard import Stand

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


@pytest.fixture
async def blank(stand: Stand, page: Page) -> Page:
    """A page that can import the scripts of the server, and does nothing itself."""
    body = '<!doctype html><link rel="icon" href="data:,">'
    await page.route("**/blank", lambda route: route.fulfill(body=body, content_type="text/html"))
    await page.goto(stand.base + "/blank")
    return page


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
            + "<ul><li><p>f\n$$\ng</p><p>h</p></li></ul>"
        ),
    ),
    "a formula behind a paragraph": (
        "a\n$$\nb\n$$\nc",
        "<p>a\n<code>$$\nb\n$$</code>\nc</p>",
    ),
    "tasks": (
        "- [ ] a\n- [x] *b*\n- [y] c\n- [ ]d\n\n[ ] e",
        (
            f'<ul><li><p>{TASK}> a</p></li><li><p>{TASK} checked=""> <em>b</em></p></li>'
            "<li><p>[y] c</p></li><li><p>[ ]d</p></li></ul><p>[ ] e</p>"
        ),
    ),
    "headings": (
        "# One\n## Two ##\n#### C#\n#none",
        "<h3>One</h3><h4>Two</h4><h6>C#</h6><p>#none</p>",
    ),
    "emphasis": (
        "*a* **b** ***c*** _d_ ~~e~~",
        "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <s>e</s></p>",
    ),
    "no emphasis": ("snake_case_name 2 * 3 * 4 \\*a\\* **b", None),
    "code in a line": (
        "`a` ``b ` c`` `*d*` `e",
        "<p><code>a</code> <code>b ` c</code> <code>*d*</code> `e</p>",
    ),
    "lists": (
        "- a\n- b\n  - c\n\n3. d\n4. e",
        (
            "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ul>"
            '<ol start="3"><li><p>d</p></li><li><p>e</p></li></ol>'
        ),
    ),
    "code in a list": (
        "1. a\n\n   ```sh\n   b\n   ```\n2. c",
        (f'<ol start="1"><li><p>a</p>{code("b", "sh")}</li><li><p>c</p></li></ol>'),
    ),
    "a fence": (
        "~~~py\n\tif a:\n\n```\n~~~\nb",
        code("\tif a:\n\n```", "py") + "<p>b</p>",
    ),
    "a fence without end": (
        "a\n```\nb *c*",
        "<p>a</p>" + code("b *c*"),
    ),
    "a quote": (
        "> *a*\nb\n\n---",
        "<blockquote><p><em>a</em>\nb</p></blockquote><hr>",
    ),
    "a table": (
        "| a | b \\| c |\n|---|--:|\n| `d` | e |\n\nf",
        (
            '<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
            '<th>a</th><th class="right">b | c</th></tr></thead><tbody><tr><td><code>d</code></td>'
            '<td class="right">e</td></tr></tbody></table></div><p>f</p>'
        ),
    ),
    "no table": ("| a | b |\n|---|", None),
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
            "[e](data:text/html,f) <javascript:alert(1)> [g](https://[) ahttps://x.org"
        ),
        None,
    ),
    "an image is a link": (
        "![a](https://x.org/b.png)",
        f'<p><a href="https://x.org/b.png"{LINK}>a</a></p>',
    ),
    "no link in a link": (
        "[a [b](http://x.org/) https://y.org/](http://z.org/)",
        (
            f'<p>[a <a href="http://x.org/"{LINK}>b</a> <a href="https://y.org/"{LINK}>'
            f'https://y.org/</a>](<a href="http://z.org/"{LINK}>http://z.org/</a>)</p>'
        ),
    ),
    "markup": (
        "<img src=x onerror=alert(1)> <b>a</b> &amp; <script>b</script>",
        (
            "<p>&lt;img src=x onerror=alert(1)&gt; &lt;b&gt;a&lt;/b&gt; &amp;amp; "
            "&lt;script&gt;b&lt;/script&gt;</p>"
        ),
    ),
}


async def test_markdown_becomes_elements(blank: Page) -> None:
    for name, (text, html) in RENDERED.items():
        shown = text.replace("\\*", "*").replace("<", "&lt;").replace(">", "&gt;")
        whole = await blank.evaluate(WHOLE, text)

        assert whole == (f"<p>{shown}</p>" if html is None else html), name
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
        for _ in range(100 if repeats == 1 else 5)
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
        "<p>d\n<em><strong>e</strong></em></p>",
    ]


MIB = 2**20
HOSTILE = ("*[", "[](http://", "`a", "- a\n", "\n", "|a|b|\n|-|-|\n", "> ", "http://a.b/((((")
FURTHER = (
    *("**a", "_a ", "` `` ``` ", "<http://a", "![a](", "http://.", ">>>>> a\n", "- ", "# ", "~~a"),
    *("- a\n\n\n\n", "1. a\n   ", "|", "```\n", "*a _b ", "x*_", " ", "\\"),
)


@pytest.mark.parametrize(
    ("units", "size"),
    [(HOSTILE, MIB // 4), pytest.param(HOSTILE + FURTHER, MIB, marks=pytest.mark.stress)],
    ids=["some", "all"],
)
@pytest.mark.timeout(240)
async def test_hostile_text_is_shown_in_linear_time(
    blank: Page, units: tuple[str, ...], size: int
) -> None:
    """Takes seconds, on a busy machine half a minute. Quadratic time would take more than four
    minutes for each unit: 2**18 characters, squared.
    """
    for unit in units:
        whole, grown = await blank.evaluate(
            """async ([unit, size]) => {
              const { MarkdownView } = await import("/assets/chat/markdown.js");
              const text = unit.repeat(Math.ceil(size / unit.length));
              const counts = [];
              for (const step of [text.length, 10_000]) {
                const box = document.createElement("div");
                const view = new MarkdownView(box);
                for (let end = step; end < text.length; end += step) view.update(text.slice(0, end));
                view.update(text);
                counts.push(box.textContent.length);
              }
              return counts;
            }""",
            [unit, size],
        )

        assert whole == grown


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
    "headings of 400 characters": ("# " + "a" * 398, "# " + "a" * 399, "h3", 1, 0),
    "6 quotes in each other": ("> " * 6 + "a", "> " * 7 + "a", "blockquote", 6, 6),
    "6 lists in each other": ("- " * 6 + "a", "- " * 7 + "a", "ul", 6, 6),
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
    "addresses of 2048 characters": (
        f"[a](http://b/{'c' * 2039})",
        f"[a](http://b/{'c' * 2040})",
        "a",
        1,
        0,
    ),
    "titles of 511 characters": (
        f'[a](http://b/ "{"c" * 511}")',
        f'[a](http://b/ "{"c" * 512}")',
        "a",
        1,
        0,
    ),
    "32 brackets in an address": (
        f"[a](http://b/{'(' * 32}{')' * 32})",
        f"[a](http://b/{'(' * 33}{')' * 33})",
        "a",
        1,
        0,
    ),
}


async def test_what_a_model_can_nest_or_lengthen_has_a_bound(blank: Page) -> None:
    count = """async ([text, selector]) => {
      const { MarkdownView } = await import("/assets/chat/markdown.js");
      const box = document.createElement("div");
      new MarkdownView(box).update(text);
      const found = Array.from(box.querySelectorAll(selector));
      // A bare address beyond the bound may be a link; that of the text is not.
      return found.filter((element) => selector !== "a" || element.textContent === "a").length;
    }"""

    for name, (at, past, selector, within, beyond) in BOUNDED.items():
        assert await blank.evaluate(count, [at, selector]) == within, name
        assert await blank.evaluate(count, [past, selector]) == beyond, name
