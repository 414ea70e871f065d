// The inline elements of a Markdown text: a subset of CommonMark 0.31 (sections 6.1 to 6.7), with GitHub's strikethrough and
// bare addresses. Links lead to http and https only; any other link is text, and so is HTML. An image is a link to it. A
// formula, \(…\), \[…\] or $$…$$, is code as it is written: nothing here sets it, and its backslashes must stay.
//
//     Node = {type: "text" | "code", text} | {type: "emphasis" | "strong" | "strike", children} | {type: "link", href, children}
//
// The time is linear in the length of the text: a closing delimiter does not look again at an opening one that it could not
// match, and every look ahead has a bound.

const MAX_ADDRESS = 2048; // characters
const MAX_TITLE = 512; // characters of the title of a link, which is not shown
const MAX_PARENTHESES = 32; // open at once in an address
const MAX_NESTED = 16; // elements in each other; the text of deeper ones is shown without them

const MAX_FORMULA = 2048; // characters
const FORMULA_ENDS = { "(": "\\)", "[": "\\]", $: "$$" };

const SPECIAL = /[\\`*_~![\]<hH$]/g;
const ESCAPABLE = /[!-/:-@[-`{-~\n]/;
const SPACE = /\s/;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const WORD = /[\p{L}\p{N}_]/u;
const ADDRESS_START = /https?:\/\//iy;
const BRACKETED_ADDRESS = /<(https?:\/\/[^\s<>]{1,2048})>/iy;
const BARE_ADDRESS = /https?:\/\/[^\s<>[\]"`]{1,2048}/iy;

// Returns the nodes of *text*.
export function parseInline(text) {
  return new Parser(text).parse();
}

// While the text is read, the nodes are a doubly linked list: a range of them becomes the inside of an element in constant
// time. An element has `first`, the head of the list of its children.
class Parser {
  #text;
  #at = 0;
  #head = { next: null };
  #tail = this.#head;
  #brackets = []; // the "[" that can still open a link: { node, delimiter, image }
  #delimiter = null; // the last run of *, _ or ~ that can still open or close: runs are a doubly linked list, too
  #formulaEnds = {}; // the end of a formula → the place of the next one; -1: there is none
  #backticks = null; // length of a run of backticks → the places of such runs, the last one first

  constructor(text) {
    this.#text = text;
  }

  parse() {
    const text = this.#text;
    while (this.#at < text.length) {
      SPECIAL.lastIndex = this.#at;
      const start = SPECIAL.exec(text)?.index ?? text.length;
      this.#addText(text.slice(this.#at, start));
      this.#at = start;
      if (start < text.length && !this.#readSpecial(text[start])) {
        this.#addText(text[start]);
        this.#at += 1;
      }
    }
    this.#matchDelimiters(null);
    return toArray(this.#head.next, 0, false);
  }

  // Read what starts with this character, and move behind it. Returns false if the character is only text.
  #readSpecial(character) {
    if (character === "\\") return this.#readFormula(this.#text[this.#at + 1]) || this.#readEscape();
    if (character === "$") return this.#text[this.#at + 1] === "$" && this.#readFormula("$");
    if (character === "`") return this.#readCode();
    if (character === "[") return this.#openBracket("[");
    if (character === "!") return this.#text[this.#at + 1] === "[" && this.#openBracket("![");
    if (character === "]") return this.#closeBracket();
    if (character === "<") return this.#readAddress(BRACKETED_ADDRESS);
    if (character === "h" || character === "H") return !WORD.test(this.#before()) && this.#readAddress(BARE_ADDRESS);
    return this.#readDelimiters(character);
  }

  #add(node) {
    node.previous = this.#tail;
    node.next = null;
    this.#tail.next = node;
    this.#tail = node;
    return node;
  }

  #addText(text) {
    if (text === "") return;
    if (this.#tail.type === "text" && !this.#tail.marker) this.#tail.text += text;
    else this.#add({ type: "text", text });
  }

  #remove(node) {
    node.previous.next = node.next;
    if (node.next === null) this.#tail = node.previous;
    else node.next.previous = node.previous;
  }

  // The characters before and behind a place; a space at the ends of the text.
  #before() {
    return this.#at === 0 ? " " : String.fromCodePoint(codePointBefore(this.#text, this.#at));
  }

  #behind(index) {
    return index < this.#text.length ? String.fromCodePoint(this.#text.codePointAt(index)) : " ";
  }

  // A backslash before a line break is a line break, as every line break in a paragraph is.
  #readEscape() {
    const next = this.#text[this.#at + 1];
    if (next === undefined || !ESCAPABLE.test(next)) return false;
    this.#addText(next);
    this.#at += 2;
    return true;
  }

  // A formula that begins here, with two characters of which *second* is the last.
  #readFormula(second) {
    const end = second === "$" && this.#text[this.#at] === "\\" ? undefined : FORMULA_ENDS[second];
    if (end === undefined) return false;
    const from = this.#at + 2;
    let place = this.#formulaEnds[end] ?? 0;
    if (place >= 0 && place < from) place = this.#formulaEnds[end] = this.#text.indexOf(end, from);
    if (place < 0 || place - from > MAX_FORMULA || this.#text.slice(from, place).trim() === "") return false;
    this.#add({ type: "code", text: this.#text.slice(this.#at, place + 2) });
    this.#at = place + 2;
    return true;
  }

  #readCode() {
    const start = this.#at;
    this.#backticks ??= backtickRuns(this.#text);
    const length = runLength(this.#text, start);
    const places = this.#backticks.get(length) ?? []; // an escaped backtick makes a run shorter
    while (places.at(-1) <= start) places.pop();
    if (places.length === 0) {
      this.#addText(this.#text.slice(start, start + length));
      this.#at = start + length;
      return true;
    }
    const end = places.pop();
    let code = this.#text.slice(start + length, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "") code = code.slice(1, -1);
    this.#add({ type: "code", text: code });
    this.#at = end + length;
    return true;
  }

  #readAddress(pattern) {
    pattern.lastIndex = this.#at;
    const match = pattern.exec(this.#text);
    if (match === null) return false;
    const shown = match[1] ?? withoutPunctuation(match[0]);
    const href = webAddress(shown);
    if (href === null) this.#addText(match[0]);
    else this.#add({ type: "link", href, first: { type: "text", text: shown, next: null } });
    this.#at += href !== null && match[1] === undefined ? shown.length : match[0].length;
    return true;
  }

  #openBracket(marker) {
    const node = this.#add({ type: "text", text: marker, marker: true });
    this.#brackets.push({ node, delimiter: this.#delimiter, image: marker === "![" });
    this.#at += marker.length;
    return true;
  }

  #closeBracket() {
    const bracket = this.#brackets.pop();
    const target = bracket && this.#text[this.#at + 1] === "(" ? readTarget(this.#text, this.#at + 2) : null;
    if (target === null) return false;
    this.#matchDelimiters(bracket.delimiter);
    this.#delimiter = bracket.delimiter;
    if (this.#delimiter !== null) this.#delimiter.next = null;
    const { node } = bracket;
    const first = node.next ?? { type: "text", text: target.href, next: null };
    this.#tail = node.previous;
    this.#add({ type: "link", href: target.href, first });
    if (!bracket.image) this.#brackets = []; // a link has no link in it, but it may have an image
    this.#at = target.end;
    return true;
  }

  #readDelimiters(character) {
    const start = this.#at;
    const length = runLength(this.#text, start);
    this.#at = start + length;
    const run = this.#text.slice(start, this.#at);
    if (character === "~" && length !== 2) {
      this.#addText(run);
      return true;
    }
    this.#at = start;
    const [before, behind] = [this.#before(), this.#behind(start + length)];
    this.#at = start + length;
    const [spaceBefore, spaceBehind] = [SPACE.test(before), SPACE.test(behind)];
    const [markBefore, markBehind] = [PUNCTUATION.test(before), PUNCTUATION.test(behind)];
    const left = !spaceBehind && (!markBehind || spaceBefore || markBefore);
    const right = !spaceBefore && (!markBefore || spaceBehind || markBehind);
    const word = character === "_"; // it is text within a word
    const opens = left && (!word || !right || markBefore);
    const closes = right && (!word || !left || markBehind);
    const node = this.#add({ type: "text", text: run, marker: true });
    if (!opens && !closes) return true;
    const delimiter = { node, character, start, length, count: length, opens, closes, previous: this.#delimiter, next: null };
    if (this.#delimiter !== null) this.#delimiter.next = delimiter;
    this.#delimiter = delimiter;
    return true;
  }

  // Make elements of the runs behind *bottom*: "An algorithm for parsing nested emphasis and links" in CommonMark's appendix.
  #matchDelimiters(bottom) {
    const exhausted = new Map(); // kind of a closing run → the place before which no run opens it
    let closer = this.#delimiter;
    while (closer !== null && closer !== bottom && closer.previous !== bottom) closer = closer.previous;
    if (closer === bottom) return;
    while (closer !== null) {
      if (!closer.closes) {
        closer = closer.next;
        continue;
      }
      const kind = `${closer.character}${closer.opens}${closer.length % 3}`;
      const limit = exhausted.get(kind) ?? -1;
      let opener = closer.previous;
      while (opener !== bottom && opener.start >= limit && !matches(opener, closer)) opener = opener.previous;
      if (opener === bottom || opener.start < limit) {
        exhausted.set(kind, closer.start);
        if (!closer.opens) this.#removeDelimiter(closer);
        closer = closer.next;
        continue;
      }
      this.#wrap(opener, closer);
      if (opener.count === 0) this.#removeDelimiter(opener);
      if (closer.count === 0) {
        this.#removeDelimiter(closer);
        closer = closer.next;
      }
    }
  }

  #removeDelimiter(delimiter) {
    if (delimiter.previous !== null) delimiter.previous.next = delimiter.next;
    if (delimiter.next !== null) delimiter.next.previous = delimiter.previous;
    else this.#delimiter = delimiter.previous;
  }

  // Put the nodes between the two runs into an element. Runs between them stay text.
  #wrap(opener, closer) {
    const used = opener.count >= 2 && closer.count >= 2 ? 2 : 1;
    const type = opener.character === "~" ? "strike" : used === 2 ? "strong" : "emphasis";
    const element = { type, first: opener.node.next, previous: opener.node, next: closer.node };
    closer.node.previous.next = null;
    opener.node.next = closer.node.previous = element;
    opener.next = closer;
    closer.previous = opener;
    for (const run of [opener, closer]) {
      run.count -= used;
      run.node.text = run.node.text.slice(used);
      if (run.count === 0) this.#remove(run.node);
    }
  }
}

