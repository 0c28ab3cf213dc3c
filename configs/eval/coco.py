"""MS-COCO: 30,000 drawn captions, or the 5,000 captioned images of the Karpathy split.

racm3 evaluate --suite=coco --workdir=out/coco \
    --config.coco=DATA/coco --config.models=WORKDIR --config.memory=MEMORY
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "text_to_image" (default) or "captioning"."""
    task = arg or "text_to_image"
    config = ConfigDict()
    config.suite = "coco"
    # The folder with annotations/ and the images beside it.
    config.coco = ""
    # Images of the list: 30,000 of val2014, or all of the Karpathy test split.
    config.num_items = 30_000 if task == "text_to_image" else 5_000
    config.split = "val2014" if task == "text_to_image" else "test"
    # Work directory of the trained model, and the memory that it retrieves from.
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
    # Files of weights of the judges; empty leaves a judge out.
    config.inception = dict(weights="", variant="fid", resizing="clean")
    # A CLIP other than the one that retrieves; "" judges with that one and says so.
    config.judge_clip = ""
    # Where features of the real images are kept for further runs; "": in the workdir.
    config.reference = ""
    return config
