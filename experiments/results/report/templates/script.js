"use strict";
for (const gallery of document.querySelectorAll(".gallery")) {
  const buttons = gallery.querySelectorAll("[data-filter]");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      for (const article of gallery.querySelectorAll("[data-ending]")) {
        article.hidden = button.dataset.filter !== "" && article.dataset.ending !== button.dataset.filter;
      }
    });
  }
  const reveal = gallery.querySelector(".reveal");
  if (reveal) {
    reveal.addEventListener("click", () => {
      for (const view of document.querySelectorAll(".blurred")) view.classList.remove("blurred");
    });
  }
}
const dialog = document.getElementById("enlarged");
for (const view of document.querySelectorAll("button.view")) {
  view.addEventListener("click", () => {
    if (view.classList.contains("blurred")) {
      view.classList.remove("blurred");
      return;
    }
    dialog.querySelector("img").src = view.querySelector("img").src;
    dialog.querySelector("p").textContent = view.dataset.caption;
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog || event.target.tagName === "IMG") dialog.close();
});
function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
window.addEventListener("hashchange", openTarget);
openTarget();
