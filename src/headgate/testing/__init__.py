"""The contract suite: one set of promises that every public module of Headgate keeps, and that yours can be put through.

``check_module(lambda: MyLayer(8), lambda generator: (torch.randn(4, 8, generator=generator),))`` runs some twenty checks
(dtypes, gradients, batch axis, seeds, state dict, compile, export, meta device, bad input) in a second or two. It needs
torch, numpy and safetensors only.
"""

from headgate.testing.case import BadInput, CheckResult, ContractCase, ContractError, ContractReport, Failure
from headgate.testing.suite import CHECKS, Check, check_case, check_module

__all__ = [
    "CHECKS",
    "BadInput",
    "Check",
    "CheckResult",
    "ContractCase",
    "ContractError",
    "ContractReport",
    "Failure",
    "check_case",
    "check_module",
]
