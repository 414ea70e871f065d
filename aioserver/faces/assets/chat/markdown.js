// A Markdown text as elements, which grow while the text does. marked reads it, DOMPurify lets through what the page makes of
// Markdown and nothing else, and what differs from what is shown is changed, so that a selection survives.
//
// GitHub's Markdown, with these differences. HTML is text. So are indented lines, lines under which others are drawn, and links
// by a name, since each of them changes what is already shown. Links lead to http and https only; an image is a link to it. A
// formula, \(…\), \[…\] or $$…$$, is code as it is written: nothing here sets it, and its backslashes must stay.

import { Marked, Renderer, Tokenizer } from "/assets/vendor/marked.js";
import "/assets/vendor/dompurify.js"; // it defines DOMPurify

const MAX_PIECE = 8_192; // characters that are parsed at once; a longer block is divided
const MAX_ITEM = 32_768; // the same for one item of a list, which cannot be divided
const MAX_BLOCKS = 6; // lists and quotes in each other
const MAX_INLINE = 16; // elements in each other in a line
const MAX_UNMATCHED = 256; // runs of *, _ and ~ in a text that nothing closes; each costs a look at the whole text
const MAX_COLUMNS = 64; // of a table
const TOP_HEADING = 3; // <h1> and <h2> are those of the page

const FORMULA = /^(?:\\\((?!\s*\\\))[^]{1,2048}?\\\)|\\\[(?!\s*\\\])[^]{1,2048}?\\\]|\$\$(?!\s*\$\$)[^]{1,2048}?\$\$)/;
const FORMULA_LINE = /^ {0,3}(?:(\\\[)(?!.*\\\])|\$\$(?!.*\$\$))/; // the first of several lines

const ATTRIBUTES = ["align", "aria-label", "checked", "class", "data-language", "disabled", "rel", "role", "start", "tabindex", "target", "type"];
const SANITIZED = {
  ALLOWED_TAGS: [
    ..."h3 h4 h5 h6 p br hr strong em del code pre ul ol li blockquote a div button input".split(" "),
    ..."table thead tbody tr th td #text".split(" "),
  ],
  ALLOWED_ATTR: ["href", ...ATTRIBUTES],
  ALLOWED_URI_REGEXP: /^https?:/i,
  ADD_URI_SAFE_ATTR: ATTRIBUTES,
  RETURN_DOM_FRAGMENT: true,
};

let depth = 0; // of what is being read
let inLink = false; // whether the inside of a link is being written

// marked's function of this name, which reads nothing at a greater depth.
function bounded(name, limit) {
  return function (...args) {
    if (depth >= limit) return undefined;
    depth += 1;
    try {
      return Tokenizer.prototype[name].apply(this, args);
    } finally {
      depth -= 1;
    }
  };
}

// The same for emphasis with these marks, which are text after MAX_UNMATCHED that nothing closes.
function emphasis(name, marks) {
  const read = bounded(name, MAX_INLINE);
  return function (text, masked, before) {
    const { state } = this.lexer;
    if (depth === 0 && masked !== state.outermost) Object.assign(state, { outermost: masked, unmatched: 0 });
    if (!marks.includes(text[0]) || state.unmatched === MAX_UNMATCHED) return undefined;
    const token = read.call(this, text, masked, before);
    if (token === undefined) state.unmatched += 1;
    return token;
  };
}

