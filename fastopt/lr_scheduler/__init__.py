"""Learning rate schedules, with the names, arguments and numbers of `torch.optim.lr_scheduler`, and what it lacks.

A schedule changes values in `param_groups` and nothing else. When training should end is for `fastopt.EarlyStopping`.
"""

from fastopt.lr_scheduler.base import LRScheduler as LRScheduler
from fastopt.lr_scheduler.composed import ChainedScheduler as ChainedScheduler
from fastopt.lr_scheduler.composed import SequentialLR as SequentialLR
from fastopt.lr_scheduler.cycles import CyclicLR as CyclicLR
from fastopt.lr_scheduler.cycles import OneCycleLR as OneCycleLR
from fastopt.lr_scheduler.decay import ConstantLR as ConstantLR
from fastopt.lr_scheduler.decay import CosineAnnealingLR as CosineAnnealingLR
from fastopt.lr_scheduler.decay import CosineAnnealingWarmRestarts as CosineAnnealingWarmRestarts
from fastopt.lr_scheduler.decay import ExponentialLR as ExponentialLR
from fastopt.lr_scheduler.decay import LambdaLR as LambdaLR
from fastopt.lr_scheduler.decay import LinearLR as LinearLR
from fastopt.lr_scheduler.decay import MultiplicativeLR as MultiplicativeLR
from fastopt.lr_scheduler.decay import MultiStepLR as MultiStepLR
from fastopt.lr_scheduler.decay import PolynomialLR as PolynomialLR
from fastopt.lr_scheduler.decay import StepLR as StepLR
from fastopt.lr_scheduler.plateau import ReduceLROnPlateau as ReduceLROnPlateau
from fastopt.lr_scheduler.warmup import InverseSquareRootLR as InverseSquareRootLR
from fastopt.lr_scheduler.warmup import WarmupLR as WarmupLR
from fastopt.lr_scheduler.warmup import WarmupStableDecayLR as WarmupStableDecayLR
