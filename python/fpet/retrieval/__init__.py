"""Image-text retrieval with BLIP (Table A7): UniAdapters and merged image tokens, trained and evaluated.

>>> model = BlipForImageTextRetrieval.from_pretrained("Salesforce/blip-itm-base-flickr")
>>> retrieval.prepare(model, RetrievalConfig())
>>> split = load_split(folder, "train", retrieval.image_transform(384, augment=True))
>>> retrieval.train(model, tokenizer, split, RetrievalConfig())
>>> print(retrieval.evaluate(model, tokenizer, load_split(folder, "test", retrieval.image_transform(384))).table())

Under torchrun every process takes its share of each batch. ``fpet retrieval --demo`` runs all of it on drawn shapes.
"""

from .config import RetrievalConfig
from .evaluation import RetrievalScore, evaluate, recall
from .inputs import image_transform
from .losses import FeatureQueue, Losses, RetrievalLoss, contrastive_loss, hard_negatives, momentum_copy
from .run import train
from .tuning import freeze, load_tuned, prepare, save_tuned

__all__ = [
    "FeatureQueue",
    "Losses",
    "RetrievalConfig",
    "RetrievalLoss",
    "RetrievalScore",
    "contrastive_loss",
    "evaluate",
    "freeze",
    "hard_negatives",
    "image_transform",
    "load_tuned",
    "momentum_copy",
    "prepare",
    "recall",
    "save_tuned",
    "train",
]