const marked = new Marked({
  breaks: true,
  tokenizer: {
    blockquote: bounded("blockquote", MAX_BLOCKS),
    list: bounded("list", MAX_BLOCKS),
    emStrong: emphasis("emStrong", "*_"),
    del: emphasis("del", "~"),
    link: bounded("link", MAX_INLINE),
    // Cells that a row has not are shown empty, so a few characters could be very many cells.
    table(text) {
      const [table, , columns] = this.rules.block.table.exec(text) ?? [""];
      const count = columns?.split("|").length ?? 0;
      return count > MAX_COLUMNS + 2 || count * table.split("\n").length > 2 * table.length ? undefined : false;
    },
    html() {},
    tag() {},
    code() {},
    lheading() {},
    def() {},
  },
  renderer: {
    heading({ tokens, depth: level }) {
      const name = `h${Math.min(6, TOP_HEADING - 1 + level)}`;
      return `<${name}>${this.parser.parseInline(tokens)}</${name}>`;
    },
    // A long line is scrolled by keys. The button has no text of its own: it is no part of the answer.
    code({ text, lang = "" }) {
      const code = this.codespan({ text: text.replace(/\n$/, "") });
      const language = this.text({ text: lang.split(" ")[0] });
      return `<div class="code"><pre data-language="${language}" tabindex="0">${code}</pre><button type="button" aria-label="Copy this code"></button></div>`;
    },
    table(token) {
      return `<div class="table" tabindex="0" role="region" aria-label="Table">${Renderer.prototype.table.call(this, token)}</div>`;
    },
    checkbox({ checked }) {
      return `<input type="checkbox" disabled aria-label="Done"${checked ? " checked" : ""}> `;
    },
    link({ href, raw, tokens }) {
      if (!/^https?:/i.test(href) || !URL.canParse(href)) return this.text({ text: raw });
      if (inLink) return this.parser.parseInline(tokens);
      inLink = true;
      const inside = this.parser.parseInline(tokens) || this.text({ text: href });
      inLink = false;
      return `<a href="${this.text({ text: new URL(href).href })}" target="_blank" rel="noopener noreferrer">${inside}</a>`;
    },
    image(token) {
      return this.link(token);
    },
  },
  extensions: [
    {
      name: "formula",
      level: "inline",
      start: (text) => text.indexOf("$$"),
      tokenizer(text) {
        const [raw] = FORMULA.exec(text) ?? [];
        return raw && { type: "codespan", raw, text: raw };
      },
    },
    {
      name: "formulaLines",
      level: "block",
      start: (text) => text.match(/\n {0,3}\\\[(?!.*\\\])/)?.index + 1, // "$$" may be the end of one that is part of a paragraph
      tokenizer(text) {
        const first = FORMULA_LINE.exec(text);
        if (first === null) return undefined;
        const [lines] = text.split(/\n[ \t]*(?:\n|$)/, 1); // TeX allows no blank line in a formula
        const end = lines.indexOf(first[1] ? "\\]" : "$$", first[0].length);
        const raw = end < 0 ? lines : lines.slice(0, end) + /.*/.exec(lines.slice(end))[0];
        return { type: "code", raw, text: raw };
      },
    },
  ],
});

const NOTHING = { start: 0, count: 0, prefix: "", divided: null };

export class MarkdownView {
  #box;
  #text = "";
  // What no later character can change: the text before *start*, which is *count* elements. Where a block was divided, *prefix*
  // makes the rest of it such a block again, and the inside of the element *divided* has *parts* nodes to which the rest is added.
  #settled = NOTHING;

  // The elements are put into *box*, which must be empty.
  constructor(box) {
    this.#box = box;
  }