// Whether these two runs match. The rule of three says that "**a*b**" has no emphasis between "**" and "*".
function matches(opener, closer) {
  if (!opener.opens || opener.character !== closer.character) return false;
  if (!opener.closes && !closer.opens) return true;
  return (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function codePointBefore(text, index) {
  const low = text.charCodeAt(index - 1);
  return low >= 0xdc00 && low <= 0xdfff && index > 1 ? text.codePointAt(index - 2) : low;
}

function runLength(text, start) {
  let end = start + 1;
  while (text[end] === text[start]) end += 1;
  return end - start;
}

function backtickRuns(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, []);
    runs.get(run.length).push(index);
  }
  for (const places of runs.values()) places.reverse();
  return runs;
}

// The address of a link, whose "(" ends before *start*: { href, end }; null if there is none, or none of the web.
function readTarget(text, start) {
  let at = start;
  while (text[at] === " ") at += 1;
  const bracketed = text[at] === "<";
  if (bracketed) at += 1;
  ADDRESS_START.lastIndex = at;
  if (!ADDRESS_START.test(text)) return null;
  const from = at;
  let open = 0;
  for (; at < text.length && at - from < MAX_ADDRESS && open < MAX_PARENTHESES; at += 1) {
    const character = text[at];
    if (bracketed ? character === ">" || character === "<" || character === "\n" : SPACE.test(character)) break;
    if (bracketed) continue;
    if (character === "(") open += 1;
    if (character === ")") open -= 1;
    if (open < 0) break;
  }
  const address = text.slice(from, at);
  if (bracketed && text[at] === ">") at += 1;
  while (text[at] === " ") at += 1;
  const quote = text[at];
  if (quote === '"' || quote === "'") {
    const end = text.slice(at + 1, at + 1 + MAX_TITLE).indexOf(quote);
    if (end < 0) return null;
    at += end + 2;
    while (text[at] === " ") at += 1;
  }
  const href = text[at] === ")" ? webAddress(address) : null;
  return href === null ? null : { href, end: at + 1 };
}

