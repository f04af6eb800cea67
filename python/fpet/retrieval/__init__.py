"""Image-text retrieval with BLIP (Table A7): UniAdapters and merged image tokens, trained and evaluated."""

from .run import (
    FeatureQueue,
    Losses,
    RetrievalConfig,
    RetrievalLoss,
    RetrievalScore,
    contrastive_loss,
    evaluate,
    freeze,
    hard_negatives,
    image_transform,
    load_tuned,
    momentum_copy,
    prepare,
    recall,
    save_tuned,
    train,
)

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
