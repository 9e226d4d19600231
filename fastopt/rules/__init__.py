"""What an optimizer is written with: functions of rules, kinds of hyperparameters, the registry.

The gradient stage, which precedes every rule, and host scalars are here too; loops, arrays and kernels are not.
"""

from fastopt.rules.functions import copysign as copysign
from fastopt.rules.functions import fabs as fabs
from fastopt.rules.functions import maximum as maximum
from fastopt.rules.functions import minimum as minimum
from fastopt.rules.functions import norm as norm
from fastopt.rules.functions import sign as sign
from fastopt.rules.functions import sqrt as sqrt
from fastopt.rules.hyperparameters import AnyReal as AnyReal
from fastopt.rules.hyperparameters import Betas as Betas
from fastopt.rules.hyperparameters import Flag as Flag
from fastopt.rules.hyperparameters import Fraction as Fraction
from fastopt.rules.hyperparameters import Kind as Kind
from fastopt.rules.hyperparameters import LearningRate as LearningRate
from fastopt.rules.hyperparameters import NonNegative as NonNegative
from fastopt.rules.hyperparameters import Pair as Pair
from fastopt.rules.hyperparameters import Real as Real
from fastopt.rules.hyperparameters import Switch as Switch
from fastopt.rules.registry import register as register
from fastopt.rules.registry import registry as registry
from fastopt.rules.spec import STATE_KINDS as STATE_KINDS
from fastopt.rules.spec import Hyper as Hyper
from fastopt.rules.spec import Spec as Spec
