"""MS-COCO: images of 30,000 captions, or captions of the 5,000 Karpathy test images.

racm3 evaluate --suite=coco --workdir=out/coco \
    --config.coco=DATA/coco --config.models=WORKDIR --config.memory=MEMORY
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "text_to_image" (default) or "captioning"."""
    task = arg or "text_to_image"
    config = ConfigDict()
    config.suite = "coco"
    # The folder with annotations/ and the images.
    config.coco = ""
    # Number of images: 30,000 of val2014, or all of the Karpathy test split.
    config.num_items = 30_000 if task == "text_to_image" else 5_000
    config.split = "val2014" if task == "text_to_image" else "test"
    # Work directory of the trained model, and its memory.
    config.models = ""
    config.memory = ""
    config.strategy = dict(max_similarity=0.9)
    config.settings = dict(
        task=task,
        image_size=256,
        variants=("retrieval", "no_retrieval", "copy", "random"),
        num_retrieved=2,
        # RA-CM3, section 4: CLIP picks 1 of 10 images, perplexity 1 of 32 captions.
        num_samples=10 if task == "text_to_image" else 32,
        temperature=1.0,
        top_p=0.9,
        prefix="" if task == "text_to_image" else "Photo of",
        max_similarity=0.95,
        seed=0,
        chunk_size=64,
        num_resamples=1000,
        num_distance_resamples=20,
        num_sheet_rows=8,
    )
    # Weight files of the evaluation models; empty skips one.
    config.inception = dict(weights="", variant="fid", resizing="clean")
    # Another CLIP than the retriever's; "" uses the retriever's, with a note.
    config.judge_clip = ""
    # Cache of features of the real images for later runs; "": in the workdir.
    config.reference = ""
    return config
