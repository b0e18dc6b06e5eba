"""Features of a frozen network, computed once and kept on disk."""

from lit_clipq.features.cache import CacheOptions, FeatureCache
from lit_clipq.features.key import FeatureKey, items_hash
from lit_clipq.features.questions import FeatureBatch
from lit_clipq.features.store import FeatureStore, decode

__all__ = ["CacheOptions", "FeatureBatch", "FeatureCache", "FeatureKey", "FeatureStore", "decode", "items_hash"]
