"""What `plan --table` assumes: four models, eight GPUs, three ways to join them. Nothing of it was measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit_tools.plan_collectives import Link
from lowbit_tools.plan_model import Machine, Prediction, predict
from lowbit_tools.plan_shapes import ModelShape
from megatron_lowbit.comm.policy import default_policy
from megatron_lowbit.comm.schemes import CommScheme

RANKS = 8

#: dimensions as the models' own config.json files state them
MODELS = (
    ModelShape("Llama-2-13B", 5120, 40, 40, 40, 128, 13824, 32000),
    ModelShape("Gemma-2-27B", 4608, 46, 32, 16, 128, 36864, 256000, tied=True),
    ModelShape("Llama-2-70B", 8192, 80, 64, 8, 128, 28672, 32000),
    ModelShape("Llama-3.1-405B", 16384, 126, 128, 8, 128, 53248, 128256),
)

# data sheet of the A100 80GB PCIe: dense bf16 peak, memory bandwidth, PCIe 4.0 x16 each way
_PEAK_FLOPS, _PEAK_MEMORY, _PCIE = 312e12, 1935e9, 32e9
# assumptions, not measurements
_FLOPS_SHARE, _MEMORY_SHARE, _CODEC_SHARE, _PCIE_SHARE, _ETHERNET_SHARE = 0.5, 0.8, 0.4, 0.75, 0.9


@dataclass(frozen=True)
class Fabric:
    """How the GPUs are joined. NCCL sends whole messages: coding and sending do not overlap."""

    name: str
    nbytes_per_s: float
    latency_s: float

    @property
    def machine(self) -> Machine:
        return Machine(
            _FLOPS_SHARE * _PEAK_FLOPS,
            _MEMORY_SHARE * _PEAK_MEMORY,
            _CODEC_SHARE * _PEAK_MEMORY,
            Link(self.nbytes_per_s, self.latency_s, overlaps=False),
        )


FABRICS = (
    Fabric("PCIe 4.0 x16", _PCIE_SHARE * _PCIE, 20e-6),
    Fabric("100 Gbit Ethernet", _ETHERNET_SHARE * 100e9 / 8, 30e-6),
    Fabric("25 Gbit Ethernet", _ETHERNET_SHARE * 25e9 / 8, 50e-6),
)

ASSUMPTIONS = (
    f"{RANKS} GPUs, one a rank, each on a link of its own. From the data sheet of the A100 80GB PCIe: "
    f"{_PEAK_FLOPS / 1e12:g} TFLOPS bf16, {_PEAK_MEMORY / 1e9:g} GB/s memory, PCIe {_PCIE / 1e9:g} GB/s each way. "
    f"Assumed shares of those peaks: {_FLOPS_SHARE:.0%} of the operations, {_MEMORY_SHARE:.0%} of the memory bandwidth "
    f"({_CODEC_SHARE:.0%} for the codec), {_PCIE_SHARE:.0%} of PCIe, {_ETHERNET_SHARE:.0%} of the Ethernet line rate. "
    "Assumed latency a stage: "
    + ", ".join(f"{fabric.name} {1e6 * fabric.latency_s:g} us" for fabric in FABRICS)
    + ". Weights in bf16, whether they fit the GPU or not."
)


def table_predictions(scheme: CommScheme, prompt_lengths: Sequence[int], batch: int) -> list[tuple[Fabric, Prediction]]:
    """Every model on every fabric, under the default policy."""
    policy = default_policy(RANKS)
    return [
        (fabric, predict(model, RANKS, fabric.machine, scheme, policy, length, batch))
        for model in MODELS
        for fabric in FABRICS
        for length in prompt_lengths
    ]