  // Show *text*. If it continues the text that is shown, only its last three blocks are parsed.
  update(text) {
    const known = this.#text;
    this.#text = text.replaceAll("\r", "");
    if (this.#text === known) return;
    if (!this.#text.startsWith(known)) this.#settled = NOTHING;
    while (this.#showPiece());
  }

  // Show what stands behind the settled text, or the first piece of it. Returns whether there is more.
  #showPiece(size = MAX_PIECE) {
    const { start, count, prefix } = this.#settled;
    const source = prefix + this.#text.slice(start, start + size);
    const more = this.#text.length > start + size;
    const tokens = marked.lexer(source);
    const blocks = tokens.filter(isBlock);
    if (more && blocks.length < 2) {
      const longItem = blocks[0]?.items?.length === 1 && size < MAX_ITEM;
      return longItem ? this.#showPiece(MAX_ITEM) : this.#divide(source, blocks[0]);
    }
    const joined = this.#show(tokens);
    // A block can begin where the next two lines make it: those that come can change where the last three begin.
    const changeable = blocks.at(more && blocks.length < 4 ? -1 : -3);
    const firm = tokens.slice(0, Math.max(0, tokens.indexOf(changeable)));
    if (firm.length) {
      const length = firm.reduce((sum, { raw }) => sum + raw.length, -prefix.length);
      this.#settled = { ...NOTHING, start: start + length, count: count + firm.filter(isBlock).length - joined };
    }
    return more;
  }

  // Show the first part of a block that is longer than a piece, and settle it.
  #divide(source, block) {
    const { start, prefix } = this.#settled;
    const end = endOfPart(source, prefix.length, block);
    this.#show(marked.lexer(source.slice(0, end)));
    const divided = this.#box.lastElementChild;
    const parts = insideOf(divided)?.childNodes.length;
    this.#settled = {
      start: start + end - prefix.length,
      count: this.#box.childElementCount,
      prefix: prefixOfRest(source, end, block),
      divided: parts === undefined ? null : divided,
      parts,
    };
    return true;
  }

  // Show the *tokens* behind what is settled. Returns 1 if the first of them is the rest of the block that was divided, else 0.
  #show(tokens) {
    const { count, divided, parts } = this.#settled;
    const elements = Array.from(DOMPurify.sanitize(marked.parser(tokens), SANITIZED).children);
    const joined = divided !== null && divided.nodeName === elements[0]?.nodeName;
    if (divided) patch(insideOf(divided), parts, joined ? insideOf(elements.shift()).childNodes : []);
    patch(this.#box, count, elements);
    return Number(joined);
  }
}

function isBlock({ type }) {
  return type !== "space";
}

// Where to divide the only block of *source*: before the last item of a list, else behind a line, else behind a word.
function endOfPart(source, least, block) {
  const items = block?.items?.slice(0, -1) ?? [];
  const end = items.reduce((sum, { raw }) => sum + raw.length, 0);
  const ends = [end, source.lastIndexOf("\n") + 1, source.lastIndexOf(" ") + 1, source.length];
  const found = block ? ends.find((place) => place > least) : source.length;
  return /[\uD800-\uDBFF]/.test(source[found - 1]) ? found - 1 : found; // not within a surrogate pair
}

// What makes the rest of this block such a block: the first line of code, or the head of a table.
function prefixOfRest(source, end, block) {
  if (block?.type === "table") return /.*\n.*\n/.exec(source)[0];
  const [fence] = /^ {0,3}(?:```|~~~).*\n/.exec(source) ?? [];
  return block?.type === "code" && fence ? fence + (source[end - 1] === "\n" ? "\n" : "") : "";
}

// The element to which the rest of a block is added; null: the rest is a block of its own.
function insideOf(element) {
  if (element?.matches("ul, ol, blockquote")) return element;
  return element?.querySelector(":scope > pre > code, :scope > table > tbody") ?? null;
}

// Change the nodes of *container* from the index *from* on into *wanted*. What is equal stays.
export function patch(container, from, wanted) {
  const nodes = Array.from(container.childNodes).slice(from);
  const after = Array.from(wanted); // a list that lives loses the nodes that are put elsewhere
  after.forEach((node, index) => (nodes[index] ? patchNode(nodes[index], node) : container.append(node)));
  for (const node of nodes.slice(after.length)) node.remove();
}

// A text that has only grown is extended. A button may say that it was pressed, and stays as it is.
function patchNode(node, wanted) {
  if (node.isEqualNode(wanted) || (node.nodeName === "BUTTON" && wanted.nodeName === "BUTTON")) return;
  if (node.nodeName === "#text" && wanted.nodeName === "#text" && wanted.data.startsWith(node.data)) {
    node.appendData(wanted.data.slice(node.length));
  } else if (node.cloneNode().isEqualNode(wanted.cloneNode())) {
    patch(node, 0, wanted.childNodes);
  } else {
    node.replaceWith(wanted);
  }
}
