// What the theme leaves out for keyboards and screen readers. The pages read the same without it.
document.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll('p.caption[role="heading"]')) caption.ariaLevel = "2";
  for (const [drawer, label] of [[".sidebar-drawer", "All pages"], [".toc-drawer", "On this page"]])
    document.querySelector(drawer)?.setAttribute("aria-label", label);
  // Sphinx writes the parameters of a long signature as definitions without terms.
  for (const list of document.querySelectorAll(".sig > dl")) {
    list.role = "list";
    for (const item of list.children) item.role = "listitem";
  }
  const reach = () => {
    // What scrolls sideways can be reached with the tabulator key, and scrolled with the arrows.
    for (const box of document.querySelectorAll("pre, .table-wrapper"))
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
  };
  reach();
  window.addEventListener("resize", reach);
});
