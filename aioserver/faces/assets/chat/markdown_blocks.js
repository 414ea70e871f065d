// The blocks of a Markdown text: a subset of CommonMark 0.31 and of GitHub's tables. It has headings, paragraphs, fenced
// code, lists, quotes, tables and rules. A formula of several lines, \[…\] or $$…$$, is code as it is written. HTML is text, and
// so is everything else that is not in this list.
//
//     Block = {type: "paragraph" | "heading" | "code" | "list" | "quote" | "table" | "rule" | "blank", …}
//     Piece = Block & {start, end, carry, settled}
//
// A text that grows is parsed in pieces. A piece is a block, or a part of a block that is longer than MAX_PIECE; a piece
// that continues the one before has `continues: true`. So the work for each new token has a bound, whatever a model writes.
// Always: `parse(text, start, carry)` from the `start` and the `carry` of a piece returns the same pieces as a parse of the
// whole text, and a piece that is `settled` starts there in every longer text.

const MAX_PIECE = 8_192; // characters; at most four times as many where a list item cannot be divided
const MAX_LINE = 4_096; // characters; a longer line is handled as several, and only its first part can start a block
const MAX_DEPTH = 6; // lists and quotes in each other; what is deeper is a paragraph
const MAX_COLUMNS = 64; // of a table
const MAX_HEADING = 400; // characters; a longer line is a paragraph

const FENCE = /^( {0,3})(`{3,}|~{3,})(.*)$/;
const FENCE_END = /^ {0,3}(`{3,}|~{3,}) *$/;
const HEADING = /^ {0,3}(#{1,6})(?: |$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const MARKER = /^( *)([-*+]|(\d{1,9})[.)])( +|$)/;
const QUOTE = /^ {0,3}> ?/;
const FORMULA = /^ {0,3}(\\\[|\$\$)/;
const DELIMITER_CELL = /^:?-+:?$/;

// Returns the pieces of *text* from *start* on. *carry* is that of the piece at *start*; null at the start of the text.
export function parse(text, start = 0, carry = null) {
  const lines = splitLines(text, start);
  const pieces = [];
  let index = 0;
  while (index < lines.length) {
    const from = index;
    const { block, next, carry: following } = readPiece(lines, index, carry);
    index = next;
    const { start: first } = lines[from];
    const end = index < lines.length ? lines[index].start : text.length;
    pieces.push({ ...block, start: first, end, carry, settled: settled(lines, from, block) });
    carry = following;
  }
  return pieces;
}

// Whether no later character can move the start of the piece: the lines that decide about it are complete. A table needs
// its second line as well.
function settled(lines, from, block) {
  const last = block.type === "table" && !block.continues ? from + 1 : from;
  return lines[last].complete;
}

// Line = {text, raw, start, complete, soft}: *raw* still has the tabs of an indent. A soft line is the rest of a line that
// is longer than MAX_LINE.
function splitLines(text, start) {
  const lines = [];
  let soft = start > 0 && text[start - 1] !== "\n";
  while (start < text.length) {
    const newline = text.indexOf("\n", start);
    let end = newline < 0 ? text.length : newline;
    const long = end - start > MAX_LINE;
    if (long) end = divide(text, start);
    const raw = text.slice(start, end).replace(/\r$/, "");
    const line = raw.replace(/^[ \t]*\t/, (indent) => indent.replaceAll("\t", "    "));
    lines.push({ text: line, raw, start, complete: long || newline >= 0, soft });
    soft = long;
    start = long ? end : end + 1;
  }
  return lines;
}

// The end of the first part of a long line: behind its last space, else anywhere but within a surrogate pair.
function divide(text, start) {
  const space = text.lastIndexOf(" ", start + MAX_LINE);
  if (space > start) return space + 1;
  const end = start + MAX_LINE;
  return /[\uD800-\uDBFF]/.test(text[end - 1]) ? end - 1 : end;
}

// Reads one piece: {block, next, carry}.
function readPiece(lines, index, carry) {
  if (carry !== null) {
    const piece = CONTINUE[carry.type](lines, index, carry);
    if (piece !== null) return piece;
  }
  const reader = blank(lines[index]) ? readBlanks : (startOf(lines, index, 0) ?? readParagraph);
  return reader(lines, index, 0);
}

function blank(line) {
  return !line.soft && line.text.trim() === "";
}

// The function that reads the block which starts at this line; null: the line belongs to a paragraph. *within* is the block
// that the line would end: a "paragraph" or a "table".
function startOf(lines, index, depth, within = "") {
  const { text, soft } = lines[index];
  if (soft) return null;
  if (fenceOf(text)) return readCode;
  if (formulaEnd(text) && !(within === "paragraph" && formulaEnd(text) === "$$")) return readFormula; // it may be the end of one
  if (text.length <= MAX_HEADING && HEADING.test(text)) return readHeading;
  if (RULE.test(text)) return readRule;
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(text)) return readQuote;
    const marker = markerOf(text);
    if (marker && marker.indent < 4 && !(within === "paragraph" && (marker.empty || marker.number > 1))) return readList;
  }
  return within !== "table" && columnsAt(lines, index) ? readTable : null;
}

