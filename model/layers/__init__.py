"""The layers that Qwen3 is made of. Each gets its tensor-parallel place as a value and knows its slice of a weight."""

from model.layers.activation import SiluAndMul
from model.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from model.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from model.layers.norm import RMSNorm
from model.layers.rotary import RotaryEmbedding
from model.layers.shard import Part, Shard, ShardedModule

__all__ = [
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "Part",
    "QKVParallelLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "RowParallelLinear",
    "Shard",
    "ShardedModule",
    "SiluAndMul",
    "VocabParallelEmbedding",
]
