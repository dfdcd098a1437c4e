"""One-shot differentiable search for multi-task dense prediction on the Coral Edge TPU.

The data flow in a dozen lines:

    space = ednas_b0()                                          # what may vary
    supernet = build_network(space, {"segmentation": 19, "depth": 1})
    alpha = ArchitectureParameters(space)                       # one logit per option
    outputs = supernet(images, space.sample(generator))         # sliced: trains the weights
    outputs = supernet(images, alpha.gates(1.0, hard=True))     # relaxed: trains alpha
    table = LatencyTable.load("latency_tables/edgetpu_sim_256x256.csv")
    latency = expected_latency(table, space, alpha.probabilities())      # ms, with gradient
    best = derive_architectures(alpha, table, space, target_ms=6.0)[0]   # inside the budget
    network = build_network(space.fix(best), supernet.out_channels)      # its own network
    inherit_weights(network, supernet, best)                    # or train it from scratch
    export_tflite(network, "model.tflite", calibration_images=images)    # full int8
"""

from importlib.metadata import PackageNotFoundError, version

from oneshot_ednas.architecture import Architecture, BlockArchitecture
from oneshot_ednas.derive import derive_architectures, pareto_front
from oneshot_ednas.export import export_tflite
from oneshot_ednas.latency.expected import expected_latency
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.deeplab import named_encoder
from oneshot_ednas.models.encoder import Chain, Encoder, EncoderLayer, ednas_encoder
from oneshot_ednas.models.network import (
    Network,
    build_network,
    derived_network,
    inherit_weights,
    recalibrate_bn,
)
from oneshot_ednas.relaxation import ArchitectureParameters, BlockGates, Gates, one_hot_gates
from oneshot_ednas.reward import accuracy_product, deltas, reward
from oneshot_ednas.sharing.branched import branched_network, supergraph
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.operators import compile_supermodel
from oneshot_ednas.sharing.policy import Policy
from oneshot_ednas.space import SearchSpace, ednas_b0, ednas_tiny, named_space

try:
    __version__ = version("oneshot-ednas")
except PackageNotFoundError:  # the bare folder, not installed
    __version__ = "unknown"

__all__ = [
    "Architecture",
    "ArchitectureParameters",
    "BlockArchitecture",
    "BlockGates",
    "Branching",
    "Chain",
    "Encoder",
    "EncoderLayer",
    "Gates",
    "LatencyTable",
    "Network",
    "Policy",
    "SearchSpace",
    "__version__",
    "accuracy_product",
    "branched_network",
    "build_network",
    "compile_supermodel",
    "deltas",
    "derive_architectures",
    "derived_network",
    "ednas_b0",
    "ednas_encoder",
    "ednas_tiny",
    "expected_latency",
    "export_tflite",
    "inherit_weights",
    "named_encoder",
    "named_space",
    "one_hot_gates",
    "pareto_front",
    "recalibrate_bn",
    "reward",
    "supergraph",
]
