"""Large random messages over 1 to 5 real ranks, held to the independent golden implementation bit for bit.

The usual run takes a few of them; MLB_MESSAGES=1000 takes as many (minutes).
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import comm_cases
from helpers.golden_messages import golden_all_reduce
from helpers.messages import digest, draw_wide_message

from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.parallel import ParallelContext

MESSAGES = int(os.environ.get("MLB_MESSAGES", "60"))
AT_ONCE = 25


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_real_and_virtual_ranks_equal_golden(ranks, size):
    seeds = [10_000 * size + index for index in range(MESSAGES // 4)]
    compared = 0
    for start in range(0, len(seeds), AT_ONCE):
        some = seeds[start : start + AT_ONCE]
        results = ranks(size).run(comm_cases.messages, timeout_s=900, seeds=some, backends=["auto"], wide=True)
        for index, seed in enumerate(some):
            message = draw_wide_message(seed, size)
            expected = digest(torch.from_numpy(golden_all_reduce(message)))
            found = {result["rows"][index]["digest"] for result in results}
            assert found == {expected}, f"real ranks, {message}"
            hidden = message.partials[0].shape[1]
            virtual = build_all_reduce(
                ParallelContext.virtual_ranks(size), message.scheme, hidden, message.constants, "auto"
            )
            assert digest(virtual(torch.stack(message.partials))) == expected, f"virtual ranks, {message}"
            compared += 1
    assert compared == len(seeds)
