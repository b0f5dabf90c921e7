// Without this script the page says the same; it only lets tables be copied.
document.documentElement.classList.add("js");
function csv(table) {
  return [...table.rows].map(row => [...row.cells].map(cell => {
    const text = cell.dataset.v ?? cell.textContent;
    return /[",\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
  }).join(",")).join("\n") + "\n";
}
async function copy(button) {
  const text = csv(button.parentElement.querySelector("table")), was = button.textContent;
  try { await navigator.clipboard.writeText(text); }
  catch {
    const area = document.createElement("textarea");
    area.value = text; document.body.append(area); area.select();
    document.execCommand("copy"); area.remove();
  }
  button.textContent = "Copied"; setTimeout(() => { button.textContent = was; }, 1500);
}
for (const button of document.querySelectorAll("button.copy"))
  button.addEventListener("click", () => copy(button));
