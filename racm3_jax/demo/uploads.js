// Files that would be refused are not sent, as gradio's buttons show no error.
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
