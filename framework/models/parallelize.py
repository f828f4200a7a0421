"""The one file that applies parallelism to a model.

Data parallelism needs nothing from the model: every rank holds whole tensors, which the ZeRO engine partitions. What a
tensor-parallel rank holds of each parameter is said here, as the list of its shards.
"""

from torch import nn

from framework.parallel.fragments import ParameterShard
from framework.parallel.mesh import Mesh


def parallelize(model: nn.Module, mesh: Mesh) -> list[ParameterShard]:
    """Apply the mesh to a model on the meta device; the shards of its parameters, in the model's order."""
    assert mesh.replica.size == 1, "the recipe's check refuses tensor and context parallelism in this release"
    return [ParameterShard.whole(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
