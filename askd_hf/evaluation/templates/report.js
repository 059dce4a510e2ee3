// A click on the heading of a column sorts the table. Without scripts the page lacks only that.
for (const table of document.querySelectorAll("table:has(thead)")) {
  if (table.querySelectorAll("tbody tr").length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, heading, column));
    heading.append(button);
  });
}

function sort(table, heading, column) {
  const descending = heading.getAttribute("aria-sort") === "ascending";
  const text = heading.matches(".left, :first-child");
  const body = oneBody(table);
  const rows = [...body.rows].map(row => [key(row.cells[column], text), row]);
  const compare = text ? (a, b) => a.localeCompare(b, undefined, {numeric: true}) : (a, b) => a - b;
  rows.sort(([a], [b]) =>
    (a === "") - (b === "") || (a === "" ? 0 : compare(a, b) * (descending ? -1 : 1)));  // empty cells stay last
  body.append(...rows.map(([, row]) => row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

// The text of a cell, or its first number; "" for an empty cell.
function key(cell, text) {
  const content = cell.textContent.trim();
  if (text || content === "") return content;
  return Number.parseFloat(content.replaceAll(",", "").replace("\u2212", "-").replace(/^[^\d-]+/, ""));
}

// Rows of a set share its name. To be sorted, each row gets its own, and all rows are moved into the first body.
function oneBody(table) {
  const [first, ...others] = table.tBodies;
  for (const body of [first, ...others]) {
    const shared = body.querySelector("th[rowspan]");
    if (!shared) continue;
    shared.removeAttribute("rowspan");
    shared.scope = "row";
    for (const row of [...body.rows].slice(1)) row.prepend(shared.cloneNode(true));
  }
  for (const body of others) {
    first.append(...body.rows);
    body.remove();
  }
  return first;
}

// One clip plays at a time.
document.addEventListener("play", event => {
  for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
}, true);
