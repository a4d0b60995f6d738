"""Values that cross the wire or the public boundary."""

from tinkex_py.types.checkpoint_path import CheckpointPath
from tinkex_py.types.datum import Datum
from tinkex_py.types.features import ServiceFeatures
from tinkex_py.types.model_input import EncodedTextChunk, Encoder, ModelInput, Tokenizer
from tinkex_py.types.outputs import (
    ForwardBackwardOutput,
    GetInfoResponse,
    ModelData,
    OptimStepResponse,
    PackedTensor,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    ServerCapabilities,
    SupportedModel,
    WeightsInfo,
)
from tinkex_py.types.parameters import AdamParams, LoraConfig, OptimizerParams, SamplingParams
from tinkex_py.types.queue_state import QueueState
from tinkex_py.types.rest import (
    ArchiveUrl,
    Checkpoint,
    CheckpointsPage,
    Cursor,
    DownloadProgress,
    ExternalWeightsUrls,
    Sampler,
    Session,
    SessionQuery,
    SessionSearchCursor,
    SessionSearchPage,
    SessionsPage,
    SessionStatus,
    SessionSummary,
    TrainingRun,
    TrainingRunsPage,
)
from tinkex_py.types.samples import PromptAltTokens, SampledSequence, SampleResponse
from tinkex_py.types.tensors import TensorData, TensorInput

__all__ = [
    "AdamParams",
    "ArchiveUrl",
    "Checkpoint",
    "CheckpointPath",
    "CheckpointsPage",
    "Cursor",
    "Datum",
    "DownloadProgress",
    "EncodedTextChunk",
    "Encoder",
    "ExternalWeightsUrls",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "LoraConfig",
    "ModelData",
    "ModelInput",
    "OptimStepResponse",
    "OptimizerParams",
    "PackedTensor",
    "PromptAltTokens",
    "QueueState",
    "SampleResponse",
    "SampledSequence",
    "Sampler",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "ServerCapabilities",
    "ServiceFeatures",
    "Session",
    "SessionQuery",
    "SessionSearchCursor",
    "SessionSearchPage",
    "SessionStatus",
    "SessionSummary",
    "SessionsPage",
    "SupportedModel",
    "TensorData",
    "TensorInput",
    "Tokenizer",
    "TrainingRun",
    "TrainingRunsPage",
    "WeightsInfo",
]
