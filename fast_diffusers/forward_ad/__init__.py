"""Forward-mode differentiation of eager Paddle code: exact directional derivatives in one pass, without a graph.

`jvp` runs a function on dual numbers: beside every tensor that depends on the inputs stands its tangent, its derivative
along the chosen direction. Each operator has a rule that computes the tangents of its results; a tangent lives as long
as its tensor. `register_rule` adds rules. The layers of a model need no change: see `compat.intercepted_operators`.
"""

from fast_diffusers.forward_ad import linear, norms, pointwise, products, selection  # noqa: F401  (they register rules)
from fast_diffusers.forward_ad.differences import central_difference
from fast_diffusers.forward_ad.directional import jvp
from fast_diffusers.forward_ad.tape import Call, register_rule

__all__ = ["Call", "central_difference", "jvp", "register_rule"]
