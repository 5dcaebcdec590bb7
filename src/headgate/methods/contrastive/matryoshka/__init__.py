"""Matryoshka Representation Learning: one embedding whose prefixes are good embeddings themselves."""

from headgate.methods.contrastive.matryoshka.cascade import MatryoshkaCascade
from headgate.methods.contrastive.matryoshka.encoder import MatryoshkaEncoder
from headgate.methods.contrastive.matryoshka.head import MatryoshkaHead
from headgate.methods.contrastive.matryoshka.language import MatryoshkaMaskedLM
from headgate.methods.contrastive.matryoshka.loss import MatryoshkaContrastiveLoss, MatryoshkaLoss
from headgate.methods.contrastive.matryoshka.resnet import MatryoshkaResNet
from headgate.methods.contrastive.matryoshka.retrieval import AdaptiveRetriever, FunnelRetriever
from headgate.methods.contrastive.matryoshka.sizes import nested_dims
from headgate.methods.contrastive.matryoshka.truncate import MatryoshkaTruncate, truncate

__all__ = [
    "AdaptiveRetriever",
    "FunnelRetriever",
    "MatryoshkaCascade",
    "MatryoshkaContrastiveLoss",
    "MatryoshkaEncoder",
    "MatryoshkaHead",
    "MatryoshkaLoss",
    "MatryoshkaMaskedLM",
    "MatryoshkaResNet",
    "MatryoshkaTruncate",
    "nested_dims",
    "truncate",
]
