"""Data sets: images of your own, generated tasks, VTAB-1K, CIFAR-100, SVHN, FGVC, and pairs of images and texts."""

from .base import Batch, DataOptions, Dataset, Splits, TensorTask, batches, epoch_order
from .digits import PretrainingData
from .families import FAMILIES, Family, Transforms, check, load, task_names
from .folder import image_files
from .image_set import ImageSet
from .images import NORMALIZATIONS, UnreadableImage, image_transform, normalize, read_image, to_rgb
from .lists import FGVC_TASKS, VTAB_TASKS, ImageList, check_folder
from .shapes import SHAPE_TASKS, draw, shapes_task

__all__ = [
    "FAMILIES",
    "FGVC_TASKS",
    "NORMALIZATIONS",
    "SHAPE_TASKS",
    "VTAB_TASKS",
    "Batch",
    "DataOptions",
    "Dataset",
    "Family",
    "ImageList",
    "ImageSet",
    "PretrainingData",
    "Splits",
    "TensorTask",
    "Transforms",
    "UnreadableImage",
    "batches",
    "check",
    "check_folder",
    "draw",
    "epoch_order",
    "image_files",
    "image_transform",
    "load",
    "normalize",
    "read_image",
    "shapes_task",
    "task_names",
    "to_rgb",
]