function webAddress(address) {
  try {
    const { protocol, href } = new URL(address);
    return protocol === "https:" || protocol === "http:" ? href : null;
  } catch {
    return null;
  }
}

// A bare address without the punctuation of the sentence behind it, and without a ")" that it does not open.
function withoutPunctuation(address) {
  let end = address.length;
  let unopened = address.split(")").length - address.split("(").length;
  for (;;) {
    const last = address[end - 1];
    if (last === ")" && unopened > 0) unopened -= 1;
    else if (!"?!.,:;*_~'".includes(last)) return address.slice(0, end);
    end -= 1;
  }
}

// The list that begins with *node* as an array. Texts in sequence are joined.
function toArray(node, depth, inLink) {
  const nodes = [];
  const addText = (text) => {
    if (nodes.at(-1)?.type === "text") nodes.at(-1).text += text;
    else nodes.push({ type: "text", text });
  };
  for (; node !== null; node = node.next) {
    if (node.type === "text") addText(node.text);
    else if (node.type === "code") nodes.push({ type: "code", text: node.text });
    else if (depth >= MAX_NESTED) addText(textOf(node));
    else if (node.type === "link" && inLink) nodes.push(...toArray(node.first, depth + 1, true));
    else {
      const children = toArray(node.first, depth + 1, inLink || node.type === "link");
      nodes.push(node.type === "link" ? { type: "link", href: node.href, children } : { type: node.type, children });
    }
  }
  return nodes;
}

// The text of an element, without recursion: it may have thousands of others in it.
function textOf(element) {
  const parts = [];
  const rest = [element.first];
  while (rest.length) {
    const node = rest.pop();
    if (node === null) continue;
    rest.push(node.next);
    if (node.first) rest.push(node.first);
    else parts.push(node.text);
  }
  return parts.join("");
}
