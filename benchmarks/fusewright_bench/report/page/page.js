"use strict";
(() => {
  const form = document.querySelector(".filters");
  const tables = [...document.querySelectorAll("table.results")];
  const rows = tables.flatMap((table) => [...table.tBodies[0].rows]);

  // A value is what data-sort says, a number where it is one; what is missing comes last either way.
  const valueOf = (row, column) => {
    const text = row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    if (text === "") return null;
    const number = Number(text);
    return Number.isNaN(number) ? text : number;
  };

  const compare = (left, right) =>
    typeof left === "number" && typeof right === "number" ? left - right : String(left).localeCompare(String(right));

  const sort = (table, header) => {
    const column = header.cellIndex;
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const sorted = [...table.tBodies[0].rows].sort((a, b) => {
      const left = valueOf(a, column), right = valueOf(b, column);
      if (left === null || right === null) return (left === null) - (right === null);
      return ascending ? compare(left, right) : compare(right, left);
    });
    table.tBodies[0].append(...sorted);
  };

  const filter = () => {
    const wanted = new FormData(form);
    const text = wanted.get("text").trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = [...wanted].every(([name, value]) => name === "text" || value === "" || row.dataset[name] === value);
      row.hidden = !(fits && row.textContent.toLowerCase().includes(text));
      shown += !row.hidden;
    }
    for (const table of tables) table.closest(".group").hidden = [...table.tBodies[0].rows].every((row) => row.hidden);
    form.elements.count.value = `${shown} of ${rows.length} rows`;
  };

  // The clipboard needs a secure page, and a file opened from disk may not be one.
  const copy = async (button) => {
    const command = button.dataset.command;
    try {
      await navigator.clipboard.writeText(command);
      button.textContent = "copied";
    } catch {
      window.prompt("Copy this command", command);
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };

  for (const table of tables) {
    for (const header of table.tHead.rows[0].cells) {
      header.querySelector("button")?.addEventListener("click", () => sort(table, header));
    }
  }
  document.addEventListener("click", (event) => {
    if (event.target.matches(".copy")) copy(event.target);
  });
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  filter();
})();
