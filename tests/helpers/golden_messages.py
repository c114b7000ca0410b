"""Messages through the golden implementation: from our types to its arrays."""

from __future__ import annotations

import numpy as np
from helpers import golden, golden_method
from helpers.messages import Message

from megatron_lowbit.comm.wire_format import WHOLE_ROW, WireFormat


def golden_format(wire: WireFormat, hidden: int) -> golden.Format:
    outliers = hidden // wire.outlier_divisor if wire.outlier_divisor else 0
    group = max(1, hidden - outliers) if wire.group_size == WHOLE_ROW else wire.group_size
    return golden.Format(wire.bits, group, outliers, wire.values, wire.scale_format, wire.asymmetric, wire.prescaled)


def array(tensor):
    return None if tensor is None else tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def golden_all_reduce(message: Message) -> np.ndarray:
    scheme, constants = message.scheme, message.constants
    hidden = message.partials[0].shape[1]
    gather = None if scheme.gather_stage is None else golden_format(scheme.gather_stage, hidden)
    rotations = scheme.reduce_stage.rotation, 0 if scheme.gather_stage is None else scheme.gather_stage.rotation
    own = (constants.gather_scale_1D, constants.gather_minimum_1D)
    gather_scale, gather_minimum = (None if side is None else array(side)[0] for side in own)
    return golden_method.all_reduce(
        [array(partial) for partial in message.partials],
        golden_format(scheme.reduce_stage, hidden),
        gather,
        array(constants.reduce_scale_RD),
        gather_scale,
        array(constants.outlier_index),
        array(constants.reduce_minimum_RD),
        gather_minimum,
        rotations,
    )
