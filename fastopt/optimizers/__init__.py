"""The optimizers: one file each, with its formula, reference, host scalars and rule."""

from fastopt.optimizers.adadelta import Adadelta as Adadelta
from fastopt.optimizers.adagrad import Adagrad as Adagrad
from fastopt.optimizers.adam import Adam as Adam
from fastopt.optimizers.adamax import Adamax as Adamax
from fastopt.optimizers.adamw import AdamW as AdamW
from fastopt.optimizers.asgd import ASGD as ASGD
from fastopt.optimizers.lamb import LAMB as LAMB
from fastopt.optimizers.lars import LARS as LARS
from fastopt.optimizers.lion import Lion as Lion
from fastopt.optimizers.momentum import Momentum as Momentum
from fastopt.optimizers.nadam import NAdam as NAdam
from fastopt.optimizers.nesterov import Nesterov as Nesterov
from fastopt.optimizers.radam import RAdam as RAdam
from fastopt.optimizers.rmsprop import RMSprop as RMSprop
from fastopt.optimizers.rprop import Rprop as Rprop
from fastopt.optimizers.sgd import SGD as SGD

# The classes, not the modules they are in. Type checkers read the lines above and need no __all__.
globals()["__all__"] = [name for name in globals() if name[0].isupper()]
