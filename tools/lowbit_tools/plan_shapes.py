"""ModelShape: the dimensions that say what a forward pass computes, reads and sends, of any dense decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_tools.model_config import config_path, is_converted
from megatron_lowbit.checkpoint.huggingface import read_json_object
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.sharding import cut_evenly

VALUE_NBYTES = 2
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TWO_MATRICES = ("gpt_neox", "phi", "starcoder2", "nemotron")


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: attention and one feed-forward block a layer, each ending in an all-reduce of `hidden` values.

    gated: the feed-forward block has three matrices (gate, up, down), else two. tied: the embedding is the head's
    weight. Sliding windows are not looked at: prompts are taken to be shorter.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    gated: bool = True

    @property
    def sync_points(self) -> int:
        return 2 * self.layers

    def shares(self, ranks: int) -> list[RankShare]:
        """What each rank holds: heads, feed-forward features and vocabulary are dealt as the runtime deals them."""
        group = self.heads // self.kv_heads
        dealt = zip(*(cut_evenly(count, ranks) for count in (self.heads, self.ffn, self.vocab)), strict=True)
        return [
            RankShare(
                self,
                heads[1] - heads[0],
                # a key-value head whose queries are dealt to two ranks is held by both
                len({head // group for head in range(*heads)}),
                ffn[1] - ffn[0],
                vocab[1] - vocab[0],
            )
            for heads, ffn, vocab in dealt
        ]


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a model, and what it does in a forward pass of `batch` equally long sequences."""

    shape: ModelShape
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Values of all matrices of one layer."""
        attention = self.shape.hidden * self.shape.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.shape.gated else 2) * self.shape.hidden * self.ffn

    @property
    def resident_nbytes(self) -> int:
        """Bytes of all weights that the rank keeps, norms left out."""
        tables = 1 if self.shape.tied else 2
        return VALUE_NBYTES * (self.shape.layers * self.layer_weights + tables * self.vocab * self.shape.hidden)

    def flops(self, batch: int, tokens: int, start: int) -> int:
        """Operations (a multiplication and an addition are two) for `tokens` new tokens behind `start` earlier ones.

        Attention counts the pairs that causality allows; the head, each sequence's last token only.
        """
        seen = tokens * start + tokens * (tokens + 1) // 2
        attention = 4 * self.heads * self.shape.head_dim * seen
        layer = 2 * tokens * self.layer_weights + attention
        return batch * (self.shape.layers * layer + 2 * self.vocab * self.shape.hidden)

    def read_nbytes(self, batch: int, tokens: int, start: int) -> int:
        """Bytes of weights (layers and head, each once) and of the keys and values of all tokens up to the last."""
        keys_values = 2 * self.kv_heads * self.shape.head_dim * (start + tokens)
        weights = self.shape.layers * self.layer_weights + self.vocab * self.shape.hidden
        return VALUE_NBYTES * (weights + batch * self.shape.layers * keys_values)


def shape_of_config(config: ModelConfig, name: str) -> ModelShape:
    """The shape of a model that this program can run."""
    return ModelShape(
        name, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim,
        config.intermediate_size, config.vocab_size, config.tie_embeddings,
    )  # fmt: skip


def read_shape(path: Path) -> ModelShape:
    """Shape from a Hugging Face config.json of any dense family, or of a converted checkpoint.

    Raises ValueError naming the file where a dimension is missing or the model is a mixture of experts.
    """
    path = config_path(path)
    data = read_json_object(path)
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.name
    if is_converted(data):
        return shape_of_config(ModelConfig.from_json(path.read_text(), str(path)), name)
    if "hidden_size" not in data and isinstance(data.get("text_config"), dict):
        data = data["text_config"]  # the language part of a model that also sees
    for key in _EXPERTS:
        if (data.get(key) or 0) > 1:
            raise ValueError(f"{path}: {key} is {data[key]}; mixtures of experts cannot be planned, give a dense model")
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    dimensions = {key: _dimension(data, key, path) for key in wanted}
    hidden, layers, heads, ffn, vocab = dimensions.values()
    kv_heads = _dimension(data, "num_key_value_heads", path, heads)
    if heads % kv_heads:
        raise ValueError(f"{path}: {heads} query heads cannot share {kv_heads} key-value heads; correct the file")
    kind = str(data.get("model_type"))
    return ModelShape(
        name, hidden, layers, heads, kv_heads, _dimension(data, "head_dim", path, max(1, hidden // heads)), ffn, vocab,
        # left out of the file, it is what the family does: of the usual ones only Gemma ties
        tied=bool(data.get("tie_word_embeddings", kind.startswith("gemma"))),
        gated=kind not in _TWO_MATRICES,
    )  # fmt: skip


def _dimension(data: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = data.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {key} is {value!r}; expected a whole number of at least 1")
    return value
