// Buttons inside a panel: the action, and its document.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (button) {
    trigger("click", { action: button.dataset.action, about: button.dataset.value });
  }
});
