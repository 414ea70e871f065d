// An answer's text as elements: what stands between code fences (CommonMark 4.5) is a <pre>.
// Text goes in as text only, whatever it says.

const FENCE = /^ {0,3}(`{3,}|~{3,})([^\n]*)(?:\n|$)/gm;

// "a\n```py\nb\n```" → [{ code: false, text: "a" }, { code: true, language: "py", text: "b" }]
export function segments(text) {
  const found = [];
  let from = 0;
  let open = null;
  for (const match of text.matchAll(FENCE)) {
    const [line, fence, info] = match;
    if (open === null) {
      if (fence[0] === "`" && info.includes("`")) continue; // code within a line
      found.push({ code: false, text: text.slice(from, match.index) });
      open = { fence, language: info.trim().split(/\s/)[0] };
    } else {
      const closes = fence[0] === open.fence[0] && fence.length >= open.fence.length;
      if (!closes || info.trim()) continue;
      found.push({ code: true, language: open.language, text: text.slice(from, match.index) });
      open = null;
    }
    from = match.index + line.length;
  }
  const rest = text.slice(from);
  if (open) found.push({ code: true, language: open.language, text: rest });
  else found.push({ code: false, text: rest });
  return found.length === 1 ? found : found.map(trimmed).filter((one) => one.code || one.text);
}

function trimmed(segment) {
  const text = segment.code
    ? segment.text.replace(/\n$/, "")
    : segment.text.replace(/^\n+|\n+$/g, "");
  return { ...segment, text };
}

// Make `box` show `text`. What stands there already is left alone, so that a selection survives.
export function showText(box, text) {
  const wanted = text ? segments(text) : [];
  wanted.forEach((segment, index) => {
    const name = segment.code ? "PRE" : "P";
    let block = box.children[index];
    if (block?.tagName !== name) {
      const made = newBlock(name);
      if (block) block.replaceWith(made);
      else box.append(made);
      block = made;
    }
    if (segment.code) block.dataset.language = segment.language;
    grow(segment.code ? block.firstChild : block, segment.text);
  });
  while (box.children.length > wanted.length) box.lastChild.remove();
}

function newBlock(name) {
  const block = document.createElement(name);
  if (name === "PRE") {
    block.tabIndex = 0; // a long line is scrolled by keys
    block.append(document.createElement("code"));
  }
  return block;
}

export function grow(element, text) {
  const node = element.firstChild;
  if (node === null) element.append(text);
  else if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else node.data = text;
}
