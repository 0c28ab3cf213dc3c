// Buttons inside a panel: what is to be done, and with which document.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (button) {
    trigger("click", { action: button.dataset.action, about: button.dataset.value });
  }
});
