"""Values of the public API and of the wire format."""

from tinkex_py.types.checkpoint_path import CheckpointPath
from tinkex_py.types.chunks import DmelChunk, EncodedTextChunk, ImageAssetPointerChunk, ImageChunk
from tinkex_py.types.datum import Datum, ModelInput
from tinkex_py.types.outputs import (
    ForwardBackwardOutput,
    GetInfoResponse,
    ModelData,
    OptimStepResponse,
    PackedTensor,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    ServerCapabilities,
    ServiceFeatures,
    SupportedModel,
    WeightsInfo,
)
from tinkex_py.types.parameters import AdamParams, LoraConfig, OptimizerParams, SamplingParams
from tinkex_py.types.parts import Encoder, Tokenizer
from tinkex_py.types.provenance import PromptProvenanceSpan, SampledProvenanceSpan
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
    "DmelChunk",
    "DownloadProgress",
    "EncodedTextChunk",
    "Encoder",
    "ExternalWeightsUrls",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "LoraConfig",
    "ModelData",
    "ModelInput",
    "OptimStepResponse",
    "OptimizerParams",
    "PackedTensor",
    "PromptAltTokens",
    "PromptProvenanceSpan",
    "QueueState",
    "SampleResponse",
    "SampledProvenanceSpan",
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
