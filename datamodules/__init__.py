"""Data modules: one per family of data sets, each with a calibration set that is disjoint from its evaluation."""

from datamodules.captioning import (
    CocoCaptioning,
    Flickr8kCaptioning,
    Flickr30kCaptioning,
    MiniCaptioning,
    MiniCaptionText,
)
from datamodules.coco import CocoRetrieval
from datamodules.datamodule import QuantDataModule
from datamodules.flickr import Flickr8kRetrieval, Flickr30kRetrieval
from datamodules.folder import PictureFolder
from datamodules.imagenet import ImageFolderClassification, ImageNetV2
from datamodules.mini import MiniClassification, MiniPretrain, MiniRetrieval, MiniVQA
from datamodules.vqa import VQAv2

__all__ = [
    "CocoCaptioning",
    "CocoRetrieval",
    "Flickr8kCaptioning",
    "Flickr8kRetrieval",
    "Flickr30kCaptioning",
    "Flickr30kRetrieval",
    "ImageFolderClassification",
    "ImageNetV2",
    "MiniCaptionText",
    "MiniCaptioning",
    "MiniClassification",
    "MiniPretrain",
    "MiniRetrieval",
    "MiniVQA",
    "PictureFolder",
    "QuantDataModule",
    "VQAv2",
]
