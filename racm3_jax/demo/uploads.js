// Files that will be refused are not sent; gradio's buttons would say nothing.
window.addEventListener(
  "change",
  (event) => {
    if (event.target.type !== "file") return;
    const wrong = [...event.target.files].find(
      (file) => file.size > props.max_bytes || !file.type.startsWith("image/"),
    );
    if (!wrong) return;
    event.stopImmediatePropagation();
    trigger("input", { name: wrong.name, bytes: wrong.size });
    event.target.value = "";
  },
  true,
);
