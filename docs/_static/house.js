// Labels and roles for keyboards and screen readers that the theme leaves out, and filters of long tables. The pages can be read without it.
document.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll('p.caption[role="heading"]')) caption.ariaLevel = "2";
  for (const [drawer, label] of [[".sidebar-drawer", "All pages"], [".toc-drawer", "On this page"]])
    document.querySelector(drawer)?.setAttribute("aria-label", label);
  // Sphinx writes the parameters of a long signature as definitions without terms.
  for (const list of document.querySelectorAll(".sig > dl")) {
    list.role = "list";
    for (const item of list.children) item.role = "listitem";
  }
  // A searchable table gets a field that hides the rows without the words typed into it.
  for (const table of document.querySelectorAll("table.searchable")) {
    const field = Object.assign(document.createElement("input"), { type: "search", placeholder: "Filter, as in: MLP bfloat16" });
    field.ariaLabel = `Filter: ${table.caption.textContent}`;
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
    table.parentElement.before(field);
  }
  const reach = () => {
    // Boxes that scroll sideways can be reached with the tabulator key, and scrolled with the arrows.
    for (const box of document.querySelectorAll("pre, .table-wrapper"))
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
  };
  reach();
  window.addEventListener("resize", reach);
});
