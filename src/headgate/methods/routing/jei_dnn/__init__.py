"""JEI-DNN: early exits whose gates and heads are learned together on a frozen backbone."""

from headgate.methods.routing.jei_dnn.costs import ExitCosts
from headgate.methods.routing.jei_dnn.exit_points import add_exit_points
from headgate.methods.routing.jei_dnn.exit_rule import (
    conditional_exits,
    exit_index,
    exit_probabilities,
    optimal_exit_targets,
    optimal_exits,
)
from headgate.methods.routing.jei_dnn.features import KeptFeatures, collect_features, keep_features, open_features
from headgate.methods.routing.jei_dnn.heads import ExitHeads, ExitOutputs, UncertaintyGate
from headgate.methods.routing.jei_dnn.losses import GateLoss, HeadLoss, exit_cross_entropy, positive_weights
from headgate.methods.routing.jei_dnn.model import EarlyExit, ExitPrediction
from headgate.methods.routing.jei_dnn.profile import profile_costs
from headgate.methods.routing.jei_dnn.t2t import T2TViT, early_exit_t2t_vit
from headgate.methods.routing.jei_dnn.trainer import JEIHistory, JEITrainer, training_phase
from headgate.methods.routing.jei_dnn.uncertainty import uncertainty_features

__all__ = [
    "EarlyExit",
    "ExitCosts",
    "ExitHeads",
    "ExitOutputs",
    "ExitPrediction",
    "GateLoss",
    "HeadLoss",
    "JEIHistory",
    "JEITrainer",
    "KeptFeatures",
    "T2TViT",
    "UncertaintyGate",
    "add_exit_points",
    "collect_features",
    "conditional_exits",
    "early_exit_t2t_vit",
    "exit_cross_entropy",
    "exit_index",
    "exit_probabilities",
    "keep_features",
    "open_features",
    "optimal_exit_targets",
    "optimal_exits",
    "positive_weights",
    "profile_costs",
    "training_phase",
    "uncertainty_features",
]