// Blocks below a list item or a quote, which are read as a whole.
function readBlocks(lines, depth) {
  const blocks = [];
  let index = 0;
  while (index < lines.length) {
    if (blank(lines[index])) {
      index += 1;
      continue;
    }
    const reader = startOf(lines, index, depth) ?? readParagraph;
    const { block, next } = reader(lines, index, depth);
    blocks.push(block);
    index = next;
  }
  return blocks;
}

// Whether a piece has to end before this line. Only pieces of the top level (depth 0) end so.
function tooLong(lines, first, index, depth, factor = 1) {
  return depth === 0 && lines[index].start - lines[first].start >= factor * MAX_PIECE;
}

// Blank lines, headings and rules.

function readBlanks(lines, index) {
  return { block: { type: "blank" }, next: behindBlanks(lines, index + 1), carry: null };
}

function readHeading(lines, index) {
  const level = HEADING.exec(lines[index].text)[1].length;
  const words = lines[index].text.trim().slice(level).trim();
  let end = words.length;
  while (words[end - 1] === "#") end -= 1;
  const closed = end === 0 || words[end - 1] === " "; // "# Title #" has a closing sequence, "# C#" has none
  const text = closed ? words.slice(0, end).trimEnd() : words;
  return { block: { type: "heading", level, text }, next: index + 1, carry: null };
}

function readRule(_lines, index) {
  return { block: { type: "rule" }, next: index + 1, carry: null };
}

// Paragraphs. A paragraph ends at a blank line, and at a line that starts another block.

function readParagraph(lines, index, depth, prefix = "") {
  let text = prefix + lines[index].text;
  let next = index + 1;
  for (; next < lines.length && paragraphGoesOn(lines, next, depth); next += 1) {
    if (tooLong(lines, index, next, depth)) return { block: { type: "paragraph", text }, next, carry: { type: "paragraph" } };
    text += joined(lines[next]);
  }
  return { block: { type: "paragraph", text }, next, carry: null };
}

function paragraphGoesOn(lines, index, depth) {
  return !blank(lines[index]) && startOf(lines, index, depth, "paragraph") === null;
}

function joined(line) {
  return line.soft ? line.text : `\n${line.text}`;
}

function continueParagraph(lines, index) {
  if (!paragraphGoesOn(lines, index, 0)) return null;
  const piece = readParagraph(lines, index, 0, lines[index].soft ? "" : "\n");
  return { ...piece, block: { ...piece.block, continues: true } };
}

// Fenced code. Its end is a fence of the same kind that is at least as long, or the end of the text.

function fenceOf(text) {
  const match = FENCE.exec(text);
  if (match === null) return null;
  const [, indent, fence, info] = match;
  if (info.length > 100 || (fence[0] === "`" && info.includes("`"))) return null; // it is code within a line
  return { type: "code", fence, indent: indent.length, language: info.trim().split(" ")[0] };
}

function readCode(lines, index, depth) {
  return readCodeLines(lines, index, index + 1, depth, fenceOf(lines[index].text), false);
}

function readCodeLines(lines, first, from, depth, fence, continues) {
  let text = "";
  const block = () => ({ type: "code", language: fence.language, text, ...(continues && { continues }) });
  for (let next = from; next < lines.length; next += 1) {
    if (next > first && tooLong(lines, first, next, depth)) return { block: block(), next, carry: fence };
    const line = lines[next];
    const end = line.soft ? null : FENCE_END.exec(line.text);
    if (end && end[1][0] === fence.fence[0] && end[1].length >= fence.fence.length) {
      return { block: block(), next: next + 1, carry: null };
    }
    text += line.soft ? line.text : (continues || next > from ? "\n" : "") + withoutIndent(line.raw, fence.indent);
  }
  return { block: block(), next: lines.length, carry: null };
}

