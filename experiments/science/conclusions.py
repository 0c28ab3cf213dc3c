"""What follows from the committed results, written after they were measured."""

from __future__ import annotations

CONCLUSIONS: dict[str, str] = {
    "gains": (
        "The paper's first claim holds, and exactly: flags and names of nations that were "
        "in no training are right in nine of ten, where a twin without retrieval has none "
        "(0.8%, 0%), and training that twin on to the same compute changes nothing. It is "
        "the content of the documents that does it, for random documents of the same "
        "memory give 1.5% and 0.3%. Returning the nearest document gives no scene that was "
        "asked for, and as good an FID (9.0, for 10.9 with wider intervals): FID alone would "
        "not tell them apart. Random documents have a lower FID than the twin of equal "
        "compute (18 for 25) with as few right flags; it measures the look of the pictures, "
        "not what they are of. Guidance by documents is worth 5 flags of 100."
    ),
    "num_documents": (
        "As the successor paper prints it, the first document gives most and the second "
        "still adds: it draws 16 more flags of 100 right without guidance, and saves 6 "
        "bits an image. Captions hardly gain (0.03 of text perplexity). Four documents, "
        "which no training has shown, are worse than one in every column: train with as "
        "many as are to be read."
    ),
    "alpha": (
        "About generation without retrieval the successor is right: a picture costs 55 "
        "bits where nothing is learned from retrieved documents, 51 at the paper's 0.1 and "
        "45 at 1, and falls with α in each of the three seeds. What α does to reading "
        "documents, models of this size do not settle: whether 3,000 steps suffice to "
        "learn to copy hangs more on the seed (48, 20 and 26 flags of 100 at 0.1) than on "
        "α. At 1 the text of documents is hardly read in any seed (perplexity 7.1 with "
        "them, 7.4 without); below 1 it is in most."
    ),
    "strategy": (
        "Relevance comes first: from random documents nothing is learned (0 to 3 flags of "
        "100 whatever is shown at test, no name, perplexity 7.6 for 2.3). Diversity is "
        "needed where a memory holds copies, and its lack shows once two documents that "
        "differ are read: a model that was trained on the nearest ones, which often were a "
        "copy of its own picture, then draws 53, 28 and 18 flags right, one that was "
        "trained with diversity 96, 95 and 68 (difference -53 [-84, -23]). Against "
        "diversity with query dropout it pays 22 bits an image more [15, 29]; flags do not "
        "settle that pair, for one seed of three did not learn to copy with query dropout "
        "(100, 22 and 90). Asked only in its own way, with copies, the model trained on the "
        "nearest seems as good as the others (flags 100, 98 and 57). Of query dropout no "
        "effect can be told (perplexity +0.3 [-0.6, +1.2] against diversity alone). The "
        "paper's 3 points of perplexity cannot show in a world where all of it is 2.3."
    ),
    "modality": (
        "Yes: a document gives what it has. Images alone are enough to draw the flag (86.5% "
        "of flags for 87.5% in the shipped model, bits alike) and give no name; texts alone "
        "give names (69% in models that were trained on them, as many as whole documents "
        "do) and no flag. Only whole documents give both, which is the paper's finding, "
        "with the reason laid open. A model that was trained on whole documents reads "
        "images alone without loss; texts alone confuse it (33% of names, and a quarter of "
        "the scenes lost). The intervals of the trained models are wide, for how well one "
        "copies flags after 6,000 steps still hangs on its seed (96, 56 and 96 of 100 with "
        "whole documents; 70, 42 and 99 with images): whether texts help to draw, they do "
        "not settle."
    ),
    "scratch": (
        "At equal compute the paper is right where it can be told: a model that reads "
        "documents from the first step on names 66, 56 and 52 of 100 nations in its "
        "captions, one that was plain for half of the compute 3, 5 and 0. Flags (83% and "
        "64%) hang too much on the seed to say. Given as many steps with documents as the "
        "other one had, which is 1.5 times the compute, the model that was plain draws 95, "
        "94 and 99 flags right (from scratch 96, 54 and 96) and names 67, 64 and 6 nations: "
        "no difference from scratch leaves its interval, so three seeds show neither harm "
        "nor gain of a plain beginning that is paid for besides."
    ),
    "sizes": (
        "At every size, and at equal compute: with documents 21%, 83% and 89% of flags are "
        "right, without 1% at each, and text perplexity is 3.3, 6.1 and 6.3 lower (all six "
        "beyond their intervals). More parameters do not make up for a memory: the small "
        "model with documents draws more flags (+20 [12, 28]) and has a lower perplexity "
        "(-4.1 [-5.0, -3.2]) than the large one without, at a tenth of its compute. Without "
        "documents, more size saves 7 bits an image [4, 10] and neither draws nor names a "
        "nation that is not known: perplexity even rises (by 0.8 [0.2, 1.4], large against "
        "small). Reading documents takes some size: from small to middle 62 flags [11, 112] and 55 "
        "names [26, 84] are won; from middle to large no difference can be told. In "
        "training, documents cost first and pay later: at equal compute the loss of "
        "captions is higher with them until copying begins, then lower at every size."
    ),
    "rotation": (
        "One caption in ten moved whole is enough, and some must be: without it, infilling "
        "a caption names 31, 0 and 1 of 100 nations, at 0.1 61, 45 and 56, at 0.25 66, 58 "
        "and 52 (both differences leave their intervals). Spans alone, which the paper "
        "trains on, do not teach it here, where few documents have one (0.2 masks each, "
        "for one or more in the papers). At 0.5 two seeds of three caption as well and one "
        "does not, and no difference can be told. Drawing gains in each seed, too (48, 36 "
        "and 25 flags of 100 without rotation, 87, 42 and 91 at 0.1), but not beyond its "
        "interval. Guidance by text, which is what the successors move captions for, is not "
        "served by it: it wins 9 and 6 flags and loses one without rotation, and wins none "
        "in any model with it. Guidance by documents wins 1 to 23 flags in all twelve."
    ),
    "memory_changes": (
        "What is drawn follows the memory at once, both ways: with all of a nation's "
        "documents removed its flag is gone (and no removed document is shown), with new "
        "documents in their place the new flag is drawn, as often as the old one was. "
        "Other nations' documents cost nothing up to 16,000. Four documents of a nation "
        "do about as well as eight; with a single one 25 flags of 100 are lost, for a wrong "
        "one then comes second. A memory that contradicts itself is followed either way, "
        "by its shares: correcting means removing, not only adding."
    ),
    "kshot": (
        "Yes, but not in the paper's way. The image's likelihood behind each label's own "
        "example tells two nations apart from the first example on, so that the curve has "
        "no slope left to show: the paper's rises from 0.78 to 0.90. By the likelihood of "
        "the label behind examples of both, which is how the paper asks, this small model "
        "guesses at any number of examples: it copies flags, and does not compare them. "
        "The nearest example by CLIP does as well without any language model."
    ),
}

# One line each, for the table at the head of the page.
ANSWERS: dict[str, str] = {
    "gains": "91% of flags and 90% of names right; without retrieval 1% and 0%, also at "
    "equal compute; behind random documents 1.5%",
    "num_documents": "two: flags 1%, 79%, 88% with none, one, two; four, which training "
    "never showed, give 36%",
    "alpha": "little for reading, as far as seeds can tell; without retrieval an image "
    "costs 55, 51 and 45 bits at α = 0, 0.1 and 1",
    "strategy": "relevant and diverse ones: 86% of flags, 33% after training on near "
    "copies, 1% on random documents; query dropout: no effect that can be told",
    "modality": "for both tasks, yes: images alone give flags (87%) and no names, texts "
    "alone names and no flags",
    "scratch": "from scratch at equal compute (59% of names for 3%); with half as much "
    "again no difference can be told",
    "sizes": "yes: the smallest model with documents draws 21% of flags, one of ten times "
    "its compute without them 1%",
    "rotation": "in one caption of ten: 54% of nations named by infilling, 11% without",
    "memory_changes": "drawings follow the memory at once; a memory that contradicts "
    "itself is followed by its shares",
    "kshot": "by the image's likelihood, fully; by the label's (the paper's way) not "
    "with these weights",
}
