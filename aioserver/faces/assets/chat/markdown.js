// A Markdown text as elements, which grow while the text does. Whatever the text says, it enters the page through text nodes
// only. The attributes that come from it are the address of a link (http or https), the language of code, the first number
// of a list, the alignment of a column, and whether a task is done.

import { parse } from "./markdown_blocks.js";
import { parseInline } from "./markdown_inline.js";

const INLINE = { emphasis: "em", strong: "strong", strike: "s" };
const TASK = /^\[([ xX])\]\s/; // the start of an item of a list of tasks
const TOP_HEADING = 3; // <h1> and <h2> are those of the page

export class MarkdownView {
  #box;
  #text = "";
  #shown = []; // for each piece: { piece, source, container, trees, nodes }; the nodes are children of the container

  // The elements are put into *box*, which must be empty.
  constructor(box) {
    this.#box = box;
  }

  // Show *text*. If it continues the text that is shown, then only what differs is changed, so that a selection survives,
  // and only the last pieces are parsed.
  update(text) {
    if (text === this.#text) return;
    if (!text.startsWith(this.#text)) this.#removeFrom(0);
    this.#text = text;
    const first = Math.max(0, this.#shown.findLastIndex(({ piece }) => piece.settled));
    const { start, carry } = this.#shown[first]?.piece ?? { start: 0, carry: null };
    const pieces = parse(text, start, carry);
    pieces.forEach((piece, index) => this.#show(first + index, piece));
    this.#removeFrom(first + pieces.length);
  }

  #removeFrom(index) {
    for (const { nodes } of this.#shown.splice(index)) for (const node of nodes) node.remove();
  }

  #show(index, piece) {
    const container = piece.continues ? insideElement(this.#shown[index - 1]) : this.#box;
    if (this.#shown[index] && this.#shown[index].container !== container) this.#removeFrom(index);
    const shown = this.#shown[index] ?? { nodes: [], trees: [] };
    const source = this.#text.slice(piece.start, piece.end);
    if (shown.source === source && shown.piece.type === piece.type) {
      shown.piece = piece;
      return;
    }
    const trees = treesOf(piece);
    const nodes = patch(container, shown.nodes, shown.trees, trees);
    this.#shown[index] = { piece, source, container, trees, nodes };
  }
}

// The element whose children are the inside of this block: a piece that continues it is added there.
function insideElement({ piece, container, nodes }) {
  if (piece.continues) return container;
  if (piece.type === "code") return nodes[0].firstChild.firstChild;
  if (piece.type === "table") return nodes[0].firstChild.lastChild;
  return nodes[0];
}

// Trees of what is shown. Tree = string | {name, attributes, children}

function tree(name, children = [], attributes = {}) {
  return { name, attributes, children };
}

// The trees of a piece. One that continues another has no element of its own.
function treesOf(piece) {
  if (piece.type === "blank") return [];
  return piece.continues ? insideOf(piece) : [treeOf(piece)];
}

function treeOf(block) {
  const inside = insideOf(block);
  switch (block.type) {
    case "heading":
      return tree(`h${Math.min(6, TOP_HEADING - 1 + block.level)}`, inside);
    case "code": // a long line is scrolled by keys
      return codeOf(block, inside);
    case "list":
      return block.number === null ? tree("ul", inside) : tree("ol", inside, { start: String(block.number) });
    case "quote":
      return tree("blockquote", inside);
    case "table":
      return tableOf(block, inside);
    case "rule":
      return tree("hr");
    default:
      return tree("p", inside);
  }
}

function insideOf(block) {
  switch (block.type) {
    case "code":
      return [block.text];
    case "list":
      return block.items.map((blocks) => tree("li", blocks.map((inner, index) => (index ? treeOf(inner) : firstOf(inner)))));
    case "quote":
      return block.blocks.map(treeOf);
    case "table":
      return block.rows.map((cells) => rowOf(cells, block.columns, "td"));
    case "rule":
      return [];
    default:
      return inlineOf(block.text);
  }
}

// The button has no text of its own: it is no part of the answer.
function codeOf({ language }, inside) {
  const code = tree("pre", [tree("code", inside)], { "data-language": language, tabindex: "0" });
  return tree("div", [code, tree("button", [], { type: "button", "aria-label": "Copy this code" })], { class: "code" });
}

// The first block of an item, which may be a task.
function firstOf(block) {
  const task = block.type === "paragraph" ? TASK.exec(block.text) : null;
  if (task === null) return treeOf(block);
  const done = task[1] === " " ? {} : { checked: "" };
  const box = tree("input", [], { type: "checkbox", disabled: "", "aria-label": "Done", ...done });
  return tree("p", [box, " ", ...inlineOf(block.text.slice(task[0].length))]);
}

function tableOf({ head, columns }, rows) {
  const table = tree("table", [tree("thead", [rowOf(head, columns, "th")]), tree("tbody", rows)]);
  return tree("div", [table], { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
}

function rowOf(cells, columns, name) {
  return tree("tr", cells.map((cell, index) => tree(name, inlineOf(cell), columns[index] ? { class: columns[index] } : {})));
}

function inlineOf(text) {
  return parseInline(text).map(inlineTree);
}

function inlineTree(node) {
  if (node.type === "text") return node.text;
  if (node.type === "code") return tree("code", [node.text]);
  const children = node.children.map(inlineTree);
  if (node.type !== "link") return tree(INLINE[node.type], children);
  return tree("a", children, { href: node.href, target: "_blank", rel: "noopener noreferrer" });
}

// Change the *nodes* in *container*, which show the trees *before*, into those that show *after*. Returns them.
function patch(container, nodes, before, after) {
  const behind = nodes.at(-1)?.nextSibling ?? null;
  const patched = after.map((wanted, index) => {
    const node = nodes[index];
    if (node === undefined) return container.insertBefore(newNode(wanted), behind);
    if (patchNode(node, before[index], wanted)) return node;
    const made = newNode(wanted);
    node.replaceWith(made);
    return made;
  });
  for (const node of nodes.slice(after.length)) node.remove();
  return patched;
}

// Change one node. Returns false if it must be another one.
function patchNode(node, before, after) {
  if (typeof before === "string" || typeof after === "string") {
    if (typeof before !== typeof after) return false;
    grow(node, before, after);
    return true;
  }
  if (before.name !== after.name || JSON.stringify(before.attributes) !== JSON.stringify(after.attributes)) return false;
  const inside = Array.from(node.childNodes).slice(0, before.children.length);
  patch(node, inside, before.children, after.children);
  return true;
}

function newNode(wanted) {
  if (typeof wanted === "string") return document.createTextNode(wanted);
  const element = document.createElement(wanted.name);
  for (const [name, value] of Object.entries(wanted.attributes)) element.setAttribute(name, value);
  element.append(...wanted.children.map(newNode));
  return element;
}

// Give a text node another text. It is extended where that is enough, so that a selection in it stays.
function grow(node, before, after) {
  if (after === before) return;
  if (after.startsWith(before)) node.appendData(after.slice(before.length));
  else node.data = after;
}
