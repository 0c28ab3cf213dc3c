"""Numbers with intervals, pictures and reports about trained models.

suite              what all suites share: stages in chunks, figures, table, images
  flagworld        flagworld_judge: are drawings and captions right?
  flagworld_tasks  task_probes: what is asked; task_answers: asks; task_sheets: shows
  likelihood_suite perplexity, kshot, retrieval, copying
  coco_suite       coco_tasks: draws, captions; coco: the lists of images
  settings         of all of them
parts, replicas    chunks that survive a kill; a model on several devices
fingerprints       what figures depend on; document_sets: which documents

captions, treebank, clip_score, frechet, inception, resizing, features
                   scores of captions and of sets of images
reading            does a model read its documents, or copy by their place?
intervals          of all figures
pictures, report   what people look at
"""
