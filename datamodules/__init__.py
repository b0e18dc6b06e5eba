"""Data modules: one per family of data sets, each with a calibration set that is disjoint from its evaluation."""

from datamodules.base import QuantDataModule
from datamodules.coco import CocoRetrieval
from datamodules.flickr import Flickr8kRetrieval, Flickr30kRetrieval
from datamodules.imagenet import ImageFolderClassification, ImageNetV2
from datamodules.mini import MiniClassification, MiniPretrain, MiniRetrieval, MiniVQA
from datamodules.vqa import VQAv2

__all__ = [
    "CocoRetrieval",
    "Flickr8kRetrieval",
    "Flickr30kRetrieval",
    "ImageFolderClassification",
    "ImageNetV2",
    "MiniClassification",
    "MiniPretrain",
    "MiniRetrieval",
    "MiniVQA",
    "QuantDataModule",
    "VQAv2",
]
