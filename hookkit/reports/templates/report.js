"use strict";
// Each column's heading becomes a button that sorts the table by it: once upwards, once more downwards. Rows without a
// value stay at the end, and equal ones in the order of the page.
const number = (text) => text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number.parseFloat(text);
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.querySelectorAll("th[data-place]")];
  for (const head of heads) {
    const button = document.createElement("button"), place = Number(head.dataset.place);
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent;
      const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(number(key(row))));
      const compared = (a, b) => numeric ? Math.sign(number(a) - number(b) || 0) : a < b ? -1 : a > b ? 1 : 0;
      const order = [...rows].sort((one, other) => {
        const a = key(one), b = key(other);
        if (a === "" || b === "") return (a === "") - (b === "");
        return down ? compared(b, a) : compared(a, b);
      });
      body.append(...order);
    });
  }
}