function continueCode(lines, index, fence) {
  return readCodeLines(lines, index, index, 0, fence, true);
}

// Formulas. They end at a blank line, too: TeX allows none in them.

// The end of the formula that starts with this line and goes on; null if none does.
function formulaEnd(text) {
  const match = FORMULA.exec(text);
  if (match === null) return null;
  const end = match[1] === "$$" ? "$$" : "\\]";
  return text.includes(end, match[0].length) ? null : end;
}

function readFormula(lines, index, depth) {
  return readFormulaLines(lines, index, depth, formulaEnd(lines[index].text), false);
}

function readFormulaLines(lines, first, depth, end, continues) {
  let text = "";
  let next = first;
  let carry = null;
  for (let over = false; next < lines.length && !over && !blank(lines[next]); next += 1) {
    if (next > first && tooLong(lines, first, next, depth)) {
      carry = { type: "formula", end };
      break;
    }
    const line = lines[next];
    text += line.soft || (next === first && !continues) ? line.text : `\n${line.text}`;
    over = line.text.includes(end) && (next > first || continues);
  }
  return { block: { type: "code", language: "", text, ...(continues && { continues }) }, next, carry };
}

function continueFormula(lines, index, { end }) {
  return blank(lines[index]) ? null : readFormulaLines(lines, index, 0, end, true);
}

function withoutIndent(text, width) {
  let start = 0;
  while (start < width && text[start] === " ") start += 1;
  return text.slice(start);
}

// Lists. A line belongs to an item if it is indented by two columns more than the marker, or if it continues the paragraph
// at the end of the item.

function markerOf(text) {
  const match = MARKER.exec(text);
  if (match === null || RULE.test(text)) return null;
  const [, indent, marker, number, space] = match;
  const width = indent.length + marker.length + (space.length > 4 ? 1 : Math.max(space.length, 1));
  const kind = number === undefined ? marker : marker.at(-1);
  return { indent: indent.length, width, kind, number: number && Number(number), empty: space === "" || match[0] === text };
}

function readList(lines, index, depth) {
  return readItems(lines, index, depth, markerOf(lines[index].text), false);
}

function readItems(lines, first, depth, { kind, number }, continues) {
  const items = [];
  const block = () => ({ type: "list", number: number ?? null, items, ...(continues && { continues }) });
  let next = first;
  while (next < lines.length && itemOf(lines[next], kind)) {
    if (next > first && tooLong(lines, first, next, depth)) return { block: block(), next, carry: { type: "list", kind, number } };
    const end = endOfItem(lines, next, depth, first);
    items.push(readBlocks(itemLines(lines, next, end), depth + 1));
    next = end;
    // Another item may follow behind blank lines, so these belong to the list.
    next = behindBlanks(lines, next);
  }
  return { block: block(), next, carry: null };
}

function continueList(lines, index, carry) {
  return itemOf(lines[index], carry.kind) ? readItems(lines, index, 0, carry, true) : null;
}

function itemOf(line, kind) {
  const marker = line.soft ? null : markerOf(line.text);
  return marker !== null && marker.indent < 4 && marker.kind === kind ? marker : null;
}

function endOfItem(lines, index, depth, first) {
  const { indent } = markerOf(lines[index].text);
  let next = index + 1;
  let lazy = !markerOf(lines[index].text).empty; // whether the line before may be the end of a paragraph
  let fence = null;
  for (; next < lines.length; next += 1) {
    const line = lines[next];
    if (tooLong(lines, first, next, depth, 4)) return next;
    if (line.soft) continue;
    if (blank(line)) {
      const after = behindBlanks(lines, next);
      if (after === lines.length || lines[after].soft || blank(lines[after])) return next;
      if (indentOf(lines[after].text) < indent + 2) return next;
      next = after - 1;
      lazy = false;
      continue;
    }
    const inside = indentOf(line.text) >= indent + 2;
    if (!inside && markerOf(line.text)) return next;
    if (!inside && (fence !== null || !lazy || startOf(lines, next, depth, "paragraph") !== null)) return next;
    const text = line.text.trimStart();
    if (fence === null) fence = inside ? fenceOf(text) : null;
    else if (FENCE_END.exec(text)?.[1].startsWith(fence.fence)) fence = null;
    lazy = fence === null;
  }
  return next;
}

