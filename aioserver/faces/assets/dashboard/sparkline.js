// A small chart of a provider's last minutes: the places taken are an area, the queue is a line.

/** Draw on *canvas*; the top is the limit or the highest value, whichever is greater. */
export function sparkline(canvas, times, { in_flight: taken, waiting }, span, limit) {
  const ratio = devicePixelRatio;
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  if (!width || !height) return;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const context = canvas.getContext("2d");
  const end = times.at(-1);
  const top = Math.max(highest(taken), highest(waiting), limit > 0 ? limit : 1);
  const x = (at) => width * (1 - (end - times[at]) / span);
  const y = (value) => height - ratio - (value / top) * (height - 3 * ratio);
  context.clearRect(0, 0, width, height);
  context.lineWidth = 1.5 * ratio;
  context.lineJoin = "round";
  for (const [column, tone, soft] of [[taken, "accent", "accent-soft"], [waiting, "warning", ""]]) {
    if (!soft && highest(column) === 0) continue; // a queue that was never used has no line
    for (const [from, to] of runs(column)) {
      context.beginPath();
      for (let at = from; at < to; at++) context.lineTo(x(at), y(column[at]));
      context.strokeStyle = colour(tone);
      context.stroke();
      if (!soft) continue;
      context.lineTo(x(to - 1), height);
      context.lineTo(x(from), height);
      context.fillStyle = colour(soft);
      context.fill();
    }
  }
}

const highest = (column) => column.reduce((a, b) => (b > a ? b : a), 0);

/** Yield [from, to) of each run of values that are not null. */
function* runs(column) {
  let from = -1;
  for (let at = 0; at <= column.length; at++) {
    const there = at < column.length && column[at] !== null;
    if (there && from < 0) from = at;
    if (!there && from >= 0) {
      yield [from, at];
      from = -1;
    }
  }
}
