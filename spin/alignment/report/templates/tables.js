// Tables that are sorted by a click on a heading, or by Enter on it. A third click restores the original order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];

  headings.forEach((heading, column) => {
    const button = element("button", { type: "button" }, heading.textContent);
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const next = { none: "descending", descending: "ascending", ascending: "none" }[heading.ariaSort ?? "none"];
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      if (next !== "none") heading.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? original : sorted(column, next === "ascending" ? 1 : -1)));
    });
  });

  function sorted(column, sign) {
    const valueOf = (row) => row.cells[column].dataset.value;
    return [...original].sort((a, b) => {
      const [one, other] = [valueOf(a), valueOf(b)];
      if (one === undefined || other === undefined) {
        // Rows without a value come last in both directions.
        const missing = (one === undefined) - (other === undefined);
        return missing || sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true });
      }
      return sign * (Number(one) - Number(other));
    });
  }
}