// The index of the first line from *index* on that is not blank. Blank lines have a bound, too: at it a list ends.
function behindBlanks(lines, index) {
  let next = index;
  while (next < lines.length && blank(lines[next]) && !tooLong(lines, index, next, 0)) next += 1;
  return next;
}

function indentOf(text) {
  return text.length - text.trimStart().length;
}

function itemLines(lines, index, end) {
  const { width } = markerOf(lines[index].text);
  const first = stripped(lines[index], width);
  const rest = lines.slice(index + 1, end).map((line) => stripped(line, line.soft ? 0 : Math.min(width, indentOf(line.text))));
  return [first, ...rest];
}

// The line without its first *width* characters.
function stripped(line, width) {
  const text = line.text.slice(width);
  return { ...line, text, raw: line.raw === line.text ? text : line.raw.trimStart() };
}

// Quotes. Only lines with a ">" belong to them, and lines that continue their last paragraph.

function readQuote(lines, index, depth) {
  return readQuoteLines(lines, index, depth, false);
}

function readQuoteLines(lines, first, depth, continues) {
  const inner = [];
  let next = first;
  let carry = null;
  for (; next < lines.length; next += 1) {
    const line = lines[next];
    const quoted = !line.soft && QUOTE.exec(line.text);
    if (!quoted && (blank(line) || startOf(lines, next, depth, "paragraph") !== null || inner.at(-1).text.trim() === "")) break;
    if (next > first && tooLong(lines, first, next, depth)) {
      carry = { type: "quote" };
      break;
    }
    inner.push(stripped(line, quoted ? quoted[0].length : 0));
  }
  return { block: { type: "quote", blocks: readBlocks(inner, depth + 1), ...(continues && { continues }) }, next, carry };
}

function continueQuote(lines, index) {
  const { text, soft } = lines[index];
  return !soft && QUOTE.test(text) ? readQuoteLines(lines, index, 0, true) : null;
}

// Tables. A table is a line with cells above a line of delimiters with as many cells.

function cellsOf(text) {
  const row = text.trim();
  const cells = [];
  let cell = "";
  for (let index = row[0] === "|" ? 1 : 0; index < row.length; index += 1) {
    if (row[index] === "\\" && row[index + 1] === "|") {
      cell += "|";
      index += 1;
    } else if (row[index] === "|") {
      cells.push(cell.trim());
      cell = "";
    } else {
      cell += row[index];
    }
  }
  if (cell.trim() !== "" || cells.length === 0) cells.push(cell.trim());
  return cells;
}

// The alignments of the table that starts at this line; null if none does.
function columnsAt(lines, index) {
  const [head, line] = [lines[index], lines[index + 1]];
  if (line === undefined || line.soft || !head.text.includes("|") || !/^[ |:-]+$/.test(line.text)) return null;
  const cells = cellsOf(line.text);
  if (!line.text.includes("-") || cells.length > MAX_COLUMNS || !cells.every((cell) => DELIMITER_CELL.test(cell))) return null;
  if (cellsOf(head.text).length !== cells.length) return null;
  return cells.map((cell) => ({ ":-": "left", "-:": "right", "::": "center" })[cell[0] + cell.at(-1)] ?? "");
}

function readTable(lines, index, depth) {
  const columns = columnsAt(lines, index);
  const { rows, next, carry } = readRows(lines, index, index + 2, depth, columns);
  return { block: { type: "table", columns, head: cellsOf(lines[index].text), rows }, next, carry };
}

function readRows(lines, first, from, depth, columns) {
  const rows = [];
  let next = from;
  for (; next < lines.length && rowGoesOn(lines, next, depth); next += 1) {
    if (next > first && tooLong(lines, first, next, depth)) return { rows, next, carry: { type: "table", columns } };
    rows.push(cellsOf(lines[next].text).slice(0, columns.length));
  }
  return { rows, next, carry: null };
}

function rowGoesOn(lines, index, depth) {
  const line = lines[index];
  return !line.soft && line.text.includes("|") && startOf(lines, index, depth, "table") === null;
}

function continueTable(lines, index, { columns }) {
  if (!rowGoesOn(lines, index, 0)) return null;
  const { rows, next, carry } = readRows(lines, index, index, 0, columns);
  return { block: { type: "table", columns, head: null, rows, continues: true }, next, carry };
}

const CONTINUE = {
  paragraph: continueParagraph,
  code: continueCode,
  formula: continueFormula,
  list: continueList,
  quote: continueQuote,
  table: continueTable,
};
