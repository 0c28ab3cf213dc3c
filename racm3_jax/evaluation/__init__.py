"""Figures with intervals, image sheets and reports about trained models.

suite              common parts of all suites: stages in chunks, figures, table, images
  likelihood_suite perplexity, kshot, retrieval, copying
  coco_suite       coco_tasks: text to image, captioning; coco: the lists of images
  settings         of all suites
parts, replicas    chunks that survive a kill; a model on several devices
fingerprints       of models, memories, documents; document_sets: which documents

captions, treebank, clip_score, frechet, inception, resizing, features
                   scores of captions and of sets of images
intervals          of all figures
pictures, report   image sheets and an HTML report
"""
